"""Products with float weights on the CPU where PyTorch's own are slow.

For one or a few rows of activations PyTorch reads weights at about half of the memory's bandwidth, and for some rows
more it rearranges the weights at every call. The compiled kernel reads at the bandwidth. Many rows PyTorch multiplies
well where the processor can calculate in the dtype. Where it cannot, as in 16 bits with AVX2, another compiled kernel
does, or a product in float32, block by block. Sums are in float32, as PyTorch's are. Which way is fastest for how many
rows is measured once per machine, dtype and size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_accel_patch.kernels import cpu, cpu_prefill
from hf_accel_patch.kernels.measuring import remembered
from hf_accel_patch.ops.linear import least_seconds, row_steps
from hf_accel_patch.ops.packing import int4_block, on_cpu
from hf_accel_patch.ops.wide import WIDENED, widened_into

WEIGHTS = 1 << 22  # that are measured: more than a second-level cache holds, in any dtype
SIDES = (512, 2048, 8192)  # input features that are measured: with more of them, fewer rows of activations fit a cache
COUNTS = (1, 2, 4, 8, 16, 32, 64, 256)  # rows of activations that are measured
MOST_FEW = 32  # of them that are few
WIDE_ROWS = 64  # from which float32 is tried
GAIN = 1.05  # less is not worth another path
FEW_ROWS = 4  # that the kernel takes where a busy machine lets nobody measure


@dataclass(frozen=True)
class FloatBackend:
    """What multiplies weights of `dtype`: the compiled kernel for few rows of activations up to `rows` of them; from
    `many` rows on that for many, from `widened` rows on blocks in float32, each 0 for never; PyTorch's own product
    otherwise."""

    dtype: torch.dtype
    rows: int
    widened: int = 0
    many: int = 0

    @property
    def faster(self) -> bool:
        return bool(self.rows or self.widened or self.many)

    def takes(self, rows: int) -> bool:
        """Whether another product than PyTorch's is for so many rows of activations."""
        return rows <= self.rows or 0 < self.many <= rows or 0 < self.widened <= rows

    def __str__(self) -> str:
        parts = [f"compiled kernel up to {self.rows} rows"] if self.rows else []
        parts += [f"compiled kernel for many rows from {self.many} on"] if self.many else []
        parts += [f"in float32 from {self.widened} rows on"] if self.widened else []
        return ", ".join(parts) or "PyTorch"


def linear_float(x: Tensor, weight: Tensor, bias: Tensor | None, backend: FloatBackend) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N]: [..., N]."""
    rows = x.numel() // weight.shape[1]
    kernels = _kernels(rows, backend)
    laid = weight.is_contiguous() or (rows > backend.rows and weight.T.is_contiguous())
    laid = laid and (bias is None or (bias.is_contiguous() and bias.shape == weight.shape[:1]))
    if kernels is not None and laid and x.shape[-1] == weight.shape[1]:
        return cpu.linear_float(kernels, x, weight, bias)
    if 0 < backend.widened <= rows:
        return _widened(x, weight, bias)
    return F.linear(x, weight, bias)


def _kernels(rows: int, backend: FloatBackend) -> Any:
    if rows <= backend.rows:
        return cpu.library(int4_block())
    return cpu_prefill.library() if 0 < backend.many <= rows else None


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], len(weight))
    a, flat = x.reshape(-1, x.shape[-1]), out.view(-1, len(weight))
    for rows in row_steps(*weight.shape):
        widened_into(a, weight[rows].T, flat[:, rows], None if bias is None else bias[rows])
    return out


def float_backend(dtype: torch.dtype, K: int, transposed: bool = False) -> FloatBackend:
    """What is fastest for weights of this dtype with K input features on this machine, [N, K] or `transposed`."""
    return _measured(dtype, min(SIDES, key=lambda side: abs(side - K)), transposed)


@on_cpu
def _measured(dtype: torch.dtype, K: int, transposed: bool) -> FloatBackend:
    few = not transposed and dtype in cpu.DTYPES and cpu.library(int4_block()) is not None
    many = dtype in cpu.DTYPES and cpu_prefill.library() is not None

    def measure() -> list[int]:
        N = WEIGHTS // (4 if transposed else 1) // K  # PyTorch may take seconds
        weight = torch.ones(K, N, dtype=dtype).T if transposed else torch.ones(N, K, dtype=dtype)
        return _division([_seconds(weight, M, few, many) for M in COUNTS])

    question = f"division {dtype} {K} {few} {many} {transposed}"
    return FloatBackend(dtype, *remembered(question, measure, [FEW_ROWS if few else 0, 0, 0]))


def _seconds(weight: Tensor, rows: int, few: bool, many: bool) -> dict[str, float]:
    """What each way takes to multiply so many rows of activations."""
    x, dtype, ways = weight.new_ones(rows, weight.shape[1]), weight.dtype, {"PyTorch": FloatBackend(weight.dtype, 0)}
    if few and rows <= MOST_FEW:
        ways["few"] = FloatBackend(dtype, rows)
    if many:
        ways["many"] = FloatBackend(dtype, 0, many=rows)
    if (dtype is torch.float16 or dtype in WIDENED) and rows >= WIDE_ROWS:
        ways["widened"] = FloatBackend(dtype, 0, widened=rows)
    return {way: least_seconds(partial(linear_float, x, weight, None, each)) for way, each in ways.items()}


def _division(seconds: Sequence[dict[str, float]]) -> list[int]:
    """Up to how many rows `few` goes, and from how many on `widened` and `many`, by what each takes for COUNTS: what
    takes least for all of them together, so that one that was held up while it was timed does not decide."""

    def cost(plan: tuple[int, int, str]) -> float:
        few, start, beyond = plan
        ways = ["few"] * few + ["PyTorch"] * (start - few) + [beyond] * (len(seconds) - start)
        taken = [
            each.get(way, math.inf) * (GAIN if way != "PyTorch" else 1) for each, way in zip(seconds, ways, strict=True)
        ]
        return sum(map(math.log, taken))

    counts = range(len(seconds) + 1)
    plans = [(few, start, way) for few in counts for start in counts[few:] for way in ("many", "widened")]
    few, start, beyond = min(plans, key=cost)
    rows = COUNTS[few - 1] if few else 0
    first = 0 if start == len(seconds) else rows + 1 if start == few else COUNTS[start]
    return [rows, first if beyond == "widened" else 0, first if beyond == "many" else 0]
