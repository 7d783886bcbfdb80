"""Attention of new tokens to a cache: a few tokens to many, exact or quantized, which is read once and never unpacked
as a whole.

On a CPU the compiled kernel (kernels/decode.c) reads an exact cache and a quantized one at the speed of the memory, the
heads of a group together; on CUDA that of kernels/triton_decode.py reads a quantized one. Where there is none, or many
tokens come at once, blocks are unpacked one after another and joined by running softmax statistics (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.kernels import cpu, cpu_decode
from hf_accel_patch.ops.attention import SCORE_BYTES, part_of_bias
from hf_accel_patch.ops.case import Mask, Variant
from hf_accel_patch.ops.kv import Bits, Packed, pack
from hf_accel_patch.ops.launching import launch, unsuitable
from hf_accel_patch.ops.stored import Content
from hf_accel_patch.ops.wide import matmul

MOST_TOKENS = 16  # new tokens at a time for which one pass over the cache by the kernel is the fastest

PART_TOKENS = 1024  # for which scores are in memory at a time

Part = tuple[int, int, Tensor, Tensor]  # the first and the last cached token, their keys and values
Joined = tuple[Tensor, Tensor, Tensor]  # of queries and what came so far: the highest score, sums of weights and values


def attend_cached(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: Variant, rest: Tensor | None = None
) -> Tensor | None:
    """Attention of T tokens [B, H, T, D] to keys and values [B, K, S, ...] as they are: [B, T, H, V], or None where
    PyTorch's kernels are the ones to use. `mask`: bool [B or 1, H or 1, T, S], or None if all is seen. `rest`: the last
    channels of the keys, where these lie apart."""
    if query.shape[2] > MOST_TOKENS or not query.is_cpu or not _kernel_takes(query, key, value, mask, variant):
        return None
    if rest is not None and not (type(rest) is Tensor and rest.is_cpu and rest.dtype == query.dtype):
        return None
    return _kernel(query, None, key, value, mask, variant, rest)


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: Variant
) -> tuple[Tensor, Tensor] | None:
    """`attend_cached` [B, T, H, V], and the logarithms of the sums of exp(score) [B, T, H], which join it to the
    attention to other keys."""
    if query.shape[2] > MOST_TOKENS or not query.is_cpu or not _kernel_takes(query, key, value, mask, variant):
        return None
    sums = query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.float32)
    return _kernel(query, None, key, value, mask, variant, sums=sums), sums


def attend_stored(query: Tensor, content: Content, mask: Mask, variant: Variant) -> Tensor:
    """Attention of T tokens [B, H, T, D] to a quantized cache: [B, T, H, V]. No gradients flow into the cache."""
    T, S = query.shape[2], content.length
    if T <= MOST_TOKENS and content.near:
        seen = mask.block(0, T, 0, S)
        if _kernel_takes(query, content.keys, content.values, seen, variant):
            output = _stored(query, content, _skipping(seen, content), variant)
            if isinstance(output, Tensor):
                return output
    return attend_parts(query, content.parts(), mask, variant).transpose(1, 2).contiguous()


def _stored(query: Tensor, content: Content, seen: Tensor | None, variant: Variant) -> Tensor | str:
    """By a kernel, or why it cannot start."""
    keys, values = content.keys, content.values
    if query.is_cpu:
        return _kernel(query, content, keys, values, seen, variant)
    rows = query.shape[1] // keys.shape[1] * query.shape[2]
    kind = "stored", content.bits, query.dtype, query.shape[-1], values.shape[-1], min(rows, MOST_TOKENS + 1)
    return launch(kind, query.device, lambda: _kernel(query, content, keys, values, seen, variant))


def pack_blocks(keys: Tensor, values: Tensor, bits: Bits) -> Packed:
    """`ops.kv.pack` of keys [B, K, 64 N, D] and values [B, K, 64 N, V], by the compiled kernel if it is there."""
    readable = bits < 16 and cpu.readable(keys) and cpu.readable(values)
    kernels = cpu_decode.library() if readable else None
    if kernels is None or keys.dtype != values.dtype or keys.dtype not in cpu.DTYPES:
        return pack(keys, values, bits)
    keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (keys, values))
    return Packed(*cpu_decode.pack(kernels, keys, values, bits))


def attend_parts(query: Tensor, parts: Iterable[Part], mask: Mask, variant: Variant) -> Tensor:
    """Attention [B, H, T, V] to keys and values that come part by part. Gradients reach the query."""
    B, H, T, _ = query.shape
    rows = max(1, SCORE_BYTES // (8 * B * H * PART_TOKENS))
    joined: dict[int, Joined] = {}  # by the first of some queries
    for first, last, keys, values in parts:
        for begin in range(first, last, PART_TOKENS):
            end = min(begin + PART_TOKENS, last)
            some = slice(begin - first, end - first)
            for start in range(0, T, rows):
                stop = min(start + rows, T)
                bias = part_of_bias(variant.bias, start, stop, begin, end)
                seen = mask.block(start, stop, begin, end)
                scores = _scores(query[:, :, start:stop], keys[:, :, some], seen, bias, variant)
                joined[start] = _join(joined.get(start) or _empty(scores, start, variant), scores, values[:, :, some])
    if not joined:
        raise ValueError("attention to a cache that holds no token")
    return torch.cat([output / total for _, total, output in joined.values()], dim=2).to(query.dtype)


def _empty(scores: Tensor, start: int, variant: Variant) -> Joined:
    """What is known before the first part: the sinks."""
    if variant.sinks is None:
        highest = scores.new_full((*scores.shape[:3], 1), -torch.inf)
        return highest, torch.zeros_like(highest), torch.zeros_like(highest)
    sinks = variant.sinks.float()
    if sinks.shape[2] != 1:
        sinks = sinks[:, :, start : start + scores.shape[2]]
    highest = sinks.expand(*scores.shape[:3], 1)
    return highest, torch.ones_like(highest), torch.zeros_like(highest)


def _join(before: Joined, scores: Tensor, values: Tensor) -> Joined:
    highest, total, output = before
    top = torch.maximum(highest, scores.amax(-1, keepdim=True))
    weights, kept = torch.exp(scores - top), torch.exp(highest - top)
    return top, total * kept + weights.sum(-1, keepdim=True), output * kept + _weighted(weights, values)


def _scores(query: Tensor, keys: Tensor, mask: Tensor | None, bias: Tensor | None, variant: Variant) -> Tensor:
    """[B, H, T, S] in float32."""
    (B, H, T, D), K = query.shape, keys.shape[1]
    scores = torch.matmul(query.reshape(B, K, H // K * T, D), keys.transpose(-1, -2)).view(B, H, T, -1)
    scores = scores.float() * variant.scale
    if variant.softcap is not None:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(query.dtype).min)
    return (scores + mask).clamp(min=torch.finfo(scores.dtype).min)  # of nothing but -inf, statistics would be NaN


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """[B, H, T, V] in float32."""
    (B, H, T, S), K = weights.shape, values.shape[1]
    return matmul(weights.view(B, K, H // K * T, S).to(values.dtype), values).view(B, H, T, -1).float()


def _kernel_takes(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, variant: Variant) -> bool:
    """Whether a kernel can do this, and is there."""
    one_per_head = variant.sinks is None or variant.sinks.numel() == query.shape[1]
    plain = _adds(query, variant.bias) and not variant.dropout and one_per_head
    masks = mask is None or (mask.dtype == torch.bool and mask.device == query.device)
    same = query.dtype == keys.dtype == values.dtype and query.dtype in cpu.DTYPES
    if not (plain and masks and same and query.device == keys.device == values.device):
        return False
    inputs = (query, keys, values, variant.sinks)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs):
        return False
    if type(query) is not Tensor or type(keys) is not Tensor or type(values) is not Tensor:
        return False
    if query.is_cpu:
        return cpu.readable(query) and cpu_decode.library() is not None
    if not query.is_cuda or torch.compiler.is_compiling() or _triton() is None:
        return False
    return not unsuitable(query.device.index)


def _adds(query: Tensor, bias: Tensor | None) -> bool:
    """Whether there is nothing to add to the scores, or the kernel can do it."""
    return bias is None or (query.is_cpu and bias.is_cpu and bias.dtype == torch.float32 and not bias.requires_grad)


def _kernel(
    query: Tensor,
    content: Content | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    variant: Variant,
    rest: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    query, keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, keys, values))
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    sinks = None if variant.sinks is None else variant.sinks.detach().float().reshape(-1).contiguous()
    packed, blocks, bits = (None, 0, 8) if content is None else (content.packed, content.blocks, content.bits)
    what = (query, packed, bits, blocks, keys, values, mask, variant.scale, variant.softcap, sinks)
    bias = None
    if content is not None and content.constant is not None and blocks:
        bias = content.constant.scores(query, content.first, blocks)
    kernels = cpu_decode.library() if query.is_cpu else None
    if rest is not None and rest.stride(-1) != 1:
        rest = rest.contiguous()
    if kernels is None:
        return _triton().attend(*what, bias)
    added = variant.bias
    if added is not None and content is not None and content.skip:
        added = torch.nn.functional.pad(added, (content.skip, 0))
    if added is not None and added.stride(-1) != 1:
        added = added.contiguous()
    return cpu_decode.attend(kernels, *what, bias, rest, added, sums)


@cache
def _triton() -> Any:
    """The kernels for CUDA, if triton is there."""
    try:
        from hf_accel_patch.kernels import triton_decode
    except ImportError:
        return None
    return triton_decode


def _skipping(mask: Tensor | None, content: Content) -> Tensor | None:
    """The mask over whole blocks: it hides the tokens of the first block that a window has left behind."""
    if not content.skip:
        return mask
    if mask is None:
        mask = torch.ones(1, 1, 1, content.length, dtype=torch.bool, device=content.keys.device)
    return torch.nn.functional.pad(mask, (content.skip, 0), value=False)
