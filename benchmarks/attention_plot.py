"""Draws the rows of `benchmarks.attention`: memory and time of a prompt against its tokens, stock and patched.

Needs matplotlib, which is imported only here.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from benchmarks.attention_table import Row, latest

PALETTE = "tab20"


def plot_attention(source: Path) -> None:
    """Save an image beside a file of rows: of the setting and the machine that were measured last, the latest row of
    each family and length; stock dashed, the patched model solid, in one colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    found = latest([json.loads(line) for line in source.read_text().splitlines()], "attention-prefill")
    if not found:
        return
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = colormaps[PALETTE].colors[::2] + colormaps[PALETTE].colors[1::2]
    for (name, by_length), colour in zip(found.items(), colours, strict=False):
        for system, dash in (("stock", "--"), ("exact", "-")):
            rows = {at: by_system[system] for at, by_system in sorted(by_length.items()) if _timed(by_system, system)}
            style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 3}
            left.plot(list(rows), [row["prefill_peak_bytes"] / 1e6 for row in rows.values()], **style)
            label = name if system == "exact" else None
            right.plot(list(rows), [median(row["prefill_ms"]) for row in rows.values()], label=label, **style)
    lengths = sorted({length for by_length in found.values() for length in by_length})
    for axes, text in ((left, "memory that a prompt adds at most, MB"), (right, "a prompt, ms")):
        axes.set(xlabel="tokens of the prompt", ylabel=text, xscale="log", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    kinds = [("transformers", "--"), ("patch(model)", "-")]
    left.legend(handles=[Line2D([], [], color="black", linestyle=dash, label=name) for name, dash in kinds], fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(source.with_suffix(".png"), dpi=150)


def _timed(by_system: dict[str, Row], system: str) -> bool:
    row = by_system.get(system, {})
    return bool(row.get("prefill_ms")) and row.get("prefill_peak_bytes") is not None
