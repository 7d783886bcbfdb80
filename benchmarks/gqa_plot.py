"""Draws the rows of `benchmarks.gqa`: what each way to merge heads loses, before and after uptraining, and the time of
a decode step and of its attention by context. Needs matplotlib, which is imported only inside the function."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gqa_table import BASE, SYSTEMS, base_of, groups, lost
from benchmarks.table import Row

COLOURS = {
    "random": "silver",
    "first": "tab:gray",
    "mean": "black",
    "aligned": "tab:orange",
    "aligned-calibrated": "tab:red",
}
HEADS = ("black", "tab:purple", "tab:blue", "tab:green", "tab:orange", "tab:red")  # from many to few


def plot_heads(source: Path) -> None:
    """Save an image beside a file of rows: of the setting and the machine that were run last."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = [json.loads(line) for line in source.read_text().splitlines()]
    quality, decode = groups(rows, "quality", "uptrain")[-1:], groups(rows, "decode")[-1:]
    quality = [group for group in quality if any(row["system"] != BASE for row in group)]
    if not quality + decode:
        return
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, len(quality + decode), squeeze=False)[0]  # a part that was not run has none
    for axes, group in zip(panels, quality + decode, strict=True):
        if group in quality:
            _quality(axes, group, rows)
        else:
            _decode(axes, group)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(source.with_suffix(".png"), dpi=150)


def _quality(axes: Any, rows: list[Row], everything: list[Row]) -> None:
    """Lines of the converted model, hollow dots after an uptraining."""
    axes.set(xlabel="key/value heads", ylabel=f"loss of {rows[0]['shape']}, nats per token", xscale="log", yscale="log")
    for system in (name for name in SYSTEMS if name != BASE):
        for trained in (False, True):
            found = {
                row["kv_heads"]: loss[0]
                for row in sorted(rows, key=lambda row: -row["kv_heads"])
                if row["system"] == system and ("steps" in row) == trained
                if (loss := lost(base_of(row, everything), row)) and loss[0] > 0
            }
            style = {"color": COLOURS[system], "marker": "o", "label": system + (", uptrained" if trained else "")}
            style |= {"linestyle": ":", "markerfacecolor": "none", "markersize": 9} if trained else {"markersize": 4}
            if found:
                axes.plot(list(found), list(found.values()), **style)
    numbers = sorted({row["kv_heads"] for row in rows if row["system"] != BASE}, reverse=True)
    axes.set_xticks(numbers, [str(heads) for heads in numbers])
    axes.invert_xaxis()
    axes.legend(fontsize=8)


def _decode(axes: Any, rows: list[Row]) -> None:
    """A step in whole lines, its attention in dashed ones."""
    text = f"{rows[0]['shape']}: ms of a step (dashed: of its attention)"
    axes.set(xlabel="tokens in the cache", ylabel=text, xscale="log", yscale="log")
    for heads, colour in zip(sorted({row["kv_heads"] for row in rows}, reverse=True), HEADS, strict=False):
        found = {row["context"]: row for row in rows if row["kv_heads"] == heads}
        for name, dash in (("decode_ms", "-"), ("attention_ms", "--")):
            times = [median(found[context][name]) for context in sorted(found)]
            style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 4}
            axes.plot(sorted(found), times, **style, **({"label": f"{heads}"} if dash == "-" else {}))
    contexts = sorted({row["context"] for row in rows})
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.legend(fontsize=8, title="key/value heads", title_fontsize=8)
