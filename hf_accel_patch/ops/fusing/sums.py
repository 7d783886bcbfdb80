"""Operators of PyTorch that sum over the last dimension, norms among them, as values of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.ops.fusing.operands import Elsewhere, Read, dense
from hf_accel_patch.ops.fusing.tracing import Node
from hf_accel_patch.ops.fusing.values import FLOATS, MOST_COLUMNS, Pointwise, Reduced, Value

aten = torch.ops.aten


def reduced(node: Node, packet: Any, sizes: tuple[int, ...], dtype: torch.dtype, read: Read) -> Value | None:
    """Over the last dimension."""
    args = node.args
    if not args or not isinstance(args[0], Tensor) or args[0].dtype not in FLOATS or dtype not in FLOATS:
        return None
    x = args[0]
    n = x.shape[-1] if x.dim() else 0
    if not 0 < n <= MOST_COLUMNS:
        return None
    if node.func in (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default):
        if [each % x.dim() for each in (args[1:] or (None,))[0] or ()] != [x.dim() - 1]:
            return None
        if node.func is aten.amax.default:
            largest = 'tl.where(tl.max(({0} != {0}).to(tl.int32), 0) > 0, float("nan"), tl.max({0}, 0))'
            return Reduced(sizes, dtype, largest, read(x), 'float("-inf")')
        if node.kwargs.get("dtype") not in (None, torch.float32, x.dtype):
            return None  # it is rounded before
        mean = f" * {torch.tensor(1 / n).item()!r}" if packet is aten.mean else ""  # as PyTorch does on a GPU
        return Reduced(sizes, dtype, "tl.sum({0}, 0)" + mean, read(x))
    if node.func is aten._softmax.default and args[1] % x.dim() == x.dim() - 1:
        value, one = read(x), (*sizes[:-1], 1)
        top = Reduced(one, torch.float32, "tl.max({0}, 0)", value, 'float("-inf")')
        grown = Pointwise(sizes, torch.float32, "tl.exp({0} - {1})", (value, top))
        total = Reduced(one, torch.float32, "tl.sum({0}, 0)", grown)
        return Pointwise(sizes, dtype, "tl.div_rn({0}, {1})", (grown, total))
    return None


def norm(node: Node, read: Read) -> Value | None:
    """The first output of PyTorch's layer norm or RMS norm, over the last dimension; nobody may read the others."""
    try:
        return layer_norm(node, read) if node.func is aten.native_layer_norm.default else rms_norm(node, read)
    except Elsewhere:
        return None


def rms_norm(node: Node, read: Read) -> Value | None:
    x, shape, weight, eps = (*node.args, None, None)[:4]
    n, sizes = x.shape[-1], tuple(x.shape)
    if list(shape) != [n] or n > MOST_COLUMNS or x.dtype not in FLOATS or not dense(node.outputs[0]):
        return None
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    value, one = read(x), (*sizes[:-1], 1)
    square = Pointwise(sizes, torch.float32, "{0} * {0}", (value,))
    root = Reduced(one, torch.float32, f"tl.rsqrt(tl.sum({{0}}, 0) / {n} + {eps!r})", square)
    more = () if weight is None else (read(weight),)
    return Pointwise(sizes, node.outputs[0].dtype, "{0} * {1}" + " * {2}" * len(more), (value, root, *more))


def layer_norm(node: Node, read: Read) -> Value | None:
    x, shape, weight, bias, eps = node.args
    n, sizes = x.shape[-1], tuple(x.shape)
    if list(shape) != [n] or n > MOST_COLUMNS or x.dtype not in FLOATS or not dense(node.outputs[0]):
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
