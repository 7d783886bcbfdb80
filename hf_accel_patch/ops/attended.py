"""Attention block by block as one operator for graphs: how many blocks there are follows from the number of tokens,
which a graph leaves open."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel_patch.ops.attention import attend
from hf_accel_patch.ops.case import Variant
from hf_accel_patch.ops.mask import mask_of


@torch.library.custom_op("hf_accel_patch::attend", mutates_args=())
def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """[B, T, H, V], without gradients: query [B, H, T, D] to key [B, K, S, D] and value [B, K, S, V], with a mask
    [B or 1, H or 1, T or 1, S], or causal from the first key on, or neither; the rest as `Variant` has it."""
    variant = Variant(scale, softcap=softcap, sinks=sinks, bias=bias)
    seen = mask_of(mask, key.shape[2], causal, query.device)
    return attend(query, key, value, seen, variant).transpose(1, 2).contiguous()


@attended.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    B, H, T = query.shape[:3]
    return query.new_empty(B, T, H, value.shape[-1])
