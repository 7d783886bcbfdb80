# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
"""HEADER"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
PROCESSORS = 132  # of an H100 or H200; not asked of the device, so that every GPU adds in the same order
LOG2E = tl.constexpr(1.4426950408889634)
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
def _folded(x, PIECES: tl.constexpr, DIGITS: tl.constexpr):
    """The sum of the pieces of x [W, PIECES * ROWS, N] in float32, [W, ROWS, N]; of DIGITS digits of base 256."""
    x = x.to(tl.float32)
    if PIECES > 1:
        x = tl.reshape(x, [x.shape[0], PIECES, x.shape[1] // PIECES, x.shape[2]])
        if DIGITS > 0:
            piece = tl.arange(0, PIECES)[None, :, None, None]
            third: tl.constexpr = 65536.0 if DIGITS == 3 else 0.0
            x *= tl.where(piece == 0, 1.0, tl.where(piece == 1, 256.0, tl.where(piece == 2, third, 0.0)))
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
    """Of blocks [W, words, inners, 4] the tile [W, 4 WORDS, INNERS] that begins at word, inner."""
    word += tl.arange(0, WORDS)[None, :, None, None]
    inner += tl.arange(0, INNERS)[None, None, :, None]
    at = (block[:, :, :, None] * words + word) * (4 * inners) + inner * 4 + tl.arange(0, 4)[None, None, None, :]
    if words % WORDS != 0:
        x = tl.load(codes + at, mask=word < words, other=0)
    elif inners % INNERS != 0:
        x = tl.load(codes + at, mask=inner < inners, other=0)
    else:
        x = tl.load(codes + at)
    return tl.reshape(tl.permute(x, (0, 1, 3, 2)), [block.shape[0], 4 * WORDS, INNERS])


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
    qs, key_codes, key_scales, block,
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
        dot = _folded(_times(digits, codes, BITS), PIECES, DIGITS)
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
        y = sums[c] * alpha[:, :, None] + _folded(_times(digits, w, BITS), PIECES, DIGITS) * unit[:, :, None]
        if BITS == 4:
            y += rest
        new = new + (y,)
    return new


@triton.jit
def _logits(products, scale, cap):
    """In base 2."""
    if cap is None:
        y = products * (scale * LOG2E)
    else:
        e = tl.exp2(tl.abs(products) * (-2 * LOG2E * scale / cap))
        tanh = (1 - e) / (1 + e)
        y = tl.where(products < 0, -tanh, tanh) * (cap * LOG2E)
    return y


@triton.jit
def _weights(logits, m, l):
    """One step of a softmax: weights, the factor for what was summed before, and the new maximum and sum."""
    most = tl.maximum(m, tl.max(logits, axis=2))
    shift = tl.where(most == float("-inf"), 0.0, most)
    p = tl.exp2(logits - shift[:, :, None])
    alpha = tl.exp2(m - shift)
    return p, alpha, most, l * alpha + tl.sum(p, axis=2)


@triton.jit(do_not_specialize=["blocks", "R", "steps"])
def _attend(
    q, k, v, key_codes, key_scales, value_codes, value_scales, mask, sinks, stats, out,
    K, G, T, D, V, blocks, R, steps, scale, cap,
    q_b, q_h, q_t, k_b, k_k, k_r, v_b, v_k, v_r, kc_b, kc_k, ks_b, ks_k, vc_b, vc_k, vs_b, vs_k, m_b, m_h, m_t,
    KEY: tl.constexpr, VALUE: tl.constexpr, groups: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
    DIGITS: tl.constexpr, DP: tl.constexpr, KC: tl.constexpr, KCS: tl.constexpr, VC: tl.constexpr, VCS: tl.constexpr,
    STAGES: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a key/value head over `steps` steps: of W blocks, then of 16 W recent tokens."""
    dtype: tl.constexpr = q.dtype.element_ty
    M: tl.constexpr = PIECES * ROWS
    tiles = tl.cdiv(G * T, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(1)
    batch, head = head // K, head % K
    w = tl.arange(0, W)[:, None, None]
    row = tile * ROWS + tl.arange(0, ROWS)[None, :, None]
    first = split * steps
    quantized = tl.cdiv(blocks, W)
    q += batch * q_b + head * G * q_h
    k += batch * k_b + head * k_k
    v += batch * v_b + head * v_k
    if mask is not None:
        mask += batch * m_b + (head * G + row // T) * m_h + (row % T) * m_t
    m = tl.full([W, ROWS], float("-inf"), tl.float32)
    l = tl.zeros([W, ROWS], tl.float32)
    sums = ()
    for _ in tl.static_range(VCS):
        sums = sums + (tl.zeros([W, ROWS, VC], tl.float32),)

    if BITS > 0:
        key_codes += batch * kc_b + head * kc_k
        key_scales += batch * ks_b + head * ks_k
        value_codes += batch * vc_b + head * vc_k
        value_scales += batch * vs_b + head * vs_k
        qs = ()
        for c in tl.static_range(KCS):
            key_channel, key_live = _channels(c, KEY, KC, BITS)
            q_at = q + (row // T) * q_h + (row % T) * q_t + key_channel
            qs = qs + (tl.load(q_at, mask=(row < G * T) & key_live & (key_channel < D), other=0).to(tl.float32),)
        for step in tl.range(first, tl.minimum(first + steps, quantized), num_stages=STAGES):
            block = step * W + w.to(tl.int64)
            readable = tl.minimum(block, blocks - 1)
            products = _products(qs, key_codes, key_scales, readable, BITS, KEY, KC, PIECES, DIGITS)
            some = block < blocks
            if mask is not None:
                seen = tl.load(mask + readable * 64 + tl.arange(0, 64)[None, None, :], mask=row < G * T, other=0)
                some = some & (seen != 0)
            logits = tl.where(some, _logits(products, scale, cap), float("-inf"))
            p, alpha, m, l = _weights(logits, m, l)
            sums = _summed(
                sums, alpha, p, value_codes, value_scales, readable, BITS, VALUE, groups, VC, PIECES, DIGITS
            )

    stack = tl.arange(0, M)[None, :, None]
    q_row = tile * ROWS + stack
    d = tl.arange(0, DP)[None, None, :]
    q_row = q + (q_row // T) * q_h + (q_row % T) * q_t
    q_all = tl.load(q_row + d + 0 * w, mask=(stack < ROWS) & (tile * ROWS + stack < G * T) & (d < D), other=0)
    n = tl.arange(0, 16)[None, :, None]
    for step in tl.range(tl.maximum(first, quantized), tl.minimum(first + steps, quantized + tl.cdiv(R, 16 * W)),
                         num_stages=TAIL_STAGES):  # fmt: skip
        start = (step - quantized) * (16 * W)
        token = start + w * 16 + n
        at = token.to(tl.int64)
        keys = tl.load(k + at * k_r + d, mask=(token < R) & (d < D), other=0)
        dot = tl.dot(q_all, tl.permute(keys, (0, 2, 1)), input_precision="tf32x3")
        logits = _logits(_folded(dot, PIECES, 0), scale, cap)
        column = start + w * 16 + tl.arange(0, 16)[None, None, :]
        some = column < R
        if mask is not None:
            some = some & (tl.load(mask + blocks * 64 + column, mask=some & (row < G * T), other=0) != 0)
        p, alpha, m, l = _weights(tl.where(some, logits, float("-inf")), m, l)
        x = _stacked(p, dtype, PIECES)
        new = ()
        for c in tl.static_range(VCS):
            channel = c * VC + tl.arange(0, VC)[None, None, :]
            values = tl.load(v + at * v_r + channel, mask=(token < R) & (channel < V), other=0)
            y = _folded(tl.dot(x, values, input_precision="tf32x3"), PIECES, 0)
            new = new + (sums[c] * alpha[:, :, None] + y,)
        sums = new

    most = tl.max(m, axis=0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    factor = tl.exp2(m - shift[None, :])
    total = tl.sum(l * factor, axis=0)
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = G * T
    if SPLIT:
        at = (tl.program_id(0) // tiles * tl.num_programs(1) + split).to(tl.int64) * rows + row
        tl.store(stats + 2 * at, most, mask=row < rows)
        tl.store(stats + 2 * at + 1, total, mask=row < rows)
        inverse = tl.full([ROWS], 1.0, tl.float32)
    else:
        at = (batch * T + row % T) * (K * G) + head * G + row // T
        inverse = _inverse(most, total, sinks, head * G + row // T, row < rows)
    for c in tl.static_range(VCS):
        channel = c * VC + tl.arange(0, VC)[None, :]
        y = tl.sum(sums[c] * factor[:, :, None], axis=0) * inverse[:, None]
        tl.store(out + at[:, None] * V + channel, y.to(out.dtype.element_ty),
                 mask=(row < rows)[:, None] & (channel < V))  # fmt: skip


@triton.jit
def _inverse(most, total, sinks, head, live):
    """What to multiply sums with, whose logits were taken relative to `most`; zero where nothing was seen."""
    factor = 1.0
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0) * LOG2E
        larger = tl.maximum(most, sink)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        factor = tl.exp2(tl.where(most == float("-inf"), shift, most) - shift)
        total = total * factor + tl.exp2(sink - shift)
    return factor / tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["splits"])
def _combine(parts, stats, sinks, out, H, T, G, V, splits, SPLITS: tl.constexpr, VP: tl.constexpr):
    """One row: the sums of its splits [splits, V], SPLITS at a time, in order."""
    rows = G * T
    head = tl.program_id(0).to(tl.int64) // rows
    row = tl.program_id(0) % rows
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, VP)
    stats += (head * splits * rows + row) * 2
    parts += (head * splits * rows + row) * V
    most = tl.full([SPLITS], float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        at = (start + split).to(tl.int64)
        most = tl.maximum(most, tl.load(stats + at * rows * 2, mask=at < splits, other=float("-inf")))
    most = tl.max(most, axis=0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros([SPLITS], tl.float32)
    y = tl.zeros([SPLITS, VP], tl.float32)
    for start in range(0, splits, SPLITS):
        at = (start + split).to(tl.int64)
        factor = tl.exp2(tl.load(stats + at * rows * 2, mask=at < splits, other=float("-inf")) - shift)
        total += factor * tl.load(stats + at * rows * 2 + 1, mask=at < splits, other=0)
        live = (at < splits)[:, None] & (channel < V)[None, :]
        y += factor[:, None] * tl.load(parts + (at * rows)[:, None] * V + channel[None, :], mask=live, other=0)
    heads = H // G
    query = (head % heads) * G + row // T
    inverse = _inverse(most, tl.sum(total, axis=0), sinks, query, True)
    y = tl.sum(y, axis=0) * inverse
    out += ((head // heads * T + row % T) * H + query) * V + channel
    tl.store(out, y.to(out.dtype.element_ty), mask=channel < V)


def attend(
    query: Tensor,
    packed: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    bits: int,
    blocks: int,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [B, H, T, D] over `blocks` blocks of `packed` (ops.kv says how they lie), then over keys [B, K, R, D] and
    values [B, K, R, V]: [B, T, H, V] in the dtype of query. Of query, keys, values and mask the last stride is 1, of
    `packed` all but those of B and K are a contiguous tensor's.

    mask: bool [B or 1, H or 1, T or 1, 64 blocks + R], True where seen; who sees nothing gets zeros. softcap: scores
    become softcap * tanh(scale * scores / softcap). sinks: float32 [H], one more score per head, without a value.
    """
    B, H, T, D = query.shape
    K, R, V = values.shape[1:]
    G = H // K
    out = query.new_empty(B, T, H, V)
    if not out.numel():
        return out
    if packed is None or not blocks:
        packed, blocks = None, 0
    key_codes, key_scales, value_codes, value_scales = packed or (None,) * 4
    bits = 0 if packed is None else bits
    KEY = 0 if key_scales is None else key_scales.shape[-1]
    VALUE = V if value_codes is None else value_codes.shape[4]
    groups = 0 if value_scales is None else value_scales.shape[4]
    t = tiling(bits, G * T, max(D, KEY), max(V, VALUE), query.dtype is torch.float32)
    tiles = triton.cdiv(G * T, t.rows)
    steps = triton.cdiv(blocks, t.warps) + triton.cdiv(R, 16 * t.warps)
    splits, per_split = split(B * K * tiles, steps)
    parts = stats = None
    if splits > 1:
        parts = torch.empty(B * K, splits, G * T, V, dtype=torch.float32, device=query.device)
        stats = torch.empty(B * K, splits, G * T, 2, dtype=torch.float32, device=query.device)
    if mask is not None:
        mask = mask.view(torch.uint8)
    with torch.cuda.device_of(query):
        _attend[(B * K * tiles, splits)](
            query, keys, values, key_codes, key_scales, value_codes, value_scales, mask, sinks,
            stats, out if parts is None else parts,
            K, G, T, D, V, blocks, R, per_split, scale, softcap,
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            *_strides(key_codes), *_strides(key_scales), *_strides(value_codes), *_strides(value_scales),
            *_mask_strides(mask),
            KEY, VALUE, groups, bits, splits > 1, t.warps, t.rows, t.pieces, t.digits, t.keys, t.key_chunk,
            triton.cdiv(KEY, t.key_chunk), t.value_chunk, triton.cdiv(VALUE, t.value_chunk), t.stages, t.tail_stages,
            num_warps=t.warps,
        )  # fmt: skip
        if parts is not None:
            _combine[(B * H * T,)](parts, stats, sinks, out, H, T, G, V, splits, 16, _next_power(V), num_warps=4)
    return out


class Tiling(NamedTuple):
    """Sizes of a program."""

    warps: int  # each takes a block of 64 tokens at a time, or 16 exact ones
    rows: int
    pieces: int
    digits: int
    keys: int  # channels of an exact key
    key_chunk: int  # channels of a quantized key
    value_chunk: int
    stages: int
    tail_stages: int


@lru_cache(maxsize=1024)
def tiling(bits: int, rows: int, key_size: int, value_size: int, float32: bool) -> Tiling:
    """Two programs on a processor should find room for what they load ahead, on GPUs with 99 KB for a program one."""
    if bits:
        pieces, digits = (4, 3) if float32 else (2, 2)
        tile = 8 if rows <= 8 or float32 else 16
        exact = 0
    else:
        pieces, digits = (2, 2) if rows <= 8 and not float32 else (1, 0)
        tile = 8 if pieces == 2 else 16 if rows <= 16 or float32 or value_size > 128 else 32
        exact = 16 * (4 if float32 else 2)
    block = (key_size + value_size) * (8 * bits if bits else exact)  # bytes of a warp's step
    warps = 4
    while warps > 1 and warps * block > 65536:
        warps //= 2
    stages = min(4, max(2, 1 + 65536 // (warps * block)))
    least = 64 if bits == 4 else 32
    return Tiling(
        warps, tile, pieces, digits,
        keys=max(16, _next_power(key_size)),
        key_chunk=max(least, min(128, _next_power(key_size))),
        value_chunk=max(16, min(64 if bits else 128, _next_power(value_size))),
        stages=stages, tail_stages=1 if bits else stages,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def split(programs: int, steps: int) -> tuple[int, int]:
    """How many programs share the steps of one of `programs`, and how many steps each of them takes: what is over first
    where two programs fit on a processor and starting one takes as long as a step."""
    choices = []
    for splits in range(1, max(1, min(steps, 8 * PROCESSORS // programs)) + 1):
        each = triton.cdiv(max(steps, 1), splits)
        splits = triton.cdiv(max(steps, 1), each)
        choices.append((triton.cdiv(programs * splits, 2 * PROCESSORS) * (each + 1), splits, each))
    return min(choices)[1:]


def _next_power(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Of B, H and T; zero where there is but one."""
    if mask is None:
        return 0, 0, 0
    b, h, t = (0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    return b, h, t
