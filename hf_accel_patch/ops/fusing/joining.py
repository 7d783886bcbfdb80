"""Products of one x with several quantized weights, one after another in a plan, as one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_accel_patch.ops.fusing.tracing import Node
from hf_accel_patch.ops.fusing.writing import Launch
from hf_accel_patch.ops.refusing import address
from hf_accel_patch.ops.together import MOST, alike, linear_together

PRODUCT = torch.ops.hf_accel_patch.linear.default  # of ops/linear.py


def joined(steps: Sequence[Launch | Node]) -> list[Launch | Node]:
    """The same steps, with such products together."""
    found: list[Launch | Node] = []
    some: list[Node] = []
    for step in steps:
        product = step if isinstance(step, Node) and step.func is PRODUCT else None
        if some and (product is None or len(some) == MOST or not _together(some[0], product)):
            found += _one(some)
            some = []
        if product is None:
            found.append(step)
        else:
            some.append(product)
    return found + _one(some)


def _together(first: Node, other: Node) -> bool:
    (x, codes, scales, scheme, *backend), (y, others, other_scales, *rest) = first.args, other.args
    same = [scheme, *backend] == rest and _same(x, y) and not (first.kwargs or other.kwargs)
    return same and alike(codes, scales, others, other_scales, scheme)


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether both are the same elements of the same memory."""
    if address(x) != address(y) or x.storage_offset() != y.storage_offset() or x.dtype != y.dtype:
        return False
    return x.shape == y.shape and x.stride() == y.stride()


def _one(some: list[Node]) -> list[Launch | Node]:
    if len(some) < 2:
        return list(some)
    x, _, _, *rest = some[0].args
    args = (x, [each.args[1] for each in some], [each.args[2] for each in some], *rest)
    outputs, made = [y for each in some for y in each.outputs], [y for each in some for y in each.made]
    return [Node(linear_together, args, {}, outputs, made, [])]
