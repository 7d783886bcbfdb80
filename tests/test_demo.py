"""The demo and the command line, as a user runs them; and the texts that the demo measures on."""

import json
import os
import subprocess
import sys

import pytest

from hf_accel_patch import HfAccelError, demo, trials
from hf_accel_patch.cli import main
from hf_accel_patch.demo import Settings
from hf_accel_patch.shapes import SHAPES, empty_model
from hf_accel_patch.texts import CALIBRATION, HELD_OUT, calibration_texts, held_out_text, source_files
from hf_accel_patch.trials import BUNDLED


def command(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", "hf_accel_patch", *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)


def test_demo_measures_both_sides_and_takes_the_patch_off():
    done = command("demo", "--tokens", "8", "--windows", "4", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    stock, patched = found["stock"], found["patched"]
    assert len(stock["texts"]) == len(patched["texts"]) == len(found["prompts"]) > 0
    assert all(text.strip() for text in stock["texts"] + patched["texts"])
    assert patched["weight_bytes"] < 0.5 * stock["weight_bytes"]
    assert 5 < stock["perplexity"] < 20  # 9.8 on other held-out text: the right weights, tokenizer and windows
    assert patched["perplexity"] != stock["perplexity"]
    assert patched["perplexity"] / stock["perplexity"] < 1.05
    assert all(side[name] > 0 for side in (stock, patched) for name in ("prefill_ms", "decode_ms"))
    assert found["taken_back"] is True
    assert "quantize" in {row["pass"] for row in found["report"]["passes"] if "reason" not in row}


def test_demo_prints_texts_table_report_and_result():
    done = command("demo", "--tokens", "4", "--windows", "1", "--threads", "1", "--quantize", "int8")
    assert done.returncode == 0, done.stderr
    for words in ("stock bfloat16", "patched int8", "decode, ms", "perplexity", "taken back bit for bit: yes"):
        assert words in done.stdout


def test_plan_of_a_path():
    done = command("plan", str(BUNDLED), "--quantize", "int4", "--json")
    assert done.returncode == 0, done.stderr
    passes = {row["pass"]: row for row in json.loads(done.stdout)["passes"]}
    assert passes["quantize"]["bytes_after"] < passes["quantize"]["bytes_before"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("nonsense",), "nonsense"),
        (("demo", "--tokens", "0"), "--tokens"),
        (("demo", "--windows", "many"), "--windows"),
        (("demo", "--shape", "llama-9-9b"), "llama-9-9b"),
        (("demo", "--shape", "llama-3.2-1b", "--model", "x"), "not allowed with"),
        (("demo", "--quantize", "int3"), "int3"),
        (("plan", str(BUNDLED), "--quantize", "int3"), "int3"),
        (("plan", "/no/such/model"), "/no/such/model"),
    ],
    ids=lambda value: " ".join(value).replace(str(BUNDLED), "BUNDLED") if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert words in said.err
    assert len(said.err.splitlines()) == 1, said.err


def test_the_command_answers_with_the_exit_code():
    done = command("plan", "/no/such/model")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr


def test_a_shape_that_memory_does_not_hold_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(trials, "available_bytes", lambda device: 10**9)
    monkeypatch.setattr(demo, "random_model", lambda shape: pytest.fail("built"))
    with pytest.raises(HfAccelError, match=r"llama-3.1-8b needs 23.5 GB of memory, 1.0 GB are available"):
        demo.run(Settings(shape="llama-3.1-8b"))


def test_shapes_have_the_parameters_that_their_names_say():
    billions = {name: sum(p.numel() for p in empty_model(name).parameters()) / 1e9 for name in SHAPES}
    rounded = {name: round(size, 2) for name, size in billions.items()}
    assert rounded == {"smollm2-360m": 0.36, "qwen2.5-0.5b": 0.49, "llama-3.2-1b": 1.24, "llama-3.1-8b": 8.03}


def test_held_out_and_calibration_are_real_text_of_different_files():
    assert "class JSONDecoder" in held_out_text()
    assert len(held_out_text()) > 100_000
    texts = calibration_texts()
    assert len(texts) > 10
    assert all(text.strip() for text in texts)
    assert not set(source_files(HELD_OUT)) & set(source_files(CALIBRATION))
    assert not any(text in held_out_text() for text in texts if len(text) > 1000)
