"""The README's table, made from the rows in benchmarks/results.

`python -m benchmarks.table` prints it; `python -m benchmarks.table --write README.md` puts it into that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark-table -->", "<!-- /benchmark-table -->"
NAMES = {
    "stock": "transformers",
    "exact": "**`patch(model)`**",
    "int8": '**`patch(model, quantize="int8")`**',
    "int4": '**`patch(model, quantize="int4")`**',
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
Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """One table per shape, setting and machine, with the latest row of each system, under a line that names them."""
    groups: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["run"])):
        same = [row["shape"], row["hardware"], *(row[name] for name in SETTINGS)]
        groups.setdefault(json.dumps(same), {})[row["system"]] = row
    stocks = {(row["run"], row["shape"]): row for row in rows if row["system"] == "stock" and "reason" not in row}
    return "\n\n".join(_table(list(group.values()), stocks) for group in groups.values())


def ratio(stock: Row | None, row: Row, name: str) -> float | None:
    """How many times faster than stock: the median of the ratios of the rounds that both ran."""
    if stock is None:
        return None
    pairs = list(zip(stock[name], row[name], strict=False))
    return median(before / after for before, after in pairs) if pairs else None


def _table(rows: list[Row], stocks: dict[tuple[str, str], Row]) -> str:
    lines = [_caption(rows), "", _line(*COLUMNS), _line("---", *(["---:"] * (len(COLUMNS) - 1)))]
    lines += [_cells(row, stocks.get((row["run"], row["shape"]))) for row in rows if row.get("decode_ms")]
    failed = [f"{_name(row)}: {row.get('reason', 'no turn in time')}" for row in rows if not row.get("decode_ms")]
    if failed:
        lines += ["", "Not measured:", "", *(f"* {text}" for text in failed)]
    return "\n".join(lines)


def _caption(rows: list[Row]) -> str:
    row = rows[0]
    hardware, versions = row["hardware"], row["versions"]
    machine = hardware.get("gpu") or f"{row['threads']} threads of {hardware['cpu']} ({hardware['cpu_capability']})"
    bandwidth = median(row["bandwidth_bytes_per_s"] for row in rows) / 1e9
    days = sorted({str(row["run"])[:10] for row in rows})
    commits = sorted({str(row["commit"]) for row in rows})
    prompts = f"{row['batch']} prompts" if row["batch"] > 1 else "a prompt"
    parts = (
        f"**{row['shape']}**" + (f" cut to {row['layers']} layers" if row["layers"] else ""),
        row["dtype"],
        f"{prompts} of {row['prompt']} tokens" + (", padded on the left" if row["padded"] else ""),
        f"{row['tokens']} new tokens",
        f"{machine}, reading {bandwidth:.0f} GB/s",
        f"torch {versions['torch']}, transformers {versions['transformers']}",
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, commit {', '.join(commits)}",
    )
    return "; ".join(parts) + "."


def _cells(row: Row, stock: Row | None) -> str:
    decode_ms, prefill_ms = median(row["decode_ms"]), median(row["prefill_ms"])
    share = row["read_bytes"] / row["bandwidth_bytes_per_s"] / (decode_ms / 1000)
    return _line(
        _name(row),
        f"{decode_ms:.1f}",
        _number(ratio(stock, row, "decode_ms"), "{:.2f}"),
        f"{prefill_ms:.0f}",
        _number(ratio(stock, row, "prefill_ms"), "{:.2f}"),
        f"{row['weight_bytes'] / 1e9:.2f}",
        _number(row["load_peak_bytes"], "{:.2f}", 1e9),
        _number(row["run_peak_bytes"], "{:.2f}", 1e9),
        f"{share:.0%}",
    )


def _name(row: Row) -> str:
    name: str = row["system"]
    return NAMES.get(name, name)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", type=Path, help="files of rows (default: benchmarks/results/*.jsonl)")
    parser.add_argument("--write", type=Path, help=f"replace what stands between {BEGIN} and {END} in this file")
    options = parser.parse_args()
    files = options.rows or sorted(RESULTS.glob("*.jsonl"))
    text = markdown([json.loads(line) for file in files for line in file.read_text().splitlines()])
    if options.write is None:
        print(text)
        return
    page = options.write.read_text()
    if BEGIN not in page or END not in page:
        sys.exit(f"{options.write} has no place for the table: put {BEGIN} and {END} where it belongs")
    before, _, rest = page.partition(BEGIN)
    options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
