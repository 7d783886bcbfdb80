"""Products of rows that are sorted by experts with the quantized weights of these, as one operator for graphs: how many
rows an expert gets is known only when they run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.ops.linear import Backend, linear
from hf_accel_patch.ops.packing import INT8
from hf_accel_patch.ops.products import Spec, as_floats

UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # the host reads the numbers of rows
TAGS = () if UNSAFE is None else (UNSAFE,)


def runs(experts: Tensor) -> Iterator[tuple[int, slice]]:
    """Of sorted experts [S]: each that occurs, and its rows."""
    found, counts = torch.unique_consecutive(experts, return_counts=True)
    start = 0
    for expert, count in zip(found.tolist(), counts.tolist(), strict=True):
        yield expert, slice(start, start + count)
        start += count


def of_expert(codes: Tensor, scheme: str, expert: int) -> Tensor:
    """The codes of one expert."""
    return codes[0, expert] if scheme in INT8 else codes[expert]


def routed_product(x: Tensor, experts: Tensor, codes: Tensor, scales: Tensor, spec: Spec) -> Tensor:
    """x [S, K] times the transpose of each row's expert's weight: [S, N] in the dtype of x."""
    how = spec.backend
    y = routed_op(x, experts, codes, as_floats(scales), spec.scheme, how.compiled, how.rows, how.decomposed, how.many)
    return y[:, : spec.shape[0]]


@torch.library.custom_op(
    "hf_accel_patch::routed",
    mutates_args=(),
    schema="(Tensor x, Tensor experts, Tensor codes, Tensor scales, str scheme, bool compiled, int rows,"
    " bool decomposed, bool many) -> Tensor",
    tags=TAGS,
)
def routed_op(x: Tensor, experts: Tensor, codes: Tensor, scales: Tensor, scheme: str, *how: Any) -> Tensor:
    """The operator."""
    out = x.new_empty(len(x), _features(scales, scheme))
    for expert, rows in runs(experts):
        out[rows] = linear(x[rows], of_expert(codes, scheme, expert), scales[expert], scheme, Backend(*how))
    return out


@routed_op.register_fake
def _(x: Tensor, experts: Tensor, codes: Tensor, scales: Tensor, scheme: str, *how: Any) -> Tensor:
    return x.new_empty(len(x), _features(scales, scheme))


def _features(scales: Tensor, scheme: str) -> int:
    return scales.shape[1] if scheme in INT8 else scales.shape[2]
