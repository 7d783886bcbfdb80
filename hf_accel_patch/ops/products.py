"""Products with one quantized weight, and what it stands for: rows, the dense weight, gradients of activations.

Scales are bit patterns held as integers, so that `.half()` and `.to(dtype)` of a module leave them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_accel_patch.kernels import cpu
from hf_accel_patch.kernels.noting import notes
from hf_accel_patch.ops.linear import Backend, dense_int4, dense_triton, linear, linear_op
from hf_accel_patch.ops.packing import INT8, rows_int4
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.ops.wide import matmul


@dataclass(frozen=True)
class Spec:
    """How to read one quantized weight [N, K]."""

    scheme: str
    shape: tuple[int, int]
    backend: Backend


def product(x: Tensor, codes: Tensor, scales: Tensor, spec: Spec) -> Tensor:
    """x [..., K] times the weight's transpose, [..., N] in the dtype of x. Raises RuntimeError for a weight elsewhere,
    where a kernel would read the memory of another device."""
    if x.device != codes.device:
        raise RuntimeError(f"activations are on {x.device} and the quantized weight is on {codes.device}")
    if torch.is_grad_enabled() and x.requires_grad:
        if torch.compiler.is_compiling():
            return F.linear(x, dequantize(codes, scales, spec, x.dtype))
        return cast(Tensor, _Product.apply(x, codes, scales, spec))  # type: ignore[no-untyped-call]
    if x.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"there are no products of quantized weights for activations on {x.device}")
    if cpu.readable(x) or _on_gpu(x):  # spares the host the way through PyTorch's dispatcher
        y = linear(x, codes, as_floats(scales), spec.scheme, spec.backend)
    else:
        backend, scales = spec.backend, as_floats(scales)
        y = linear_op(x, codes, scales, spec.scheme, backend.compiled, backend.rows, backend.decomposed, backend.many)
    return y if y.shape[-1] == spec.shape[0] else y[..., : spec.shape[0]]


def _on_gpu(x: Tensor) -> bool:
    """Whether a kernel may read it there at once."""
    return x.is_cuda and type(x) is Tensor and not cpu.recorded_or_replaced()


def dequantize(codes: Tensor, scales: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that the codes stand for."""
    N, K = spec.shape
    if spec.scheme in INT8:
        return (codes.view(N, K).float() * as_floats(scales)[:, None]).to(dtype)
    if _on_gpu(codes):
        dense = dense_triton(codes, as_floats(scales), spec.scheme, N, dtype)
        if isinstance(dense, Tensor):
            return dense
    return dense_int4(codes, as_floats(scales), TABLES.get(spec.scheme), spec.backend, N, dtype)


def rows(index: Tensor, codes: Tensor, scales: Tensor, spec: Spec) -> Tensor:
    """Rows `index` [n] of the weight, bfloat16 [n, K]. Raises IndexError, as an embedding does."""
    if index.is_cpu and index.numel() and not torch.compiler.is_compiling() and notes() is None:
        if index.amin() < 0 or index.amax() >= spec.shape[0]:
            raise IndexError(f"index out of range: rows are 0..{spec.shape[0] - 1}")
    if spec.scheme in INT8:
        return (codes.view(spec.shape)[index].float() * as_floats(scales)[index, None]).bfloat16()
    return rows_int4(codes, as_floats(scales), TABLES.get(spec.scheme), index)


def as_floats(bits: Tensor) -> Tensor:
    """Scales from their bit patterns: bfloat16 from int16, float32 from int32, in the same memory."""
    return bits.view(torch.bfloat16 if bits.dtype is torch.int16 else torch.float32)


class _Product(torch.autograd.Function):
    """In the precision of x, and with nothing but the codes kept for the way back, where they are dequantized again, as
    QLoRA does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, spec: Spec) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.spec = spec
        return F.linear(x, dequantize(codes, scales, spec, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = ctx.saved_tensors
        return matmul(grad, dequantize(codes, scales, ctx.spec, grad.dtype)), None, None, None
