"""Draws the rows of `benchmarks.quantize`: size against what it costs in perplexity, and against speed; those of
`benchmarks.kvcache`: the time of a decode step and the bytes of the cache against the tokens in it; those of
`benchmarks.speculative`: how many times as fast as stock, and what drafts of a copy can bring by their length; those of
`benchmarks.long_context`: perplexity against the context, for each way to scale positions; and those of
`benchmarks.gqa`, by gqa_plot.py.

    python -m benchmarks.plot        # of each of these, the file in benchmarks/results, to .png

Needs matplotlib, which is imported only inside the functions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.attention_plot import plot_attention
from benchmarks.baselines import FORMATS, SYSTEMS
from benchmarks.cache_table import cache_shares
from benchmarks.gqa_plot import plot_heads
from benchmarks.speculating import MOST
from benchmarks.speculative_table import base_of, computed, in_groups, times_of
from benchmarks.table import RESULTS, Row, loss, ratio

COLOURS = {"ours": "tab:red", "stock": "black", "llama_cpp": "tab:blue"}
LINE_POINTS = 10  # from one label to the next where dots are close
CACHE_STYLES = {  # colour and dash
    "stock": ("black", "-"),
    "cache=False": ("tab:gray", "--"),
    "exact": ("tab:red", "-"),
    "int8": ("tab:orange", "-"),
    "int4": ("goldenrod", "-"),
    "fp8": ("tab:blue", "--"),
    "quanto-4bit": ("tab:green", "--"),
    "hqq-8bit": ("tab:purple", "--"),
    "hqq-4bit": ("tab:pink", "--"),
}

SCALING_STYLES = {  # colour and dash
    "unscaled": ("black", "-"),
    "linear": ("tab:gray", "--"),
    "llama3": ("tab:purple", "--"),
    "dynamic": ("tab:blue", "-"),
    "dynamic-fixed": ("tab:blue", "--"),
    "yarn": ("tab:orange", "-"),
    "self-extend": ("tab:red", "-"),
}

SPECULATION_COLOURS = {
    "stock-lookup": "tab:gray",
    "stock-early-exit": "silver",
    "exact": "tab:blue",
    "ngram": "tab:orange",
    "self": "tab:red",
}


def perplexity_points(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Of the latest row of each system: bits per weight of the bundled model, and percent of perplexity lost."""
    found = {}
    for row, stock in _with_stock(rows):
        lost = loss(stock, row)
        if lost:
            found[row["system"]] = (8 * row["weight_bytes"] / row["parameters"], 100 * (lost[0] - 1))
    return found


def speed_points(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Of the latest row of each system: GB of weights, and how many times as fast as stock it decodes."""
    found = {}
    for row, stock in _with_stock(rows):
        times = ratio(stock, row, "decode_ms")
        if times:
            found[row["system"]] = (row["weight_bytes"] / 1e9, times)
    for system, same in FORMATS.items():
        if same in found:
            found[system] = found[same]
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Save an image of the bundled model's rows, and of those of the last shape that was run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = sorted(rows, key=lambda row: str(row["run"]))
    quality, speed = ([row for row in rows if row["part"] == part] for part in ("perplexity", "speed"))
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_yscale("symlog", linthresh=0.1)
    left.set(xlabel="bits per weight of the bundled model", ylabel="perplexity lost, %")
    _draw(left, perplexity_points(quality))
    shape = speed[-1]["shape"] if speed else "a shape"
    right.set(xlabel=f"GB of {shape}", ylabel="decode, times as fast as stock")
    right.set_yscale("log", subs=())
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _draw(right, speed_points([row for row in speed if row["shape"] == shape]))
    figure.savefig(path, dpi=150)


def plot_caches(source: Path) -> None:
    """Save an image beside a file of rows: of the shape, the setting and the machine that were run last, each cache's
    latest row at each context."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows = [row for row in rows if row.get("part") == "cache-decode" and "reason" not in row]
    rows.sort(key=lambda row: str(row["run"]))
    if not rows:
        return
    last, same = rows[-1], ("shape", "layers", "dtype", "device", "threads", "hardware")
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if all(row[name] == last[name] for name in same):
            found.setdefault(row["system"], {})[row["context"]] = row
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for system in (name for name in CACHE_STYLES if name in found):
        by_context = dict(sorted(found[system].items()))
        colour, dash = CACHE_STYLES[system]
        label = "transformers" if system == "stock" else system
        style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 4, "label": label}
        left.plot(list(by_context), [median(row["decode_ms"]) for row in by_context.values()], **style)
        sizes = [max(cache_shares(row)) * row["token_bytes"] * row["context"] / 1e6 for row in by_context.values()]
        right.plot(list(by_context), sizes, **style)
    contexts = sorted({context for by_context in found.values() for context in by_context})
    for axes, text in ((left, f"a decode step of {last['shape']}, ms"), (right, "the cache, MB")):
        axes.set(xlabel="tokens in the cache", ylabel=text, xscale="log", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(source.with_suffix(".png"), dpi=150)


def plot_speculation(source: Path) -> None:
    """Save an image beside a file of rows: of the setting that was run last for a batch of one, how many times as fast
    as stock each system is at each task; and what is computed for drafts of the copy, with the real run beside it."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in source.read_text().splitlines()]
    groups = in_groups([row for row in rows if row.get("batch", 1) == 1])
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    timed = groups.get("speculative-generate", [[]])[-1]
    found = {(row["task"], row["system"]): times_of(base_of(row, rows), row) for row in timed if "reason" not in row}
    tasks = list(dict.fromkeys(task for task, _ in found))
    systems = [system for system in SPECULATION_COLOURS if any(name == system for _, name in found)]
    for number, system in enumerate(systems):
        places = [at + (number - (len(systems) - 1) / 2) * 0.8 / len(systems) for at in range(len(tasks))]
        heights = [found.get((task, system)) or 0.0 for task in tasks]
        style = {"width": 0.8 / len(systems), "color": SPECULATION_COLOURS[system], "label": system}
        left.bar(places, heights, **style)
    left.axhline(1, color="black", linewidth=0.8)
    left.set_xticks(range(len(tasks)), tasks)
    left.set(ylabel="times as fast as transformers, the bundled model")
    for group in groups.get("speculative-costs", [])[-1:]:
        accepted = groups.get("speculative-acceptance", [[]])[-1]
        for task, by_width in computed(group, accepted).items():
            right.plot(range(1, MOST + 1), [times for times, _ in by_width], marker="o", label=f"computed: {task}")
        right.set(xlabel="tokens that the copy drafts, at most", ylabel="times as fast as patch(model)")
        right.set_title(f'speculative="self" on {group[0]["shape"]}', fontsize=10)
    for row in groups.get("speculative-held", [[]])[-1]:
        times = times_of(base_of(row, rows, "exact"), row) if "reason" not in row else None
        if row["system"] == "self" and times:
            share = row["accepted"] / max(row["drafted"], 1)
            right.axhline(
                times, color="tab:red", linestyle="--", label=f"measured: {share:.0%} of its drafts are right"
            )
    right.axhline(1, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(source.with_suffix(".png"), dpi=150)


def plot_contexts(source: Path) -> None:
    """Save an image beside a file of rows: of the model and the setting that were measured last, the perplexity of the
    latest row of each method at each context."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows = [row for row in rows if row.get("part") == "long-context-perplexity" and "reason" not in row]
    rows.sort(key=lambda row: str(row["run"]))
    if not rows:
        return
    last, same = rows[-1], ("model", "trained", "factor", "windows", "dtype")
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if all(row[name] == last[name] for name in same):
            found.setdefault(row["system"], {})[row["context"]] = row["perplexity"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for system in (name for name in SCALING_STYLES if name in found):
        by_context = dict(sorted(found[system].items()))
        colour, dash = SCALING_STYLES[system]
        style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 4, "label": system}
        axes.plot(list(by_context), list(by_context.values()), **style)
    contexts = sorted({context for by_context in found.values() for context in by_context})
    axes.axvline(last["trained"], color="black", linewidth=0.8, linestyle=":")
    label = f"perplexity of the same tokens, {last['model']}"
    axes.set(xlabel=f"tokens of context (trained on {last['trained']})", ylabel=label, yscale="log")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(source.with_suffix(".png"), dpi=150)


def _with_stock(rows: list[Row]) -> list[tuple[Row, Row]]:
    """The rows that have numbers, each with stock's of the same run."""
    measured = [row for row in rows if "reason" not in row]
    stocks = {row["run"]: row for row in measured if row["system"] == "stock"}
    return [(row, stocks[row["run"]]) for row in measured if row["run"] in stocks]


def _draw(axes: Any, found: dict[str, tuple[float, float]]) -> None:
    """Dots, each with its name beside it, moved up along a line where that place is taken."""
    colours = {system: COLOURS.get(SYSTEMS[system][0], "tab:gray") for system in found}
    for system, point in found.items():
        axes.scatter(*point, color=colours[system], zorder=3)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.figure.draw_without_rendering()  # settles where the dots are
    taken: list[Any] = []
    for system, point in sorted(found.items(), key=lambda item: item[1][::-1]):
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": colours[system]}
        for number in range(len(found)):
            place = (8, 3 + LINE_POINTS * number)
            label = axes.annotate(system, point, place, **style)
            box = label.get_window_extent()
            label.remove()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": colours[system], "shrinkA": 0} if number else None
        axes.annotate(system, point, place, arrowprops=line, **style).set_in_layout(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ("quantize", "attention", "kvcache", "speculative", "long_context", "gqa")
    files = [RESULTS / f"{name}.jsonl" for name in names]
    parser.add_argument("rows", nargs="*", type=Path, help="files of rows (default: these)")
    for file in parser.parse_args().rows or [file for file in files if file.exists()]:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if any(row.get("part") == "cache-decode" for row in rows):
            plot_caches(file)
        elif any(row.get("part") == "attention-prefill" for row in rows):
            plot_attention(file)
        elif any(str(row.get("part")).startswith("speculative-") for row in rows):
            plot_speculation(file)
        elif any(str(row.get("part")).startswith("long-context-") for row in rows):
            plot_contexts(file)
        elif any(str(row.get("part")).startswith("gqa-") for row in rows):
            plot_heads(file)
        else:
            plot(rows, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
