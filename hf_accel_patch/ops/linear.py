"""Products with quantized weights on the CPU.

One or a few rows of activations go through a matrix-vector kernel, which reads the weights once: that of
kernels/cpu.py, which a C compiler on this machine makes, or else PyTorch's, which wants bfloat16 activations (with
float32 or float16 it is scalar code). Both work on the same bytes. Their time grows with the rows, so a prefill unpacks
blocks of weights to bfloat16 and multiplies those. Where the two cross, and whether PyTorch has a fast kernel for this
processor at all, is measured once per process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops.quantize import quantize_int4, row_blocks

UNPACK_ELEMENTS = 1 << 20  # weights unpacked at a time: 2 MB in bfloat16, which stay in the cache
ALWAYS = 1 << 30  # rows


@dataclass(frozen=True)
class Backend:
    """What multiplies: a matrix-vector kernel, compiled or PyTorch's, for up to `rows` rows of activations."""

    compiled: bool
    rows: int

    def __str__(self) -> str:
        kernel = "compiled kernel" if self.compiled else "PyTorch's kernel"
        return f"{kernel} up to {self.rows} rows, then unpacked" if self.rows else "unpacked to bfloat16"


def pack_int4(weight: Tensor, group_size: int, block: int, refinements: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize [N, K] and lay the codes out for PyTorch's CPU kernel, row block by row block.

    Returns codes uint8 [N', K / 2] and scales and zeros bfloat16 [K / G, N', 2], N' being N rounded up to whole blocks.
    In memory the codes are [N' / block, K, block / 2]: the low half-byte is a row of the block's first half, the high
    half-byte the same row of its second half.
    """
    N, K = weight.shape
    padded = -(-N // block) * block
    packed = torch.empty(padded // block, K, block // 2, dtype=torch.uint8)
    scales = torch.empty(K // group_size, padded, 2, dtype=torch.bfloat16)
    for rows in row_blocks(weight, block):
        codes, scale, zero = quantize_int4(weight[rows], group_size, refinements)
        if short := -len(codes) % block:
            codes, scale, zero = (F.pad(x, (0, 0, 0, short)) for x in (codes, scale, zero))
        stop = rows.start + len(codes)
        halves = codes.view(-1, 2, block // 2, K)
        bytes_ = halves[:, 1].bitwise_left_shift(4).bitwise_or_(halves[:, 0])
        packed[rows.start // block : stop // block] = bytes_.transpose(1, 2)
        scales[:, rows.start : stop, 0] = scale.T
        scales[:, rows.start : stop, 1] = zero.T
    return packed.view(padded, K // 2), scales


def unpack_int4(packed: Tensor, scales: Tensor, block: int, start: int, stop: int) -> Tensor:
    """Blocks start..stop as bfloat16 [stop - start, K, block], transposed as the codes lie in memory."""
    K = packed.shape[1] * 2
    groups = scales.shape[0]
    bytes_ = packed.view(-1, K, block // 2)[start:stop]
    out = torch.empty(stop - start, K, 2, block // 2, dtype=torch.bfloat16)
    out[:, :, 0] = bytes_.bitwise_and(15).sub_(8).view(torch.int8)
    out[:, :, 1] = bytes_.bitwise_right_shift(4).sub_(8).view(torch.int8)
    s = scales[:, start * block : stop * block].view(groups, -1, block, 2).transpose(0, 1)
    scale, zero = (s[..., i].unsqueeze(2).contiguous() for i in (0, 1))
    grouped = out.view(stop - start, groups, K // groups, block)
    torch.addcmul(zero, grouped, scale, out=grouped)
    return out.view(stop - start, K, block)


def rows_int4(packed: Tensor, scales: Tensor, block: int, index: Tensor) -> Tensor:
    """Rows `index` [n] of the weights, bfloat16 [n, K]."""
    K = packed.shape[1] * 2
    lane = index % block
    bytes_ = packed.view(-1, K, block // 2)[index // block, :, lane % (block // 2)]
    codes = bytes_.bitwise_right_shift((lane // (block // 2) * 4).to(torch.uint8)[:, None]).bitwise_and_(15)
    scale, zero = scales[:, index].unbind(-1)
    grouped = codes.view(len(index), scales.shape[0], -1).float() - 8
    return (grouped * scale.T[..., None] + zero.T[..., None]).view(len(index), K).bfloat16()


def linear_int4(x: Tensor, packed: Tensor, scales: Tensor, block: int, backend: Backend) -> Tensor:
    """x [..., K] times the weights' transpose: [..., N'] in the dtype of x."""
    kernels, shape, dtype = _kernels(x, block, backend), x.shape, x.dtype
    _check_features(shape[-1], packed.shape[1] * 2)
    if x.numel() // shape[-1] <= backend.rows and kernels is not None:
        return cpu.linear_int4(kernels, x, packed, scales)
    x = x.reshape(-1, shape[-1]).to(torch.bfloat16).contiguous()
    if x.shape[0] <= backend.rows and block == int4_block():  # a model from another machine may have another layout
        group_size = x.shape[1] // scales.shape[0]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)
        return y.to(dtype).view(*shape[:-1], len(packed))
    N, K = packed.shape[0], packed.shape[1] * 2
    out = x.new_empty(x.shape[0], N)
    step = max(1, UNPACK_ELEMENTS // (K * block))
    for start in range(0, N // block, step):
        stop = min(start + step, N // block)
        rows = slice(start * block, stop * block)
        if kernels is not None:
            torch.mm(x, cpu.unpack_int4(kernels, packed, scales, rows.start, rows.stop), out=out[:, rows])
        else:
            product = torch.matmul(x, unpack_int4(packed, scales, block, start, stop))
            out[:, rows].view(-1, stop - start, block).copy_(product.transpose(0, 1))
    return out.to(dtype).view(*shape[:-1], N)


def linear_int8(x: Tensor, codes: Tensor, scales: Tensor, backend: Backend) -> Tensor:
    """x [..., K] times the transpose of int8 codes [N, K] with bfloat16 scales [N]: [..., N] in the dtype of x."""
    (N, K), shape, dtype = codes.shape, x.shape, x.dtype
    kernels = _kernels(x, int4_block(), backend)
    _check_features(shape[-1], K)
    if x.numel() // K <= backend.rows and kernels is not None:
        return cpu.linear_int8(kernels, x, codes, scales)
    x = x.reshape(-1, K).to(torch.bfloat16).contiguous()
    if x.shape[0] <= backend.rows and K % 16 == 0:
        return torch._weight_int8pack_mm(x, codes, scales).to(dtype).view(*shape[:-1], N)
    out = x.new_empty(x.shape[0], N)
    for rows in row_steps(N, K):
        dense = codes[rows].to(torch.bfloat16) if kernels is None else cpu.unpack_int8(kernels, codes[rows])
        torch.mul(F.linear(x, dense), scales[rows], out=out[:, rows])
    return out.to(dtype).view(*shape[:-1], N)


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


@torch.library.custom_op(
    "hf_accel_patch::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scales, int block, bool compiled, int rows) -> Tensor",
)
def linear_op(x: Tensor, codes: Tensor, scales: Tensor, block: int, compiled: bool, rows: int) -> Tensor:
    """Either product as one operator for graphs that torch.compile makes; `block` is 0 for int8."""
    backend = Backend(compiled, rows)
    return linear_int4(x, codes, scales, block, backend) if block else linear_int8(x, codes, scales, backend)


@linear_op.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, block: int, compiled: bool, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@cache
def int4_block() -> int:
    """Rows per block in the layout of PyTorch's kernel on this processor: 64 with AVX512, 32 with AVX2; 0 where it has
    another layout, and with it no fast kernel."""
    codes = torch.randint(0, 16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (64, 32):
        halves = codes.view(-1, 2, block // 2, 64)
        ours = (halves[:, 1] << 4 | halves[:, 0]).transpose(1, 2).to(torch.uint8)
        if torch.equal(ours.reshape(expected.shape), expected):
            return block
    return 0


@cache
def backend_int4(compiled: bool) -> Backend:
    """The kernel for int4 weights, and up to how many rows of activations it beats unpacking, measured."""
    block = int4_block()
    if not block:
        return Backend(False, 0)
    packed, scales = pack_int4(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)), 64, block)
    return _measured(compiled, block, lambda x, backend: linear_int4(x, packed, scales, block, backend))


@cache
def backend_int8(compiled: bool) -> Backend:
    """The same for int8 weights."""
    codes, scales = torch.ones(1024, 1024, dtype=torch.int8), torch.ones(1024, dtype=torch.bfloat16)
    return _measured(compiled, int4_block(), lambda x, backend: linear_int8(x, codes, scales, backend))


def _measured(compiled: bool, block: int, linear: Callable[[Tensor, Backend], Tensor]) -> Backend:
    """The backend with the largest number of rows, a power of two up to 256, at which its kernel still wins."""
    compiled = compiled and cpu.library(block) is not None
    best = 0
    for M in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        x = torch.ones(M, 1024, dtype=torch.bfloat16)
        kernel, unpacked = (partial(linear, x, Backend(compiled, rows)) for rows in (ALWAYS, 0))
        if median_seconds(kernel) > median_seconds(unpacked):
            break
        best = M
    return Backend(compiled, best)


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Of `repeats` runs, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
