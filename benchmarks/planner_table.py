"""The tables of `benchmarks.planner`, made from its rows."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.table import Row, line, origin

SIZES = ("weights", "cache", "activations", "peak")
MEASURED = ("weights", "cache", "peak")
WAYS = {
    "stock": "transformers",
    "exact": "`patch(model)`",
    "int8": '`quantize="int8"`',
    "cache": '`quantize="int4", cache="int8"`',
}
PIECES = {
    "exact": "in pieces: `patch(model)`",
    "stock's cache": "in pieces: `cache=False`",
    "int4": 'in pieces: `quantize="int4"`',
    "int8 cache": 'in pieces: `cache="int8"`',
    "int4, int4 cache": 'in pieces: `quantize="int4", cache="int4"`',
}
MEASURED_PLANS = ("planner-measured", "planner-pieces")
EXACT = "as asked"  # which is `patch(model)` here


def planner_markdown(rows: list[Row]) -> str:
    """What OctoCoder would take by scheme, and what each budget decides."""
    rows = _latest(rows)
    schemes = [row for row in rows if row["part"] == "planner-octocoder"]
    budgets = [row for row in rows if row["part"] == "planner-budget"]
    if not schemes:
        return ""
    caption = f"One sequence of {schemes[0]['context']} tokens, in GB; {origin(schemes)}."
    lines = [caption, "", *_head("", *SIZES)]
    for row in schemes:
        name = "exact" if row["scheme"] == EXACT else row["scheme"]
        lines.append(line(name, *(f"{row[size] / 1e9:.2f}" for size in SIZES)))
    lines += _decided("What a budget takes:", budgets)
    llama = [row for row in rows if row["part"] == "planner-llama"]
    lines += _decided("For a Llama of 8 billion weights in bfloat16, and one sequence of 16384 tokens:", llama)
    return "\n".join(lines)


def _decided(caption: str, rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["", caption, "", line("budget", "taken", "tried before, and what it needs"), line("---", "---", "---")]
    for row in rows:
        if "error" in row:
            lines.append(line(row["asked"], "`HfAccelError`", row["error"].partition(": ")[2]))
        else:
            lines.append(line(row["asked"], row["chosen"], row["why"]))
    return lines


def estimates_markdown(rows: list[Row]) -> str:
    """How far plans are from measured bytes at most, over the families of models."""
    rows = _latest(rows)
    if not rows:
        return ""
    families = list(dict.fromkeys(row["family"] for row in rows))
    caption = f"The largest differences over {len(families)} families ({', '.join(families)}); {origin(rows)}."
    lines = [caption, "", *_head("", *MEASURED)]
    for way, name in WAYS.items():
        found = [row for row in rows if row["way"] == way and row.get("part") != "planner-pieces"]
        if found:
            lines.append(line(name, *(f"{difference(found, size):.1%}" for size in MEASURED)))
    for way, name in PIECES.items():  # of stock's cache, windows are a slice of more until the next token
        found = [row for row in rows if row["way"] == way and row.get("part") == "planner-pieces"]
        if found:
            cells = (f"{difference(found, size):.1%}" if size != "cache" else "" for size in MEASURED)
            lines.append(line(name, *cells))
    return "\n".join(lines)


def difference(rows: Iterable[Row], size: str) -> float:
    """The largest one between what was said and what was measured, over the latter."""
    return max(abs(row["said"][size] / row["measured"][size] - 1) for row in rows)


def _latest(rows: list[Row]) -> list[Row]:
    """Those of the last run."""
    last = max((str(row["run"]) for row in rows), default="")
    return [row for row in rows if row["run"] == last]


def _head(*columns: str) -> list[str]:
    return [line(*columns), line("---", *(["---:"] * (len(columns) - 1)))]
