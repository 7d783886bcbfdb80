"""The tables of `benchmarks.gqa`, made from its rows."""

from __future__ import annotations

import json
import math
from statistics import mean, median, stdev

from benchmarks.table import Row, line, number, origin, ratio

BASE = "unconverted"
SYSTEMS = {
    BASE: "unconverted",
    "random": '`GQA(N, merge="random")`: new heads',
    "first": '`GQA(N, merge="first")`: one head of each group',
    "mean": '`GQA(N, merge="mean")`',
    "aligned": "**`patch(model, gqa=N)`**",
    "aligned-calibrated": "**`patch(model, gqa=GQA(N, calibrate=texts))`**",
}
FEWER_QUERIES = 8  # heads whose attention is timed beside that of the model's own
SETTINGS = {
    "quality": ("shape", "dtype", "device", "windows"),
    "decode": ("shape", "layers", "dtype", "device", "threads"),
}


def heads_markdown(rows: list[Row]) -> str:
    """Tables of quality and of decode for each setting and machine, with the latest row of each way to merge and number
    of heads, before and after an uptraining, and of each context."""
    tables = [_quality(group, rows) for group in groups(rows, "quality", "uptrain")]
    return "\n\n".join(tables + [_decode(group, rows) for group in groups(rows, "decode")])


def groups(rows: list[Row], *parts: str) -> list[list[Row]]:
    """The rows of each table of these parts; the latest table comes last."""
    found: dict[str, dict[tuple[object, ...], Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["run"])):
        if row["part"] in [f"gqa-{part}" for part in parts]:
            same = json.dumps([row["hardware"], *(row[name] for name in SETTINGS[parts[0]])])
            key = (row.get("system"), row["kv_heads"], row.get("steps"), row.get("learning_rate"), row.get("context"))
            found[same] = found.pop(same, {}) | {key: row}
    return [list(group.values()) for group in found.values()]


def base_of(row: Row, rows: list[Row], kv_heads: int | None = None) -> Row | None:
    """Of the same run, what the loss of a row counts from; or, for times, the row at this context with so many
    heads."""
    name, value = ("system", BASE) if kv_heads is None else ("kv_heads", kv_heads)
    same = ("run", "shape", "context")
    known = (each for each in rows if each.get(name) == value and (each["part"] == "gqa-decode") == ("context" in row))
    return next((each for each in known if all(each.get(key) == row.get(key) for key in same)), None)


def lost(base: Row | None, row: Row, name: str = "nats") -> tuple[float, float] | None:
    """Nats per token more than the base, and the standard error: from differences window by window."""
    if base is None or len(row[name]) < 2:
        return None
    differences = [after - before for before, after in zip(base["nats"], row[name], strict=True)]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


def _quality(rows: list[Row], everything: list[Row]) -> str:
    """A row of each way to merge, and of each uptraining, by the number of heads."""
    first, base = rows[0], next(row for row in rows if row["system"] == BASE)
    numbers = sorted({row["kv_heads"] for row in rows if row["system"] != BASE}, reverse=True)
    caption = f"**{first['shape']}**, trained weights; {first['dtype']}; {first['windows']} windows of 512 tokens of "
    caption += f"held-out text, from Python {first['versions']['python']}; unconverted, with {base['kv_heads']} "
    caption += f"key/value heads: perplexity {math.exp(mean(base['nats'])):.3f}; {origin(rows)}."
    columns = [text for heads in numbers for text in (f"N = {heads}, perplexity", "loss, nats")]
    lines = [caption, "", line("", *columns), line("---", *(["---:"] * len(columns)))]
    by_name: dict[tuple[int, str], dict[int, Row]] = {}
    for row in (row for row in rows if row["system"] != BASE):
        order = list(SYSTEMS).index(row["system"]) + (len(SYSTEMS) if "steps" in row else 0)
        by_name.setdefault((order, _name(row)), {})[row["kv_heads"]] = row
    for (_, name), found in sorted(by_name.items()):
        cells: list[str] = []
        for row in map(found.get, numbers):
            loss = lost(base_of(row, everything), row) if row else None
            cells += [
                f"{math.exp(mean(row['nats'])):.3f}" if row else "",
                "{:.3f} ± {:.3f}".format(*loss) if loss else "",
            ]
        lines.append(line(name, *cells))
    notes = [_recovered(row, everything) for row in rows if "steps" in row]
    return "\n".join(lines + (["", *(f"* {note}" for note in notes)] if notes else []))


def _name(row: Row) -> str:
    name = SYSTEMS[row["system"]]
    if "steps" in row:
        name += f", then {row['steps']} steps of `uptrain`"
        name += f" at a learning rate of {row['learning_rate']:g}" if row["learning_rate"] else ""
    return name


def recovered(row: Row, rows: list[Row]) -> float | None:
    """The share of the lost loss that an uptraining brought back, on the held-out text."""
    base = base_of(row, rows)
    before, after = lost(base, row, "nats_before"), lost(base, row)
    return (before[0] - after[0]) / before[0] if before and after and before[0] > 0 else None


def _recovered(row: Row, rows: list[Row]) -> str:
    done, share = row["uptrained"], recovered(row, rows)
    text = f"{_name(row)}, N = {row['kv_heads']}: {done['tokens']} tokens of {row['trained_on']} in "
    text += f"{done['seconds']:.0f} s on {row['threads']} threads"
    if share is not None and done["recovered"] is not None:
        text += f"; {share:.0%} of the loss is recovered, {done['recovered']:.0%} on text like that trained on"
    return text


def _decode(rows: list[Row], everything: list[Row]) -> str:
    """A row of each context and number of heads."""
    first, hardware = rows[0], rows[0]["hardware"]
    most = max(row["kv_heads"] for row in rows)
    bandwidth = median(row["bandwidth_bytes_per_s"] for row in rows) / 1e9
    machine = hardware.get("gpu") or f"{first['threads']} threads of {hardware['cpu']} ({hardware['cpu_capability']})"
    caption = f"**{first['shape']}**" + (f" cut to {first['layers']} layers" if first["layers"] else "")
    caption += f", random weights, {first['heads']} query heads of {first['head_size']}; {first['dtype']}; {machine}, "
    caption += f"reading {bandwidth:.0f} GB/s; {origin(rows)}."
    columns = ["key/value heads", "cache, MB", "a step, ms", f"x {most}", "its attention, ms", f"x {most}"]
    fewer = any("attention_of_8_ms" in row for row in rows)
    columns += [f"attention of {FEWER_QUERIES} query heads, ms", f"x {FEWER_QUERIES}"] if fewer else []
    lines = [caption, "", line("tokens cached", *columns), line(*(["---:"] * (1 + len(columns))))]
    for row in sorted(rows, key=lambda row: (row["context"], -row["kv_heads"])):
        cells = [f"{row['context']}", f"{row['kv_heads']}", f"{row['cache_bytes'] / 1e6:.1f}"]
        for name, heads in (("decode_ms", most), ("attention_ms", most), ("attention_of_8_ms", FEWER_QUERIES)):
            if name in row:
                times = ratio(base_of(row, everything, heads), row, name)
                cells += [f"{median(row[name]):.2f}", number(times, "{:.2f}")]
        lines.append(line(*cells, *([""] * (1 + len(columns) - len(cells)))))
    return "\n".join(lines)
