"""Which passes over a cache can be recorded, and what they see of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_accel_patch.passes.layers import InPlaceLayer, InPlaceSlidingWindowLayer
from hf_accel_patch.passes.rooms import Room


def windows(model: PreTrainedModel, cache: Any) -> list[int | None] | None:
    """How many keys each layer sees, None: all. A cache that was made without a configuration keeps all of them,
    and the model hides them nevertheless. None where a layer keeps fewer than it sees."""
    found: list[int | None] = [None] * len(cache.layers)
    for i, layer in enumerate(DynamicCache(config=model.config.get_text_config(decoder=True)).layers[: len(found)]):
        found[i] = layer.sliding_window if layer.is_sliding else None
    held = [layer.sliding_window if layer.is_sliding else None for layer in cache.layers]
    return found if all(own in (None, window) for own, window in zip(held, found, strict=True)) else None


def masks(model: PreTrainedModel, room: Room, places: Tensor, size: int, cache: Any) -> Any:
    """What tokens at `places` [B, T] see of the first `size` entries, [B, 1, T, S], as the model takes it: by the kind
    of layer where there are two."""
    columns, seen = room.columns[:size], room.seen[:, None, :size]
    mask, found = (columns <= places[:, :, None]) & seen, {}
    for window in windows(model, cache) or ():
        kind = "full_attention" if window is None else "sliding_attention"
        if kind not in found:
            part = mask if window is None else mask & (columns > places[:, :, None] - window)
            if model.config.get_text_config(decoder=True)._attn_implementation == "eager":
                added = torch.zeros(part.shape, dtype=model.dtype, device=part.device)
                part = added.masked_fill(~part, torch.finfo(model.dtype).min)
            found[kind] = part[:, None]
    return found if len(found) > 1 else next(iter(found.values()))


def unfit(cache: Any, model: PreTrainedModel) -> str:
    """Why passes of this model over this cache are not recorded."""
    if cache.offloading:
        return "the cache offloads itself"
    for layer in cache.layers:
        if type(layer) not in (InPlaceLayer, InPlaceSlidingWindowLayer):
            return f"a layer of the cache is a {type(layer).__name__}"
        placed = layer.placed()
        if placed is None or layer.first() + len(placed[0]) != cache.get_seq_length():
            return "a layer of the cache holds other tokens than the first"
        if any(type(each.buffer) is not Tensor or each.buffer.requires_grad for each in placed):
            return "a layer of the cache holds no plain tensor"
    return "" if windows(model, cache) is not None else "a layer of the cache has another window than the model's"
