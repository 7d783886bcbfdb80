"""The tables of what was measured on a GPU: tokens, steps replayed as CUDA graphs, attention of long prompts."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from benchmarks.table import line, markdown, number, origin

Row = dict[str, Any]
STEPS = ("tokens of a pass", "ordinary, ms", "replayed, ms", "times as fast", "recorded once in, ms")
KERNELS = ("attention", "PyTorch, ms", "TFLOP/s", "Triton, ms", "TFLOP/s", "times as fast as PyTorch")


def gpu_markdown(rows: list[Row]) -> str:
    """Rows of GPUs only. A group is what was measured alike, on one machine."""
    tables = [markdown([row for row in rows if "part" not in row and row.get("decode_ms")])]
    for part, table in (("graphs", _steps), ("attention-kernels", _kernels)):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.get("part") == part and "reason" not in row:
                same = [row["hardware"], row.get("shape"), *(row.get(name) for name in ("batch", "prompt", "length"))]
                groups.setdefault(json.dumps(same), []).append(row)
        tables += map(table, groups.values())
    return "\n\n".join(filter(None, tables))


def _steps(rows: list[Row]) -> str:
    first = rows[0]
    caption = (
        f"**{first['shape']}**, a pass after {first['prompt']} tokens, as CUDA graphs replay it; {first['dtype']}; "
    )
    lines = [f"{caption}{first['hardware']['gpu']}; {origin(rows)}.", "", line(*STEPS)]
    lines.append(line("---:", *(["---:"] * (len(STEPS) - 1))))
    for row in rows:
        plain, replayed = median(row["plain_ms"]), median(row["replayed_ms"])
        cells = f"{plain:.1f}", f"{replayed:.2f}", f"{plain / replayed:.2f}", f"{row['record_ms']:.0f}"
        lines.append(line(str(row["width"]), *cells))
    return "\n".join(lines)


def _kernels(rows: list[Row]) -> str:
    first = rows[0]
    caption = f"**A prompt of {first['length']} tokens**, {first['heads']} heads of {first['head_size']} for "
    caption += f"{first['shared']} of keys and values; {first['dtype']}; {first['hardware']['gpu']}; {origin(rows)}."
    lines = [caption, "", line(*KERNELS), line("---", *(["---:"] * (len(KERNELS) - 1)))]
    kinds: dict[str, dict[str, Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], {})[row["backend"]] = row
    for kind, by in kinds.items():
        cells = [text for name in ("torch", "triton") for text in _timed(by.get(name))]
        both = by["torch"]["ms"] / by["triton"]["ms"] if {"torch", "triton"} <= by.keys() else None
        lines.append(line(kind, *cells, number(both, "{:.2f}")))
    return "\n".join(lines)


def _timed(row: Row | None) -> tuple[str, str]:
    return ("", "") if row is None else (f"{row['ms']:.2f}", f"{row['tflops']:.0f}")
