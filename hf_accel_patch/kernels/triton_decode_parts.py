# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="assignment"
"""What the kernels of triton_decode.py and triton_decode_exact.py share, in Triton: soft caps, sinks and the sum of
what programs found that split the tokens."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(products, scale, cap):
    """Soft-capped logits in base 2."""
    e = tl.exp2(tl.abs(products) * (-2 * LOG2E * scale / cap))
    tanh = (1 - e) / (1 + e)
    y = tl.where(products < 0, -tanh, tanh) * (cap * LOG2E)
    return tl.where(products == float("-inf"), products, y)


@triton.jit
def inverse_of(most, total, sinks, head, live):
    """What to multiply sums with, whose logits were taken relative to `most`; zero where nothing was seen."""
    factor = 1.0
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0) * LOG2E
        larger = tl.maximum(most, sink)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        factor = tl.exp2(tl.where(most == float("-inf"), shift, most) - shift)
        total = total * factor + tl.exp2(sink - shift)
    return factor / tl.where(total == 0, 1.0, total)


@triton.jit
def placed(most, total, sinks, stats, row, rows, line, batch, head, K, G, T, SPLIT: tl.constexpr):
    """Of rows of key/value head `line`, of which `rows` exist, where their sums go, and what these are multiplied with.
    If other programs have a share in them, what `combine` needs is stored."""
    if SPLIT:
        at = (line * tl.num_programs(1) + tl.program_id(1)) * rows + row
        tl.store(stats + 2 * at, most, mask=row < rows)
        tl.store(stats + 2 * at + 1, total, mask=row < rows)
        inverse = tl.full(total.shape, 1.0, tl.float32)
    else:
        at = (batch * T + row % T) * (K * G) + head * G + row // T
        inverse = inverse_of(most, total, sinks, head * G + row // T, row < rows)
    return at, inverse


@triton.jit(do_not_specialize=["splits"])
def combine(parts, stats, sinks, out, H, T, G, V, splits, SPLITS: tl.constexpr, C: tl.constexpr):
    """C channels of one row: the sums of its splits [splits, V], SPLITS at a time, in order."""
    rows = G * T
    head = tl.program_id(0).to(tl.int64) // rows
    row = tl.program_id(0) % rows
    split = tl.arange(0, SPLITS)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    stats += (head * splits * rows + row) * 2
    parts += (head * splits * rows + row) * V
    most = tl.max(tl.full([SPLITS], float("-inf"), tl.float32), axis=0)
    total = tl.zeros([SPLITS], tl.float32)
    y = tl.zeros([SPLITS, C], tl.float32)
    for start in tl.range(0, splits, SPLITS, num_stages=1):  # all that an iteration loads is asked for at once
        at = start + split
        m = tl.load(stats + at * rows * 2, mask=at < splits, other=float("-inf"))
        weight = tl.load(stats + at * rows * 2 + 1, mask=at < splits, other=0)
        live = (at < splits)[:, None] & (channel < V)[None, :]
        part = tl.load(parts + (at * rows)[:, None] * V + channel[None, :], mask=live, other=0)
        larger = tl.maximum(most, tl.max(m, axis=0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        factor = tl.exp2(m - shift)
        alpha = tl.exp2(most - shift)
        total = total * alpha + factor * weight
        y = y * alpha + factor[:, None] * part
        most = larger
    heads = H // G
    query = (head % heads) * G + row // T
    inverse = inverse_of(most, tl.sum(total, axis=0), sinks, query, True)
    sums = tl.sum(y, axis=0) * inverse
    out += ((head // heads * T + row % T) * H + query) * V + channel
    tl.store(out, sums.to(out.dtype.element_ty), mask=channel < V)
