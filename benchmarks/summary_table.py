"""The README's one table of ratios, made from the latest rows of the benchmarks on a CPU."""

from __future__ import annotations

import math

from benchmarks import attention_table, cache_table, gqa_table, speculative_table
from benchmarks.table import SETTINGS, Row, line, loss, number, ratio

COLUMNS = ("`patch(model, ...)`", "measured on", "times as fast", "bytes", "perplexity of code-llama-8m")
QUANTIZED = {
    "exact": "no options",
    "int8": '`quantize="int8"`',
    "int4": '`quantize="int4"`',
}
CACHES = {"exact": "no options", "int8": '`cache="int8"`', "int4": '`cache="int4"`'}
FAMILIES = {
    "llama-padded": "a layer of Llama's shape, two prompts, one padded, up to {} tokens",
    "gpt_oss": "layers of gpt-oss's shape, a prompt of {} tokens",
}
TASKS = {"editing": "code edited", "unpredictable": "text that cannot be foreseen"}
FEWER = 4  # times as few key/value heads
AGAINST = "The rows of `rope` and `gqa` are against `patch(model)` without that option, in the same run. "
AGAINST += "`gqa` has two rows, for two models: times of a shape with random weights, perplexity of the bundled one."


def summary_markdown(rows: list[Row]) -> str:
    """One row per pass and case, against transformers in the same run, or where that is said under the table, against
    the patched model; empty where nothing was measured."""
    measured = [row for row in rows if "reason" not in row and row.get("device", "cpu") == "cpu"]
    parts: dict[str, list[Row]] = {}
    for row in sorted(measured, key=lambda row: str(row["run"])):
        parts.setdefault(str(row.get("part", "decode")), []).append(row)
    patched = [
        *_positions(parts.get("long-context-perplexity", [])),
        *_heads(parts.get("gqa-decode", [])),
        *_fewer(parts.get("gqa-quality", [])),
    ]
    lines = [
        *_tokens(parts.get("decode", []), parts.get("perplexity", [])),
        *_prompts(parts.get("attention-prefill", [])),
        *_steps(parts.get("cache-decode", []), parts.get("cache-perplexity", [])),
        *_drafts(parts.get("speculative-generate", [])),
        *patched,
    ]
    if not lines:
        return ""
    head = [line(*COLUMNS), line("---", "---", "---:", "---:", "---:")]
    return "\n".join([*head, *lines, *(["", AGAINST] if patched else [])])


def _tokens(rows: list[Row], quality: list[Row]) -> list[str]:
    """A token of the largest shape, and the prompt before it, by the instructions of the processor; bytes are those of
    the weights."""
    found, stocks = {}, {(row["run"], row["shape"]): row for row in rows if row["system"] == "stock"}
    unusual = ("padded", "layers", "busy")
    plain = [row for row in rows if row["batch"] == 1 and row.get("decode_ms") and not any(map(row.get, unusual))]
    for row in plain:
        if all(row[name] == plain[-1][name] for name in SETTINGS):
            found[row["hardware"]["cpu_capability"], row["shape"], row["system"]] = row
    sizes = {shape: row["weight_bytes"] for (_, shape, system), row in found.items() if system == "exact"}
    shape, lines = max(sizes, key=lambda shape: sizes[shape], default=None), []
    for capability in sorted({capability for capability, *_ in found}, reverse=True):
        for system, name in QUANTIZED.items():
            row = found.get((capability, shape, system))
            if row and (stock := stocks.get((row["run"], shape))):
                size, worse = row["weight_bytes"] / stock["weight_bytes"], _perplexity(quality, system)
                prompt, token = f"a prompt of {row['prompt']} tokens of {shape}", f"a token of {shape} after it"
                for what, times in ((prompt, "prefill_ms"), (token, "decode_ms")):
                    lines.append(line(name, f"{what}, {capability}", *_cells(ratio(stock, row, times), size, worse)))
    return lines


def _prompts(rows: list[Row]) -> list[str]:
    """The longest prompt that both have read; bytes are those that it adds to the process at most."""
    found, lines = attention_table.latest(rows, "attention-prefill") if rows else {}, []
    for family, where in FAMILIES.items():
        both = {
            length: by_system
            for length, by_system in found.get(family, {}).items()
            if attention_table.times_of(by_system, "prefill_ms") is not None
        }
        if both:
            length, by_system = max(both), both[max(both)]
            stock, ours = by_system["stock"], by_system["exact"]
            size = ours["prefill_peak_bytes"] / stock["prefill_peak_bytes"]
            speed = attention_table.times_of(by_system, "prefill_ms")
            lines.append(line("no options", where.format(length), *_cells(speed, size, None)))
    return lines


def _steps(rows: list[Row], quality: list[Row]) -> list[str]:
    """A step at the longest context; bytes are those of the cache."""
    if not rows:
        return []
    context, lines = max(row["context"] for row in rows if row["system"] == "stock"), []
    found = {row["system"]: row for row in rows if row["context"] == context}
    for system, name in CACHES.items():
        if (row := found.get(system)) and (stock := cache_table.base_of(row, rows)):
            where = f"a token of {row['shape']}, {context} cached"
            size = cache_table.cache_shares(row)[0] / cache_table.cache_shares(stock)[0]
            speed = ratio(stock, row, "decode_ms")
            lines.append(line(name, where, *_cells(speed, size, _perplexity(quality, system))))
    return lines


def _drafts(rows: list[Row]) -> list[str]:
    """By the instructions of the processor."""
    alone = [row for row in rows if row["batch"] == 1]
    found = {(row["hardware"]["cpu_capability"], row["task"]): row for row in alone if row["system"] == "ngram"}
    lines = []
    for capability in sorted({capability for capability, _ in found}, reverse=True):
        for task, text in TASKS.items():
            if row := found.get((capability, task)):
                speed = speculative_table.times_of(speculative_table.base_of(row, alone), row)
                where = f"{text} by {row['shape']}, {capability}"
                lines.append(line('`speculative="ngram"`', where, *_cells(speed, None, None)))
    return lines


def _positions(rows: list[Row]) -> list[str]:
    """Perplexity of the longest text, over that of the model unscaled."""
    found, lines = {(row["system"], row["context"]): row["perplexity"] for row in rows}, []
    context = max((context for _, context in found), default=0)
    for method in ("yarn", "self-extend"):
        if (method, context) in found and ("unscaled", context) in found:
            row = rows[0]
            name, where = (
                f'`rope="{method}:{row["factor"]:g}"`',
                f"text of {context} tokens, trained on {row['trained']}",
            )
            worse = found[method, context] / found["unscaled", context]
            lines.append(line(name, where, *_cells(None, None, worse)))
    return lines


def _heads(rows: list[Row]) -> list[str]:
    """A step at the longest context with a fourth of the heads; bytes are those of the cache."""
    if not rows:
        return []
    context, most = max(row["context"] for row in rows), max(row["kv_heads"] for row in rows)
    row = next((row for row in reversed(rows) if (row["context"], row["kv_heads"] * FEWER) == (context, most)), None)
    base = row and gqa_table.base_of(row, rows, most)
    if not row or not base:
        return []
    where = f"a token of a multi-head shape, {context} cached, {most} key/value heads to {row['kv_heads']}"
    cells = _cells(ratio(base, row, "decode_ms"), row["cache_bytes"] / base["cache_bytes"], None)
    return [line(f"`gqa={row['kv_heads']}`", where, *cells)]


def _fewer(rows: list[Row]) -> list[str]:
    """Perplexity with a fourth of the heads."""
    most = max((row["kv_heads"] for row in rows), default=0)
    merged = [row for row in rows if row["system"] == "aligned-calibrated" and row["kv_heads"] * FEWER == most]
    lost = gqa_table.lost(gqa_table.base_of(merged[-1], rows), merged[-1]) if merged else None
    if lost is None:
        return []
    where = f"text by {merged[-1]['shape']}, {most} key/value heads to {merged[-1]['kv_heads']}"
    name = f"`gqa=GQA({merged[-1]['kv_heads']}, calibrate=texts)`"
    return [line(name, where, *_cells(None, None, math.exp(lost[0])))]


def _perplexity(rows: list[Row], system: str) -> float | None:
    """The latest one of the bundled model, over that of stock in the same run."""
    row = next((row for row in reversed(rows) if row["system"] == system), None)
    stock = next((each for each in rows if row and (each["run"], each["system"]) == (row["run"], "stock")), None)
    found = loss(stock, row) if row else None
    return found[0] if found else None


def _cells(speed: float | None, size: float | None, worse: float | None) -> list[str]:
    return [number(speed, "{:.2f}"), number(size, "{:.2f}"), number(worse, "{:.3f}")]
