"""Attention to positions in groups beyond a window of neighbours (SelfExtend, arXiv 2401.01325).

A query at position p sees the keys of the last `window` positions, its own among them, at their distances. It sees an
older key at position r at the distance p // group + window - window // group - r // group, so distances stay below
what the model was trained on for texts of up to (trained - window) x group + window tokens. Beyond the trained length,
scores are multiplied by the logarithm of the length over that of the trained one, unless told otherwise. Each score is
computed once, or twice near the edge of the window, in blocks of queries: memory beside inputs and output is linear in
the length.

Shapes: see ops.attention. Far keys and far queries are those rotated to their grouped positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_accel_patch.ops.attention import blocks, evenly, part_of_bias, products, weighed
from hf_accel_patch.ops.case import Mask, Variant
from hf_accel_patch.ops.decode import attend_part
from hf_accel_patch.ops.fused import attention_and_sums

LEAST_ROWS, MOST_ROWS = 256, 512  # of a block of queries for the fused kernels


@dataclass(frozen=True)
class Grouping:
    """Which positions are grouped, and how far a token moves for it."""

    window: int  # tokens
    group: int  # tokens
    trained: int  # tokens
    attention_factor: float | None = None  # times which both queries and keys are longer; None: grows with the text

    def sharpness(self, positions: Tensor) -> Tensor:
        """Times which the scores of these queries are multiplied, for they are spread over more keys than in training:
        the logarithm of the keys that are seen by that of the trained length, beyond it."""
        seen = (positions + 1).clamp(min=self.trained)
        return seen.float().log() / math.log(max(self.trained, 2))

    def of_keys(self, positions: Tensor) -> Tensor:
        """From the position of a key to its group's."""
        return positions.div(self.group, rounding_mode="floor") - positions

    def of_queries(self, positions: Tensor) -> Tensor:
        return self.of_keys(positions) + self.window - self.window // self.group


@dataclass(frozen=True)
class Keys:
    """The keys of S tokens. `far` has the first ones, [B, K, n, D] in one piece or two, up to the last that any query
    sees in a group; `near` the last ones, from the first that any sees as a neighbour."""

    far: Sequence[Tensor] = field(repr=False)
    near: Tensor = field(repr=False)


def attend_grouped(
    query: Tensor, far_query: Tensor, keys: Keys, value: Tensor, mask: Mask, variant: Variant, window: int
) -> Tensor:
    """The output [B, H, T, V] of T queries, the last of which is at the last of S keys. The window counts tokens, and
    so does padding between them."""
    (B, H, T, D), S = query.shape, value.shape[2]
    one_size = value.shape[-1] == D and query.dtype == value.dtype
    if query.is_cpu and variant.plain and not variant.dropout and one_size and not torch.is_grad_enabled():
        given = [_joined(query, far_query, keys, value, mask, variant, window, *some) for some in _rows(T, window)]
    else:
        some = blocks(T, S * B * H * 8, cpu=query.is_cpu)
        given = [_block(query, far_query, keys, value, mask, variant, window, *each)[0] for each in some]
    return given[0] if len(given) == 1 else torch.cat(given, dim=2)


def scored_grouped(
    query: Tensor, far_query: Tensor, keys: Keys, value: Tensor, mask: Mask, variant: Variant, window: int
) -> tuple[Tensor, Tensor]:
    """The output [B, H, T, V] and the weights [B, H, T, S], with every score in memory."""
    return _block(query, far_query, keys, value, mask, variant, window, 0, query.shape[2])


def _block(
    query: Tensor,
    far_query: Tensor,
    keys: Keys,
    value: Tensor,
    mask: Mask,
    variant: Variant,
    window: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Queries start..stop: far from the keys before `near`, near to those from `far` on, and either between."""
    T, S = query.shape[2], value.shape[2]
    own = S - T + start  # the key that is the first query's own
    last = own + stop - start
    near, far = max(0, own - window + 1), max(0, last - window)
    queries, far_queries = query[:, :, start:stop], far_query[:, :, start:stop]
    skipped = S - keys.near.shape[2]
    scores = products(queries, keys.near[:, :, near - skipped : last - skipped])
    if far:
        grouped = _far(far_queries, keys.far, far)
        if far > near:
            rows = torch.arange(own, last, device=query.device)[:, None]
            is_near = torch.arange(near, far, device=query.device) > rows - window
            both = torch.where(is_near, scores[..., : far - near], grouped[..., near:])
            scores = torch.cat((both, scores[..., far - near :]), dim=-1)
        scores = torch.cat((grouped[..., :near], scores), dim=-1)
    block, bias = mask.block(start, stop, 0, last), part_of_bias(variant.bias, start, stop, 0, last)
    if variant.sinks is not None and variant.sinks.shape[2] != 1:
        variant = replace(variant, sinks=variant.sinks[:, :, start:stop])
    return weighed(scores.float() * variant.factor, value[:, :, :last], block, bias, variant, query.dtype)


def _far(queries: Tensor, pieces: Sequence[Tensor], count: int) -> Tensor:
    """Scores of the first `count` far keys."""
    found = []
    for piece in pieces:
        some = min(count, piece.shape[2])
        count -= some
        if some:
            found.append(products(queries, piece[:, :, :some]))
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _rows(length: int, window: int) -> Iterator[tuple[int, int]]:
    """Blocks of queries as long as the window: what lies between is then scored twice at most once more than once."""
    return evenly(length, min(max(LEAST_ROWS, window), MOST_ROWS))


def _joined(
    query: Tensor,
    far_query: Tensor,
    keys: Keys,
    value: Tensor,
    mask: Mask,
    variant: Variant,
    window: int,
    start: int,
    stop: int,
) -> Tensor:
    """The same as `_block`, by fused kernels: of near and of far keys, joined by the sums of their weights (arXiv
    2205.14135)."""
    own = value.shape[2] - query.shape[2] + start
    last = own + stop - start
    near, far = max(0, own - window + 1), max(0, last - window)
    skipped, one = value.shape[2] - keys.near.shape[2], last - own == 1
    rows = None if one else torch.arange(own, last, device=query.device)[:, None]
    plain = mask.square and mask.padding is None

    def part(queries: Tensor, some: Tensor, first: int, end: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        if not plain:
            block = mask.block(start, stop, first, end)
            seen = block if seen is None else seen if block is None else _both(seen, block)
        return _fused(queries[:, :, start:stop], some, value[:, :, first:end], seen, variant)

    seen = None
    if rows is not None:
        places = torch.arange(near, last, device=query.device)
        seen = (places > rows - window) & (places <= rows)
    parts = [part(query, keys.near[:, :, near - skipped : last - skipped], near, last, _four(seen))]
    first = 0
    for piece in keys.far:
        for begin, end, only in ((first, near, True), (max(first, near), far, False)):
            end = min(end, first + piece.shape[2])
            if begin < end:
                seen = None
                if rows is not None and not only:
                    seen = torch.arange(begin, end, device=query.device) <= rows - window
                parts.append(part(far_query, piece[:, :, begin - first : end - first], begin, end, _four(seen)))
        first += piece.shape[2]
    if len(parts) == 1:
        return parts[0][0]
    outputs, sums = zip(*parts, strict=True)
    weights = torch.softmax(torch.stack(sums).clamp(min=torch.finfo(torch.float32).min), dim=0)
    return sum(each * weight[..., None] for each, weight in zip(outputs, weights, strict=True)).to(query.dtype)


def _four(seen: Tensor | None) -> Tensor | None:
    return None if seen is None else seen[None, None]


def _both(seen: Tensor, mask: Tensor) -> Tensor:
    return seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: Variant) -> tuple[Tensor, Tensor]:
    """Attention [B, H, T, V] and the logarithms of the sums of exp(score) [B, H, T], -inf where no key is seen."""
    found = attend_part(query, key, value, mask, variant)
    if found is not None:
        return found[0].transpose(1, 2), found[1].transpose(1, 2)
    return attention_and_sums(query, key, value, mask, variant.scale)
