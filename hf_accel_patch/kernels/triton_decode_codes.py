# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="assignment"
"""Attention of up to 8 rows of 16-bit queries to quantized keys and values, in Triton: what triton_decode.py calls
where head sizes are powers of two and the mask is the same for all rows.

Every program is one warp, which waits for no other and takes a block of 64 tokens at a time. Tokens, and then channels,
are the rows of tensor cores' operands; what they meet are few columns, two per query row. Codes become float16 by one
instruction for two of them: as 1024 + code, or 1024 + 16 * code of a high half. They meet query * scale, and then
weight * scale, relative to the largest scale of the block, as two terms of float16, which have 22 bits together. What
the 1024, the offsets and the minima add is subtracted in float32.

As Triton 3.6 compiles it for sm_90, with keys and values of 128, in groups of 4 heads and with a mask, a block of 64
tokens takes 1,233 instructions of int8, 384 of these for codes; with 8 rows 1,760.
In 200 registers and 18 KB ten programs fit on a processor. On an H200 caches of 32k and 128k tokens are read at 63 and
65 % of the bandwidth with int8, at 42 and 49 % with int4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_accel_patch.kernels.triton_decode_exact import _last_seen, _steps
from hf_accel_patch.kernels.triton_decode_parts import LOG2E, capped, placed

INTERPRETED = bool(triton.knobs.runtime.interpret)  # as it was when the kernels were decorated
TAIL_TOKENS = 16
STAGES = {8: 2, 4: 3}  # by bits


@triton.jit
def _numbers(words, PART: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Of words [W, N] the float16 [N, 2 W] that are 1024 more than: of int8 the codes in bytes PART and PART + 2; of
    int4 the low halves of these, or with PART - 2 for PART 16 times the high ones."""
    MASK: tl.constexpr = "0x00FF00FF" if BITS == 8 else "0x000F000F" if PART < 2 else "0x00F000F0"
    if PART % 2 == 1:
        words = words >> 8
    if ASM:  # Triton takes two instructions
        LOP3: tl.constexpr = "lop3.b32 $0, $1, " + MASK + ", 0x64006400, 0xEA;"
        pair = tl.inline_asm_elementwise(LOP3, "=r,r", [words], tl.int32, is_pure=True, pack=1)
    elif BITS == 8:
        pair = words & 0x00FF00FF | 0x64006400
    elif PART < 2:
        pair = words & 0x000F000F | 0x64006400
    else:
        pair = words & 0x00F000F0 | 0x64006400
    first = pair.to(tl.int16).to(tl.float16, bitcast=True)
    second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.permute(tl.join(first, second), (1, 0, 2)), [words.shape[1], 2 * words.shape[0]])


@triton.jit
def _terms(x):
    """x [N, ROWS] as float16 [N, 2 ROWS]: rounded, and what that lacks, side by side."""
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    return tl.reshape(tl.join(high, low), [x.shape[0], 2 * x.shape[1]])


@triton.jit
def _folded(x):
    """The sums of the two terms, [N, ROWS]."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)


@triton.jit
def _parted(x, BITS: tl.constexpr):
    """Of tokens or channels [N] or [N, C] those that each part of the codes stands for."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.numel // N
    if BITS == 8:
        a, b = tl.split(tl.permute(tl.reshape(x, [N // 2, 2, C]), (0, 2, 1)))
        parts = a, b
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [2, N // 2, C]), (1, 2, 0)))
        a, b = tl.split(tl.permute(tl.reshape(low, [N // 4, 2, C]), (0, 2, 1)))
        c, d = tl.split(tl.permute(tl.reshape(high, [N // 4, 2, C]), (0, 2, 1)))
        parts = a, b, c, d
    return parts


@triton.jit
def _products(qn, codes, scales, KEY: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Queries, divided by their largest, times the keys of a block, [64, ROWS]."""
    W: tl.constexpr = KEY * BITS // 32
    words = tl.reshape(tl.load(codes + tl.arange(0, 64 * W)), [W, 64])
    channel = tl.arange(0, KEY)
    scale, minimum = tl.load(scales + channel), tl.load(scales + KEY + channel)
    most = tl.maximum(tl.max(scale, axis=0).to(tl.float32), 1e-30)
    inverse = 1 / most
    scale, minimum = _parted(scale, BITS), _parted(minimum, BITS)
    offsets = tl.zeros([2 * W, qn[0].shape[1]], tl.float32)
    y = tl.zeros([64, 2 * qn[0].shape[1]], tl.float32)
    for part in tl.static_range(16 // BITS):
        each = scale[part].to(tl.float32) * (1.0 if part < 2 else 0.0625)
        offsets += qn[part] * (minimum[part].to(tl.float32) - 1024 * each)
        y = tl.dot(_numbers(words, part, BITS, ASM), _terms(qn[part] * (each * inverse)), y)
    return _folded(y) * most + tl.sum(offsets, axis=0)[None, :]


@triton.jit
def _values(p, codes, scales, group: tl.constexpr, VALUE: tl.constexpr, GROUPS: tl.constexpr,
            BITS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Weights p [64, ROWS] times a group of channels of the values of a block, [channels, ROWS]."""
    W: tl.constexpr = 2 * BITS
    N: tl.constexpr = VALUE // GROUPS
    i = tl.arange(0, W * N)
    words = tl.reshape(tl.load(codes + i // N * VALUE + group * N + i % N), [W, N])
    token = tl.arange(0, 64)
    if BITS == 8:
        scale = tl.load(scales + token).to(tl.float32)
        minimum = -128 * scale
    else:
        minimum = tl.load(scales + (GROUPS + group) * 64 + token).to(tl.float32)
        scale = tl.load(scales + group * 64 + token).to(tl.float32) * tl.where(token < 32, 1.0, 0.0625)
    most = tl.maximum(tl.max(scale, axis=0), 1e-30)
    rest = tl.sum(p * (minimum - 1024 * scale)[:, None], axis=0)
    terms = _parted(_terms(p * (scale / most)[:, None]), BITS)
    y = tl.zeros([N, 2 * p.shape[1]], tl.float32)
    if BITS == 8:
        for part in tl.static_range(2):
            y = tl.dot(_numbers(words, part, BITS, ASM), terms[part], y)
    else:  # two parts at once: Triton gives each lane 8 of the 16 tokens of one, four lanes 32, and computes nonsense
        for half in tl.static_range(2):
            numbers = tl.join(_numbers(words, 2 * half, BITS, ASM), _numbers(words, 2 * half + 1, BITS, ASM))
            both = tl.permute(tl.join(terms[2 * half], terms[2 * half + 1]), (0, 2, 1))
            y = tl.dot(tl.reshape(numbers, [N, 32]), tl.reshape(both, [32, 2 * p.shape[1]]), y)
    return _folded(y) * most + rest[None, :]


@triton.jit
def _stored(sums, m, total, sinks, stats, out, row, rows, line, batch, head, K, G, T, channel, V: tl.constexpr,
            SPLIT: tl.constexpr):  # fmt: skip
    """sums [channels, ROWS]."""
    at, inverse = placed(m, total, sinks, stats, row, rows, line, batch, head, K, G, T, SPLIT)
    sums *= inverse[None, :]
    tl.store(out + at[None, :] * V + channel[:, None], sums.to(out.dtype.element_ty), mask=(row < rows)[None, :])


@triton.jit
def _attend_blocks(
    q, key_codes, key_scales, value_codes, value_scales, mask, sinks, stats, out, line, batch, head, tile, K, G, T,
    first, stop, scale, cap, q_h, q_t,
    D: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    rows = G * T
    row = tile * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, D * BITS // 16)
    largest = tl.full([ROWS], 1e-30, tl.float32)
    qs = ()
    for part in tl.static_range(16 // BITS):
        channel = i // 2 * 4 + i % 2 * 2 + (part % 2 + part // 2 * (D // 2))
        q_at = q + (row // T * q_h + row % T * q_t)[None, :] + channel[:, None]
        each = tl.load(q_at, mask=(row < rows)[None, :] & (channel < D)[:, None], other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(each), axis=0))
        qs += (each,)
    qn = ()
    for part in tl.static_range(16 // BITS):
        qn += (qs[part] / largest[None, :],)
    unit = largest * scale
    if cap is None:
        unit *= LOG2E
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([64, ROWS], tl.float32)
    sums = ()
    for _ in tl.static_range(GROUPS):
        sums += (tl.zeros([V // GROUPS, ROWS], tl.float32),)
    for step in tl.range(first, stop, num_stages=STAGES):
        block = first.to(tl.int64) + (step - first)
        x = _products(qn, key_codes + block * (D * BITS * 2), key_scales + block * (2 * D), D, BITS, ASM)
        x *= unit[None, :]
        if cap is not None:
            x = capped(x, 1.0, cap)
        if mask is not None:
            seen = tl.load(mask + step * 64 + tl.arange(0, 64))
            x = tl.where((seen != 0)[:, None], x, float("-inf"))
        most = tl.maximum(m, tl.max(x, axis=0))
        shift = tl.where(most == float("-inf"), 0.0, most)
        p = tl.exp2(x - shift[None, :])
        alpha = tl.exp2(m - shift)
        m = most
        total = total * alpha[None, :] + p
        codes = value_codes + block * (2 * BITS * V)
        scales = value_scales + block * (64 if BITS == 8 else 128 * GROUPS)
        new = ()
        for g in tl.static_range(GROUPS):
            new += (sums[g] * alpha[None, :] + _values(p, codes, scales, g, V, GROUPS, BITS, ASM),)
        sums = new
    weight = tl.sum(total, axis=0)
    for g in tl.static_range(GROUPS):
        channel = g * (V // GROUPS) + tl.arange(0, V // GROUPS)
        _stored(sums[g], m, weight, sinks, stats, out, row, rows, line, batch, head, K, G, T, channel, V, SPLIT)


@triton.jit
def _attend_rest(
    q, k, v, mask, sinks, stats, out, line, batch, head, tile, K, G, T, R, first, stop, scale, cap, q_h, q_t,
    k_r: tl.constexpr, v_r: tl.constexpr, D: tl.constexpr, V: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As triton_decode_exact.py does it, with 8 rows."""
    rows = G * T
    i = tl.arange(0, 16) % 8
    row = tile * ROWS + i
    d = tl.arange(0, D)[None, :]
    q_at = q + (row // T * q_h + row % T * q_t)[:, None] + d
    queries = tl.load(q_at, mask=((i < ROWS) & (row < rows))[:, None] & (d < D), other=0)
    sums, m, total = _steps(
        tl.zeros([16, V], tl.float32), tl.full([16], float("-inf"), tl.float32), tl.zeros([16, N], tl.float32),
        queries, k, v, mask, first, stop, R, scale, cap, k_r, v_r, D, V, D, V, N, False, 8, 2, False, 2)  # fmt: skip
    if cap is None:
        m *= scale * LOG2E
    sums = tl.trans(tl.sum(tl.reshape(sums, [2, 8, V]), axis=0))
    m = tl.max(tl.reshape(m, [2, 8]), axis=0)
    total = tl.max(tl.reshape(tl.sum(total, axis=1), [2, 8]), axis=0)
    each = tl.arange(0, 8)
    live = tl.where(each < ROWS, tile * ROWS + each, rows)
    _stored(sums, m, total, sinks, stats, out, live, rows, line, batch, head, K, G, T, tl.arange(0, V), V, SPLIT)


@triton.jit(
    do_not_specialize=["blocks", "R", "steps", "coded", "rest_steps", "m_b"],
    do_not_specialize_on_alignment=["mask"],
)
def attend_codes(
    q, k, v, key_codes, key_scales, value_codes, value_scales, mask, sinks, stats, out,
    K, G, T, blocks, R, steps, coded, rest_steps, scale, cap,
    q_b, q_h, q_t, k_b, k_k, v_b, v_k, kc_b, kc_k, ks_b, ks_k, vc_b, vc_k, vs_b, vs_k, m_b,
    k_r: tl.constexpr, v_r: tl.constexpr, D: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a key/value head: the first `coded` programs over `steps` blocks each, the others over `rest_steps`
    times N of the R tokens without codes. Codes are words."""
    tiles = tl.cdiv(G * T, ROWS)
    line = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    batch, head = line // K, line % K
    q += batch * q_b + head * G * q_h
    if mask is not None:
        mask += batch * m_b
    if tl.program_id(1) < coded:
        begin = tl.program_id(1) * steps
        end = tl.minimum(begin + steps, blocks)
        if mask is not None:
            end = _last_seen(mask, begin, end, blocks * 64, T, 0, 64, False)
        _attend_blocks(
            q, key_codes + batch * kc_b + head * kc_k, key_scales + batch * ks_b + head * ks_k,
            value_codes + batch * vc_b + head * vc_k, value_scales + batch * vs_b + head * vs_k, mask, sinks, stats,
            out, line, batch, head, tile, K, G, T, begin, end, scale, cap, q_h, q_t,
            D, V, GROUPS, BITS, SPLIT, ROWS, STAGES, ASM)  # fmt: skip
    else:
        rest = mask
        if mask is not None:
            rest = mask + blocks * 64
        start = (tl.program_id(1) - coded) * rest_steps
        stop = tl.minimum(start + rest_steps, tl.cdiv(R, N))
        _attend_rest(
            q, k + batch * k_b + head * k_k, v + batch * v_b + head * v_k, rest, sinks, stats, out, line, batch, head,
            tile, K, G, T, R, start, stop, scale, cap, q_h, q_t, k_r, v_r, D, V, SPLIT, ROWS, N)  # fmt: skip


def fit(rows: int, size: int) -> int:
    """How many programs a processor has at once, of this many rows and channels."""
    return 6 if size > 128 else 8 if rows > 4 else 10


def takes(bits: int, rows: int, key_size: int, value_size: int) -> bool:
    """Whether the kernel is for rows of such queries, keys and values."""
    powers = all(16 * 16 // bits <= size <= 256 and size & (size - 1) == 0 for size in (key_size, value_size))
    return rows <= 8 and powers
