"""The tables of `benchmarks.speculative`, made from its rows."""

from __future__ import annotations

import json
from statistics import median

from benchmarks.speculating import LOOKUP, MOST, chances, expected
from benchmarks.table import Row, line, number, origin

NAMES = {
    "stock": "transformers",
    "stock-lookup": f"transformers, `prompt_lookup_num_tokens={LOOKUP}`",
    "stock-early-exit": "transformers, `assistant_early_exit`, half of the layers",
    "exact": "**`patch(model)`**",
    "ngram": '**`patch(model, speculative="ngram")`**',
    "self": '**`patch(model, speculative="self")`**',
}
TASK_ORDER = ("editing", "continuation", "summarising", "unpredictable")
SETTINGS = {  # rows that agree in these, and in the shape and the machine, make a table
    "speculative-generate": ("dtype", "device", "threads", "batch", "prompts", "tokens"),
    "speculative-tokens": ("dtype", "device", "prompts", "tokens"),
    "speculative-held": ("dtype", "device", "threads", "layers", "prompts", "tokens"),
    "speculative-acceptance": ("dtype", "device", "prompts", "tokens"),
    "speculative-costs": ("dtype", "device", "threads", "layers"),
}
COLUMNS = (
    "ms per token", "x transformers", "x `patch(model)`", "passes per token", "drafted tokens that are right",
    "texts as of transformers", "texts as of `patch(model)`",
)  # fmt: skip


def speculative_markdown(rows: list[Row]) -> str:
    """Tables of each part, setting and machine, with the latest row of each system at each task. Rows whose task,
    batch and system were timed again later, with other prompts, are left out."""
    groups = in_groups([row for row in rows if not _again(row, rows)])
    tables = [_timed(group, rows) for group in groups.get("speculative-generate", [])]
    tables += [_same(group) for group in groups.get("speculative-tokens", [])]
    tables += [_timed(group, rows) for group in groups.get("speculative-held", [])]
    for group in groups.get("speculative-costs", []):
        accepted = groups.get("speculative-acceptance", [[]])[-1]
        tables.append(_costs(group, accepted))
    return "\n\n".join(tables)


def in_groups(rows: list[Row]) -> dict[str, list[list[Row]]]:
    """By part, the tables' rows, the latest of each task, batch and system; the latest table comes last."""
    found: dict[str, dict[str, dict[tuple[str, int, str], Row]]] = {}
    for row in sorted(rows, key=lambda row: str(row["run"])):
        same = json.dumps([row["shape"], row["hardware"], *(row[name] for name in SETTINGS[row["part"]])])
        tables = found.setdefault(row["part"], {})
        tables[same] = tables.pop(same, {}) | {(row.get("task", ""), row.get("batch", 1), row["system"]): row}
    return {part: [_ordered(list(group.values())) for group in tables.values()] for part, tables in found.items()}


def _again(row: Row, rows: list[Row]) -> bool:
    """Whether a later run has timed the same system at the same task, with another number of prompts."""
    if row["part"] != "speculative-generate":
        return False
    same = ("part", "shape", "hardware", "dtype", "device", "threads", "batch", "task", "system")
    later = (each for each in rows if str(each["run"]) > str(row["run"]) and "reason" not in each)
    return any(
        each.get("prompts") != row["prompts"] and all(each.get(name) == row[name] for name in same) for each in later
    )


def base_of(row: Row, rows: list[Row], system: str = "stock") -> Row | None:
    """The row of the same run and task that this one is compared with."""
    same = ("run", "part", "shape", "task", "batch")
    measured = (each for each in rows if each["system"] == system and "reason" not in each)
    return next((each for each in measured if all(each.get(name) == row.get(name) for name in same)), None)


def times_of(base: Row | None, row: Row) -> float | None:
    """How many times as fast as the base: the median over the rounds that both ran."""
    if base is None:
        return None
    pairs = zip(base["seconds"], row["seconds"], strict=False)
    return median(sum(before) / sum(after) for before, after in pairs)


def computed(costs: list[Row], accepted: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """By task, for drafts of the copy of at most 1 to 8 tokens: how many times as fast as a plain pass, and
    milliseconds per token. From the costs of one model and the acceptance of another, so not a measurement."""
    row = next((row for row in costs if row["system"] == "exact" and "reason" not in row), None)
    if row is None:
        return {}
    pass_ms = {int(width): median(times) for width, times in row["pass_ms"].items()}
    found = {}
    for each in (each for each in accepted if "counts" in each and any(map(sum, each["counts"]))):
        ms = [expected(each["counts"], most, pass_ms, median(row["draft_ms"])) for most in range(1, MOST + 1)]
        found[each["task"]] = [(pass_ms[1] / token_ms, token_ms) for token_ms in ms]
    return found


def _timed(rows: list[Row], everything: list[Row]) -> str:
    first = rows[0]
    held, several = first["part"] == "speculative-held", first["batch"] > 1
    caption = f"**{first['shape']}**" + (f" cut to {first['layers']} layers" if first.get("layers") else "")
    caption += ", random weights that int4 holds exactly" if held else ", trained weights"
    caption += f"; {first['dtype']}; {first['prompts']} prompts" + (f", {first['batch']} at once" if several else "")
    caption += f"; {first['tokens']} new tokens each, the prompt's pass included; {_machine(first)}; {origin(rows)}."
    lines = [caption, "", *_head(*(() if held else ("task",)), "system", *COLUMNS)]
    for row in rows:
        if "reason" in row:
            continue
        stock, exact = (base_of(row, everything, system) for system in ("stock", "exact"))
        tokens = row["prompts"] * row["tokens"]
        cells = [
            f"{1000 * median(map(sum, row['seconds'])) / tokens:.2f}",
            number(times_of(stock, row), "{:.2f}"),
            number(times_of(exact, row), "{:.2f}"),
            f"{median(row['passes']) / tokens * row['batch']:.2f}",
            f"{row['accepted'] / row['drafted']:.0%}" if row["drafted"] else "",
            _of(row["same_as_stock"]),
            _of(row["same_as_exact"]),
        ]
        name = NAMES[row["system"]]
        lines.append(line(name, *cells) if held else line(row["task"], name, *cells))
    notes = [f"{NAMES[row['system']]}: {row['held'][0]} of {row['held'][1]} matrices of the copy are the model's, bit "
             "for bit" for row in rows if row.get("held")]  # fmt: skip
    gaps = [gap for row in rows for base in ("stock", "exact") for gap in row.get(f"gaps_to_{base}", ())]
    if gaps:
        notes.append(
            f"Where greedy texts first differ, the logits of the two tokens are at most {max(gaps):.1%} apart "
            f"(median {median(gaps):.2%}), of the largest logit; bfloat16 rounds to 0.4%"
        )
    return "\n".join(lines + (["", *(f"* {note}" for note in notes)] if notes else []) + _missing(rows))


def _same(rows: list[Row]) -> str:
    """Texts that are those of stock, by task and batch."""
    first, measured = rows[0], [row for row in rows if "reason" not in row]
    columns = list(dict.fromkeys((row["task"], row["batch"]) for row in measured))
    caption = f"**{first['shape']}** in {first['dtype']}: texts that are those of transformers, token for token; "
    caption += f"{first['tokens']} new tokens each; {origin(rows)}."
    lines = [caption, "", *_head("system", *(_at(*column) for column in columns))]
    for system in (system for system in NAMES if any(row["system"] == system for row in measured)):
        found = {(row["task"], row["batch"]): _of(row["same_as_stock"]) for row in measured if row["system"] == system}
        lines.append(line(NAMES[system], *(found.get(column, "") for column in columns)))
    sampled = "At temperature 3 a seed gives the same text only where numbers are drawn as in plain decoding."
    sampled_too = any(row["task"] == "unpredictable" for row in measured)
    return "\n".join(lines + (["", f"* {sampled}"] if sampled_too else []) + _missing(rows))


def _costs(rows: list[Row], accepted: list[Row]) -> str:
    """What passes and drafts cost, how often drafts are right, and what follows."""
    row = next((row for row in rows if row["system"] == "exact" and "reason" not in row), None)
    stock = next((row for row in rows if row["system"] == "stock" and "reason" not in row), None)
    if row is None:
        return "\n".join(_missing(rows))
    pass_ms = {int(width): median(times) for width, times in row["pass_ms"].items()}
    caption = f"**Computed, not measured**: what drafts of the copy in 4 bits bring on **{row['shape']}**"
    caption += f" cut to {row['layers']} layers" if row["layers"] else ""
    caption += f" at the acceptance of {accepted[0]['shape']}" if accepted else ""
    caption += f". Measured are a pass ({pass_ms[1]:.1f} ms for one token"
    caption += f", {median(stock['pass_ms']['1']):.1f} ms in transformers" if stock else ""
    caption += f") and a drafted token ({median(row['draft_ms']):.1f} ms), after {row['context']} tokens; "
    caption += f"{row['dtype']}; {_machine(row)}, reading {row['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s; "
    caption += f"{origin(rows + accepted)}. "
    caption += "`right`: that a drafted token is, if those before it are; tokens per second: as `self` drafts, which "
    caption += "ends a draft where the copy is not sure, and in brackets against plain passes; only at those places of "
    drafted = (
        f"{sum(map(sum, each['counts']))} of {each['places']} ({each['task']})" for each in accepted if "counts" in each
    )
    caption += f"the texts where it asks the copy, since they do not repeat themselves: {', '.join(drafted)}."
    by_task = computed(rows, accepted)
    rights = {each["task"]: chances(each["counts"]) for each in accepted if "counts" in each}
    columns = [text for task in by_task for text in (f"{task}: right", "tokens per second, computed")]
    lines = [caption, "", *_head("drafted, at most", "pass over them and one, ms", *columns)]
    for width in range(1, MOST + 1):
        cells = [f"{pass_ms[1 + width]:.1f}"]
        for task, found in by_task.items():
            times, token_ms = found[width - 1]
            cells += [f"{rights[task][width - 1]:.0%}", f"{1000 / token_ms:.1f} ({times:.2f} x)"]
        lines.append(line(str(width), *cells))
    return "\n".join(lines + _missing(rows + accepted))


def _machine(row: Row) -> str:
    hardware = row["hardware"]
    return hardware.get("gpu") or f"{row['threads']} threads of {hardware['cpu']} ({hardware['cpu_capability']})"


def _ordered(rows: list[Row]) -> list[Row]:
    def place(row: Row) -> tuple[int, int, int]:
        task = row.get("task")
        at = TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)
        return at, row.get("batch", 1), list(NAMES).index(row["system"])

    return sorted(rows, key=place)


def _of(counted: list[int]) -> str:
    return f"{counted[0]} of {counted[1]}"


def _at(task: str, batch: int) -> str:
    return task + (f", {batch} at once" if batch > 1 else "")


def _head(*columns: str) -> list[str]:
    return [line(*columns), line("---", *(["---:"] * (len(columns) - 1)))]


def _missing(rows: list[Row]) -> list[str]:
    """Lines under a table: what is not in it, with the reason."""
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            failed.setdefault((row["system"], row["reason"]), []).append(_at(row.get("task", ""), row.get("batch", 1)))
    texts = [f"{NAMES[name]} ({'; '.join(filter(None, at))}): {reason}" for (name, reason), at in failed.items()]
    return ["", "Not measured:", "", *(f"* {text}" for text in texts)] if texts else []
