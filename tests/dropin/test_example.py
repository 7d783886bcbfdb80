"""The article's own code, in examples/, runs from its first to its last cell."""

import re

import pytest
from programs import ROOT, program

SCRIPT = ROOT / "examples" / "getting_the_most_out_of_llms.py"


@pytest.fixture(scope="module")
def said():
    done = program(SCRIPT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_each_step_of_the_article_is_taken(said):
    for words in (
        "load_in_8bit=True: ",  # and why it is gone
        "int8, weights of",
        "int4, weights of",
        "has to_bettertransformer: False",
        "shape of input_ids torch.Size([1, 1])",
        "length of key-value cache",
        "7864320000 values, 15.7 GB; with one head for all, as it has, 328 MB",
    ):
        assert words in said, words
    assert "40 heads: 0.08 GB" in said and "40 heads: 20.48 GB" in said and "40 heads: 800.00 GB" in said


def test_what_is_measured_is_in_order(said):
    """Fewer bits are fewer bytes, and attention without scores of N x N takes less memory than with them, where the
    system measures it."""
    weights = [float(size) for size in re.findall(r"weights of (\d\.\d+) GB", said)]
    assert len(weights) == 3 and weights == sorted(weights, reverse=True)
    peaks = {name: float(size) for name, size in re.findall(r"^(eager|sdpa|patched): .* peak (\d\.\d+) GB", said, re.M)}
    assert not peaks or peaks["eager"] > 1.5 * peaks["patched"]


def test_it_is_a_notebook_too():
    """Cells of code and of text take turns, and every cell of code compiles by itself."""
    cells = re.split(r"^# %%", SCRIPT.read_text(), flags=re.M)[1:]
    code = [cell for cell in cells if not cell.startswith(" [markdown]")]
    assert len(code) > 15 and len(cells) - len(code) > 12
    for cell in code:
        compile(cell, str(SCRIPT), "exec")
