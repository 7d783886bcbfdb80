"""What a later piece of a prompt finds in the cache, on the meta device: as the pieces before it leave it there.

Attention then runs over it as it does on a real device, with what it unpacks of a quantized cache, block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.families import CacheRow
from hf_accel_patch.ops.kv import BLOCK, pack
from hf_accel_patch.ops.stored import Content, Stored
from hf_accel_patch.passes.cache import BITS, KVCache
from hf_accel_patch.passes.hybrid_layers import QUANTIZED
from hf_accel_patch.passes.offloaded_layers import OFFLOADED

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # keys and values in, those to attend to out


def fill(layer: Any, row: CacheRow, tokens: int) -> None:
    """Let a layer of transformers' own, which has some tokens, have `tokens`."""
    shape = (*layer.keys.shape[:2], max(0, tokens - layer.get_seq_length()))
    more = (layer.keys.new_empty(*shape, size) for size in (row.key_size, row.value_size))
    type(layer).update(layer, *more)
    for name in ("keys", "values"):  # not a slice of more than is kept
        setattr(layer, name, torch.empty_like(getattr(layer, name)))


def later(layer: Any, row: CacheRow, cache: KVCache | None, past: int, new: int) -> tuple[Update | None, list[Tensor]]:
    """The update by which a layer that holds `past` tokens in a cache of this kind takes `new` ones, and the tensors
    that are the cache's own then. None: transformers' own update."""
    if cache is None or row.kind not in cache.layer_classes():
        return None, []
    held = min(past, row.window - 1) if row.window else past
    B, K = layer.keys.shape[:2]

    def empty(tokens: int) -> list[Tensor]:
        return [layer.keys.new_empty(B, K, tokens, size) for size in (row.key_size, row.value_size)]

    if (cache.kind in BITS and row.kind in QUANTIZED) or (cache.offload is not None and row.kind in OFFLOADED):
        return _packed(cache, held, new, empty)
    if row.window:
        return _windowed(empty(held)), []
    both = empty(held + new)
    return _moved(held * B * K * row.key_size, both[0], both[1]), both


def _packed(cache: KVCache, held: int, new: int, empty: Callable[[int], list[Tensor]]) -> tuple[Update, list[Tensor]]:
    """Whole blocks are packed but for the latest tokens, and the new tokens are added to these as they are."""
    recent = min(held, cache.latest + (held - cache.latest) % BLOCK)
    blocks, latest = (held - recent) // BLOCK, empty(recent + new)
    keys, values = empty(held - recent)
    packed = pack(keys, values, cache.bits) if blocks else None
    content = Content(cache.bits, packed, blocks, 0, latest[0], latest[1])
    largest = 0 if packed is None else max(each.numel() * each.itemsize for each in packed)
    update = _moved(largest // latest[0].itemsize, Stored(content, 0), Stored(content, 1))
    return update, [*latest, *(packed or ())]


def _moved(elements: int, keys: Tensor, values: Tensor) -> Update:
    """A buffer of so many elements is moved to one that has room, and goes."""

    def update(new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        new_keys.new_empty(elements)
        return keys, values

    return update


def _windowed(held: list[Tensor]) -> Update:
    """A copy of the window with the new tokens behind it, for this piece only."""

    def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((held[0], keys), dim=2), torch.cat((held[1], values), dim=2)

    return update
