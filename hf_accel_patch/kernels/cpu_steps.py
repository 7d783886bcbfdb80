"""Lists of operators on x86 processors, run in C without a return to Python (steps.c).

`library()` is None where that is not possible; see compiling.py for how it is compiled and kept.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

from hf_accel_patch.kernels import compiling, cpu

SOURCE = Path(__file__).with_name("steps.c")
DIMS = 5
OPERATOR = struct.Struct(f"@5q{4 * DIMS}q3Pd6q")  # `operator` in steps.c


class Kind(IntEnum):
    """As in steps.c."""

    COPY, ADD, SUBTRACT, MULTIPLY, DIVIDE, NEGATE, RSQRT, SQUARE, CUBE = range(9)
    SILU, SIGMOID, EXP, TANH, GELU, GELU_TANH, RELU, COS, SIN = range(9, 18)
    LESS_EQUAL, GREATER, BOTH, PLUS, TO_FLOAT = range(18, 23)
    MEAN, SUM, LAYER_NORM = range(23, 26)
    MOVE, GATHER, SCATTER = range(26, 29)
    LINEAR_INT4, LINEAR_INT8, LINEAR_FLOAT, ATTEND = range(29, 33)


def library() -> ctypes.CDLL | None:
    """The runner, or None."""
    return _load()[0]


def why_not() -> str:
    """Why there is none."""
    return _load()[1]


def packed(
    kind: Kind,
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
    pointers: Sequence[int],
    scalar: float,
    extra: Sequence[int],
) -> bytes:
    """One operator. dtypes, strides and pointers: of the output and of up to two inputs."""
    codes = [cpu.DTYPES.get(dtype, 0) for dtype in dtypes] + [0] * (3 - len(dtypes))
    rows = [_filled(each, DIMS) for each in (*strides, *[()] * (3 - len(strides)))]
    return OPERATOR.pack(
        kind, *codes, len(sizes), *_filled(sizes, DIMS), *rows[0], *rows[1], *rows[2], *_filled(pointers, 3), scalar,
        *_filled(extra, 6),
    )  # fmt: skip


def run(kernels: ctypes.CDLL, operators: ctypes.Array[ctypes.c_char], count: int) -> None:
    """Run a list of packed operators. Raises IndexError for an index that is not there, MemoryError."""
    failed = kernels.run(operators, count, torch.get_num_threads())
    if failed:
        kind = Kind(struct.unpack_from("@q", operators, (failed - 1) * OPERATOR.size)[0])
        if kind in (Kind.GATHER, Kind.SCATTER):
            raise IndexError("index out of range in self")
        raise MemoryError("no memory for a product or an attention")


def _filled(values: Sequence[int], size: int) -> list[int]:
    return [*values, *[0] * (size - len(values))]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    kernels, reason = compiling.load(SOURCE, 64)
    if kernels is None:
        kernels, reason = compiling.load(SOURCE, 32)
    if kernels is not None:
        kernels.run.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
        kernels.run.restype = ctypes.c_int64
    return kernels, reason
