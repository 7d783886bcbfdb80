"""Attention by PyTorch's FlexAttention (arXiv 2412.05496). On CUDA it compiles a kernel per kind of attention at its
first call, which takes seconds; elsewhere PyTorch's reference computes, which stores all scores."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.ops.case import Variant

BLOCK = 128  # tokens of the blocks that are left out or not masked


def attend(query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, variant: Variant) -> Tensor:
    """Attention [B, T, H, V] where a query sees an interval of the keys (ops.seen), with soft caps, biases
    [B or 1, H or 1, 1, S] and sinks [1, H, 1, 1], which need only the log-sum-exp."""
    from torch.nn.attention.flex_attention import AuxRequest

    (B, H, _, _), S = query.shape, key.shape[2]
    cap, bias = variant.softcap, variant.bias
    row = None if bias is None else bias[:, :, 0].expand(B, H, S)

    def modified(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        return score if row is None else score + row[b, h, k]

    options: dict[str, Any] = {"scale": variant.scale, "enable_gqa": key.shape[1] != H}
    options["block_mask"] = block_mask(intervals.expand(B, -1, -1), S)
    options["score_mod"] = None if cap is None and row is None else modified
    options["return_aux"] = None if variant.sinks is None else AuxRequest(lse=True)
    output = _function(query.is_cuda)(query, key, value, **options)
    if variant.sinks is not None:
        output, aux = output
        share = torch.sigmoid(aux.lse[..., None] - variant.sinks.float())
        output = (output * share).to(query.dtype)
    return output.transpose(1, 2).contiguous()


def block_mask(intervals: Tensor, S: int) -> Any:
    """A BlockMask of intervals [B, T, 2], made block by block: no mask of T x S exists."""
    from torch.nn.attention.flex_attention import BlockMask

    T, device = intervals.shape[1], intervals.device
    first, last = intervals.unbind(-1)
    rows = -(-T // BLOCK)

    def extreme(x: Tensor, fill: int, largest: bool) -> Tensor:
        blocks = torch.nn.functional.pad(x, (0, rows * BLOCK - T), value=fill).view(-1, rows, BLOCK)
        return blocks.amax(-1)[..., None] if largest else blocks.amin(-1)[..., None]

    begin = torch.arange(0, S, BLOCK, device=device)
    end = (begin + BLOCK).clamp(max=S)
    some = (extreme(torch.where(first < last, first, S), S, False) < end) & (extreme(last, 0, True) > begin)
    whole = some & (extreme(first, 0, True) <= begin) & (extreme(last, S, False) >= end)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (first[b, q] <= k) & (k < last[b, q])

    lists = (*_lists(some & ~whole), *_lists(whole))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, S))


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys [B, 1, rows], and which come first [B, 1, rows, columns]."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


@cache
def _function(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
