"""Rotary positions: how a cached key moves to another position.

A key at position p is its unrotated self times R(p), so R(d) takes it to p + d. Which function of a model's file does
that, on which channels, by which frequencies, differs from model to model and from layer to layer. It is tried out, not
listed: the keys of a sequence of one token do not depend on its position but for their rotation.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_accel_patch.compat import CACHE
from hf_accel_patch.families import View, first_cached_module

APPLY = ("apply_rotary_pos_emb", "apply_rotary_emb")  # function(query, key, cos, sin) in the files of models
NEAR, FAR = 3, 40  # the positions that are compared
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # in 16 bits 2e-2: two roundings of 2^-8


@dataclass(frozen=True, eq=False)
class Rotation:
    """R(d), as the model's own rotary module and the function beside its attention have it."""

    rotary: nn.Module
    apply: Callable[..., Any]
    layer_type: str | None
    partly: bool  # the function gets the rotated channels only, which are the first

    def __call__(self, keys: Tensor, distance: Tensor) -> Tensor:
        """keys [B, K, S, D] moved by `distance` positions, [B or 1] or [B or 1, S], rotated in float32."""
        options = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = self.rotary(keys.float(), distance.view(len(distance), -1).to(keys.device), **options)
        length = torch.sqrt(cos * cos + sin * sin)  # not 1 where the method scales the scores as well (YaRN)
        return self.by(keys, cos / length, sin / length)

    def by(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """keys [B, K, S, D] rotated by angles, as the rotary module gives them [B or 1, S, ...]."""
        kept = keys.float()
        if not self.partly:
            return self.apply(kept[:, :1], kept, cos, sin)[1].to(keys.dtype)  # the query is not asked for
        size = cos.shape[-1]
        rotated = self.apply(kept[:, :1, :, :size], kept[..., :size], cos, sin)[1]
        return torch.cat((rotated, kept[..., size:]), dim=-1).to(keys.dtype)


@dataclass(frozen=True, eq=False)
class Moves:
    """What a layer's cache must do to move: rotate its keys, or the second tensor of a latent cache, or nothing."""

    rotation: Rotation | None
    part: int = 0


@torch.no_grad()
def moves(view: View) -> list[Moves] | None:
    """For each layer that caches keys and values; None where positions are not rotations that can be found."""
    try:
        near, far = (_cached(view, position) for position in (NEAR, FAR))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None
    candidates, found = list(_candidates(view)), []
    for before, after in zip(near, far, strict=True):
        move = _found(before, after, candidates)
        if move is None:
            return None
        found.append(move)
    return found


@torch.no_grad()
def tells_positions(view: View) -> bool:
    """Whether layers are handed the positions of their tokens beside the cache. A token is read to see it."""
    first, found = first_cached_module(view), []
    if first is None:
        return False

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        found.append(isinstance(positions, Tensor) and positions.ndim == 2)

    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        _cached(view, NEAR)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        handle.remove()
    return found == [True]


def _found(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], candidates: list[Rotation]) -> Moves | None:
    same = [_close(*pair) for pair in zip(before, after, strict=True)]
    if all(same):
        return Moves(None)
    if not any(same):
        return None
    part = same.index(False)
    distance = torch.tensor([FAR - NEAR])
    for rotation in candidates:
        try:
            moved = rotation(before[part], distance)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
            continue
        if moved.shape == after[part].shape and _close(moved, after[part]):
            return Moves(rotation, part)
    return None


def _cached(view: View, position: int) -> list[tuple[Tensor, Tensor]]:
    """What the layers cache for one token at a position."""
    cache, device = DynamicCache(config=view.config), next(view.model.parameters()).device
    one = torch.ones(1, 1, dtype=torch.long, device=device)
    view.model(one, position_ids=position * one, use_cache=True, **{CACHE: cache})
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    if any(layer.keys is None for layer in layers):
        raise ValueError("a layer caches something else than tokens of the text, as cross-attention does")
    return [(layer.keys, layer.values) for layer in layers]


def _candidates(view: View) -> Iterator[Rotation]:
    files = {sys.modules.get(type(module).__module__) for _, module in view.named_modules()}
    found: set[Any] = {vars(file).get(name) for file in files if file for name in APPLY}
    for _, rotary in view.rotary_modules():
        kinds: list[str | None] = [None]
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            kinds = sorted(set(view.config.layer_types))
        for apply in found - {None}:
            for kind in kinds:
                for partly in (False, True):
                    yield Rotation(rotary, apply, kind, partly)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
    return bool(error < TOLERANCE.get(a.dtype, 2e-2))
