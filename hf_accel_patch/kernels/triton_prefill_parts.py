# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="assignment"
"""What the forward and the backward of kernels/triton_prefill.py have in common: scores, rows and what queries see."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
BIAS_ROOM = tl.constexpr(128)  # rows of a bias are multiples of this, as long as the largest block of keys


@triton.jit
def approximate_tanh(x):
    """Within 2^-11 of its size, by one instruction of NVIDIA GPUs since compute capability 7.5."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def to_scores(products, scale, cap, FAST: tl.constexpr):
    """Scores before they are multiplied with `unit_of`: products of queries and keys, or with a soft cap their tanh."""
    if cap is None:
        y = products
    elif FAST:
        y = approximate_tanh(products * (scale / cap))
    else:
        e = tl.exp2(tl.abs(products) * (-2 * LOG2E * scale / cap))
        tanh = (1 - e) / (1 + e)
        y = tl.where(products < 0, -tanh, tanh)
    return y


@triton.jit
def unit_of(scale, cap):
    """What `to_scores` is multiplied with to be scores in base 2."""
    return (scale if cap is None else cap) * LOG2E


@triton.jit
def load_rows(x, start, stride, rows, SIZE: tl.constexpr, ROWS: tl.constexpr, ROOM: tl.constexpr, WHOLE: tl.constexpr):
    """Rows start.. of a matrix [rows, SIZE], as [ROWS, ROOM] with zeros around it. WHOLE: all rows exist."""
    row, d = tl.arange(0, ROWS)[:, None], tl.arange(0, ROOM)[None, :]
    at = x + tl.cast(start, tl.int64) * stride + row * stride + d
    if WHOLE and SIZE == ROOM:
        y = tl.load(at)
    elif WHOLE:
        y = tl.load(at, mask=d < SIZE, other=0)
    else:
        y = tl.load(at, mask=(start + row < rows) & (d < SIZE), other=0)
    return y


@triton.jit
def bounds(seen, row, T, S, N: tl.constexpr):
    """The intervals of rows, and of keys in whole blocks: those that any row sees, and those that all see."""
    live = row < T
    first = tl.load(seen + row * 2, mask=live, other=0)
    last = tl.load(seen + row * 2 + 1, mask=live, other=0)
    some = first < last
    start = tl.min(tl.where(some, first, S), axis=0) // N * N
    stop = tl.max(tl.where(some, last, 0), axis=0)
    inner = tl.cdiv(tl.max(first, axis=0), N) * N
    outer = tl.min(tl.where(live, last, S), axis=0) // N * N
    return first, last, start, stop, inner, outer
