"""Products of many rows of activations on x86 processors whose PyTorch has no fast ones, in C (prefill.c).

They are called as those of cpu.py. `library()` is None where they cannot be made, and `why_not()` says why; see
compiling.py for how they are compiled and kept.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from torch import Tensor

from hf_accel_patch.kernels import compiling, cpu

SOURCE = Path(__file__).with_name("prefill.c")
BLOCK = 32  # rows of int4 codes that lie together
GROUP_MOST = 128  # input features per scale of int4 codes


def library() -> ctypes.CDLL | None:
    """The kernels, or None."""
    return _load()[0]


def why_not() -> str:
    """Why there are none."""
    return _load()[1]


def takes_int4(codes: Tensor, scales: Tensor) -> bool:
    """Whether there is a product with these codes [N / block, K, block / 2]."""
    group = codes.shape[1] // len(scales)
    return codes.shape[2] * 2 == BLOCK and group % 2 == 0 and group <= GROUP_MOST


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    kernels, reason = compiling.load(SOURCE, BLOCK)
    if kernels is not None:
        cpu.declare_products(kernels)
        kernels.linear_columns.argtypes = kernels.linear_float.argtypes
    return kernels, reason
