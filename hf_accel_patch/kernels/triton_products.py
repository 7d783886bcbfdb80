# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
"""The kernels behind kernels/triton_linear.py: products with codes, and codes as dense weights.

`_product4` and `_product8` turn the product round: outputs are the rows of what tensor cores multiply, the rows of x
its columns, eight at least. That leaves room for a trick. A program splits K into S parts, and its tile has for every
output S rows, one of each part; x comes with S * ROWS columns, those of a part being its own piece of x. So S warps
read S parts of K at once, and of the tile that comes out [S, outputs, S, ROWS] only where both parts are the same is
summed: what the other cells cost is tensor cores that would be idle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_accel_patch.kernels.triton_codes import entries, half_bytes, scale_and_zero, whole_bytes


@triton.jit
def _own(y, S: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    """[S * OUTPUTS, S * ROWS or more] to [OUTPUTS, ROWS], or with S = 1 to [OUTPUTS, ROWS or more]."""
    if S > 1:
        part = (tl.arange(0, S * OUTPUTS) // OUTPUTS)[:, None] == (tl.arange(0, y.shape[1]) // ROWS)[None, :]
        y = tl.sum(tl.reshape(tl.where(part, y, 0.0), [S, OUTPUTS, y.shape[1]]), axis=0)
        y = tl.sum(tl.reshape(y, [OUTPUTS, y.shape[1] // ROWS, ROWS]), axis=1)
    return y


@triton.jit
def _weight(
    tile, second, third, codes_0, codes_1, codes_2, scales_0, scales_1, scales_2, out_0, out_1, out_2, n_0, n_1, n_2
):  # fmt: skip
    """Of three weights that share x, the one that a tile is of, and which one of its tiles that is: they begin with the
    tiles 0, `second` and `third`."""
    codes, scales, out, n, first = codes_0, scales_0, out_0, n_0, tile * 0
    if tile >= second:
        codes, scales, out, n, first = codes_1, scales_1, out_1, n_1, second
    if tile >= third:
        codes, scales, out, n, first = codes_2, scales_2, out_2, n_2, third
    return codes, scales, out, n, tile - first


@triton.jit(do_not_specialize=["M", "pairs", "groups", "each"])  # what changes with the rows of x compiles once
def _product4(
    x, codes, scales, table, out, M, N, K, pairs, groups, each,
    LOOKUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, S: tl.constexpr,
    G: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """PAIRS pairs of outputs, whose codes share their bytes, over S parts of `each` groups. scales: int64 [groups,
    pairs], two words each."""
    _tile4(
        tl.program_id(0), x, codes, scales, table, out, M, N, K, pairs, groups, each,
        LOOKUP, ROWS, COLUMNS, PAIRS, S, G, UNROLL, STAGES, FAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "pairs_0", "pairs_1", "pairs_2", "groups", "each", "second", "third"])
def _three4(
    x, codes_0, codes_1, codes_2, scales_0, scales_1, scales_2, table, out_0, out_1, out_2, M, K,
    pairs_0, pairs_1, pairs_2, groups, each, second, third,
    LOOKUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, S: tl.constexpr,
    G: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """`_product4` of three weights in one, their tiles one after another."""
    codes, scales, out, pairs, tile = _weight(
        tl.program_id(0), second, third, codes_0, codes_1, codes_2, scales_0, scales_1, scales_2, out_0, out_1, out_2,
        pairs_0, pairs_1, pairs_2,
    )  # fmt: skip
    _tile4(
        tile, x, codes, scales, table, out, M, 2 * pairs, K, pairs, groups, each,
        LOOKUP, ROWS, COLUMNS, PAIRS, S, G, UNROLL, STAGES, FAST,
    )  # fmt: skip


@triton.jit
def _tile4(
    tile, x, codes, scales, table, out, M, N, K, pairs, groups, each,
    LOOKUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, S: tl.constexpr,
    G: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    OFFSET: tl.constexpr = 0.0 if dtype == tl.float16 else 136.0
    split = tl.program_id(1)
    r, c, k = tl.arange(0, S * PAIRS), tl.arange(0, COLUMNS), tl.arange(0, G)
    pair = tl.minimum(tile * PAIRS + r % PAIRS, pairs - 1)
    row = tl.program_id(2) * ROWS + c % ROWS
    first_r = (split * S + r // PAIRS) * each  # the group with which a part begins
    first_c = (split * S + c // ROWS) * each
    last_r = tl.maximum(tl.minimum(each, groups - first_r) - 1, 0)
    last_c = tl.where((row < M) & (c < S * ROWS), tl.minimum(each, groups - first_c), 0)
    codes += pair[:, None].to(tl.int64) * K + k[None, :]
    x += (row * K + first_c * G)[None, :] + k[:, None]
    scales += pair
    low = tl.zeros([S * PAIRS, COLUMNS], tl.float32)
    high = tl.zeros([S * PAIRS, COLUMNS], tl.float32)
    for begin in tl.range(0, each, UNROLL, num_stages=STAGES):
        for step in tl.static_range(UNROLL):
            g = begin + step
            group = tl.minimum(first_r + tl.minimum(g, last_r), groups - 1)
            both = tl.load(scales + group * pairs)
            w = tl.load(codes + (group * G)[:, None])
            x_k = tl.load(x + g * G, mask=(g < last_c)[None, :], other=0)
            scale_low, scale_high = both.to(tl.int32), (both >> 32).to(tl.int32)
            if table is not None:
                q_low, q_high = entries(w, table, LOOKUP, dtype, FAST)
                low += tl.dot(q_low, x_k) * scale_low.to(tl.float32, bitcast=True)[:, None]
                high += tl.dot(q_high, x_k) * scale_high.to(tl.float32, bitcast=True)[:, None]
            else:
                q_low, q_high, one = half_bytes(w, dtype, FAST)
                x_sum = tl.dot(one, x_k)
                scale, zero = scale_and_zero(scale_low, OFFSET)
                low += tl.dot(q_low, x_k) * scale[:, None]
                low += x_sum * zero[:, None]
                scale, zero = scale_and_zero(scale_high, OFFSET)
                high += tl.dot(q_high, x_k) * scale[:, None]
                high += x_sum * zero[:, None]
    low, high = _own(low, S, PAIRS, ROWS), _own(high, S, PAIRS, ROWS)
    output = (tile * PAIRS + tl.arange(0, PAIRS))[:, None] * 2
    row = (tl.program_id(2) * ROWS + tl.arange(0, low.shape[1]))[None, :]
    out += (split * M + row) * N + output
    mask = (row < M) & (tl.arange(0, low.shape[1]) < ROWS)[None, :] & (output < 2 * pairs)
    tl.store(out, low.to(out.dtype.element_ty), mask=mask)
    tl.store(out + 1, high.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "each"])
def _product8(
    x, codes, scales, out, M, N, K, each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """OUTPUTS outputs over S parts of `each` steps."""
    _tile8(tl.program_id(0), x, codes, scales, out, M, N, K, each, ROWS, COLUMNS, OUTPUTS, S, STEP, STAGES, FAST)


@triton.jit(do_not_specialize=["M", "N_0", "N_1", "N_2", "each", "second", "third"])
def _three8(
    x, codes_0, codes_1, codes_2, scales_0, scales_1, scales_2, out_0, out_1, out_2, M, K, N_0, N_1, N_2, each,
    second, third,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """`_product8` of three weights in one, their tiles one after another."""
    codes, scales, out, N, tile = _weight(
        tl.program_id(0), second, third, codes_0, codes_1, codes_2, scales_0, scales_1, scales_2, out_0, out_1, out_2,
        N_0, N_1, N_2,
    )  # fmt: skip
    _tile8(tile, x, codes, scales, out, M, N, K, each, ROWS, COLUMNS, OUTPUTS, S, STEP, STAGES, FAST)


@triton.jit
def _tile8(
    tile, x, codes, scales, out, M, N, K, each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    r, c, k = tl.arange(0, S * OUTPUTS), tl.arange(0, COLUMNS), tl.arange(0, STEP)
    n = tl.minimum(tile * OUTPUTS + r % OUTPUTS, N - 1)
    row = tl.program_id(2) * ROWS + c % ROWS
    first_r = (split * S + r // OUTPUTS) * each * STEP
    first_c = (split * S + c // ROWS) * each * STEP
    stop = tl.where((row < M) & (c < S * ROWS), tl.minimum(first_c + each * STEP, K), 0)
    k_r = first_r[:, None] + k[None, :]
    k_c = first_c[None, :] + k[:, None]
    codes += n[:, None].to(tl.int64) * K + k_r
    x += (row * K)[None, :] + k_c
    y = tl.zeros([S * OUTPUTS, COLUMNS], tl.float32)
    for step in tl.range(0, each, num_stages=STAGES):
        at = step * STEP
        w = tl.load(codes + at, mask=k_r + at < K, other=0)
        x_k = tl.load(x + at, mask=k_c + at < stop[None, :], other=0)
        y = tl.dot(whole_bytes(w, dtype, FAST), x_k, y)
    y = _own(y, S, OUTPUTS, ROWS)
    output = (tile * OUTPUTS + tl.arange(0, OUTPUTS))[:, None]
    row = (tl.program_id(2) * ROWS + tl.arange(0, y.shape[1]))[None, :]
    y *= tl.load(scales + output, mask=output < N, other=0).to(tl.float32)
    mask = (row < M) & (tl.arange(0, y.shape[1]) < ROWS)[None, :] & (output < N)
    tl.store(out + (split * M + row) * N + output, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _weights(w, scale, table, HIGH: tl.constexpr):
    """In float32: of codes the low or the high half-bytes, with words [...] of scales."""
    q = w >> 4 if HIGH else w & 15
    if table is not None:
        y = tl.load(table + q) * scale.to(tl.float32, bitcast=True)
    else:
        scale, zero = scale_and_zero(scale, 8.0)
        y = q.to(tl.float32) * scale + zero
    return y


@triton.jit(do_not_specialize=["M", "pairs"])
def _exact4(
    x, codes, scales, table, out, M, N, K, pairs,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """PAIRS pairs of outputs of float32 activations, without tensor cores, which would round them."""
    pair = tl.minimum(tl.program_id(0) * PAIRS + tl.arange(0, PAIRS), pairs - 1)[:, None]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None]
    k = tl.arange(0, STEP)[None, :]
    low = tl.zeros([ROWS, PAIRS, STEP], tl.float32)
    high = tl.zeros([ROWS, PAIRS, STEP], tl.float32)
    for start in range(0, K, STEP):
        live = start + k < K
        w = tl.load(codes + pair.to(tl.int64) * K + start + k, mask=live, other=0)
        both = tl.load(scales + (start + k) // G * pairs + pair, mask=live, other=0)
        x_k = tl.load(x + row * K + (start + k)[None, :, :], mask=live[None, :, :] & (row < M), other=0)
        low += _weights(w, both.to(tl.int32), table, False)[None, :, :] * x_k
        high += _weights(w, (both >> 32).to(tl.int32), table, True)[None, :, :] * x_k
    output = (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))[None, :] * 2
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < M) & (output < 2 * pairs)
    tl.store(out + row * N + output, tl.sum(low, axis=2), mask=mask)
    tl.store(out + row * N + output + 1, tl.sum(high, axis=2), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _exact8(x, codes, scales, out, M, N, K, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr):
    """OUTPUTS outputs of float32 activations."""
    n = tl.minimum(tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), N - 1)[:, None]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None]
    k = tl.arange(0, STEP)[None, :]
    total = tl.zeros([ROWS, OUTPUTS, STEP], tl.float32)
    for start in range(0, K, STEP):
        live = start + k < K
        w = tl.load(codes + n.to(tl.int64) * K + start + k, mask=live, other=0).to(tl.float32)
        x_k = tl.load(x + row * K + (start + k)[None, :, :], mask=live[None, :, :] & (row < M), other=0)
        total += w[None, :, :] * x_k
    n = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    y = tl.sum(total, axis=2) * tl.load(scales + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out + row * N + n, y, mask=(row < M) & (n < N))


@triton.jit
def _add(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """parts [SPLITS, size] to out [size], in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(parts + at, mask=at < size)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(parts + split * size + at, mask=at < size)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _dense4(codes, scales, table, out, pairs, stride, K, PAIRS: tl.constexpr, STEP: tl.constexpr, G: tl.constexpr):
    """PAIRS pairs of rows of the weights, over STEP input features. stride: pairs in a row of the scales, which may be
    those of more weights."""
    pair = (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))[:, None]
    k = (tl.program_id(1) * STEP + tl.arange(0, STEP))[None, :]
    live = (k < K) & (pair < pairs)
    w = tl.load(codes + pair.to(tl.int64) * K + k, mask=live, other=0)
    both = tl.load(scales + k // G * stride + pair, mask=live, other=0)
    at = out + pair.to(tl.int64) * 2 * K + k
    tl.store(at, _weights(w, both.to(tl.int32), table, False).to(out.dtype.element_ty), mask=live)
    tl.store(at + K, _weights(w, (both >> 32).to(tl.int32), table, True).to(out.dtype.element_ty), mask=live)
