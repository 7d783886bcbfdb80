"""The part that all keys of a layer have in common, held apart from what is quantized.

A bias of the key projection adds a constant to every key before it is rotated to its position. In Qwen2.5 it is tens of
times larger than the rest, which is what breaks other 4-bit caches there; and where it rotates fast, no scale of a
block fits both. So the constant c is taken off before keys are packed, k - R(p) c at place p, and q R(p) c is added to
their scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_accel_patch.ops.kv import BLOCK

Rotate = Callable[[Tensor, Tensor], Tensor]  # keys [B, K, S, D] moved by distances [B or 1, S]

LATEST = 256  # keys from which the constant is estimated
LARGE = 6.0  # times the usual spread of a channel; smaller ones cost a scale little


@dataclass(frozen=True, eq=False)
class Constant:
    """`base` [B, K, D], float32: the constant at place 0. Places are counted in the stream of cached tokens; what a
    model calls their positions differs by a number that is the same for all tokens of a sequence."""

    base: Tensor
    rotate: Rotate

    def at(self, first: int, count: int) -> Tensor:
        """R(p) c for `count` places from `first` on: [B, K, count, D]."""
        places = torch.arange(first, first + count, device=self.base.device)[None]
        B, K, D = self.base.shape
        return self.rotate(self.base[:, :, None].expand(B, K, count, D), places)

    def scores(self, query: Tensor, first: int, blocks: int) -> Tensor:
        """q R(p) c for query [B, H, T, D] and whole blocks from the place `first` on: [B, H, T, 64 blocks], float32.

        Within a block places differ by 0 to 63, so the query moves back by the place of each block, and one table
        serves all of them."""
        (B, H, T, D), K = query.shape, self.base.shape[1]
        starts = torch.arange(first, first + blocks * BLOCK, BLOCK, device=query.device)[None]
        moved = self.rotate(query.float().reshape(B, H * T, 1, D).expand(B, H * T, blocks, D), -starts)
        table = self.at(0, BLOCK)
        return torch.matmul(moved.reshape(B, K, -1, D), table.mT).view(B, H, T, blocks * BLOCK)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Constant:
        """The same for other sequences, or on another device."""
        return replace(self, base=change(self.base))


def constant_of(keys: Tensor, first: int, rotate: Rotate) -> Constant | None:
    """The constant in keys [B, K, S, D] from the place `first` on, if it is large."""
    S = keys.shape[2]
    some = keys[:, :, max(0, S - LATEST) :].float()
    places = torch.arange(first + S - some.shape[2], first + S, device=keys.device)[None]
    still = rotate(some, -places)
    mean, spread = still.mean(2), still.std(2)
    large = mean.abs().amax(-1) > LARGE * spread.median(-1).values
    return Constant(mean, rotate) if bool(large.any()) else None
