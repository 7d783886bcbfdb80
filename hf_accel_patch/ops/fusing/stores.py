"""Operators of PyTorch that write to memory which is there already, as what a kernel stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel_patch.ops.fusing.affine import ZERO, Affine, Index
from hf_accel_patch.ops.fusing.operands import Read, cast, overlaps, readable, spread
from hf_accel_patch.ops.fusing.tracing import Node
from hf_accel_patch.ops.fusing.values import DTYPES, Pending, Row, Value, Writer, broadcast, linear

aten = torch.ops.aten


@dataclass
class Store:
    """An element of a value for each index of its shape, to memory: to where the target has it, or the `place` that
    follows from the index, a sum of variables and rows; what goes to rows that are not there is dropped."""

    target: Tensor
    value: Value
    place: Callable[[Writer, Index], tuple[Affine, list[Row]]] | None = None

    def fills(self, pending: Pending) -> bool:
        """Whether it puts this value where it is to lie."""
        return self.value is pending and self.target is pending.tensor and self.place is None

    def address(self, to: Writer, at: Index) -> tuple[Affine, list[Row]]:
        if self.place is not None:
            return self.place(to, at)
        return linear(at, self.target.stride()), []


def store_of(node: Node, read: Read) -> Store | None:
    """What an operator writes in place, if a kernel can write it."""
    target = node.written[0]
    if any(not readable(each, target.device) or each.device != target.device for each in node.given):
        return None
    if target.dtype not in DTYPES:
        return None
    if node.func is aten.copy_.default and isinstance(node.args[1], Tensor):
        source = node.args[1]
        if overlaps(target):
            return None
        return Store(target, cast(spread(read(source), tuple(target.shape)), target.dtype))
    if node.func is aten.index_put_.default and not (node.kwargs or len(node.args) > 3):
        return _put(target, node.args[1], node.args[2], read)
    return None


def _put(target: Tensor, indices: Sequence[Tensor | None], new: Tensor, read: Read) -> Store | None:
    """`target[indices] = new`: indices, broadcast to one shape, come first in the shape of `new`, or in the place of
    the dimensions that they index if these lie side by side."""
    given = [(dim, each) for dim, each in enumerate(indices) if each is not None]
    if any(each.dtype not in (torch.int64, torch.int32) for _, each in given) or new.dtype is not target.dtype:
        return None
    shape = torch.broadcast_shapes(*(each.shape for _, each in given))  # type: ignore[no-untyped-call]
    dims = [dim for dim, _ in given]
    together = dims == list(range(dims[0], dims[-1] + 1))
    first = dims[0] if together else 0
    others = [dim for dim in range(target.dim()) if dim not in dims]
    sizes = [target.shape[dim] for dim in others]
    sizes[first:first] = shape
    if math.prod(sizes) == 0:
        return None
    values = [(dim, read(each)) for dim, each in given]

    def place(to: Writer, at: Index) -> tuple[Affine, list[Row]]:
        inside, rest = at[first : first + len(shape)], (*at[:first], *at[first + len(shape) :])
        total = ZERO
        for dim, where in zip(others, rest, strict=True):
            total = total + where * target.stride(dim)
        rows = []
        for dim, value in values:
            own = broadcast(value.sizes, inside)
            rows.append(Row(to.element(value, own, ()), target.shape[dim], target.stride(dim), own))
        return total, rows

    return Store(target, spread(read(new), tuple(sizes)), place)
