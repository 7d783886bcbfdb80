"""Attention without values, on the meta device: each of these takes and frees the memory that attention takes on a CPU,
to a whole prompt or to a piece of one."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from hf_accel_patch.ops.attention import SCORE_BYTES, blocks, equal_sizes, pads
from hf_accel_patch.ops.case import Mask, Variant
from hf_accel_patch.ops.decode import PART_TOKENS, attend_parts
from hf_accel_patch.ops.stored import Content


def unattended(query: Tensor, key: Tensor, value: Tensor, plain: bool, masked: bool) -> Tensor:
    """As `attend` does without values, on the meta device: [B, T, H, V]. It takes and frees the memory that `attend`
    takes on a CPU."""
    (B, H, T, D), (S, V) = query.shape, value.shape[-2:]
    padded = equal_sizes(query, key, value) if plain and pads(T, S, D, V) else None
    fused = plain and (D == V or padded is not None)
    row_bytes = S * B * (5 if fused else 8 * H)
    rows = next((stop - start for start, stop in blocks(T, row_bytes, cpu=True)), 0)
    block = query.new_empty(rows * row_bytes, dtype=torch.uint8) if masked or not fused else None
    output = query.new_empty(B, T, H, V if padded is None else max(D, V))
    del block, padded
    return output if fused and not masked and D == V else query.new_empty(B, T, H, V)


def unattended_parts(query: Tensor, content: Content, mask: Mask, softcap: float | None) -> Tensor:
    """`attend_stored` [B, T, H, V], of which each block of queries and each part of the cache takes the same."""
    B, H, T, _ = query.shape
    rows = max(1, SCORE_BYTES // (8 * B * H * PART_TOKENS))
    joined = query.new_empty(B, H, T, content.values.shape[-1], dtype=torch.float32)
    attend_parts(query[:, :, :rows], islice(content.parts(), 2), mask, Variant(1.0, softcap=softcap))
    divided = torch.empty_like(joined)
    output = torch.empty_like(divided)
    del joined, divided
    return output.to(query.dtype).transpose(1, 2).contiguous()


def unattended_biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """`attend` [B, T, H, V] with a bias [B or 1, H or 1, T or 1, S] into which the mask is written, block by block."""
    (B, H, T, _), S = query.shape, key.shape[2]
    rows = next((stop - start for start, stop in blocks(T, 8 * B * H * S, cpu=True)), 0)
    mask = query.new_empty(B * rows * S, dtype=torch.uint8)
    written = query.new_empty(B, bias.shape[1], rows, S, dtype=torch.float32)
    output = query.new_empty(B, T, H, value.shape[-1])
    del mask, written
    return torch.empty_like(output)
