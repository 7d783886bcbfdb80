"""The tables of `benchmarks.attention`, made from its rows."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.table import line, number, origin, ratio

Row = dict[str, Any]
SHOWN = 3  # of the longest prompts
NAMES = {
    "llama": "Llama: grouped keys and values",
    "llama-padded": "Llama, two prompts, one padded to twice its length",
    "mistral": "Mistral: a window of 512",
    "gemma2": "Gemma 2: soft caps; one layer of two with a window of 4096",
    "gpt_oss": "gpt-oss: sinks; one layer of two with a window of 128",
    "bloom": "BLOOM: ALiBi",
    "mpt": "MPT: ALiBi",
    "falcon-alibi": "Falcon: ALiBi",
    "falcon-multi-query": "Falcon: multi-query",
    "gptj": "GPT-J",
    "gpt_neo": "GPT-Neo: one layer of two with a window of 256",
    "deepseek_v3": "DeepSeek-V3: latent attention",
}
Found = dict[str, dict[int, dict[str, Row]]]  # family, length or context, system: its latest row


def attention_markdown(rows: list[Row]) -> str:
    """Tables of the setting and machine that were measured last: times and memory of prompts, times of steps."""
    times, memory, steps = "", "", ""
    if prompts := latest(rows, "attention-prefill"):
        times, memory = _times(prompts), _memory(prompts)
    if decoded := latest(rows, "attention-decode"):
        steps = _steps(decoded)
    return "\n\n".join(filter(None, (times, memory, steps)))


def latest(rows: list[Row], part: str) -> Found:
    """The latest row of each family, length and system that ran where the last one did."""
    rows = sorted((row for row in rows if row["part"] == part), key=lambda row: str(row["run"]))
    found: Found = {}
    for row in rows:
        if all(row[name] == rows[-1][name] for name in ("hardware", "dtype", "device", "threads")):
            at = row["length"] if part == "attention-prefill" else row["context"]
            found.setdefault(row["family"], {}).setdefault(at, {})[row["system"]] = row
    return {name: found[name] for name in NAMES if name in found}


def times_of(by_system: dict[str, Row], name: str) -> float | None:
    """How many times as fast as stock the patched model is, in the median over rounds of one run."""
    stock, ours = by_system.get("stock"), by_system.get("exact")
    if stock is None or ours is None or stock["run"] != ours["run"] or not stock.get(name):
        return None
    return ratio(stock, ours, name)


def _times(found: Found) -> str:
    caption, lengths = _caption(found), _lengths(found)[-SHOWN:]
    caption = f"**A prompt**, ms, by its tokens; {caption}"
    columns = [text for each in lengths for text in (f"{each}, stock", "patched", "x stock")]
    lines = [caption, "", line("attention", *columns), _rule(columns)]
    for name, by_length in found.items():
        cells: list[str] = []
        for length in lengths:
            by_system = by_length.get(length, {})
            for system in ("stock", "exact"):
                taken = by_system.get(system, {}).get("prefill_ms")
                cells.append(number(median(taken) if taken else None, "{:.0f}"))
            cells.append(number(times_of(by_system, "prefill_ms"), "{:.2f}"))
        lines.append(line(NAMES[name], *cells))
    return "\n".join(lines + _left_out(found))


def _memory(found: Found) -> str:
    lengths = _lengths(found)[-SHOWN:]
    caption = "The same prompts: what one adds to the memory of its process at most, keys and values included, MB. "
    caption += "Twice as many tokens take twice as much where memory is linear, four times where it is quadratic."
    columns = [text for each in lengths for text in (f"{each}, stock", "patched")]
    lines = [caption, "", line("attention", *columns), _rule(columns)]
    for name, by_length in found.items():
        rows = [by_length.get(length, {}).get(system, {}) for length in lengths for system in ("stock", "exact")]
        lines.append(line(NAMES[name], *(number(row.get("prefill_peak_bytes"), "{:.0f}", 1e6) for row in rows)))
    return "\n".join(lines)


def _steps(found: Found) -> str:
    contexts = _lengths(found)
    columns = [text for each in contexts for text in (f"{each}, stock", "patched", "x stock")]
    lines = [f"**One token**, ms, by tokens in the cache; {_caption(found)}", ""]
    lines += [line("attention", *columns), _rule(columns)]
    for name, by_context in found.items():
        cells: list[str] = []
        for context in contexts:
            by_system = by_context.get(context, {})
            for system in ("stock", "exact"):
                taken = by_system.get(system, {}).get("decode_ms")
                cells.append(number(median(taken) if taken else None, "{:.2f}"))
            cells.append(number(times_of(by_system, "decode_ms"), "{:.2f}"))
        lines.append(line(NAMES[name], *cells))
    return "\n".join(lines)


def _caption(found: Found) -> str:
    rows = _rows(found)
    first, hardware = rows[0], rows[0]["hardware"]
    machine = hardware.get("gpu") or f"{first['threads']} threads of {hardware['cpu']} ({hardware['cpu_capability']})"
    kept = [row for row in rows if "reason" not in row]
    turns = sorted({len(row.get("prefill_ms") or row.get("decode_ms") or ()) for row in kept})
    medians = f"medians of {turns[0]}" + (f" to {turns[-1]}" if turns[-1] > turns[0] else "") + " turns"
    return f"{first['dtype']}; {medians}; {machine}; {origin(rows)}."


def _left_out(found: Found) -> list[str]:
    """Why stock has no number at a length, each reason that is shown once per family."""
    notes = []
    for name, by_length in found.items():
        for length in _lengths(found)[-SHOWN:]:
            for system, row in by_length.get(length, {}).items():
                if "reason" in row and not row["reason"].startswith(f"{length} tokens would take"):
                    notes.append(f"* {NAMES[name]}, {system}, {length} tokens: {row['reason']}")
    limited = [row["most_bytes"] for row in _rows(found) if "would take" in row.get("reason", "")]
    text = "Where stock has no number, its prompt would take more than {:.0f} GB."
    empty = ["", text.format(max(limited) / 1e9)] if limited else []
    return empty + (["", "Not measured:", "", *notes] if notes else [])


def _rows(found: Found) -> list[Row]:
    return [row for by_length in found.values() for by_system in by_length.values() for row in by_system.values()]


def _lengths(found: Found) -> list[int]:
    return sorted({length for by_length in found.values() for length in by_length})


def _rule(columns: list[str]) -> str:
    return line("---", *(["---:"] * len(columns)))
