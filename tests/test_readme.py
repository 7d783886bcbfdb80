"""What the README shows runs, and does what it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import logits, prompt

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The names that a block leaves behind. It runs in a folder of its own, beside the package."""
    (tmp_path / "hf_accel_patch").symlink_to(ROOT / "hf_accel_patch")
    monkeypatch.chdir(tmp_path)

    def execute(code: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
        return names

    return execute


def test_the_first_example(run, capsys):
    run(BLOCKS[0])
    assert "def read_lines" in capsys.readouterr().out


def test_caches(run, capsys):
    names = run(BLOCKS[1])
    assert len(capsys.readouterr().out) > 80
    assert names["prefixes"].hits == 1 and names["prefixes"].reused_tokens > 16
    assert list(names["prefixes"].folder.glob("*.safetensors"))


def test_fewer_heads(run):
    names = run(BLOCKS[2])
    assert names["again"].config.num_key_value_heads == 2
    torch.testing.assert_close(logits(names["again"], prompt()), logits(names["model"], prompt()), rtol=0, atol=1e-3)
    assert names["done"].loss_original < names["done"].loss_after < names["done"].loss_before


def test_quantized_checkpoints(run):
    names = run(BLOCKS[3])
    plain = names["load"](names["path"], quantize="int4", attention=False, linear=False)  # as `again` is: not patched
    assert torch.equal(logits(names["again"], prompt()), logits(plain, prompt()))
    assert names["stock_way"].hf_quantizer.quantization_config.scheme == "int8"


def test_there_are_no_others():
    assert len(BLOCKS) == 4
