"""Products with float weights on the CPU where PyTorch's own are slow.

For one or a few rows of activations PyTorch reads weights at about half of the memory's bandwidth, and float16 beyond
that at a fraction of its speed on processors that cannot calculate in it. For some rows more it rearranges the weights
at every call. The compiled kernel reads at the bandwidth; more rows of float16 are multiplied as float32, block by
block. Sums are in float32, as PyTorch's are. From how many rows on which is faster is measured once per machine, dtype
and size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops.linear import least_seconds, row_steps
from hf_accel_patch.ops.packing import int4_block, on_cpu

WEIGHTS = 1 << 22  # that are measured: more than a second-level cache holds, in any dtype
SIDES = (512, 2048, 8192)  # input features that are measured: with more of them, fewer rows of activations fit a cache
WIDE_ROWS = 64  # from which float32 is tried
GAIN = 1.05  # less is not worth another path
FEW_ROWS = 4  # that the kernel takes where a busy machine lets nobody measure


@dataclass(frozen=True)
class FloatBackend:
    """What multiplies weights of `dtype`: the compiled kernel for up to `rows` rows of activations; from `widened` rows
    on blocks in float32, 0 for never; PyTorch's own product otherwise."""

    dtype: torch.dtype
    rows: int
    widened: int

    @property
    def faster(self) -> bool:
        return bool(self.rows or self.widened)

    def __str__(self) -> str:
        parts = [f"compiled kernel up to {self.rows} rows"] if self.rows else []
        parts += [f"in float32 from {self.widened} rows on"] if self.widened else []
        return ", ".join(parts) or "PyTorch"


def linear_float(x: Tensor, weight: Tensor, bias: Tensor | None, backend: FloatBackend) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N]: [..., N]."""
    rows = x.numel() // weight.shape[1]
    kernels = cpu.library(int4_block()) if rows <= backend.rows else None
    if kernels is not None and weight.is_contiguous() and x.shape[-1] == weight.shape[1]:
        return cpu.linear_float(kernels, x, weight, bias)
    if 0 < backend.widened <= rows:
        return _widened(x, weight, bias)
    return F.linear(x, weight, bias)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, wide = x.new_empty(*x.shape[:-1], len(weight)), x.float()
    for rows in row_steps(*weight.shape):
        out[..., rows] = F.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
    return out


def float_backend(dtype: torch.dtype, K: int) -> FloatBackend:
    """What is fastest for weights of this dtype with K input features on this machine."""
    return _measured(dtype, min(SIDES, key=lambda side: abs(side - K)))


@on_cpu
def _measured(dtype: torch.dtype, K: int) -> FloatBackend:
    def measure() -> list[int]:
        weight = torch.ones(WEIGHTS // K, K, dtype=dtype)
        rows = 0
        if compiled:
            for M in (1, 2, 4, 8, 16, 32):
                if not _pays(FloatBackend(dtype, M, 0), weight, M):
                    break
                rows = M
        widened = max(WIDE_ROWS, rows + 1)
        pays = dtype == torch.float16 and _pays(FloatBackend(dtype, 0, widened), weight, widened)
        return [rows, widened if pays else 0]

    compiled = dtype in cpu.DTYPES and cpu.library(int4_block()) is not None
    rows, widened = cpu.remembered(f"{dtype} {K} {compiled}", measure, [FEW_ROWS if compiled else 0, 0])
    return FloatBackend(dtype, rows, widened)


def _pays(backend: FloatBackend, weight: Tensor, rows: int) -> bool:
    """Whether it is faster than PyTorch's product for this number of rows."""
    x = weight.new_ones(rows, weight.shape[1])
    stock = least_seconds(lambda: F.linear(x, weight))
    return least_seconds(lambda: linear_float(x, weight, None, backend)) * GAIN < stock
