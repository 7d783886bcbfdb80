"""How a cache comes to know the positions of its tokens, and is told those of new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from hf_accel_patch.families import View, first_cached_module
from hf_accel_patch.families.rotary import Key, Turn, turn_at
from hf_accel_patch.families.rotation import Rotation, tells_positions
from hf_accel_patch.journal import Journal
from hf_accel_patch.passes.layers import _InPlace
from hf_accel_patch.passes.placed import PlacedStaticLayer, Rotated

MARK = "_hf_accel_turning"  # on a cache whose layers turn their keys
Found = tuple[tuple[Rotation, int, Key] | None, ...]  # of each layer that holds keys, how they are rotated


@dataclass(frozen=True)
class ConvertingToPlaced:
    """The hook on the first layer that meets a cache: those of its layers whose keys need it become ones that know
    their positions."""

    classes: Mapping[type, type]
    found: Found = field(repr=False)
    rotated: Callable[..., Rotated]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((each for each in (*kwargs.values(), *args) if isinstance(each, Cache)), None)
        if cache is None:
            return
        if not vars(cache).get(MARK):
            if torch.compiler.is_compiling():
                return
            self.convert(cache)
        _give(cache, kwargs.get("position_ids"))

    def convert(self, cache: Cache) -> None:
        vars(cache)[MARK] = True
        cache = _of_the_text(cache)
        turnings = [each and self.rotated(*each) for each in self.found]
        holding = [layer for layer in cache.layers if isinstance(layer, DynamicLayer | StaticLayer)]
        if len(holding) == len(turnings):
            for layer, turning in zip(holding, turnings, strict=True):
                if turning is not None and type(layer) in self.classes:
                    _convert(layer, self.classes[type(layer)], turning)
        elif not holding and cache.layer_class_to_replicate in self.classes:
            same = {each and (each.part, each.key) for each in turnings}
            if len(same) == 1 and turnings[0] is not None:
                kind = self.classes[cache.layer_class_to_replicate]
                cache.layer_class_to_replicate = partial(_new, kind, turnings[0])


def follow(view: View, converting: ConvertingToPlaced, journal: Journal) -> None:
    """Let the caches of a model know positions; static ones, if its layers are handed those."""
    first, kinds = first_cached_module(view), converting.classes
    generates = hasattr(type(view.model), "_prepare_static_cache")
    static = StaticLayer in kinds and generates and tells_positions(view)
    kinds = {kind: ours for kind, ours in kinds.items() if static or not issubclass(kind, StaticLayer)}
    if first is not None:
        journal.add_forward_pre_hook(first, replace(converting, classes=kinds))
    if StaticLayer in kinds:
        journal.bind_method(view.model, "_prepare_static_cache", prepare_static_cache)


def prepare_static_cache(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Cache:
    """`generate`'s own, with layers that know their positions from the start: a prompt that is read in chunks meets its
    cache in a compiled call, in which none can be converted."""
    cache: Cache = type(self)._prepare_static_cache(self, *args, **kwargs)
    for module in self.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, ConvertingToPlaced):
                hook.convert(cache)
    for layer in _of_the_text(cache).layers if "model_kwargs" in kwargs else ():
        if isinstance(layer, PlacedStaticLayer):
            layer.expect(kwargs["model_kwargs"].get("position_ids"))
    return cache


def _give(cache: Cache, positions: Tensor | None) -> None:
    """Tell the layers of a fixed size which positions come next; those that are rotated alike share what they learn."""
    turns: dict[Key, Turn] = {}
    for layer in _of_the_text(cache).layers:
        if isinstance(layer, PlacedStaticLayer) and positions is not None and positions.ndim == 2:
            key = layer.turning.key
            if key not in turns:
                turns[key] = turn_at(layer.turning.rotation.rotary, key[1], positions)
            layer.given = turns[key]


def _of_the_text(cache: Any) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _convert(layer: Any, kind: type, turning: Rotated) -> None:
    if isinstance(layer, StaticLayer):
        layer.__class__, layer.turning = kind, turning
        layer.begin()
        return
    held = isinstance(layer, _InPlace)
    keys, values = (None, None) if held else (vars(layer).pop(name, None) for name in ("keys", "values"))
    layer.__class__ = kind
    layer.turning = turning
    if keys is not None and keys.ndim == 4:
        layer.take(keys, values)
    elif held:
        layer.begin()


def _new(kind: Any, turning: Rotated) -> Any:
    layer = kind()
    layer.turning = turning
    return layer
