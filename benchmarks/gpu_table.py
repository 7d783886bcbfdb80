"""The tables of what was measured on a GPU: tokens, steps replayed as CUDA graphs, attention of long prompts,
linear layers."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from benchmarks.cache_table import cache_markdown
from benchmarks.table import line, markdown, number, origin

Row = dict[str, Any]
STEPS = ("tokens of a pass", "ordinary, ms", "replayed, ms", "times as fast", "recorded once in, ms")
LINEAR = ("rows", "weights", "ms", "x bf16", "read, GB", "GB/s", "of the bandwidth")
FORMATS = {
    "int8": "**int8**",
    "int4": "**int4, groups of 64**",
    "nf4": "**nf4, groups of 64**",
    "tinygemm-int4": "int4, groups of 64, by PyTorch",
    "bitsandbytes-nf4": "nf4, by bitsandbytes",
    "int8-together": "**int8**, weights of one input together",
    "int4-together": "**int4**, weights of one input together",
    "nf4-together": "**nf4**, weights of one input together",
}
KERNELS = ("attention", "PyTorch, ms", "TFLOP/s", "Triton, ms", "TFLOP/s", "times as fast as PyTorch")

DECODES = ("cached tokens", "keys and values", "us", "GB/s", "of the bandwidth")
CACHED = {
    "torch": "16 bits, PyTorch's flash attention",
    "torch-rows": "16 bits, PyTorch, a group's heads as rows",
    "triton": "16 bits, with a mask, Triton",
    "int8": "**int8**",
    "int4": "**int4**",
}
ALIKE = ("shape", "batch", "prompt", "length", "quantize")  # in a table
APART = ("width", "context", "system", "scheme", "kind", "backend", "tile")  # its rows, as far as they have these
OCTOCODER = ("weights", "GiB", "more while quantizing, GiB", "seconds")


def gpu_markdown(rows: list[Row]) -> str:
    """Rows of GPUs only. A group is what was measured alike, on one machine: the latest row of each."""
    rows = sorted(rows, key=lambda row: str(row["run"]))
    tables = [markdown([row for row in rows if "part" not in row and row.get("decode_ms")])]
    parts = {"graphs": _steps, "attention-kernels": _kernels, "attention-tilings": _tilings}
    parts |= {"attention-decode": _decodes, "octocoder": _octocoder}
    for part, table in parts.items():
        groups: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row.get("part") == part and "reason" not in row:
                same = [row["hardware"], *map(row.get, ALIKE), bool(row.get("fused"))]
                groups.setdefault(json.dumps(same), {})[json.dumps([*map(row.get, APART)])] = row
        tables += [table(list(group.values())) for group in groups.values()]
    tables.append(cache_markdown([row for row in rows if row.get("part") == "cache-decode"]))
    tables.append(linear_table([row for row in rows if row.get("part") == "linear-kernels"]))
    return "\n\n".join(filter(None, tables))


def _steps(rows: list[Row]) -> str:
    first = rows[0]
    caption = (
        f"**{first['shape']}**, a pass after {first['prompt']} tokens, as CUDA graphs replay it"
        f"{', small operators fused' if first.get('fused') else ''}; {first.get('quantize') or first['dtype']}; "
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


def _tilings(rows: list[Row]) -> str:
    """TFLOP/s by kind and tile, in turns with nothing else."""
    first, kinds = rows[0], list(dict.fromkeys(row["kind"] for row in rows))
    caption = (
        f"The same prompt by the Triton kernel alone, TFLOP/s by its tile; {first['hardware']['gpu']}; {origin(rows)}."
    )
    lines = [caption, "", line("queries, keys, warps, stages", *kinds), line("---", *(["---:"] * len(kinds)))]
    by = {(tuple(row["tile"]), row["kind"]): row for row in rows}
    for tile in dict.fromkeys(tuple(row["tile"]) for row in rows):
        found = (by.get((tile, kind), {}).get("tflops") for kind in kinds)
        lines.append(line(", ".join(map(str, tile)), *(number(each, "{:.0f}") for each in found)))
    return "\n".join(lines)


def _decodes(rows: list[Row]) -> str:
    first = rows[0]
    caption = (
        f"**One token to a cache**, {first['heads']} heads of {first['head_size']} for {first['shared']} of keys and "
    )
    caption += f"values; {first['dtype']}; {first['hardware']['gpu']}, a CUDA graph; {origin(rows)}."
    lines = [caption, "", line(*DECODES), line("---:", "---", *(["---:"] * (len(DECODES) - 2)))]
    for row in rows:
        us = 1e3 * median(row["ms"]) / row["layers"]
        speed = row["read_bytes"] / row["layers"] / us * 1e6
        cells = f"{us:.1f}", f"{speed / 1e9:.0f}", f"{speed / row['bandwidth_bytes_per_s']:.0%}"
        lines.append(line(str(row["context"]), CACHED[row["system"]], *cells))
    return "\n".join(lines)


def _octocoder(rows: list[Row]) -> str:
    first = rows[0]
    caption = f"**OctoCoder's shape**, {first['parameters'] / 1e9:.1f} billion parameters, quantized in place; "
    lines = [f"{caption}{first['hardware']['gpu']}; {origin(rows)}.", "", line(*OCTOCODER)]
    lines.append(line("---", *(["---:"] * (len(OCTOCODER) - 1))))
    for row in rows:
        sizes = (f"{row[name] / 2**30:.2f}" for name in ("after_bytes", "more_bytes"))
        lines.append(line(FORMATS.get(row["scheme"], row["scheme"]), *sizes, f"{row['patch_s']:.1f}"))
    return "\n".join(lines)


def _timed(row: Row | None) -> tuple[str, str]:
    return ("", "") if row is None else (f"{row['ms']:.2f}", f"{row['tflops']:.0f}")


def linear_table(rows: list[Row]) -> str:
    """Of benchmarks.linear_kernels: the latest row of each system by shape, machine and number of rows. Ratios are
    those of one run."""
    groups: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["run"])):
        if "reason" not in row:
            name = json.dumps([row[name] for name in ("shape", "layers", "hardware", "device", "threads")])
            groups.setdefault(name, {})[json.dumps([row["rows"], row["system"]])] = row
    dense = {(row["run"], row["shape"], row["rows"]): row for row in rows if row["system"] == "bf16" and "ms" in row}
    return "\n\n".join(_linear(list(group.values()), dense) for group in groups.values())


def _linear(rows: list[Row], dense: dict[tuple[Any, ...], Row]) -> str:
    first = rows[0]
    single = first["copies"]
    what = "one product, on copies beyond any cache" if single else "all linear layers of a step"
    cut = f" cut to {first['layers']} layers" if first["layers"] else ""
    gpu = first["hardware"].get("gpu")
    where = f"{gpu}, replayed as one CUDA graph" if gpu else f"{first['hardware']['cpu']}, called in a row"
    lines = [f"**{first['shape']}**{cut}, {what}; bfloat16; {where}; {origin(rows)}.", "", line(*LINEAR)]
    lines.append(line("---:", "---", *(["---:"] * (len(LINEAR) - 2))))
    for row in sorted(rows, key=lambda row: int(row["rows"])):  # stable: systems stay in order
        each = row["products"] if single else 1
        ms, size = median(row["ms"]) / each, row["weight_bytes"] / each
        base = dense.get((row["run"], row["shape"], row["rows"]))
        more = base["products"] / row["products"] if base and single else 1  # each system has copies of its own number
        ratios = [a / b / more for a, b in zip(base["ms"], row["ms"], strict=False)] if base else []
        speed = size / ms / 1e6
        share = f"{1e9 * speed / row['bandwidth_bytes_per_s']:.0%}"
        cells = f"{ms:.4f}" if single else f"{ms:.3f}", f"{median(ratios):.2f}" if ratios else ""
        lines.append(
            line(str(row["rows"]), FORMATS.get(row["system"], row["system"]), *cells, f"{size / 1e9:.3f}",
                 f"{speed:.0f}", share)
        )  # fmt: skip
    return "\n".join(lines)
