"""Attention to latents without expanding them (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

A head's keys are k = (U c, r) of a latent c [R] and a rotated part r [P] that all heads share, and its values v = D c.
So q . k = (U^T q1) . c + q2 . r, and the sum of weighted values is D times that of the weighted latents: with the
weights absorbed by query and output, all heads attend to one head with keys (c, r) and values c. Each new token then
costs more, and the cached ones need not be expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.ops.attention import attend
from hf_accel_patch.ops.case import Mask, Variant
from hf_accel_patch.ops.decode import MOST_TOKENS, PART_TOKENS, Part, attend_cached, attend_parts
from hf_accel_patch.ops.lazy import Lazy
from hf_accel_patch.ops.stored import Stored
from hf_accel_patch.ops.wide import WIDENED

ADVANTAGE = 2  # of expanding, for it is one large product: this many operations take the time of one
MOST_ROWS = 512  # heads times tokens: from there on the kernel's parts of sums take memory, and products are as fast
UNPACKING = 64  # operations in which a quantized weight is unpacked


@dataclass(frozen=True)
class Latents:
    """What is cached of S tokens, and the way to keys and values. `expand` gives keys [B, H, S, N + P] and values
    [B, H, S, V], `weight` the matrix [H * (N + V), R] of U and D, head by head."""

    latent: Tensor  # [B, 1, S, R], may be `Stored`
    rotated: Tensor  # [B, 1, S, P], likewise
    key_size: int  # N
    value_size: int  # V
    heads: int  # H
    unpacks: bool  # whether `weight` must be unpacked first
    weight: Callable[[], Tensor]
    expand: Callable[[], tuple[Tensor, Tensor]]

    @cached_property
    def expanded(self) -> tuple[Tensor, Tensor]:
        return self.expand()

    def stay(self, T: int) -> bool:
        """Whether T tokens attend to the latents in fewer operations than it takes to expand them."""
        S, R, P = self.latent.shape[2], self.latent.shape[3], self.rotated.shape[3]
        matrix, B = R * (self.key_size + self.value_size), self.latent.shape[0]
        here = B * T * (S * (2 * R + P) + matrix) + (UNPACKING * matrix if self.unpacks else 0)
        there = B * S * (matrix + T * (self.key_size + P + self.value_size))
        return ADVANTAGE * here < there

    def parts(self) -> Iterator[Part]:
        """Keys (c, r) and values c in float32, some tokens at a time."""
        if isinstance(self.latent, Stored):
            for first, last, latent, rotated in self.latent.content.parts():
                yield first, last, torch.cat((latent, rotated), dim=-1).float(), latent.float()
            return
        S = self.latent.shape[2]
        for first in range(0, S, PART_TOKENS):
            last = min(first + PART_TOKENS, S)
            latent, rotated = self.latent[:, :, first:last], self.rotated[:, :, first:last]
            keys = torch.cat((latent, rotated), dim=-1).float()
            yield first, last, keys, keys[..., : latent.shape[-1]]


class Latent(Lazy):
    """The keys [B, H, S, N + P] or the values [B, H, S, V] of some `Latents`, which attention reads instead."""

    fixed = "keys and values of latents cannot be changed in place"
    latents: Latents
    part: int  # 0 keys, 1 values

    @staticmethod
    def __new__(cls, latents: Latents, part: int) -> Latent:
        like = latents.latent
        size = latents.value_size if part else latents.key_size + latents.rotated.shape[-1]
        shape = (like.shape[0], latents.heads, like.shape[2], size)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.latents, made.part = latents, part
        return made

    def dense(self) -> Tensor:
        """As the model's own method gives it."""
        return self.latents.expanded[self.part].contiguous()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Latent(shape={tuple(self.shape)}, part={self.part})"


def attend_latents(query: Tensor, latents: Latents, mask: Mask, variant: Variant) -> Tensor:
    """Attention of T tokens [B, H, T, N + P] in the space of the latents: [B, T, H, V]. No gradients flow into them."""
    N, R = latents.key_size, latents.latent.shape[-1]
    matrix = latents.weight().view(latents.heads, -1, R)
    absorbed = _by_head(query[..., :N], matrix[:, :N], transposed=False)
    rows = torch.cat((absorbed, query[..., N:]), dim=-1)
    return _by_head(_attend(rows, latents, mask, variant), matrix[:, N:], transposed=True).transpose(1, 2)


def _attend(query: Tensor, latents: Latents, mask: Mask, variant: Variant) -> Tensor:
    """Attention of [B, H, T, R + P] to keys (c, r) and values c: [B, H, T, R]."""
    (_, H, T, _), S, stored = query.shape, latents.latent.shape[2], isinstance(latents.latent, Stored)
    if T <= MOST_TOKENS and H * T <= MOST_ROWS and not stored:
        seen = mask.block(0, T, 0, S)
        output = attend_cached(query, latents.latent, latents.latent, seen, variant, latents.rotated)
        if output is not None:
            return output.transpose(1, 2)
    if query.is_cpu or stored:
        return attend_parts(query.float(), latents.parts(), mask, variant).to(query.dtype)
    keys = torch.cat((latents.latent, latents.rotated), dim=-1).float()
    return attend(query.float(), keys, keys[..., : latents.latent.shape[-1]], mask, variant).to(query.dtype)


def _by_head(x: Tensor, matrix: Tensor, *, transposed: bool) -> Tensor:
    """x [B, H, T, n] times each head's matrix [H, n, m], or its transpose, [H, m, n]: [B, H, T, m]."""
    B, H, T, n = x.shape
    rows = x.transpose(0, 1).reshape(H, B * T, n)
    if x.is_cpu and (x.dtype is torch.float16 or x.dtype in WIDENED):
        each = zip(rows.float(), matrix, strict=True)
        y = torch.stack([a @ (m.float().T if transposed else m.float()) for a, m in each]).to(x.dtype)
    elif transposed:  # in this order, for a row times a transpose is up to five times slower
        y = torch.bmm(matrix, rows.transpose(1, 2)).transpose(1, 2)
    else:
        y = torch.bmm(rows, matrix)
    return y.reshape(H, B, T, -1).transpose(0, 1)
