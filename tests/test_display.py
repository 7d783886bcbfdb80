"""Plans and reports as lines, in a terminal, in a notebook, as JSON."""

import io
import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import hf_accel_patch
from hf_accel_patch import patch, plan, report
from hf_accel_patch.comparison import Comparison
from hf_accel_patch.display import Column, Tabular
from hf_accel_patch.options import from_text
from hf_accel_patch.report import Report

MODEL = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"

ROWS = (
    {"pass": "quantize", "exact": False, "bytes_before": 2_000_000, "bytes_after": 500_000, "scheme": "int4"},
    {"pass": "cache", "exact": True, "bytes_before": 7, "bytes_after": 7, "layers": [1, 2, 3, 4], "none": []},
    {"pass": "linear", "exact": True, "bytes_before": 7, "bytes_after": 7, "reason": "its <b>[bold]</b> are quantized"},
)
REPORT = Report("Llama[x]<y>", ROWS, "half")


def test_lines():
    assert list(REPORT.lines()) == [
        "quantize: on, changed, 2.00 MB -> 500.00 kB, scheme int4",
        "cache: on, exact, same, 4 layers",
        "linear: skipped, its <b>[bold]</b> are quantized",
    ]


def test_text_of_a_file_has_a_line_per_pass():
    title, head, *lines, last = str(REPORT).splitlines()
    assert (title, last) == ("Llama[x]<y>", "incomplete: half")
    assert head.split() == ["pass", "state", "output", "bytes"]
    assert [line.split()[0] for line in lines] == ["quantize", "cache", "linear"]
    assert len({line.index(word) for line, word in zip(lines, ("on ", "on ", "skipped"), strict=True)}) == 1


def test_text_of_a_terminal_fits_it(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    row = ROWS[0] | {"said": "words " * 40}
    text = str(Report("Llama", (row,)))
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("words") == 40 and "quantize" in text and "\x1b" not in text


def test_rich_takes_no_text_for_markup():
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(REPORT)
    text = console.export_text()
    assert "[bold]" in text and "Llama[x]<y>" in text and "incomplete: half" in text


def test_html_is_escaped():
    html = REPORT._repr_html_()
    assert "<b>[bold]" not in html and "&lt;b&gt;[bold]" in html and "Llama[x]&lt;y&gt;" in html
    assert html.count("<tr>") == 4 and html.count("<td>") == 15


def test_json_is_the_dictionary():
    assert json.loads(REPORT.to_json()) == REPORT.to_dict() | {"passes": [dict(row) for row in ROWS]}


class Sizes(Tabular):
    title, notes = "sizes", ("a <note>",)
    columns = (Column("name", wraps=True), Column("bytes", figures=True), Column("fits", wraps=True))

    def cells(self):
        return [("weights", "7", "yes"), ("a cache of [many] words " * 3, "12345", "no")]

    def faded(self, row):
        return row[-1] == "no"


class Losses(Comparison):
    title, sides = "losses", ("before", "after")

    def cells(self):
        return [("validation", "12.5", "1.25"), ("training", "nan", "1.00")]

    def to_dict(self):
        return {"before": [12.5, math.nan], "after": (1.25, math.inf)}


def test_figures_stand_to_the_right():
    assert str(Losses()).splitlines() == [
        "losses",
        "            before  after",
        "validation    12.5   1.25",
        "training       nan   1.00",
    ]
    _, head, first, second, note = str(Sizes()).splitlines()
    assert head.index("fits") == first.index("yes") == second.index("no", second.index("12345"))
    assert first.index("7") == second.index("5", second.index("1")) and note == "a <note>"


def test_a_terminal_wraps_words_and_keeps_sides_together(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    lines = str(Sizes()).splitlines()
    assert max(map(len, lines)) <= 30 and "12345" in "".join(lines) and "".join(lines).count("[many]") == 3
    monkeypatch.setenv("COLUMNS", "12")
    assert "validation    12.5   1.25" in str(Losses()).splitlines()


def test_tables_in_a_notebook_and_in_json():
    html = Sizes()._repr_html_()
    assert html.count("<tr>") == 3 and html.count("<th>") == 3 and html.count("<td>") == 6 and "a &lt;note&gt;" in html
    assert json.loads(Losses().to_json()) == {"before": [12.5, None], "after": [1.25, None]}
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    console.print(Sizes())
    dim, plain = ([line for line in console.file.getvalue().splitlines() if word in line] for word in ("no ", "yes"))
    assert dim and all("\x1b[2m" in line for line in dim) and plain and not any("\x1b[2m" in line for line in plain)


def test_a_plan_and_a_report_of_a_model():
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    planned = plan(model)
    assert [row["pass"] for row in planned.to_dict()["passes"]] == [line.partition(":")[0] for line in planned.lines()]
    text = io.StringIO()
    Console(file=text, width=200).print(planned)
    for shown in (planned.text(), text.getvalue(), planned._repr_html_()):
        assert "attention" in shown and "int8 weights and int8 cache" in shown, "both tables"
    assert "not patched" in report(model)._repr_html_() and "<table>" not in report(model)._repr_html_()
    patch(model)
    assert "<td>attention</td><td>on</td>" in report(model)._repr_html_()


def test_one_line_of_log_per_pass(logged):
    said = logged(logging.INFO)
    model = patch(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16), quantize="int8")
    lines = [message for name, message in said if name.endswith(".api")]
    assert [line.split(": ")[1] for line in lines] == [row["pass"] for row in report(model).to_dict()["passes"]]
    assert any("quantize" in line and "int8" in line for line in lines)


@pytest.mark.parametrize(
    ("keyword", "text", "value"),
    [
        ("attention", "0", False),
        ("attention", "No", False),
        ("linear", "on", True),
        ("cache", "TRUE", True),
        ("cache", "sinks:256", "sinks:256"),
        ("gqa", "1", 1),
        ("gqa", " 2 ", 2),
        ("context", "16384", 16384),
        ("quantize", "int4", "int4"),
        ("quantize", "off", False),
    ],
)
def test_values_spelled_as_text(keyword, text, value):
    found = from_text(keyword, text)
    assert found == value and type(found) is type(value)


def test_a_text_that_is_no_number():
    with pytest.raises(ValueError, match="gqa='two'; allowed: a whole number"):
        from_text("gqa", "two")
