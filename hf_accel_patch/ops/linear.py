"""Products with quantized weights.

On the CPU one or a few rows of activations go through a matrix-vector kernel, which reads the weights once: that of
kernels/cpu.py, which a C compiler on this machine makes, or else PyTorch's, which wants bfloat16 activations (with
float32 or float16 it is scalar code). Both work on the same bytes. Their time grows with the rows, so a prefill goes
through the compiled kernel of kernels/cpu_prefill.py, or unpacks blocks of weights to bfloat16 and multiplies those.
Which of them is faster from how many rows on, and whether PyTorch has a fast kernel for this processor at all, is
measured, once per machine. On CUDA codes go to kernels/triton_linear.py, or where that cannot start are unpacked.

The layout of codes is in ops/packing.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_accel_patch.kernels import cpu, cpu_prefill
from hf_accel_patch.kernels.measuring import remembered
from hf_accel_patch.ops.launching import launch
from hf_accel_patch.ops.packing import CUDA_BLOCK, INT8, in_blocks, int4_block, on_cpu, pack, unpack_int4
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.ops.wide import WIDENED, matmul_into

UNPACK_ELEMENTS = 1 << 23  # weights unpacked at a time, 16 MB in bfloat16: products with more are no faster
ALWAYS = 1 << 30  # rows
OUTLIER = 6.0  # llm.int8: input features with a larger activation are multiplied in 16 bits (arXiv 2208.07339)
FEW_ROWS = 129  # of activations: from there on, the kernels are the same for any number of them
MANY_ROWS = (64, 256)  # of activations at which the compiled kernel for many must be faster
LONG_SECONDS = 0.1  # of runs that are timed
FEW_COMPILED = 8  # rows that the compiled kernel takes where a busy machine lets nobody measure
PRODUCTS = 1 << 19  # 32-bit integers of a product at a time, 2 MB


@dataclass(frozen=True)
class Backend:
    """What multiplies on the CPU: a matrix-vector kernel, compiled or PyTorch's, for up to `rows` rows of activations.
    For more of them it is the compiled kernel for `many`, or the weights are unpacked to bfloat16, or the activations,
    but for outliers, are rounded to 8 bits."""

    compiled: bool
    rows: int
    decomposed: bool = False
    many: bool = False

    def __str__(self) -> str:
        kernel = "compiled kernel" if self.compiled else "PyTorch's kernel"
        beyond = "activations in 8 bits but for outliers" if self.decomposed else "unpacked"
        beyond = "compiled kernel for many rows" if self.many else beyond
        return f"{kernel} up to {self.rows} rows, then {beyond}" if self.rows else f"{beyond} to bfloat16"


def linear_int4(x: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, backend: Backend) -> Tensor:
    """x [..., K] times the weights' transpose: [..., N'] in the dtype of x."""
    N, (K, half) = scales.shape[1], codes.shape[1:]
    kernels, shape, dtype = _kernels(x, 2 * half, backend), x.shape, x.dtype
    _check_features(shape[-1], K)
    if x.numel() // K <= backend.rows and kernels is not None:
        return cpu.linear_int4(kernels, x, codes, scales, table)
    if (for_many := _for_many(x, backend)) is not None and cpu_prefill.takes_int4(codes, scales):
        return cpu.linear_int4(for_many, x, codes, scales, table)
    x = x.reshape(-1, K).to(torch.bfloat16).contiguous()
    if len(x) <= backend.rows and table is None and 2 * half == int4_block():  # a model may come from another machine
        packed = codes.view(N, K // 2)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, K // len(scales), scales)
        return y.to(dtype).view(*shape[:-1], N)
    out = x.new_empty(len(x), N)
    step = max(1, UNPACK_ELEMENTS // (K * 2 * half))
    for start in range(0, len(codes), step):
        stop = min(start + step, len(codes))
        rows = slice(start * 2 * half, stop * 2 * half)
        if kernels is not None:
            matmul_into(x, cpu.unpack_int4(kernels, codes, scales, table, start, stop), out[:, rows])
            continue
        dense = unpack_int4(codes, scales, table, start, stop)
        if half == 1 or x.dtype in WIDENED:  # as a GPU has them
            matmul_into(x, dense.transpose(1, 2).reshape(-1, K).T, out[:, rows])
        else:
            out[:, rows].view(-1, stop - start, 2 * half).copy_(torch.matmul(x, dense).transpose(0, 1))
    return out.to(dtype).view(*shape[:-1], N)


def linear_int8(x: Tensor, codes: Tensor, scales: Tensor, backend: Backend) -> Tensor:
    """x [..., K] times the transpose of int8 codes [N, K] with bfloat16 scales [N]: [..., N] in the dtype of x."""
    N, K = codes.shape[-2:]
    shape, dtype, rows = x.shape, x.dtype, x.numel() // K
    kernels = _kernels(x, int4_block(), backend)
    _check_features(shape[-1], K)
    if rows <= backend.rows and kernels is not None:
        return cpu.linear_int8(kernels, x, codes, scales)
    if (for_many := _for_many(x, backend)) is not None:
        return cpu.linear_int8(for_many, x, codes, scales)
    codes = codes.view(N, K)
    if backend.decomposed and kernels is not None and K % 16 == N % 16 == 0:
        return _decomposed(kernels, x.reshape(-1, K).contiguous(), codes, scales).view(*shape[:-1], N)
    x = x.reshape(-1, K).to(torch.bfloat16).contiguous()
    if rows <= backend.rows and K % 16 == 0:
        return torch._weight_int8pack_mm(x, codes, scales).to(dtype).view(*shape[:-1], N)
    out = x.new_empty(rows, N)
    for step in row_steps(N, K):
        dense = codes[step].to(torch.bfloat16) if kernels is None else cpu.unpack_int8(kernels, codes[step])
        matmul_into(x, dense.t(), out[:, step])
    return out.mul_(scales).to(dtype).view(*shape[:-1], N)


def _decomposed(kernels: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] in 8 bits, with a scale per row, times the codes, and outlier features of x in 16 bits."""
    M, N = len(x), len(codes)
    outliers = x.abs().amax(0) > OUTLIER
    q, row_scales = cpu.narrow_rows(kernels, x, outliers)
    out, step = x.new_empty(M, N), max(16, PRODUCTS // M // 16 * 16)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        products = cpu.scratch(M * (rows.stop - start), torch.int32).view(M, -1)
        torch._int_mm(q, codes[rows].t(), out=products)
        cpu.scale_products(kernels, products, row_scales, scales[rows], out[:, rows])
    kept = outliers.nonzero()[:, 0]
    if len(kept):
        dense = codes[:, kept] * scales.float()[:, None]  # scaled first: the product with codes overflows float16
        out += F.linear(x[:, kept], dense.to(x.dtype))
    return out


def _check_features(found: int, K: int) -> None:
    """The kernels trust what they are given."""
    if found != K:
        raise RuntimeError(f"activations with {found} features meet weights with {K}")


def row_steps(N: int, K: int) -> list[slice]:
    """The rows of a weight [N, K] in steps of UNPACK_ELEMENTS weights."""
    step = max(1, UNPACK_ELEMENTS // K)
    return [slice(start, min(start + step, N)) for start in range(0, N, step)]


def _kernels(x: Tensor, block: int, backend: Backend) -> Any:
    """The compiled kernels where they can be used."""
    return cpu.library(block) if backend.compiled and x.dtype in cpu.DTYPES else None


def _for_many(x: Tensor, backend: Backend) -> Any:
    return cpu_prefill.library() if backend.many and x.dtype in cpu.DTYPES else None


def dense_int4(
    codes: Tensor, scales: Tensor, table: Tensor | None, backend: Backend, N: int, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] that codes in 4 bits stand for."""
    K, block = codes.shape[1], 2 * codes.shape[2]
    kernels = cpu.library(block) if backend.compiled and cpu.readable(codes) else None
    if kernels is None:
        return unpack_int4(codes, scales, table, 0, len(codes)).transpose(1, 2).reshape(-1, K)[:N].to(dtype)
    out = torch.empty(N, K, dtype=dtype)
    step = max(1, UNPACK_ELEMENTS // (K * block))
    for start in range(0, len(codes), step):
        stop = min(start + step, len(codes))
        rows = out[start * block : stop * block]
        rows.copy_(cpu.unpack_int4(kernels, codes, scales, table, start, stop).T[: len(rows)])
    return out


def linear(x: Tensor, codes: Tensor, scales: Tensor, scheme: str, backend: Backend) -> Tensor:
    """x [..., K] times the transpose of weights [N', K] in any scheme: [..., N'] in the dtype of x."""
    if x.is_cuda:
        output = _launched(x, codes, scales, scheme)
        if isinstance(output, Tensor):
            return output
        backend = Backend(False, 0)
    if scheme in INT8:
        return linear_int8(x, codes, scales, backend)
    return linear_int4(x, codes, scales, TABLES.get(scheme), backend)


def _launched(x: Tensor, codes: Tensor, scales: Tensor, scheme: str) -> Tensor | str:
    """By the Triton kernels, or why they cannot start."""
    kernel = min(x.numel() // x.shape[-1], FEW_ROWS), codes.shape[1:], scales.shape
    return launch((scheme, x.dtype, *kernel), x.device, lambda: linear_triton(x, codes, scales, scheme))


def linear_triton(x: Tensor, codes: Tensor, scales: Tensor, scheme: str) -> Tensor:
    """The same by the Triton kernels."""
    from hf_accel_patch.kernels import triton_linear

    flat = x.reshape(-1, x.shape[-1])
    if scheme in INT8:
        y = triton_linear.linear_int8(flat, codes.view(codes.shape[-2:]), scales)
    elif scheme in TABLES:
        y = triton_linear.linear_table(flat, _in_pairs(codes), scales, _table_on(scheme, x.device))
    else:
        y = triton_linear.linear_int4(flat, _in_pairs(codes), scales)
    return y.view(*x.shape[:-1], y.shape[-1])


def dense_triton(codes: Tensor, scales: Tensor, scheme: str, N: int, dtype: torch.dtype) -> Tensor | str:
    """The weight [N, K] that codes in 4 bits on a GPU stand for, or why the kernel cannot start. Nothing else of its
    size is made on the way."""

    def run() -> Tensor:
        from hf_accel_patch.kernels import triton_linear

        in_pairs = _in_pairs(codes)
        if scheme in TABLES:
            return triton_linear.dequantize_table(in_pairs, scales, _table_on(scheme, codes.device), dtype)
        return triton_linear.dequantize_int4(in_pairs, scales, dtype)

    dense = launch(("dense", scheme, dtype, codes.shape), codes.device, run)
    return dense if isinstance(dense, str) else dense[:N]


def _in_pairs(codes: Tensor) -> Tensor:
    """As the Triton kernels read them: what a hook brings to a GPU lies as a CPU reads it."""
    rows = codes.shape[0] * codes.shape[2] * 2
    return codes if codes.shape[-1] * 2 == CUDA_BLOCK else in_blocks(codes, rows, CUDA_BLOCK)


@cache
def _table_on(scheme: str, device: torch.device) -> Any:
    """As the Triton kernels read it."""
    from hf_accel_patch.kernels import triton_linear

    with torch.inference_mode(False):
        return triton_linear.Table.of(TABLES[scheme], device)


@torch.library.custom_op(
    "hf_accel_patch::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scales, str scheme, bool compiled, int rows, bool decomposed, bool many)"
    " -> Tensor",
)
def linear_op(
    x: Tensor, codes: Tensor, scales: Tensor, scheme: str, compiled: bool, rows: int, decomposed: bool, many: bool
) -> Tensor:
    """The same as one operator for graphs that torch.compile makes."""
    return linear(x, codes, scales, scheme, Backend(compiled, rows, decomposed, many))


@linear_op.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, scheme: str, *backend: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(scales) if scheme in INT8 else scales.shape[1])


@on_cpu
def backend_for(scheme: str, compiled: bool) -> Backend:
    """The kernel for weights in this scheme, and up to how many rows of activations it beats unpacking, as measured on
    this machine."""
    block = int4_block()
    random = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    compiled = compiled and cpu.library(block) is not None
    if (scheme not in INT8 and not block) or (scheme in TABLES and not compiled):
        return Backend(False, 0)
    codes, bits = pack(random, scheme, 64, block)
    scales = bits.view(torch.float32 if scheme in TABLES else torch.bfloat16)
    decomposed = scheme == "llm.int8" and compiled

    def seconds(M: int, backend: Backend) -> float:
        x = torch.ones(M, 1024, dtype=torch.bfloat16)
        return least_seconds(lambda: linear(x, codes, scales, scheme, backend))

    def measure() -> list[int]:
        beyond, best = Backend(compiled, 0, decomposed), 0
        many = Backend(compiled, 0, decomposed, True)
        if for_many and all(seconds(M, many) < seconds(M, beyond) for M in MANY_ROWS):
            beyond = many
        for M in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            if seconds(M, Backend(compiled, ALWAYS)) > seconds(M, beyond):
                break
            best = M
        return [best, int(beyond.many)]

    for_many = compiled and cpu_prefill.library() is not None
    for_many = for_many and (scheme in INT8 or cpu_prefill.takes_int4(codes, scales))
    least = [FEW_COMPILED if compiled else 0, int(for_many and torch.bfloat16 in WIDENED)]
    rows, many = remembered(f"{scheme} {compiled} {for_many}", measure, least)
    return Backend(compiled, rows, decomposed, bool(many))


def least_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Of `repeats` runs after one that is not counted, unless they take long: what else the machine does only adds to
    them."""
    times: list[float] = []
    while len(times) <= repeats and sum(times) < LONG_SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)
