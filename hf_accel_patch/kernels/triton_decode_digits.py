# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="assignment"
"""Attention of a few queries to quantized keys and values of any kind, in Triton: what triton_decode.py calls where
triton_decode_codes.py does not do it.

Every warp of a program is on its own: it takes a whole block of 64 quantized tokens, or 16 exact ones of the
rest, at a time, with a softmax and sums of its own, which a program adds at its end. Codes are never dequantized.
Tensor cores multiply them as the bytes they are, four of a word being what an operand has side by side: of int8 less
128, of int4 the low halves, and 16 times the high halves less 8. What they meet is query * scale per block, or weight *
scale, as an integer of 16 bits (of float32 queries, 23) relative to the row's largest in the block, in base 256: the
digits lie in rows of the operand that would be padding, as tensor cores multiply 16 at least. Offsets and minima are
summed in float32.

For a block with keys and values of 128, in groups of 4 heads and with a mask, Triton 3.6 has a warp do 1,846
instructions of int8 and 2,214 of int4, in 254 and 242 registers, so two programs of four warps fit on a processor.
Words come from shared memory with four lanes on a bank. On an H200 with 32k to 128k tokens the time of a token added
was 79 % of the bandwidth's with int8 and 50 % with int4: instructions are the limit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_accel_patch.kernels.triton_decode_parts import LOG2E, capped, placed

TAIL = tl.constexpr(16)  # exact tokens that a warp takes at a time
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a float32 below 2^22, it leaves the nearest integer in the bits


@triton.jit
def _stacked(x, dtype: tl.constexpr, PIECES: tl.constexpr):
    """x [W, ROWS, N] as PIECES terms [W, PIECES * ROWS, N] in dtype: x rounded, what that lacks, and zeros."""
    y = x.to(dtype)
    if PIECES > 1:
        low = (x - y.to(tl.float32)).to(dtype)
        piece = tl.arange(0, PIECES)[None, :, None, None]
        none = tl.zeros_like(y)[:, None, :, :]
        y = tl.where(piece == 0, y[:, None, :, :], tl.where(piece == 1, low[:, None, :, :], none))
        y = tl.reshape(y, [x.shape[0], PIECES * x.shape[1], x.shape[2]])
    return y


@triton.jit
def _folded(x, seen, PIECES: tl.constexpr, DIGITS: tl.constexpr):
    """The sum of the pieces of x [W, PIECES * ROWS, N] in float32, [W, ROWS, N]; of DIGITS digits of base 256."""
    x = x.to(tl.float32)
    if seen is not None:  # in the layout of a product: a softmax in the layout of a mask takes twice as long
        x = tl.where(seen, x, float("-inf"))
    if PIECES > 1:
        x = tl.reshape(x, [x.shape[0], PIECES, x.shape[1] // PIECES, x.shape[2]])
        if DIGITS > 0:
            piece = tl.arange(0, PIECES)[None, :, None, None]
            x *= tl.where(piece == 0, 1.0, tl.where(piece == 1, 256.0, 65536.0))
            if PIECES > DIGITS:
                x = tl.where(piece < DIGITS, x, 0.0)
        x = tl.sum(x, axis=1)
    return x


@triton.jit
def _digits(x, PIECES: tl.constexpr, DIGITS: tl.constexpr):
    """x [W, ROWS, N] as signed digits of base 256, int8 [W, PIECES * ROWS, N], and the unit of a row, [W, ROWS]."""
    LEVELS: tl.constexpr = 4194303.0 if DIGITS == 3 else 32639.0
    most = tl.maximum(tl.max(tl.abs(x), axis=2), 1e-30)
    bits = (x * (LEVELS / most)[:, :, None] + ROUND).to(tl.int32, bitcast=True) + 0x408080
    shift = tl.minimum(8 * tl.arange(0, PIECES), 16)[None, :, None, None]
    digit = (bits[:, None, :, :] >> shift ^ 0x80).to(tl.int8)
    return tl.reshape(digit, [x.shape[0], PIECES * x.shape[1], x.shape[2]]), most / LEVELS


@triton.jit
def _times(digits, codes, BITS: tl.constexpr):
    """digits [W, M, N] times codes less their offset, int32. Of int4, digits [.., : N / 2] meet the low halves, and the
    products are 16 times too large: `codes & 0xF0` are high halves, and 16 times what they stand for."""
    if BITS == 8:
        y = tl.dot(digits, (codes ^ 0x80).to(tl.int8, bitcast=True), out_dtype=tl.int32)
    else:
        halves = tl.reshape(digits, [digits.shape[0], digits.shape[1], 2, digits.shape[2] // 2])
        low, high = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        y = tl.dot(low, (codes & 15).to(tl.int8, bitcast=True), out_dtype=tl.int32) * 16
        y += tl.dot(high, (codes & 0xF0 ^ 0x80).to(tl.int8, bitcast=True), out_dtype=tl.int32)
    return y


@triton.jit
def _codes(
    codes, block, word, inner,
    WORDS: tl.constexpr, words: tl.constexpr, INNERS: tl.constexpr, inners: tl.constexpr,
):  # fmt: skip
    """Of blocks [words, inners, 4] the tile [W, 4 WORDS, INNERS] that begins at word, inner. It is read in runs of
    4 INNERS bytes: of a tile with a dimension of four bytes Triton would read only four at a time."""
    word += tl.arange(0, WORDS)[None, :, None]
    byte = inner * 4 + tl.arange(0, 4 * INNERS)[None, None, :]
    at = codes + (block * words + word) * (4 * inners) + byte
    if words % WORDS != 0:
        x = tl.load(at, mask=word < words, other=0)
    elif inners % INNERS != 0:
        x = tl.load(at, mask=byte < 4 * inners, other=0)
    else:
        x = tl.load(at)
    x = tl.permute(tl.reshape(x, [block.shape[0], WORDS, INNERS, 4]), (0, 1, 3, 2))
    return tl.reshape(x, [block.shape[0], 4 * WORDS, INNERS])


@triton.jit
def _channels(c, KEY: tl.constexpr, KC: tl.constexpr, BITS: tl.constexpr):
    """The channels [1, 1, KC] of chunk c of the key codes, and which exist."""
    i = tl.arange(0, KC)[None, None, :]
    if BITS == 8:
        d = c * KC + i
        live = d < KEY
    else:
        d = c * (KC // 2) + i % (KC // 2)
        live = d < KEY // 2
        d += i // (KC // 2) * (KEY // 2)
    return d, live


@triton.jit
def _products(
    qs, key_codes, key_scales, block, seen,
    BITS: tl.constexpr, KEY: tl.constexpr, KC: tl.constexpr, PIECES: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """Queries times the keys of W blocks, [W, ROWS, 64]."""
    y = tl.zeros([block.shape[0], qs[0].shape[1], 64], tl.float32)
    C: tl.constexpr = KC * BITS // 32
    for c in tl.static_range(len(qs)):
        codes = _codes(key_codes, block, c * C, 0, C, KEY * BITS // 32, 64, 64)
        d, live = _channels(c, KEY, KC, BITS)
        at = key_scales + block * (2 * KEY) + d
        scale = tl.load(at, mask=live, other=0).to(tl.float32)
        minimum = tl.load(at + KEY, mask=live, other=0).to(tl.float32)
        if BITS == 8:
            minimum += 128 * scale
        else:
            minimum += tl.where(tl.arange(0, KC)[None, None, :] < KC // 2, 0.0, 8.0) * scale
        digits, unit = _digits(qs[c] * scale, PIECES, DIGITS)
        if c == 0:
            dot = _folded(_times(digits, codes, BITS), seen, PIECES, DIGITS)
        else:
            dot = _folded(_times(digits, codes, BITS), None, PIECES, DIGITS)
        y += dot * (unit * (1.0 if BITS == 8 else 0.0625))[:, :, None]
        y += tl.sum(qs[c] * minimum, axis=2)[:, :, None]
    return y


@triton.jit
def _summed(
    sums, alpha, p, codes, scales, block,
    BITS: tl.constexpr, VALUE: tl.constexpr, groups: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
    DIGITS: tl.constexpr,
):  # fmt: skip
    """sums * alpha plus p [W, ROWS, 64] times the values of W blocks."""
    token = tl.arange(0, 64)[None, None, :]
    new = ()
    for c in tl.static_range(len(sums)):
        if c < groups:
            if BITS == 8:
                digits, unit = _digits(p * tl.load(scales + block * 64 + token).to(tl.float32), PIECES, DIGITS)
            else:
                at = scales + (block * (2 * groups) + c) * 64 + token
                scale = tl.load(at).to(tl.float32)
                minimum = tl.load(at + groups * 64).to(tl.float32) + tl.where(token < 32, 0.0, 8.0) * scale
                rest = tl.sum(p * minimum, axis=2)[:, :, None]
                digits, unit = _digits(p * scale, PIECES, DIGITS)
                unit *= 0.0625
        w = _codes(codes, block, 0, c * C, 2 * BITS, 2 * BITS, C, VALUE)
        y = sums[c] * alpha[:, :, None] + _folded(_times(digits, w, BITS), None, PIECES, DIGITS) * unit[:, :, None]
        if BITS == 4:
            y += rest
        new += (y,)
    return new


@triton.jit
def _logits(products, scale, cap):
    """In base 2."""
    if cap is None:
        return products * (scale * LOG2E)
    else:
        return capped(products, scale, cap)


@triton.jit
def _weights(logits, m, total):
    """One step of a softmax: weights, the factor for what was summed before, and the new maximum and sum."""
    most = tl.maximum(m, tl.max(logits, axis=2))
    shift = tl.where(most == float("-inf"), 0.0, most)
    p = tl.exp2(logits - shift[:, :, None])
    alpha = tl.exp2(m - shift)
    return p, alpha, most, total * alpha + tl.sum(p, axis=2)


@triton.jit(
    do_not_specialize=[
        "blocks",
        "R",
        "steps",
        "m_b",
        "m_h",
        "m_t",
        "o_b",
        "o_h",
        "o_t",
    ],  # what changes with the length
    do_not_specialize_on_alignment=["mask"],
)
def attend_digits(
    q, k, v, key_codes, key_scales, value_codes, value_scales, mask, sinks, bias, stats, out,
    K, G, T, D, V, blocks, R, steps, scale, cap,
    q_b, q_h, q_t, k_b, k_k, k_r, v_b, v_k, v_r, kc_b, kc_k, ks_b, ks_k, vc_b, vc_k, vs_b, vs_k, m_b, m_h, m_t,
    o_b, o_h, o_t,
    KEY: tl.constexpr, VALUE: tl.constexpr, groups: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, DIGITS: tl.constexpr, DP: tl.constexpr,
    KC: tl.constexpr, KCS: tl.constexpr, VC: tl.constexpr, VCS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a key/value head over `steps` steps: of W blocks, then of TAIL * W recent tokens."""
    dtype: tl.constexpr = q.dtype.element_ty
    M: tl.constexpr = PIECES * ROWS
    tiles = tl.cdiv(G * T, ROWS)
    line = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    batch, head = line // K, line % K
    w = tl.arange(0, W)[:, None, None]
    row = tile * ROWS + tl.arange(0, ROWS)[None, :, None]
    first = tl.program_id(1) * steps
    quantized = tl.cdiv(blocks, W)
    q += batch * q_b + head * G * q_h
    k += batch * k_b + head * k_k
    v += batch * v_b + head * v_k
    if mask is not None:
        stacked = tl.minimum(tile * ROWS + tl.arange(0, M)[None, :, None] % ROWS, G * T - 1)
        mask += batch * m_b + (head * G + stacked // T) * m_h + (stacked % T) * m_t
    m = tl.full([W, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([W, ROWS], tl.float32)
    sums = ()
    for _ in tl.static_range(VCS):
        sums += (tl.zeros([W, ROWS, VC], tl.float32),)

    key_codes += batch * kc_b + head * kc_k
    key_scales += batch * ks_b + head * ks_k
    if bias is not None:
        bias += batch * o_b + head * G * o_h
    value_codes += batch * vc_b + head * vc_k
    value_scales += batch * vs_b + head * vs_k
    qs = ()
    for c in tl.static_range(KCS):
        key_channel, key_live = _channels(c, KEY, KC, BITS)
        q_at = q + (row // T) * q_h + (row % T) * q_t + key_channel
        qs += (tl.load(q_at, mask=(row < G * T) & key_live & (key_channel < D), other=0).to(tl.float32),)
    for step in tl.range(first, tl.minimum(first + steps, quantized), num_stages=STAGES):
        block = step * W + w.to(tl.int64)
        readable = tl.minimum(block, blocks - 1)
        seen = None
        if mask is not None:
            seen = tl.load(mask + readable * 64 + tl.arange(0, 64)[None, None, :]) != 0
        products = _products(qs, key_codes, key_scales, readable, seen, BITS, KEY, KC, PIECES, DIGITS)
        if bias is not None:
            bias_at = bias + (row // T) * o_h + (row % T) * o_t + readable * 64 + tl.arange(0, 64)[None, None, :]
            products += tl.load(bias_at, mask=row < G * T, other=0)
        logits = tl.where(block < blocks, _logits(products, scale, cap), float("-inf"))
        p, alpha, m, total = _weights(logits, m, total)
        sums = _summed(sums, alpha, p, value_codes, value_scales, readable, BITS, VALUE, groups, VC, PIECES, DIGITS)

    stack = tl.arange(0, M)[None, :, None]
    q_row = tile * ROWS + stack
    d = tl.arange(0, DP)[None, None, :]
    q_row = q + (q_row // T) * q_h + (q_row % T) * q_t
    q_all = tl.load(q_row + d + 0 * w, mask=(stack < ROWS) & (tile * ROWS + stack < G * T) & (d < D), other=0)
    n = tl.arange(0, TAIL)[None, :, None]
    for step in tl.range(tl.maximum(first, quantized), tl.minimum(first + steps, quantized + tl.cdiv(R, TAIL * W)),
                         num_stages=1):  # fmt: skip
        start = (step - quantized) * (TAIL * W)
        token = start + w * TAIL + n
        at = token.to(tl.int64)
        keys = tl.load(k + at * k_r + d, mask=(token < R) & (d < D), other=0)
        dot = tl.dot(q_all, tl.permute(keys, (0, 2, 1)), input_precision="tf32x3")
        column = start + w * TAIL + tl.arange(0, TAIL)[None, None, :]
        unmasked = None
        if mask is not None:
            unmasked = tl.load(mask + blocks * 64 + tl.minimum(column, R - 1)) != 0
        logits = _logits(_folded(dot, unmasked, PIECES, 0), scale, cap)
        p, alpha, m, total = _weights(tl.where(column < R, logits, float("-inf")), m, total)
        x = _stacked(p, dtype, PIECES)
        new = ()
        for c in tl.static_range(VCS):
            channel = c * VC + tl.arange(0, VC)[None, None, :]
            values = tl.load(v + at * v_r + channel, mask=(token < R) & (channel < V), other=0)
            y = _folded(tl.dot(x, values, input_precision="tf32x3"), None, PIECES, 0)
            new += (sums[c] * alpha[:, :, None] + y,)
        sums = new

    most = tl.max(m, axis=0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    factor = tl.exp2(m - shift[None, :])
    total = tl.sum(total * factor, axis=0)
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = G * T
    at, inverse = placed(most, total, sinks, stats, row, rows, line, batch, head, K, G, T, SPLIT)
    for c in tl.static_range(VCS):
        channel = c * VC + tl.arange(0, VC)[None, :]
        y = tl.sum(sums[c] * factor[:, :, None], axis=0) * inverse[:, None]
        tl.store(out + at[:, None] * V + channel, y.to(out.dtype.element_ty),
                 mask=(row < rows)[:, None] & (channel < V))  # fmt: skip
