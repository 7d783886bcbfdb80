"""Products of 16-bit matrices on the CPU, as float32 where PyTorch has nothing faster.

On x86 processors whose oneDNN does not take a dtype (bfloat16 before AVX512, float16 before AVX512 FP16) PyTorch
multiplies it in loops of its own unless the second matrix is transposed: on AVX2 at 0.7 GFLOP/s, about a hundredth of
its speed in float32.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor


def _widened() -> frozenset[torch.dtype]:
    """The dtypes that PyTorch multiplies without a library made for this processor."""
    slow = set()
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        supported = getattr(torch.ops.mkldnn, name, None)
        if supported is not None and platform.machine() in ("x86_64", "AMD64") and not supported():
            slow.add(dtype)
    return frozenset(slow)


WIDENED = _widened()  # once, and not in what torch.compile reads
ROWS = 512  # of a matrix that are widened at a time, where its copy should stay small


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product, like a. Gradients flow."""
    if a.device.type == "cpu" and a.dtype in WIDENED:
        return torch.matmul(a.float(), b.float()).to(a.dtype)
    return torch.matmul(a, b)


def matmul_into(a: Tensor, b: Tensor, out: Tensor) -> None:
    """The product of a [M, K] and b [K, N] into out [M, N], without gradients."""
    if a.device.type == "cpu" and a.dtype in WIDENED:
        widened_into(a, b, out)
    else:
        torch.mm(a, b, out=out)


def widened_into(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """The same in float32, plus bias [N], without a copy of all of a, which may be a long prompt."""
    b, bias = b.float(), None if bias is None else bias.float()
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        product = a[rows].float() @ b
        out[rows] = product if bias is None else product.add_(bias)
