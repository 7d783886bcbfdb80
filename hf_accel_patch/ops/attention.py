"""Exact softmax attention in memory linear in the length, on PyTorch's own kernels.

Shapes: query [B, H, T, D], key [B, K, S, D], value [B, K, S, V], with H a multiple of K (grouped-query attention); keys
and values are never copied per query head. T new tokens attend to S cached ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_accel_patch.ops.case import Mask, Variant
from hf_accel_patch.ops.fused import attention_and_sums, fused_attention
from hf_accel_patch.ops.wide import matmul

SCORE_BYTES = 32 << 20  # scores and masks that exist at a time; a block of queries is as long as this allows
GPU_SCORE_BYTES = 256 << 20  # the same elsewhere: blocks of few queries leave a GPU idle
FOLD = 64.0  # times which a bias fits into float16
PADDED_FROM = 4096  # keys, from which on PyTorch's fused kernel is faster with zeros than blocks of scores without,
PADDED_ROWS = 128  # where there are as many queries: for fewer of them, zeros behind all keys cost more than they save
ROWS, MORE_ROWS, LONG = 128, 256, 4096  # of a block on a CPU, and from so many queries on: short blocks compute less
GPU_ROWS = 512  # above the diagonal, long ones read keys and values less often; on a GPU short ones leave it idle


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, variant: Variant) -> Tensor:
    """The attention output [B, H, T, V], block of queries by block of queries.

    Memory beside inputs and output is at most about SCORE_BYTES, or what a single query needs, or on a GPU copies of
    the inputs.
    """
    (B, H, T, D), (S, V) = query.shape, value.shape[-2:]
    biased = _takes_bias(query, key, value, variant)
    sunk = _sinks_follow(query, key, value, variant)
    fused = variant.plain or biased or sunk
    if fused and query.is_cpu and pads(T, S, D, V):
        return attend(*equal_sizes(query, key, value), mask, variant)[..., :V]
    fused = fused and D == V
    if fused and biased and variant.bias is not None and variant.bias.shape[2] == 1 and mask.square:
        return _row_and_causal(query, key, value, variant.bias, mask.padding, variant.scale)
    if fused and sunk and mask.square and mask.padding is None:
        return _fused(query, key, value, None, variant, causal=True)
    folds = not query.is_cpu and mask.square and _folds(query, key, value, variant)
    spans = mask.spans() if folds or (fused and not biased) else None
    if spans is not None:
        return _by_sequence(query, key, value, spans, variant)
    if folds and mask.padding is None:
        return _row_as_channels(query, key, value, variant)
    outputs = []
    row_bytes = key.shape[2] * B * (5 if fused and not biased else 8 * H)
    for start, stop in blocks(T, row_bytes, cpu=query.is_cpu):
        first, last = mask.keys(start, stop)
        block, part = mask.block(start, stop, first, last), query[:, :, start:stop]
        keys, values = key[:, :, first:last], value[:, :, first:last]
        bias = part_of_bias(variant.bias, start, stop, first, last)
        if fused:
            added = block if bias is None else _added(_as_precise(bias, query), block)
            outputs.append(_fused(part, keys, values, added, variant))
            del added  # or it would be there beside the next
        else:
            sinks = variant.sinks
            if sinks is not None and sinks.shape[2] != 1:
                sinks = sinks[:, :, start:stop]
            outputs.append(scored(part, keys, values, block, bias, replace(variant, sinks=sinks))[0])
        del block
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def scored(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, variant: Variant
) -> tuple[Tensor, Tensor]:
    """The output [B, H, T, V] and the attention weights [B, H, T, S], with every score in memory, in float32."""
    scores = products(query, key).float()
    scores = scores * variant.factor if torch.is_grad_enabled() else scores.mul_(variant.factor)
    return weighed(scores, value, mask, bias, variant, query.dtype)


def products(query: Tensor, key: Tensor) -> Tensor:
    """The product of each query [B, H, T, D] with each key [B, K, S, D] of its group: [B, H, T, S]."""
    (B, H, T, D), K = query.shape, key.shape[1]
    return torch.matmul(query.reshape(B, K, H // K * T, D), key.transpose(-1, -2)).view(B, H, T, -1)


def weighed(
    scores: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, variant: Variant, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The output and the weights of scores [B, H, T, S] in float32, which are times `variant.factor`. `dtype`: of the
    queries.

    Without gradients the scores are overwritten: at this size a new tensor costs as much as what is computed for it.
    """
    (B, H, T, S), K = scores.shape, value.shape[1]
    keep, cap, sinks = torch.is_grad_enabled(), variant.softcap, variant.sinks
    if cap is not None:
        scores = cap * torch.tanh(scores) if keep else scores.tanh_().mul_(cap)
    if bias is not None:
        scores = scores + bias if keep else scores.add_(bias)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask if keep else scores.add_(mask).clamp_(min=torch.finfo(scores.dtype).min)
    elif mask is not None:
        lowest = max(torch.finfo(dtype).min, torch.finfo(scores.dtype).min)  # of float64, no float32
        scores = scores.masked_fill(~mask, lowest) if keep else scores.masked_fill_(~mask, lowest)
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    elif keep:
        weights = torch.softmax(torch.cat([scores, sinks.float().expand(B, H, T, 1)], dim=-1), dim=-1)[..., :-1]
    else:  # what the largest score gets says what the sink gets
        weights, largest = torch.softmax(scores, dim=-1), scores.amax(-1, keepdim=True)
        share = weights.amax(-1, keepdim=True) * torch.exp(sinks.float() - largest)
        weights.div_(1 + share)
    weights = weights.to(value.dtype)
    used = F.dropout(weights, variant.dropout) if variant.dropout else weights
    output = matmul(used.reshape(B, K, H // K * T, S), value)
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
                if not seen.any():
                    continue
                weights = torch.exp(scores[seen] - scores[seen].max())
                total = weights.sum()
                if variant.sinks is not None:
                    sink = variant.sinks.expand(B, H, T, 1)[b, h, t, 0].double()
                    total = total + torch.exp(sink - scores[seen].max())
                output[b, h, t] = (weights[:, None] * v[seen]).sum(0) / total
    return output


def _takes_bias(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> bool:
    """Whether PyTorch's fused kernel adds the bias: on a CPU, where it reads it by its strides."""
    bias = variant.bias
    if bias is None or bias.requires_grad or bias.dtype not in (torch.float32, query.dtype):
        return False
    same = query.is_cpu and query.dtype == key.dtype == value.dtype
    return same and not variant.dropout and variant.softcap is None and variant.sinks is None


def _sinks_follow(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> bool:
    """Whether sinks are taken into account behind PyTorch's fused kernel: on a CPU, where it gives its sums away."""
    if variant.sinks is None or variant.softcap is not None or variant.bias is not None or variant.dropout:
        return False
    same = query.is_cpu and query.dtype == key.dtype == value.dtype
    return same and variant.sinks.shape[2] == 1 and not torch.is_grad_enabled()


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: Variant, *, causal: bool = False
) -> Tensor:
    """By PyTorch's fused kernel. A sink takes its share of the weights from all keys alike, so it may come last."""
    if variant.sinks is None:
        return fused_attention(query, key, value, mask, variant.dropout, variant.scale, causal=causal)
    output, sums = attention_and_sums(query, key, value, mask, variant.scale, causal=causal)
    return output.mul_(torch.sigmoid(sums - variant.sinks.float()[..., 0])[..., None])


def _row_and_causal(
    query: Tensor, key: Tensor, value: Tensor, row: Tensor, padding: Tensor | None, scale: float
) -> Tensor:
    """Causal attention with a bias [B or 1, H or 1, 1, S] that is the same for all queries, in one call. The kernel
    does both together, but the public function refuses the pair. A query that sees nothing gets zeros: so its gradients
    are zero as well, where those of the lowest finite number are lost in its rounding."""
    row = _as_precise(row, query)
    if padding is not None:
        row = row.masked_fill(~padding[:, None, None], -math.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    inputs = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    output: Tensor = kernel(*inputs, 0.0, True, attn_mask=row, scale=scale)[0]
    return output


def _folds(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> bool:
    bias = variant.bias
    if bias is None or bias.shape[2] != 1 or bias.requires_grad or variant.softcap is not None:
        return False
    return variant.sinks is None and query.shape[1] == key.shape[1] and query.dtype == key.dtype == value.dtype


def _row_as_channels(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
    """Causal attention with a bias [B or 1, H or 1, 1, S] as more channels of the keys, which those of the queries are
    constant for: so kernels that take no bias (flash attention on a GPU) compute it. In 16 bits it takes three, which
    together have the precision of float32."""
    assert variant.bias is not None
    (B, H, T, D), V = query.shape, value.shape[-1]
    rest, pieces = variant.bias.float().transpose(2, 3) / (variant.scale * FOLD), []
    for _ in range(1 if query.dtype.itemsize > 2 else 3):
        pieces.append(rest.to(query.dtype).expand(B, H, T, 1))
        rest = rest - pieces[-1].float()
    room = -(-(max(D + len(pieces), V)) // 8) * 8
    keys = F.pad(torch.cat((key, *pieces), dim=-1), (0, room - D - len(pieces)))
    queries = F.pad(F.pad(query, (0, len(pieces)), value=FOLD), (0, room - D - len(pieces)))
    values = F.pad(value, (0, room - V))
    inputs = queries, keys, values, None, variant.dropout
    return F.scaled_dot_product_attention(*inputs, is_causal=True, scale=variant.scale)[..., :V]


def pads(T: int, S: int, D: int, V: int) -> bool:
    """Whether zeros behind keys or values pay on a CPU."""
    return D != V and S > PADDED_FROM and T >= PADDED_ROWS


def equal_sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With zeros behind values that are shorter than keys, or behind queries and keys that are shorter than values,
    which change nothing: PyTorch's fused kernel for CPUs wants one size."""
    D, V = query.shape[-1], value.shape[-1]
    if V < D:
        return query, key, F.pad(value, (0, D - V))
    return F.pad(query, (0, V - D)), F.pad(key, (0, V - D)), value


def part_of_bias(bias: Tensor | None, start: int, stop: int, first: int, last: int) -> Tensor | None:
    """The bias of these queries and keys."""
    if bias is None:
        return None
    return bias[..., first:last] if bias.shape[2] == 1 else bias[..., start:stop, first:last]


def _as_precise(bias: Tensor, query: Tensor) -> Tensor:
    """On processors without AVX512 PyTorch's kernel misreads a float32 bias beside float64 queries."""
    return bias.to(query.dtype) if query.dtype is torch.float64 else bias


def _added(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask


def _by_sequence(query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], variant: Variant) -> Tensor:
    """Causal attention within each sequence's own run of tokens. Padded positions, which nobody reads, get zeros."""
    output, bias = query.new_zeros((*query.shape[:-1], value.shape[-1])), variant.bias
    for row, (start, stop) in enumerate(spans):
        if stop > start:
            q, k, v = (x[row : row + 1, :, start:stop] for x in (query, key, value))
            if bias is not None:
                own = (bias[row : row + 1] if len(bias) > 1 else bias)[..., start:stop]
                output[row : row + 1, :, start:stop] = _row_as_channels(q, k, v, replace(variant, bias=own))
                continue
            sinks = variant.sinks if variant.sinks is None or len(variant.sinks) == 1 else variant.sinks[row : row + 1]
            done = _fused(q, k, v, None, replace(variant, sinks=sinks), causal=True)
            output[row : row + 1, :, start:stop] = done
    return output


def blocks(length: int, bytes_per_row: int, *, cpu: bool) -> Iterator[tuple[int, int]]:
    """Of queries: the first of each, and the one behind its last. `bytes_per_row`: of scores and masks."""
    most = (MORE_ROWS if length >= LONG else ROWS) if cpu else GPU_ROWS
    room = SCORE_BYTES if cpu else GPU_SCORE_BYTES
    return evenly(length, max(1, min(most, room // max(1, bytes_per_row))))


def evenly(length: int, most: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most so many rows, all about as long."""
    rows = math.ceil(length / math.ceil(length / most)) if length else 1
    for start in range(0, length, rows):
        yield start, min(start + rows, length)
