"""The tables of the README and of docs/, made from the rows in benchmarks/results: of `benchmarks.decode`,
`benchmarks.quantize`, `benchmarks.attention`, `benchmarks.kvcache`, `benchmarks.speculative`, `benchmarks.gqa`,
`benchmarks.long_context`, `benchmarks.exactness`, `benchmarks.planner`, `benchmarks.startup` and
`benchmarks.compatibility`.

`python -m benchmarks.table` prints them; `python -m benchmarks.table --write README.md docs` puts each into the pages
that have a place for it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.baselines import FORMATS

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "stock": "transformers",
    "exact": "**`patch(model)`**",
    "int8": '**`patch(model, quantize="int8")`**',
    "int4": '**`patch(model, quantize="int4")`**',
    "nf4": '**`patch(model, quantize="nf4")`**',
    "llm.int8": '**`patch(model, quantize="llm.int8")`**',
    "int4-calibrated": '**`patch(model, quantize=Quantize("int4", calibrate=texts))`**',
    "eager": "**`patch(model, cache=KVCache(graphs=False))`**",
    "int8-eager": '**`patch(model, quantize="int8", cache=KVCache(graphs=False))`**',
    "int4-eager": '**`patch(model, quantize="int4", cache=KVCache(graphs=False))`**',
}
COLUMNS = (
    "system",
    "decode, ms per token",
    "x stock",
    "prefill, ms",
    "x stock",
    "weights, GB",
    "peak of loading, GB",
    "peak of running, GB",
    "of the bandwidth",
)
SETTINGS = ("dtype", "layers", "batch", "prompt", "tokens", "padded", "device", "threads")
QUALITY = ("perplexity", "x stock", "bits per weight", "converted in, s")
SPEED = ("weights, GB", "converted in, s", "decode, ms per token", "x stock", "prefill, ms", "x stock")
Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """One table per shape, setting and machine, with the latest row of each system, under a line that names them."""
    groups: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["run"])):
        same = [row["shape"], row["hardware"], row.get("busy", 0), *(row[name] for name in SETTINGS)]
        groups.setdefault(json.dumps(same), {})[row["system"]] = row
    stocks = {(row["run"], row["shape"]): row for row in rows if row["system"] == "stock" and "reason" not in row}
    return "\n\n".join(_table(list(group.values()), stocks) for group in groups.values())


def ratio(stock: Row | None, row: Row, name: str) -> float | None:
    """How many times faster than stock: the median of the ratios of the rounds that both ran."""
    if stock is None:
        return None
    pairs = list(zip(stock[name], row[name], strict=False))
    return median(before / after for before, after in pairs) if pairs else None


def quantize_markdown(rows: list[Row]) -> str:
    """One table for the bundled model and one per shape, setting and machine, each with the latest row of a system."""
    groups: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["run"])):
        settings = ("windows", "dtype", "device") if row["part"] == "perplexity" else (*SETTINGS, "batched")
        same = [row["part"], row["shape"], row["hardware"], *(row[name] for name in settings)]
        groups.setdefault(json.dumps(same), {})[row["system"]] = row
    stocks = {(row["run"], row["shape"]): row for row in rows if row["system"] == "stock" and "reason" not in row}
    tables = []
    for group in groups.values():
        kind = _quality if next(iter(group.values()))["part"] == "perplexity" else _speed
        tables.append(kind(group, stocks))
    return "\n\n".join(tables)


def loss(stock: Row | None, row: Row) -> tuple[float, float] | None:
    """Perplexity over stock's, and its standard error: from differences of the cross-entropy, window by window."""
    if stock is None or len(row["nats"]) < 2:
        return None
    differences = [after - before for before, after in zip(stock["nats"], row["nats"], strict=True)]
    ratio = math.exp(mean(differences))
    return ratio, ratio * stdev(differences) / math.sqrt(len(differences))


def _table(rows: list[Row], stocks: dict[tuple[str, str], Row]) -> str:
    lines = [_caption(rows), "", line(*COLUMNS), line("---", *(["---:"] * (len(COLUMNS) - 1)))]
    lines += [_cells(row, stocks.get((row["run"], row["shape"]))) for row in rows if row.get("decode_ms")]
    failed = [f"{_name(row)}: {row.get('reason', 'no turn in time')}" for row in rows if not row.get("decode_ms")]
    if failed:
        lines += ["", "Not measured:", "", *(f"* {text}" for text in failed)]
    return "\n".join(lines)


def _caption(rows: list[Row]) -> str:
    row = rows[0]
    hardware = row["hardware"]
    machine = hardware.get("gpu") or f"{row['threads']} threads of {hardware['cpu']} ({hardware['cpu_capability']})"
    bandwidth = median(row["bandwidth_bytes_per_s"] for row in rows) / 1e9
    busy = row.get("busy", 0)
    prompts = f"{row['batch']} prompts" if row["batch"] > 1 else "a prompt"
    parts = (
        f"**{row['shape']}**" + (f" cut to {row['layers']} layers" if row["layers"] else ""),
        row["dtype"],
        f"{prompts} of {row['prompt']} tokens" + (", padded on the left" if row["padded"] else ""),
        f"{row['tokens']} new tokens" + (f", other processes that compute meanwhile: {busy}" if busy else ""),
        f"{machine}, reading {bandwidth:.0f} GB/s",
        origin(rows),
    )
    return "; ".join(parts) + "."


def _quality(group: dict[str, Row], stocks: dict[tuple[str, str], Row]) -> str:
    first, rows = next(iter(group.values())), [row for row in group.values() if "reason" not in row]
    python = first["versions"]["python"]
    caption = f"**{first['shape']}**, trained weights; {first['dtype']}; {first['windows']} windows of held-out text, "
    caption += f"from Python {python}; {origin(list(group.values()))}."
    lines = [caption, "", line("system", *QUALITY), line("---", *(["---:"] * len(QUALITY)))]
    for row in rows:
        found = loss(stocks.get((row["run"], row["shape"])), row)
        cells = (
            f"{math.exp(mean(row['nats'])):.3f}",
            "{:.4f} ± {:.4f}".format(*found) if found else "",
            f"{8 * row['weight_bytes'] / row['parameters']:.2f}",
            f"{row['load_s']:.1f}",
        )
        lines.append(line(_name(row), *cells))
    return "\n".join(lines + _remarks(group))


def _speed(group: dict[str, Row], stocks: dict[tuple[str, str], Row]) -> str:
    first, rows = next(iter(group.values())), [row for row in group.values() if row.get("decode_ms")]
    batched, columns = first["batched"], SPEED
    if batched:
        columns = (*SPEED, f"decode of {batched['batch']}, ms per step", "x stock")
    lines = [_caption(list(group.values())), "", line("system", *columns), line("---", *(["---:"] * len(columns)))]
    for row in rows:
        stock = stocks.get((row["run"], row["shape"]))
        cells = [f"{row['weight_bytes'] / 1e9:.2f}", f"{row['load_s']:.1f}"]
        for name, form in (("decode_ms", "{:.1f}"), ("prefill_ms", "{:.0f}"), ("batched_decode_ms", "{:.1f}")):
            if name in row:
                cells += [form.format(median(row[name])), number(ratio(stock, row, name), "{:.2f}")]
        lines.append(line(_name(row), *cells, *([""] * (len(columns) - len(cells)))))
    return "\n".join(lines + _remarks(group))


def _remarks(group: dict[str, Row]) -> list[str]:
    """Lines under a table: what a reader must know of its numbers, and what is not in it, with the reason."""
    notes = [f"{_name(row)}: {row['note']}" for row in group.values() if row.get("note")]
    refused = [row for row in group.values() if row.get("batched_refused")]
    notes += [f"{_name(row)}, {row['batched']['batch']} at once: {row['batched_refused']}" for row in refused]
    speed = any("decode_ms" in row for row in group.values())
    for system, same in FORMATS.items():
        if speed and same in group:
            notes.append(f"{_name({'system': system})}: the format of {_name(group[same])}, so its bytes and times")
    failed = [
        f"{_name(row)}: {row.get('reason', 'no turn in time')}"
        for row in group.values()
        if not (row.get("decode_ms") or row.get("nats"))
    ]
    lines = ["", *(f"* {text}" for text in notes)] if notes else []
    return lines + (["", "Not measured:", "", *(f"* {text}" for text in failed)] if failed else [])


def origin(rows: list[Row]) -> str:
    """The versions, the day and the commit of these rows."""
    versions = rows[0]["versions"]
    days = sorted({str(row["run"])[:10] for row in rows})
    commits = sorted({str(row["commit"]) for row in rows})
    return (
        f"torch {versions['torch']}, transformers {versions['transformers']}; "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, commit {', '.join(commits)}"
    )


def _cells(row: Row, stock: Row | None) -> str:
    decode_ms, prefill_ms = median(row["decode_ms"]), median(row["prefill_ms"])
    share = row["read_bytes"] / row["bandwidth_bytes_per_s"] / (decode_ms / 1000)
    return line(
        _name(row),
        f"{decode_ms:.1f}",
        number(ratio(stock, row, "decode_ms"), "{:.2f}"),
        f"{prefill_ms:.0f}",
        number(ratio(stock, row, "prefill_ms"), "{:.2f}"),
        f"{row['weight_bytes'] / 1e9:.2f}",
        number(row["load_peak_bytes"], "{:.2f}", 1e9),
        number(row["run_peak_bytes"], "{:.2f}", 1e9),
        f"{share:.0%}",
    )


def _name(row: Row) -> str:
    name: str = row["system"]
    return NAMES.get(name, name)


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def tables(rows: list[Row]) -> dict[str, str]:
    """Every table by the name of its place."""
    from benchmarks.attention_table import attention_markdown
    from benchmarks.cache_table import cache_markdown  # which are made with what stands above
    from benchmarks.compatibility import compatibility_markdown
    from benchmarks.gpu_table import gpu_markdown
    from benchmarks.gqa_table import heads_markdown
    from benchmarks.planner_table import MEASURED_PLANS, estimates_markdown, planner_markdown
    from benchmarks.positions_table import exactness_markdown, positions_markdown
    from benchmarks.speculative_table import speculative_markdown
    from benchmarks.startup_table import startup_markdown
    from benchmarks.summary_table import summary_markdown

    on_gpus = [row for row in rows if row.get("hardware", {}).get("gpu")]
    rows = [row for row in rows if row not in on_gpus]
    return {
        "gpu-table": gpu_markdown(on_gpus),
        "benchmark-table": markdown([row for row in rows if "part" not in row]),
        "quantize-table": quantize_markdown([row for row in rows if row.get("part") in ("perplexity", "speed")]),
        "attention-table": attention_markdown([row for row in rows if str(row.get("part")).startswith("attention-")]),
        "kvcache-table": cache_markdown([row for row in rows if str(row.get("part")).startswith("cache-")]),
        "speculative-table": speculative_markdown(
            [row for row in rows if str(row.get("part")).startswith("speculative-")]
        ),
        "gqa-table": heads_markdown([row for row in rows if str(row.get("part")).startswith("gqa-")]),
        "positions-table": positions_markdown(
            [row for row in rows if str(row.get("part")).startswith("long-context-")]
        ),
        "exactness-table": exactness_markdown([row for row in rows if row.get("part") == "exactness"]),
        "planner-table": planner_markdown([row for row in rows if str(row.get("part")).startswith("planner-")]),
        "estimates-table": estimates_markdown([row for row in rows if row.get("part") in MEASURED_PLANS]),
        "startup-table": startup_markdown([row for row in rows if str(row.get("part")).startswith("startup-")]),
        "summary-table": summary_markdown(rows),
        "compatibility-table": compatibility_markdown([row for row in rows if row.get("part") == "compatibility"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", type=Path, help="files of rows (default: benchmarks/results/*.jsonl)")
    parser.add_argument(
        "--write",
        nargs="+",
        type=Path,
        metavar="PATH",
        help=f"pages, or folders of pages, in which to replace what stands between {' and '.join(_place('NAME'))}",
    )
    options = parser.parse_args()
    files = options.rows or sorted(RESULTS.glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    made = tables(rows)
    if options.write is None:
        print("\n\n".join(filter(None, made.values())))
        return
    written: set[str] = set()
    for path in options.write:
        for page in sorted(path.glob("*.md")) if path.is_dir() else [path]:
            written |= write(page, made)
    if not written:
        names = ", ".join(map(str, options.write))
        sys.exit(f"{names}: no place for a table: put {' and '.join(_place('benchmark-table'))} there")
    for name in sorted(name for name, text in made.items() if text and name not in written):
        print(f"no page has a place for the {name}: put {' and '.join(_place(name))} there", file=sys.stderr)


def write(page: Path, made: dict[str, str]) -> set[str]:
    """Put tables into the places that a page has for them; returns the names of those."""
    content, written = page.read_text(), set()
    for name, text in made.items():
        begin, end = _place(name)
        if text and begin in content and end in content:
            before, _, rest = content.partition(begin)
            content = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
            written.add(name)
    if written:
        page.write_text(content)
    return written


def _place(name: str) -> tuple[str, str]:
    """The lines that begin and end the place of a table in a page."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


if __name__ == "__main__":
    main()
