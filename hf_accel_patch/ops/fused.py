"""PyTorch's fused attention where heads share keys and values, without copies of these and in linear memory.

Its CPU kernel groups heads under any mask. On a GPU only the flash and cuDNN kernels do, without a mask; with one, in
float32, for heads above 256 and on old GPUs, `enable_gqa` ends in the kernel that stores all scores.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
MOST_CHANNELS = 256  # of a head, in the flash kernel


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float,
    *,
    causal: bool = False,
) -> Tensor:
    """Attention [B, H, T, V] of query [B, H, T, D] to key and value [B, K, S, ...], with a mask or causal or neither.
    Where PyTorch would store all scores, the heads of a group become rows, or under `causal` a call each."""
    (B, H, T, D), K = query.shape, key.shape[1]
    attend = F.scaled_dot_product_attention
    if H == K:  # said apart, for torch.compile knows this and cannot hand `H != K` on
        return attend(query, key, value, mask, dropout, is_causal=causal, scale=scale)
    if not _groups_store_scores(query, key, value, mask, dropout, causal):
        return attend(query, key, value, mask, dropout, is_causal=causal, scale=scale, enable_gqa=True)
    if causal:
        heads = query.reshape(B, K, H // K, T, D).unbind(2)
        each = [attend(q, key, value, None, dropout, is_causal=True, scale=scale) for q in heads]
        return torch.stack(each, 2).flatten(1, 2)
    if mask is not None and mask.shape[1] != 1:
        mask = mask.reshape(mask.shape[0], K, -1, mask.shape[-1])
    elif mask is not None and mask.shape[2] != 1:
        mask = mask.repeat(1, 1, H // K, 1)
    folded = query.reshape(B, K, H // K * T, D)
    return attend(folded, key, value, mask, dropout, scale=scale).reshape(B, H, T, -1)


def attention_and_sums(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """On a CPU, without gradients, of one dtype and head size: attention [B, H, T, D] with a mask or causal or neither,
    and the logarithms of the sums of exp(score), float32 [B, H, T], -inf where no key is seen."""
    nothing = None
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
        nothing = hidden.all(-1)
        added = torch.zeros_like(mask, dtype=query.dtype) if mask.dtype == torch.bool else mask.to(query.dtype)
        mask = added.masked_fill(hidden, -math.inf)
    inputs = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, sums = kernel(*inputs, 0.0, causal, attn_mask=mask, scale=scale)
    return output, sums if nothing is None else sums.masked_fill(nothing, -math.inf)


def _groups_store_scores(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> bool:
    """Whether PyTorch takes grouped heads here with the kernel alone that stores all scores."""
    if query.is_cpu:
        return False
    if mask is not None:
        return True
    if not query.is_cuda:
        return False
    casts = torch.is_autocast_enabled("cuda")
    if casts or torch.compiler.is_compiling():
        dtype = torch.get_autocast_dtype("cuda") if casts else query.dtype
        return dtype not in HALVES or not query.shape[-1] == value.shape[-1] <= MOST_CHANNELS
    case = torch.backends.cuda.SDPAParams(query, key, value, None, dropout, causal, True)
    return not (torch.backends.cuda.can_use_flash_attention(case) or torch.backends.cuda.can_use_cudnn_attention(case))
