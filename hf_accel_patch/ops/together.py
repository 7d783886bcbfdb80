"""Products of the same activations with several quantized weights, as with those of queries, keys and values: on a GPU
one kernel for up to three of them, for a small product is over in microseconds, most of which are its start."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from hf_accel_patch.ops.launching import launch
from hf_accel_patch.ops.linear import FEW_ROWS, Backend, _in_pairs, _table_on, linear
from hf_accel_patch.ops.packing import INT8
from hf_accel_patch.ops.quantize import TABLES

MOST = 3  # weights of one kernel


def alike(codes: Tensor, scales: Tensor, others: Tensor, other_scales: Tensor, scheme: str) -> bool:
    """Whether one kernel could take both weights."""
    if codes.dtype != others.dtype or codes.device != others.device:
        return False
    if scheme in INT8:
        return codes.shape[-1] == others.shape[-1]
    return codes.shape[1:] == others.shape[1:] and len(scales) == len(other_scales)


def linear_together(x: Tensor, codes: list[Tensor], scales: list[Tensor], scheme: str, *backend: Any) -> list[Tensor]:
    """`ops.linear.linear` of x with each of these weights, which are alike. `backend`: what a Backend consists of."""
    if x.is_cuda and len(codes) > 1:
        kernel = min(x.numel() // x.shape[-1], FEW_ROWS), *(each.shape for each in (*codes, *scales))
        run = partial(together_triton, x, codes, scales, scheme)
        outputs = launch(("together", scheme, x.dtype, *kernel), x.device, run)
        if isinstance(outputs, list):
            return outputs
    return [linear(x, *each, scheme, Backend(*backend)) for each in zip(codes, scales, strict=True)]


def together_triton(x: Tensor, codes: list[Tensor], scales: list[Tensor], scheme: str) -> list[Tensor] | None:
    """The same by one Triton kernel; None where several are better."""
    from hf_accel_patch.kernels import triton_linear

    codes = [each.view(each.shape[-2:]) if scheme in INT8 else _in_pairs(each) for each in codes]
    table = _table_on(scheme, x.device) if scheme in TABLES else None
    flat = x.reshape(-1, x.shape[-1])
    ys = triton_linear.linear_together(flat, list(zip(codes, scales, strict=True)), table)
    return None if ys is None else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
