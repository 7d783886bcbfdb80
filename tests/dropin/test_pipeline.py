"""pipeline("text-generation") with a patched model."""

import pytest
import transformers
from programs import BUNDLED, LAYERS, chat_checkpoint

from hf_accel_patch import patch, report, unpatch

PROMPTS = ["def read_lines(path):\n", "import os\n", "class Stack:\n    def __init__(self):\n        self.items = []\n"]


def text_generation(model, tokenizer):
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)


@pytest.mark.parametrize("batch_size", (1, 3))
def test_batches(stock, ours, tokenizer, at_work, batch_size):
    """Prompts of three lengths, padded on the left where they are one batch."""
    asked = dict(max_new_tokens=12, do_sample=False, batch_size=batch_size)
    expected = text_generation(stock, tokenizer)(PROMPTS, **asked)
    found = text_generation(ours, tokenizer)(PROMPTS, **asked)
    assert found == expected and len({answer[0]["generated_text"] for answer in found}) == 3
    at_work(ours, calls=LAYERS * 12)


def test_chats(stock, ours, tmp_path, at_work):
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_checkpoint(tmp_path / "model"))
    chat = [
        {"role": "user", "content": "a function that reads a file"},
        {"role": "assistant", "content": "def read(path):\n    return open(path).read()"},
        {"role": "user", "content": "now one that writes it"},
    ]
    asked = dict(max_new_tokens=16, do_sample=False)
    expected = text_generation(stock, tokenizer)(chat, **asked)[0]["generated_text"]
    found = text_generation(ours, tokenizer)(chat, **asked)[0]["generated_text"]
    assert found == expected and found[:3] == chat and found[3]["role"] == "assistant" and found[3]["content"]
    at_work(ours, calls=LAYERS * 16)


def test_streams(stock, ours, tokenizer, at_work, capsys):
    texts = []
    for model in (stock, ours):
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
        done = text_generation(model, tokenizer)(
            PROMPTS[0], max_new_tokens=12, do_sample=False, streamer=streamer, return_full_text=False
        )
        texts.append((capsys.readouterr().out.rstrip("\n"), done[0]["generated_text"]))
    assert texts[0] == texts[1] and texts[1][0].strip()
    assert texts[1][0] == texts[1][1].rstrip("\n")
    at_work(ours, calls=LAYERS * 12)


def test_a_pipeline_from_a_path_and_int4(tokenizer, at_work):
    pipe = patch(transformers.pipeline("text-generation", model=str(BUNDLED)), quantize="int4")
    assert pipe(PROMPTS[0], max_new_tokens=8, do_sample=False)[0]["generated_text"].startswith(PROMPTS[0])
    at_work(pipe, "quantize", calls=LAYERS * 8)
    unpatch(pipe, reload=True)
    assert not report(pipe).to_dict()["patched"]
