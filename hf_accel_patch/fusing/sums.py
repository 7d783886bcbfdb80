"""Operators of PyTorch that sum over the last dimension, norms among them, as values of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.fusing.operands import Read, dense
from hf_accel_patch.fusing.tracing import Node
from hf_accel_patch.fusing.values import FLOATS, Pointwise, Reduced, Value

aten = torch.ops.aten
MOST_SUMMED = 16384  # columns


def reduced(node: Node, packet: Any, sizes: tuple[int, ...], dtype: torch.dtype, read: Read) -> Value | None:
    """Over the last dimension."""
    args = node.args
    if not args or not isinstance(args[0], Tensor) or args[0].dtype not in FLOATS or dtype not in FLOATS:
        return None
    x = args[0]
    n = x.shape[-1] if x.dim() else 0
    if not 0 < n <= MOST_SUMMED:
        return None
    if node.func in (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default):
        if args[1] is None or [each % x.dim() for each in args[1]] != [x.dim() - 1]:
            return None
        if node.func is aten.amax.default:
            return Reduced(sizes, dtype, "tl.max({0}, 0)", read(x), 'float("-inf")')
        return Reduced(sizes, dtype, "tl.sum({0}, 0)" + (f" / {n}" if packet is aten.mean else ""), read(x))
    if node.func is aten._softmax.default and args[1] % x.dim() == x.dim() - 1:
        value, one = read(x), (*sizes[:-1], 1)
        top = Reduced(one, torch.float32, "tl.max({0}, 0)", value, 'float("-inf")')
        grown = Pointwise(sizes, torch.float32, "tl.exp({0} - {1})", (value, top))
        return Pointwise(sizes, dtype, "{0} / {1}", (grown, Reduced(one, torch.float32, "tl.sum({0}, 0)", grown)))
    if node.func is aten._fused_rms_norm.default and list(args[1]) == [n]:
        eps = args[3] if args[3] is not None else torch.finfo(dtype).eps
        value, one = read(x), (*sizes[:-1], 1)
        square = Pointwise(sizes, torch.float32, "{0} * {0}", (value,))
        root = Reduced(one, torch.float32, f"tl.rsqrt(tl.sum({{0}}, 0) / {n} + {eps!r})", square)
        weight = (read(args[2]),) if args[2] is not None else ()
        return Pointwise(sizes, dtype, "{0} * {1}" + " * {2}" * len(weight), (value, root, *weight))
    return None


def layer_norm(node: Node, read: Read) -> Value | None:
    """The first output of PyTorch's layer norm, over the last dimension; nobody may read the others."""
    x, shape, weight, bias, eps = node.args
    n, sizes = x.shape[-1], tuple(x.shape)
    if list(shape) != [n] or n > MOST_SUMMED or x.dtype not in FLOATS or not dense(node.outputs[0]):
        return None
    value, one = read(x), (*sizes[:-1], 1)
    mean = Reduced(one, torch.float32, f"tl.sum({{0}}, 0) / {n}", value)
    centred = Pointwise(sizes, torch.float32, "{0} - {1}", (value, mean))
    square = Pointwise(sizes, torch.float32, "{0} * {0}", (centred,))
    root = Reduced(one, torch.float32, f"tl.rsqrt(tl.sum({{0}}, 0) / {n} + {eps!r})", square)
    more = [read(each) for each in (weight, bias) if each is not None]
    form = (
        "{0} * {1}" + (" * {2}" if weight is not None else "") + (f" + {{{1 + len(more)}}}" if bias is not None else "")
    )
    return Pointwise(sizes, x.dtype, form, (centred, root, *more))
