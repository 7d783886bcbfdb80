"""`transformers serve`, a program that never heard of the package, answers over HTTP with a patched model."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from programs import chat_checkpoint, environment
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")

MESSAGES = [{"role": "user", "content": "a function that reads the lines of a file"}]
TOKENS = 16
SERVE = ("-m", "hf_accel_patch", "run", "-m", "transformers.cli.transformers", "serve")
START_SECONDS = 180


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("serve") / "model")


@contextmanager
def serving(checkpoint: Path, log: Path, *options: str, **variables: str) -> Iterator[str]:
    """The address of a server of this checkpoint, as soon as it is up, until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *SERVE, str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--log-level", "info", *options]
    with log.open("w") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, env=environment(**said(variables)))
    try:
        address, start = f"http://127.0.0.1:{port}", time.monotonic()
        while not up(address):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() - start < START_SECONDS, log.read_text()[-3000:]
            time.sleep(0.25)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def said(variables: dict[str, str]) -> dict[str, str]:
    """With the threads of this process, so that outputs are those of one split of the work."""
    return {"OMP_NUM_THREADS": str(torch.get_num_threads()), "NO_PROXY": "127.0.0.1"} | variables


def up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return json.load(answer)["status"] == "ok"
    except (urllib.error.URLError, OSError):
        return False


def ask(address: str, path: str = "/v1/chat/completions", **body: object) -> str:
    """The body of the answer to a request for greedy tokens."""
    asked = {"max_tokens": TOKENS, "temperature": 0.0} | body
    request = urllib.request.Request(address + path, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error.code}: {error.read().decode()}")


def streamed(text: str) -> list[dict]:
    """The chunks of a stream of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def expected(checkpoint: Path) -> tuple[str, int]:
    """What stock answers, and the tokens of its prompt."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model, length = AutoModelForCausalLM.from_pretrained(checkpoint), inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, length:]
    return tokenizer.decode(tokens, skip_special_tokens=True), length


def test_chat_completions(checkpoint, tmp_path):
    """Exact passes: the tokens of stock, whole and streamed."""
    log = tmp_path / "log.txt"
    text, length = expected(checkpoint)
    with serving(checkpoint, log) as address:
        whole = json.loads(ask(address, messages=MESSAGES))
        chunks = streamed(ask(address, messages=MESSAGES, stream=True))
        completion = json.loads(ask(address, "/v1/completions", prompt="import os\n"))
    choice = whole["choices"][0]
    assert choice["message"] == {"content": text, "role": "assistant"} | choice["message"]
    assert choice["message"]["content"] == text and choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == TOKENS and whole["usage"]["prompt_tokens"] == length
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(pieces) == text and len([piece for piece in pieces if piece]) > 2
    assert completion["choices"][0]["text"]
    written = log.read_text()
    assert "LlamaForCausalLM: attention" in written and "LlamaForCausalLM: cache" in written, written[-3000:]
    assert "LlamaForCausalLM: quantize" not in written or "not asked for" in written


@pytest.mark.slow
def test_int4(checkpoint, tmp_path):
    log = tmp_path / "log.txt"
    with serving(checkpoint, log, HF_ACCEL_QUANTIZE="int4") as address:
        whole = json.loads(ask(address, messages=MESSAGES))
    assert whole["usage"]["completion_tokens"] == TOKENS and whole["choices"][0]["message"]["content"].strip()
    line = next(line for line in log.read_text().splitlines() if "LlamaForCausalLM: quantize" in line)
    assert "int4" in line, line
