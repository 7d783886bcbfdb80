"""Products of 16-bit matrices on the CPU, as float32 where PyTorch has nothing faster.

On x86 processors without matrix instructions for a dtype (bfloat16: before AVX512 BF16 and AMX; float16: before AVX512
FP16) PyTorch multiplies it in scalar code unless the second matrix is transposed: on AVX2 at 0.7 GFLOP/s, a hundredth
of its speed in float32.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor


@cache
def widens(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of this dtype without a library made for this processor."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    return supported is not None and not getattr(torch.ops.mkldnn, supported)()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product, like a. Gradients flow."""
    if a.is_cpu and widens(a.dtype):
        return torch.matmul(a.float(), b.float()).to(a.dtype)
    return torch.matmul(a, b)
