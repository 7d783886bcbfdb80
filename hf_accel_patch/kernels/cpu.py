"""Products of a few rows on x86 processors, in C (cpu.c).

`library()` is None where that is not possible, and `why_not()` says why; then PyTorch's kernels do the work, on the
same bytes. See compiling.py for how it is compiled and kept.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from hf_accel_patch.kernels import compiling
from hf_accel_patch.kernels.measuring import remembered
from hf_accel_patch.kernels.noting import Call, notes, unnoted

SOURCE = Path(__file__).with_suffix(".c")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STRIDE = 32  # more than the rows, so that what lies below one another does not fall on the same cache sets
SPAN, TURNS = 1 << 26, 7  # bytes that are read to see what reads faster, and how often
FETCHING = ("linear_int4", "linear_int8", "linear_float")  # products that prefetch where that is faster

_threads = threading.local()
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack


def library(block: int) -> ctypes.CDLL | None:
    """The kernels for int4 codes in blocks of `block` rows, or None."""
    return _load(block)[0]


def why_not(block: int) -> str:
    """Why there are none."""
    return _load(block)[1]


def readable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether code outside PyTorch may read these: plain memory of the CPU, of which no gradient is asked, and nothing
    records or replaces operators (torch.compile, tracing, a dispatch mode, functorch, autocast)."""
    if type(x) is not Tensor or not x.is_cpu or torch.compiler.is_compiling():
        return False
    recorded = torch.is_grad_enabled()
    if recorded and x.requires_grad:
        return False
    for parameter in parameters:
        if parameter is None:
            continue
        if type(parameter) is not Parameter or not parameter.is_cpu or (recorded and parameter.requires_grad):
            return False
    return not (recorded_or_replaced() or torch.is_autocast_enabled("cpu"))


def recorded_or_replaced() -> bool:
    """Whether anything records or replaces the operators of PyTorch, which must then be all that computes; derivatives
    that go forward beside them are such a thing. What notes our calls beside them does not count."""
    modes = _dispatch_modes()
    if modes == 1 and notes() is not None:
        modes = 0
    forward = forward_ad._current_level >= 0
    return bool(torch.compiler.is_compiling() or modes or forward or _tracing_state() or _transforms())


def linear_int4(kernels: ctypes.CDLL, x: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None) -> Tensor:
    """x [..., K] times the transpose of 4-bit weights (see ops/linear.py): [..., N'], like x."""
    x, (groups, N), K = x.contiguous(), scales.shape[:2], codes.shape[1]
    M, out = x.numel() // K, x.new_empty(*x.shape[:-1], N)
    _check(
        kernels.linear_int4(
            x.data_ptr(), DTYPES[x.dtype], M, K, codes.data_ptr(), scales.data_ptr(), _pointer(table), N, K // groups,
            out.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    if (tell := notes()) is not None:
        tell(Call(kernels.linear_int4, x, out, (codes, scales, table), K // groups))
    return out


def linear_int8(kernels: ctypes.CDLL, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [..., K] times the transpose of int8 codes [N, K] with scales [N]: [..., N], like x."""
    x, (N, K) = x.contiguous(), codes.shape[-2:]
    M, out = x.numel() // K, x.new_empty(*x.shape[:-1], N)
    _check(
        kernels.linear_int8(
            x.data_ptr(), DTYPES[x.dtype], M, K, codes.data_ptr(), scales.data_ptr(), N, out.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    if (tell := notes()) is not None:
        tell(Call(kernels.linear_int8, x, out, (codes, scales)))
    return out


def linear_float(kernels: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N], both contiguous and like x: [..., N], summed in
    float32. Of a weight that is not contiguous its transpose must be, and the kernels those of cpu_prefill."""
    x, (N, K) = x.contiguous(), weight.shape
    M, out = x.numel() // K, x.new_empty(*x.shape[:-1], N)
    run = kernels.linear_float if weight.is_contiguous() else kernels.linear_columns
    _check(
        run(
            x.data_ptr(), DTYPES[x.dtype], M, K, weight.data_ptr(), _pointer(bias), N, out.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    if (tell := notes()) is not None:
        tell(Call(run, x, out, (weight, bias)))
    return out


def unpack_int4(
    kernels: ctypes.CDLL, codes: Tensor, scales: Tensor, table: Tensor | None, start: int, stop: int
) -> Tensor:
    """Blocks start..stop as bfloat16 [K, rows], which last until this thread unpacks the next."""
    unnoted("unpack_int4")
    (groups, N), K, block = scales.shape[:2], codes.shape[1], codes.shape[2] * 2
    rows = (stop - start) * block
    out = scratch(K * (rows + STRIDE), torch.bfloat16).view(K, rows + STRIDE)
    kernels.unpack_int4(
        codes[start:].data_ptr(), scales.data_ptr() + 4 * start * block, _pointer(table), N, K, K // groups, rows,
        out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out[:, :rows]


def unpack_int8(kernels: ctypes.CDLL, codes: Tensor) -> Tensor:
    """Contiguous int8 codes as bfloat16, which holds them exactly. It lasts until this thread unpacks the next."""
    unnoted("unpack_int8")
    out = scratch(codes.numel(), torch.bfloat16).view(codes.shape)
    kernels.unpack_int8(codes.data_ptr(), codes.numel(), out.data_ptr(), torch.get_num_threads())
    return out


def narrow_rows(kernels: ctypes.CDLL, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as int8 with a float32 scale [M] per row; input features where `skip` (bool [K]) is set become 0."""
    unnoted("narrow_rows")
    q = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scales = torch.empty(len(x), dtype=torch.float32, device="cpu")
    kernels.narrow_rows(
        x.data_ptr(), DTYPES[x.dtype], *x.shape, skip.data_ptr(), q.data_ptr(), scales.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return q, scales


def scale_products(kernels: ctypes.CDLL, products: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """out [M, n] = products int32 [M, n] * rows float32 [M] * columns bfloat16 [n]. The rows of `out` may be apart."""
    unnoted("scale_products")
    kernels.scale_products(
        products.data_ptr(), *products.shape, rows.data_ptr(), columns.data_ptr(), DTYPES[out.dtype], out.data_ptr(),
        out.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def scratch(size: int, dtype: torch.dtype) -> Tensor:
    """[size], one per thread and dtype: memory that is new each time costs more in page faults than what fills it."""
    kept: Tensor | None = getattr(_threads, str(dtype), None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=dtype, device="cpu")
        setattr(_threads, str(dtype), kept)
    return kept[:size]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the activations of a linear layer")


@cache
def _load(block: int) -> tuple[ctypes.CDLL | None, str]:
    kernels, reason = compiling.load(SOURCE, block)
    if kernels is None:
        return None, reason
    _declare(kernels)
    plain, _ = compiling.load(SOURCE, block, "-DPLAIN")
    if plain is not None:
        _declare(plain)
        faster = remembered(f"plain {block}", lambda: _read_faster(plain, kernels, block))
        for name, is_faster in zip(FETCHING, faster, strict=True):
            if is_faster:
                setattr(kernels, name, getattr(plain, name))
    return kernels, ""


def declare_products(kernels: ctypes.CDLL) -> None:
    """Arguments of what cpu.c and prefill.c have in common."""
    pointer, integer, size, crew = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_ssize_t
    kernels.linear_int4.argtypes = [pointer, integer, size, size, *[pointer] * 3, size, size, pointer, crew]
    kernels.linear_int8.argtypes = [pointer, integer, size, size, pointer, pointer, size, pointer, crew]
    kernels.linear_float.argtypes = [pointer, integer, size, size, pointer, pointer, size, pointer, crew]


def _declare(kernels: ctypes.CDLL) -> None:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    declare_products(kernels)
    kernels.unpack_int4.argtypes = [*[pointer] * 3, size, size, size, size, pointer, size, integer]
    kernels.unpack_int8.argtypes = [pointer, size, pointer, integer]
    kernels.narrow_rows.argtypes = [pointer, integer, size, size, pointer, pointer, pointer, integer]
    kernels.scale_products.argtypes = [pointer, size, size, pointer, pointer, integer, pointer, size, integer]
    for name in ("unpack_int4", "unpack_int8", "narrow_rows", "scale_products"):
        getattr(kernels, name).restype = None


@torch.no_grad()
def _read_faster(first: ctypes.CDLL, second: ctypes.CDLL, block: int) -> list[int]:
    """Whether each of FETCHING of the first multiplies a weight that no cache holds in less time, at its best."""
    K, group, x = 2048, 64, torch.ones(1, 2048, dtype=torch.bfloat16, device="cpu")
    int8 = torch.ones(SPAN // K, K, dtype=torch.int8, device="cpu")
    int4 = torch.ones(2 * SPAN // K // block, K, block // 2, dtype=torch.uint8, device="cpu")
    scales = torch.ones(len(int8), dtype=torch.bfloat16, device="cpu")
    pairs = torch.ones(K // group, len(int4) * block, 2, dtype=torch.bfloat16, device="cpu")
    floats = torch.ones(SPAN // 2 // K, K, dtype=torch.bfloat16, device="cpu")
    return [
        _is_less(lambda kernels: linear_int4(kernels, x, int4, pairs, None), first, second),
        _is_less(lambda kernels: linear_int8(kernels, x, int8, scales), first, second),
        _is_less(lambda kernels: linear_float(kernels, x, floats, None), first, second),
    ]


def _is_less(run: Callable[[ctypes.CDLL], object], first: ctypes.CDLL, second: ctypes.CDLL) -> int:
    least = [math.inf, math.inf]
    for _ in range(TURNS):
        for index, kernels in enumerate((first, second)):
            started = time.perf_counter()
            run(kernels)
            least[index] = min(least[index], time.perf_counter() - started)
    return int(least[0] < least[1])
