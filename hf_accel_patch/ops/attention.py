"""Exact softmax attention in memory linear in the length, on PyTorch's own kernels.

Shapes: query [B, H, T, D], key [B, K, S, D], value [B, K, S, V], with H a multiple of K (grouped-query attention); keys
and values are never copied per query head. T new tokens attend to S cached ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_BYTES = 32 << 20  # scores and masks that exist at a time; a block of queries is as long as this allows
MAX_ROWS = 512  # longer blocks gain nothing, and compute more above the diagonal


class Mask(Protocol):
    """Which keys a query may see, described instead of stored."""

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        """A range of keys outside of which queries start..stop see nothing."""
        ...

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        """The mask [B or 1, H or 1, stop - start, last - first] of these queries and keys: bool, True where seen, or
        additive. None: all are seen."""
        ...

    def spans(self) -> list[tuple[int, int]] | None:
        """If the mask is causal within one contiguous run of tokens per sequence, and nothing else: these runs."""
        ...


@dataclass(frozen=True)
class Causal:
    """Query t sees the keys up to t. Keys beyond the queries (a static cache's free part) are never seen."""

    length: int
    device: torch.device

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        return 0, stop

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        rows = torch.arange(start, stop, device=self.device)[:, None]
        return (torch.arange(first, last, device=self.device) <= rows)[None, None]

    def spans(self) -> list[tuple[int, int]] | None:
        return None


@dataclass(frozen=True)
class Dense:
    """A mask that exists already, [B or 1, H or 1, T or 1, S], bool or additive."""

    mask: Tensor

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        return 0, self.mask.shape[-1]

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        rows = slice(None) if self.mask.shape[-2] == 1 else slice(start, stop)
        return self.mask[:, :, rows, first:last]

    def spans(self) -> list[tuple[int, int]] | None:
        return None


@dataclass(frozen=True)
class Everything:
    """Every query sees every key."""

    length: int

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        return 0, self.length

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        return None

    def spans(self) -> list[tuple[int, int]] | None:
        return None


@dataclass(frozen=True)
class Variant:
    """What an architecture adds to softmax(scale * q k^T) v."""

    scale: float
    dropout: float = 0.0
    softcap: float | None = None  # scores become cap * tanh(scores / cap) before masking (Gemma 2)
    sinks: Tensor | None = field(
        default=None, repr=False
    )  # [B or 1, H, T or 1, 1], one more logit without a value (gpt-oss)
    bias: Tensor | None = field(default=None, repr=False)  # added to the scores, [B or 1, H, T, S]

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None and self.bias is None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, variant: Variant) -> Tensor:
    """The attention output [B, H, T, V], block of queries by block of queries.

    Memory beside inputs and output is at most about SCORE_BYTES, or what a single query needs.
    """
    B, H, T, _ = query.shape
    spans = mask.spans() if variant.plain and query.shape[-1] == value.shape[-1] else None
    if spans is not None:
        return _by_sequence(query, key, value, spans, variant)
    fused = variant.plain and query.shape[-1] == value.shape[-1]
    outputs = []
    for start, stop in _blocks(T, key.shape[2] * B * (5 if fused else 8 * H)):
        first, last = mask.keys(start, stop)
        block, part = mask.block(start, stop, first, last), query[:, :, start:stop]
        keys, values = key[:, :, first:last], value[:, :, first:last]
        if fused:
            outputs.append(_fused(part, keys, values, block, variant))
        else:
            bias = None if variant.bias is None else variant.bias[..., start:stop, first:last]
            sinks = variant.sinks
            if sinks is not None and sinks.shape[2] != 1:
                sinks = sinks[:, :, start:stop]
            outputs.append(scored(part, keys, values, block, bias, replace(variant, sinks=sinks))[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def scored(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, variant: Variant
) -> tuple[Tensor, Tensor]:
    """The output [B, H, T, V] and the attention weights [B, H, T, S], with every score in memory, in float32."""
    B, H, T, D = query.shape
    K, S = key.shape[1], key.shape[2]
    scores = torch.matmul(query.reshape(B, K, H // K * T, D), key.transpose(-1, -2))
    scores = scores.view(B, H, T, S).float() * variant.scale
    if variant.softcap is not None:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        lowest = torch.finfo(query.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if variant.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sinks = variant.sinks.float().expand(B, H, T, 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    weights = weights.to(value.dtype)
    used = F.dropout(weights, variant.dropout) if variant.dropout else weights
    output = torch.matmul(used.reshape(B, K, H // K * T, S), value)
    return output.view(B, H, T, -1), weights


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: Variant) -> Tensor:
    """The definition, query by query and head by head in float64: slow, for tests. `mask` is a bool [B, H, T, S]."""
    B, H, T, _ = query.shape
    output = torch.zeros(B, H, T, value.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            k, v = (x[b, h * x.shape[1] // H].double() for x in (key, value))
            for t in range(T):
                scores = variant.scale * (k @ query[b, h, t].double())
                if variant.softcap is not None:
                    scores = variant.softcap * torch.tanh(scores / variant.softcap)
                if variant.bias is not None:
                    scores = scores + variant.bias.expand(B, H, T, -1)[b, h, t].double()
                seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[b, h, t]
                total = torch.exp(scores[seen]).sum()
                if variant.sinks is not None:
                    total = total + torch.exp(variant.sinks.expand(B, H, T, 1)[b, h, t, 0].double())
                if seen.any():
                    output[b, h, t] = (torch.exp(scores[seen])[:, None] * v[seen]).sum(0) / total
    return output


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: Variant) -> Tensor:
    """scaled_dot_product_attention without expanded keys and values. Its CPU kernel groups heads also under a mask; on
    other devices a mask sends grouped heads to the kernel that stores all scores, so they are folded into the rows."""
    B, H, T, D = query.shape
    K = key.shape[1]
    if H == K or mask is None or query.device.type == "cpu":
        return F.scaled_dot_product_attention(
            query, key, value, mask, variant.dropout, scale=variant.scale, enable_gqa=H != K
        )
    if mask.shape[1] != 1:
        mask = mask.reshape(mask.shape[0], K, -1, mask.shape[-1])
    elif mask.shape[2] != 1:
        mask = mask.repeat(1, 1, H // K, 1)
    folded = query.reshape(B, K, H // K * T, D)
    output = F.scaled_dot_product_attention(folded, key, value, mask, variant.dropout, scale=variant.scale)
    return output.reshape(B, H, T, -1)


def _by_sequence(query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], variant: Variant) -> Tensor:
    """Causal attention within each sequence's own run of tokens. Padded positions, which nobody reads, get zeros."""
    output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    for row, (start, stop) in enumerate(spans):
        if stop > start:
            q, k, v = (x[row : row + 1, :, start:stop] for x in (query, key, value))
            output[row : row + 1, :, start:stop] = F.scaled_dot_product_attention(
                q, k, v, None, variant.dropout, is_causal=True, scale=variant.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
    return output


def _blocks(length: int, bytes_per_row: int) -> Iterator[tuple[int, int]]:
    rows = max(1, min(MAX_ROWS, SCORE_BYTES // max(1, bytes_per_row)))
    rows = math.ceil(length / math.ceil(length / rows)) if length else 1  # blocks of equal size
    for start in range(0, length, rows):
        yield start, min(start + rows, length)
