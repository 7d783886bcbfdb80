"""The tables of `benchmarks.kvcache`, made from its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from statistics import mean, median
from typing import Any

from benchmarks.table import line, loss, number, origin, ratio

Row = dict[str, Any]
SETTINGS = {
    "cache-perplexity": ("dtype", "device", "windows", "piece"),
    "cache-stream": ("dtype", "device", "tokens", "places", "window"),
    "cache-decode": ("dtype", "device", "threads", "layers"),
}
NAMES = {
    "stock": "transformers, `DynamicCache`",
    "cache=False": "**`patch(model, cache=False)`**: its cache stays stock",
    "exact": "**`patch(model)`**",
    "fp8": '`QuantizedCache("fp8")`',
    "quanto-4bit": '`QuantizedCache("quanto", nbits=4)`',
    "hqq-8bit": '`QuantizedCache("hqq", nbits=8)`',
    "hqq-4bit": '`QuantizedCache("hqq", nbits=4)`',
}


def cache_markdown(rows: list[Row]) -> str:
    """Tables of each part, shape, setting and machine, with the latest row of each cache, at each context."""
    groups: dict[str, dict[tuple[str, int | None], Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["run"])):
        same = [row["part"], row["shape"], row["hardware"], *(row[name] for name in SETTINGS[row["part"]])]
        groups.setdefault(json.dumps(same), {})[row["system"], row.get("context")] = row
    measured = [row for row in rows if "reason" not in row]
    order = list(SETTINGS)
    kinds: dict[str, Callable[[list[Row], list[Row]], str]]
    kinds = {"cache-perplexity": _quality, "cache-stream": _stream, "cache-decode": _decode}
    found = sorted((list(group.values()) for group in groups.values()), key=lambda group: order.index(group[0]["part"]))
    return "\n\n".join(kinds[group[0]["part"]](group, measured) for group in found)


def name_of(system: str) -> str:
    kind, _, window = system.partition(":")
    if kind == "recompute":
        return f"the last {window} tokens anew for every token"
    return NAMES.get(system, f'**`patch(model, cache="{system}")`**')


def base_of(row: Row, measured: list[Row], system: str = "stock") -> Row | None:
    """The row of the same run, shape and context that this one is compared with."""
    same = ("run", "part", "shape", "context")
    return next(
        (each for each in measured if each["system"] == system and all(each.get(k) == row.get(k) for k in same)), None
    )


def cache_shares(row: Row) -> tuple[float, float]:
    """Bytes of the cache over those of the same tokens in 16 bits: as it was filled, and after more tokens."""
    first = row["cache_bytes"] / row["token_bytes"] / row["cache_tokens"]
    return first, row["later_bytes"] / row["token_bytes"] / row["later_tokens"] if "later_bytes" in row else first


def _quality(rows: list[Row], measured: list[Row]) -> str:
    first = rows[0]
    caption = f"**{first['shape']}**, trained weights; {first['dtype']}; {first['windows']} windows of 512 tokens of "
    caption += (
        f"held-out text, from Python {first['versions']['python']}, fed through the cache {first['piece']} tokens "
    )
    caption += f"at a time; {origin(rows)}."
    lines = [caption, "", *_head("cache", "perplexity", "x stock")]
    for row in rows:
        if "reason" not in row:
            lines.append(_scores(row, loss(base_of(row, measured), row)))
    return "\n".join(lines + _remarks(rows))


def _stream(rows: list[Row], measured: list[Row]) -> str:
    first = rows[0]
    caption = (
        f"**{first['shape']}**; {first['dtype']}; one stream of {first['tokens']} tokens, which is read a token at a "
    )
    caption += f"time, beyond the model's context of 512; perplexity at {first['places']} places of it, and over all; "
    caption += f"{origin(rows)}."
    lines = [caption, "", *_head("cache", "perplexity", "x recomputation", "over all tokens")]
    for row in rows:
        if "reason" not in row:
            found = loss(base_of(row, measured, f"recompute:{row['window']}"), row)
            lines.append(_scores(row, found, f"{math.exp(row['stream_nats']):.3f}" if "stream_nats" in row else ""))
    return "\n".join(lines + _remarks(rows))


def _decode(rows: list[Row], measured: list[Row]) -> str:
    """Two tables: times, and bytes."""
    first, contexts = rows[0], sorted({row["context"] for row in rows})
    by_system: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_system.setdefault(row["system"], {})
        if "reason" not in row:
            by_system[row["system"]][row["context"]] = row
    hardware = first["hardware"]
    bandwidth = median(row["bandwidth_bytes_per_s"] for row in rows) / 1e9
    machine = hardware.get("gpu") or f"{first['threads']} threads of {hardware['cpu']} ({hardware['cpu_capability']})"
    caption = f"**{first['shape']}**" + (f" cut to {first['layers']} layers" if first["layers"] else "")
    caption += f"; {first['dtype']}; a decode step, by tokens in the cache; {machine}, reading {bandwidth:.0f} GB/s; "
    times = [caption + f"{origin(rows)}.", ""]
    columns = [text for each in contexts for text in (f"{each}, ms", "x stock")]
    times += _head("cache", *columns, "packing, ms per token")
    sizes = ["The same runs: bytes of the cache over those of 16 bits, and what a step takes beside it.", ""]
    sizes += _head("cache", *(f"{each}, x 16 bits" for each in contexts), *(f"{each}, MB a step" for each in contexts))
    for system, found in by_system.items():
        if not found:
            continue
        cells: list[str] = []
        for row in map(found.get, contexts):
            decode_ms = median(row["decode_ms"]) if row else None
            times_stock = ratio(base_of(row, measured), row, "decode_ms") if row else None
            cells += [number(decode_ms, "{:.1f}"), number(times_stock, "{:.2f}")]
        times.append(line(name_of(system), *cells, _packing(found)))
        shares = [_share(row) for row in map(found.get, contexts)]
        peaks = [number(row and row["step_peak_bytes"], "{:.1f}", 1e6) for row in map(found.get, contexts)]
        sizes.append(line(name_of(system), *shares, *peaks))
    return "\n".join([*times, "", *sizes, *_remarks(rows)])


def _packing(found: dict[int, Row]) -> str:
    """What packing adds to a token, spread over those that are packed at once, at the longest context there is."""
    row = found[max(found)]
    if not row.get("pack_ms"):
        return ""
    return f"{max(0.0, row['pack_ms'] - median(row['decode_ms'])) / row['packs_every']:.1f} at {row['context']}"


def _share(row: Row | None) -> str:
    if row is None:
        return ""
    texts = sorted({f"{share:.2f}" for share in cache_shares(row)})
    return " to ".join(texts)


def _scores(row: Row, found: tuple[float, float] | None, *more: str) -> str:
    texts = ("{:.4f} ± {:.4f}".format(*found) if found else "", *more)
    return line(name_of(row["system"]), f"{math.exp(mean(row['nats'])):.3f}", *texts)


def _head(*columns: str) -> list[str]:
    return [line(*columns), line("---", *(["---:"] * (len(columns) - 1)))]


def _remarks(rows: list[Row]) -> list[str]:
    """Lines under a table: what is not in it, with the reason."""
    notes = [f"{name_of(row['system'])}: {row['note']}" for row in rows if row.get("note")]
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            at = f"{row['context']}" if "context" in row else ""
            failed.setdefault((row["system"], row["reason"]), []).append(at)
    texts = []
    for (system, reason), places in failed.items():
        at = f" at {', '.join(places)}" if any(places) else ""
        texts.append(f"{name_of(system)}{at}: {reason}")
    lines = ["", *(f"* {text}" for text in notes)] if notes else []
    return lines + (["", "Not measured:", "", *(f"* {text}" for text in texts)] if texts else [])
