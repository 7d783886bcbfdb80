# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="assignment"
"""Attention of a few queries to exact keys and values, in Triton: what triton_decode.py calls for caches without codes.

A program goes over the tokens of a key/value head in steps, of 64 in 16 bits with head size 128, which its four warps
share: each multiplies 16 keys with all query rows, and the weights of all with a quarter of the channels of the values.
Keys and values of the next two steps are on their way meanwhile. Query rows fill a tensor core's 16: up to 8 of 16 bits
lie there twice, so that their weights meet the values as two terms, rounded and what that lacks, as good as float32;
more are rounded once, as in FlashAttention. Exact float32 is three products of tf32. A program first reads its part of
the mask, and stops at the last token that it shows: room for later tokens costs nothing.

What limits it are not bytes but how long a warp waits for itself: 9 to 11 cycles per instruction, on an H200. Per step,
as Triton 3.6 compiles it for sm_90 with a mask, a warp has 281 instructions, 32 of them products, and waits for others
6 times; the two terms cost 12. In 154 registers and 71 KB three programs fit on a processor, so by that count reading
takes nearly twice as long. Before, each warp had a softmax of its own over 16 tokens, in a layout of Triton's that took
678 instructions and waited 18 times for as many bytes, in two programs, which read 46 % of the bandwidth.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from hf_accel_patch.kernels.triton_decode_parts import LOG2E, capped, placed

STEP_BYTES = 32768  # of keys and values that a program loads at a time
PROCESSOR_BYTES = 227 << 10  # of shared memory
SCANNED = tl.constexpr(1024)  # tokens of a mask at a time


@triton.jit
def _last_seen(mask, first, stop, R, T, m_t, N: tl.constexpr, TIMES: tl.constexpr):
    """Where to stop between the steps `first` and `stop`, as no query sees a token beyond. (To begin later as well,
    where the first is seen, would have Triton 3.9 forget how what is loaded is aligned.)"""
    i = tl.arange(0, SCANNED)
    high = tl.full([SCANNED], -N, tl.int32)
    end = tl.minimum(stop * N, R)
    times = T if TIMES else 1
    for t in tl.range(0, times, num_stages=1):
        for start in tl.range(first * N, end, SCANNED, num_stages=1):
            at = start + i
            live = tl.load(mask + t * m_t + at, mask=at < end, other=0) != 0
            high = tl.maximum(high, tl.where(live, at, -N))
    return tl.minimum(stop, tl.max(high, axis=0) // N + 1)


@triton.jit
def _loaded(x, start, LIMIT, STRIDE: tl.constexpr, C: tl.constexpr, N: tl.constexpr, CP: tl.constexpr,
            WHOLE: tl.constexpr):  # fmt: skip
    """N tokens x [start :, : C] as [N, CP]."""
    n, c = tl.arange(0, N)[:, None], tl.arange(0, CP)[None, :]
    at = x + start.to(tl.int64) * STRIDE + (n * STRIDE + c)
    if WHOLE and C == CP:
        return tl.load(at)
    elif WHOLE:
        return tl.load(at, mask=c < C, other=0)
    else:
        return tl.load(at, mask=(start + n < LIMIT) & (c < C), other=0)


@triton.jit
def _visible(mask, start, end, M: tl.constexpr, N: tl.constexpr, EACH: tl.constexpr):
    """What is seen of N tokens, a byte for each; if EACH, for each of M rows."""
    column = start + tl.arange(0, N)[None, :]
    if EACH:
        return tl.load(mask + column, mask=(tl.arange(0, M)[:, None] < M) & (column < end), other=0)
    else:
        return tl.load(mask + column, mask=column < end, other=0)


@triton.jit
def _steps(
    sums, m, total, q, k, v, mask, first, stop, R, scale, cap,
    k_r: tl.constexpr, v_r: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    N: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The softmax goes on over the steps from `first` to `stop`. Maxima are those of products, or of capped logits."""
    M: tl.constexpr = PIECES * ROWS
    unit = scale * LOG2E if cap is None else 1.0
    end = tl.minimum(stop * N, R)
    if mask is not None:
        seen = _visible(mask, first * N, end, M, N, EACH)
    for step in tl.range(first, stop, num_stages=STAGES):
        start = step * N
        keys = _loaded(k, start, R, k_r, D, N, DP, WHOLE)
        x = tl.dot(q, tl.trans(keys), input_precision="tf32x3")
        if cap is not None:
            x = capped(x, scale, cap)
        if mask is not None:
            shown = seen
            if EACH:  # through a product, so that the softmax keeps the layout of products
                one = tl.arange(0, M)[:, None] == tl.arange(0, M)[None, :]
                shown = tl.dot(one.to(tl.float16), seen.to(tl.float16))
            x = tl.where(shown != 0, x, float("-inf"))
            seen = _visible(mask, start + N, end, M, N, EACH)  # a step ahead
        elif not WHOLE:
            x = tl.where(start + tl.arange(0, N)[None, :] < R, x, float("-inf"))
        most = tl.maximum(m, tl.max(x, axis=1))
        shift = tl.where(most == float("-inf"), 0.0, most) * unit
        p = tl.exp2(x * unit - shift[:, None])
        alpha = tl.exp2(m * unit - shift)
        m = most
        total = total * alpha[:, None] + p  # added up at the end, so that warps do not wait for each other's
        values = _loaded(v, start, R, v_r, V, N, VP, WHOLE)
        weights = p.to(values.dtype)
        if PIECES > 1:  # the second half of the rows has what is lost in the first
            rest = (p - weights.to(tl.float32)).to(values.dtype)
            weights = tl.where(tl.arange(0, M)[:, None] < ROWS, weights, rest)
        sums = tl.dot(weights, values, sums * alpha[:, None], input_precision="tf32x3")
    return sums, m, total


@triton.jit(
    do_not_specialize=["R", "steps", "m_b", "m_h", "m_t"],  # what changes with the length compiles once
    do_not_specialize_on_alignment=["mask"],
)
def attend_exact(
    q, k, v, mask, sinks, stats, out, K, G, T, R, steps, scale, cap,
    q_b, q_h, q_t, k_b, k_k, v_b, v_k, m_b, m_h, m_t,
    k_r: tl.constexpr, v_r: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    HEADS: tl.constexpr, TIMES: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
    N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a key/value head over `steps` steps of N tokens. The mask differs between HEADS, and TIMES."""
    M: tl.constexpr = PIECES * ROWS
    tiles = tl.cdiv(G * T, ROWS)
    line = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    batch, head = line // K, line % K
    rows = G * T
    piece_row = tile * ROWS + tl.arange(0, M) % ROWS
    k += batch * k_b + head * k_k
    v += batch * v_b + head * v_k
    first = tl.program_id(1) * steps
    stop = tl.minimum(first + steps, tl.cdiv(R, N))
    if mask is not None:
        mask += batch * m_b
        if not HEADS:
            stop = _last_seen(mask, first, stop, R, T, m_t, N, TIMES)
        if HEADS or TIMES:
            each = tl.minimum(piece_row, rows - 1)[:, None]
            mask += (head * G + each // T) * m_h + (each % T) * m_t
    d = tl.arange(0, DP)[None, :]
    q_at = q + batch * q_b + head * G * q_h + (piece_row // T * q_h + piece_row % T * q_t)[:, None] + d
    queries = tl.load(q_at, mask=(piece_row < rows)[:, None] & (d < D), other=0)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M, N], tl.float32)
    sums = tl.zeros([M, VP], tl.float32)
    whole = R // N
    sums, m, total = _steps(
        sums, m, total, queries, k, v, mask, first, tl.minimum(stop, whole), R, scale, cap,
        k_r, v_r, D, V, DP, VP, N, HEADS or TIMES, ROWS, PIECES, True, STAGES)  # fmt: skip
    sums, m, total = _steps(
        sums, m, total, queries, k, v, mask, tl.maximum(first, whole), stop, R, scale, cap,
        k_r, v_r, D, V, DP, VP, N, HEADS or TIMES, ROWS, PIECES, False, 1)  # fmt: skip
    total = tl.sum(total, axis=1)
    if cap is None:
        m *= scale * LOG2E
    if PIECES > 1:
        sums = tl.sum(tl.reshape(sums, [PIECES, ROWS, VP]), axis=0)
        m = tl.max(tl.reshape(m, [PIECES, ROWS]), axis=0)
        total = tl.max(tl.reshape(total, [PIECES, ROWS]), axis=0)
    row = tile * ROWS + tl.arange(0, ROWS)
    at, inverse = placed(m, total, sinks, stats, row, rows, line, batch, head, K, G, T, SPLIT)
    sums *= inverse[:, None]
    channel = tl.arange(0, VP)[None, :]
    tl.store(out + at[:, None] * V + channel, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (channel < V))


class Tiling(NamedTuple):
    """The sizes of a program."""

    warps: int
    rows: int
    pieces: int  # rows of a tensor core's operand per row
    tokens: int  # at a time; at most 16 per warp, or Triton lays the softmax out as it reads the mask
    stages: int
    fit: int  # programs on a processor at once


@lru_cache(maxsize=1024)
def tiling(rows: int, key_size: int, value_size: int, float32: bool) -> Tiling:
    """For `rows` query rows per key/value head, and sizes that are powers of two."""
    if rows <= 8 and not float32:
        tile, pieces = 8, 2
    else:
        tile, pieces = 16 if rows <= 16 or float32 or value_size > 128 else 32, 1
    token_bytes = (key_size + value_size) * (4 if float32 else 2)
    tokens = max(16, min(64, 1 << (STEP_BYTES // token_bytes).bit_length() - 1))
    stages = 3 if tokens * token_bytes <= STEP_BYTES else 2
    taken = (stages - 1) * tokens * token_bytes + 16 * key_size * (4 if float32 else 2) + 4096
    fit = max(1, min(2 if float32 or tile * pieces > 16 else 3, PROCESSOR_BYTES // taken))
    return Tiling(4, tile, pieces, tokens, stages, fit)
