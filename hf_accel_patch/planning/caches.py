"""Bytes of a k/v cache, from what each layer caches of a token: as stock keeps it, and as each kind of ours does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_accel_patch.families import CacheRow
from hf_accel_patch.ops.kv import BLOCK, block_bytes
from hf_accel_patch.passes.cache import KVCache
from hf_accel_patch.passes.hybrid_layers import QUANTIZED
from hf_accel_patch.passes.layers import IN_PLACE, LEAST, SLACK, WINDOW_LEAST, WINDOW_SLACK
from hf_accel_patch.passes.offloaded_layers import OFFLOADED
from hf_accel_patch.passes.quantized_layers import SLACK as PACKED_SLACK

LATEST_LEAST = 16  # tokens for which a quantized layer has room beyond the latest ones


@dataclass(frozen=True)
class Kept:
    """Bytes of a cache: right after a prompt of that many tokens; and at most, where a text has grown to as many token
    by token, with the room for more that buffers have then and with what a buffer is moved out of."""

    prompt: int
    grown: int


def kept(
    cache: KVCache | None, rows: Sequence[CacheRow], tokens: int, batch: int, width: int, piece: int | None = None
) -> Kept:
    """Of `batch` sequences of `tokens`, in numbers of `width` bytes. None: stock's cache. `piece`: so many tokens of
    the prompt are read at a time; None: all of them."""
    prompt, grown, moved = 0, 0, 0
    for row in rows:
        size = row.heads * (row.key_size + row.value_size) * width * batch
        seen = min(tokens, row.window - 1) if row.window else tokens
        if cache is None or row.kind not in cache.layer_classes():
            prompt, grown, moved = prompt + seen * size, grown + seen * size, max(moved, seen * size // 2)
            continue
        if cache.offload is not None and row.kind in OFFLOADED:
            stays = min(tokens, cache.latest + BLOCK) * size
            unpacked = min(tokens, cache.latest + piece + LATEST_LEAST) * size if piece else stays
            prompt, grown = prompt + unpacked, grown + stays
            continue
        if cache.kind in ("int8", "int4") and row.kind in QUANTIZED:
            packed = _packed(cache, row, seen, batch, width)
            prompt += _packed(cache, row, seen, batch, width, piece) if piece else packed
            grown, moved = grown + packed, max(moved, packed // 2)
            continue
        least, slack = (WINDOW_LEAST, WINDOW_SLACK) if row.window else (LEAST, SLACK)
        if cache.window is not None and row.window is None:
            seen = min(seen, cache.window)
        room = max(least, int(seen * slack)) if row.window else least  # a window is filled up from its own end
        if piece and not row.window:
            room = _grown(seen, piece, slack, least) - seen
        prompt += (seen + room) * size if row.kind in IN_PLACE else seen * size
        grown += (seen + max(least, int(seen * slack))) * size
        moved = max(moved, seen * size // 2)
    return Kept(prompt, grown + moved)


def _packed(cache: KVCache, row: CacheRow, tokens: int, batch: int, width: int, piece: int | None = None) -> int:
    """Whole blocks beyond the latest tokens, with their spare room, and the buffer for these. After a piece of a prompt
    it has that piece as it was, until the next tokens come."""
    unpacked = 0 if piece is None or row.window else piece
    blocks = max(0, tokens - cache.latest - unpacked) // BLOCK
    latest = max(tokens - blocks * BLOCK, cache.latest + BLOCK)
    if piece is not None:
        latest = min(tokens, cache.latest) + piece + LATEST_LEAST
    blocks += int(blocks * PACKED_SLACK)
    content = blocks * block_bytes(row.key_size, row.value_size, cache.bits)
    return batch * row.heads * (content + latest * (row.key_size + row.value_size) * width)


def _grown(tokens: int, piece: int, slack: float, least: int) -> int:
    """The length of a buffer to which a prompt has come piece by piece."""
    held = room = 0
    while held < tokens:
        added = min(piece, tokens - held)
        if held + added > room:
            room = held + added + max(least, int(held * slack))
        held += added
    return room
