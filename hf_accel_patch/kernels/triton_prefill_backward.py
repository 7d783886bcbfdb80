# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="assignment"
"""The gradients of kernels/triton_prefill.py, in linear memory and always the same bits.

Weights are computed again from the log-sum-exp. Programs of their own go over the keys of a tile of queries, and over
the queries and the heads of the group of a block of keys: nothing is added atomically.

As Triton 3.6 compiles them for sm_90 and head size 128, they take 15 and 23 instructions per score with tiles of 128
queries, 33 and 44 with 64, where both halves of the warps compute all scores, products included. The second one has
more sums than registers and moves some of them through memory, with either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel_patch.kernels import triton_prefill
from hf_accel_patch.kernels.triton_prefill import approximates, room, shared_memory, strides
from hf_accel_patch.kernels.triton_prefill_parts import BIAS_ROOM, LOG2E, bounds, load_rows, to_scores, unit_of


@triton.jit
def _gradient(q, k, v, do, bias, lse, delta, column, seen, scale, cap, FAST: tl.constexpr):
    """Of queries [M, DP], keys [N, DP], values [N, VP] and output gradients [M, VP]: the weights, and the gradient of
    the scores, [M, N]."""
    scores = to_scores(tl.dot(q, tl.trans(k), input_precision="tf32x3"), scale, cap, FAST)
    slope = scale
    if cap is not None:
        slope = scale - scale * (scores * scores)
    logits = scores * unit_of(scale, cap)
    if bias is not None:
        logits += tl.load(bias + column)[None, :]
    p = tl.where(seen, tl.exp2(logits - lse[:, None] * LOG2E), 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="tf32x3")
    return p, p * (dp - delta[:, None]) * slope


@triton.jit(do_not_specialize=["H", "G", "T", "S", "seen_b", "bias_b", "bias_h"])
def _backward_queries(
    q, k, v, seen, bias, do, lse, delta, dq, scale, cap, H, G, T, S,
    q_b, q_h, q_t, k_b, k_k, k_s, v_b, v_k, v_s, seen_b, bias_b, bias_h,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients of M queries of one head. do is [B, T, H, V], dq [B, H, T, D]."""
    tiles = tl.cdiv(T, M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    line = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = line // H, line % H
    row = tile * M + tl.arange(0, M)
    k += batch * k_b + head // G * k_k
    v += batch * v_b + head // G * v_k
    if bias is not None:
        bias += tl.multiple_of(batch * bias_b + head * bias_h, BIAS_ROOM)
    first, last, start, stop, _inner, _outer = bounds(seen + batch * seen_b, row, T, S, N)
    queries = load_rows(q + batch * q_b + head * q_h, tile * M, q_t, T, D, M, DP, False)
    wanted = load_rows(do + (batch * T * H + head) * V, tile * M, H * V, T, V, M, VP, False)
    norm = tl.load(lse + line * T + row, mask=row < T, other=0)
    mean = tl.load(delta + line * T + row, mask=row < T, other=0)
    sums = tl.zeros([M, DP], tl.float32)
    for begin in tl.range(start, stop, N, num_stages=STAGES):
        column = tl.multiple_of(begin, N) + tl.arange(0, N)
        keys = load_rows(k, begin, k_s, S, D, N, DP, False)
        values = load_rows(v, begin, v_s, S, V, N, VP, False)
        sees = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
        _p, ds = _gradient(queries, keys, values, wanted, bias, norm, mean, column, sees, scale, cap, FAST)
        sums = tl.dot(ds.to(keys.dtype), keys, sums, input_precision="tf32x3")
    d = tl.arange(0, DP)[None, :]
    tl.store(dq + (line * T + row)[:, None] * D + d, sums.to(dq.dtype.element_ty), mask=(row < T)[:, None] & (d < D))


@triton.jit(do_not_specialize=["H", "G", "T", "S", "seen_b", "tiles_b", "bias_b", "bias_h"])
def _backward_keys(
    q, k, v, seen, tiles, bias, do, lse, delta, dk, dv, scale, cap, H, G, T, S,
    q_b, q_h, q_t, k_b, k_k, k_s, v_b, v_k, v_s, seen_b, tiles_b, bias_b, bias_h,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients dk [B, K, S, D] and dv [B, K, S, V] of N keys, from the tiles of queries that see any of them."""
    blocks = tl.cdiv(S, N)
    block = tl.program_id(0) % blocks
    line = (tl.program_id(0) // blocks).to(tl.int64)
    batch, shared = line // (H // G), line % (H // G)
    column = block * N + tl.arange(0, N)
    keys = load_rows(k + batch * k_b + shared * k_k, block * N, k_s, S, D, N, DP, False)
    values = load_rows(v + batch * v_b + shared * v_k, block * N, v_s, S, V, N, VP, False)
    seen += batch * seen_b
    tiles += batch * tiles_b + block * 2
    start, stop = tl.load(tiles), tl.load(tiles + 1)
    dks = tl.zeros([N, DP], tl.float32)
    dvs = tl.zeros([N, VP], tl.float32)
    for each in range(0, G):
        head = shared * G + each
        one = batch * H + head
        added = bias
        if bias is not None:
            added = bias + tl.multiple_of(batch * bias_b + head * bias_h, BIAS_ROOM)
        for tile in tl.range(start, stop, num_stages=STAGES):
            row = tile * M + tl.arange(0, M)
            first = tl.load(seen + row * 2, mask=row < T, other=0)
            last = tl.load(seen + row * 2 + 1, mask=row < T, other=0)
            queries = load_rows(q + batch * q_b + head * q_h, tile * M, q_t, T, D, M, DP, False)
            wanted = load_rows(do + (batch * T * H + head) * V, tile * M, H * V, T, V, M, VP, False)
            norm = tl.load(lse + one * T + row, mask=row < T, other=0)
            mean = tl.load(delta + one * T + row, mask=row < T, other=0)
            sees = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
            p, ds = _gradient(queries, keys, values, wanted, added, norm, mean, column, sees, scale, cap, FAST)
            dvs = tl.dot(tl.trans(p.to(wanted.dtype)), wanted, dvs, input_precision="tf32x3")
            dks = tl.dot(tl.trans(ds.to(queries.dtype)), queries, dks, input_precision="tf32x3")
    at, live = (line * S + column)[:, None], (column < S)[:, None]
    d, channel = tl.arange(0, DP)[None, :], tl.arange(0, VP)[None, :]
    tl.store(dk + at * D + d, dks.to(dk.dtype.element_ty), mask=live & (d < D))
    tl.store(dv + at * V + channel, dvs.to(dv.dtype.element_ty), mask=live & (channel < V))


def gradients(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None, do: Tensor, lse: Tensor,
    delta: Tensor, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key and value, as triton_prefill.attend takes them, for gradients do [B, T, H, V] of its output, its
    log-sum-exp, and delta, the sum of do times the output, both float32 [B, H, T]."""
    (B, H, T, D), (K, S, V) = query.shape, value.shape[1:]
    dq, dk, dv = query.new_empty(B, H, T, D), key.new_empty(B, K, S, D), value.new_empty(B, K, S, V)
    t = triton_prefill.tiling(D, V, query.dtype is torch.float32, shared_memory(query.device), backward=True)
    sizes = (D, V, room(D), room(V), t.queries, t.keys, t.stages, approximates(query))
    steps = strides(query, key, value, seen, bias)
    with torch.cuda.device_of(query):
        if dq.numel():
            _backward_queries[(B * H * triton.cdiv(T, t.queries),)](
                query, key, value, seen, bias, do, lse, delta, dq, scale, softcap, H, H // K, T, S, *steps, *sizes,
                num_warps=t.warps,
            )  # fmt: skip
        if dk.numel():
            tiles = _tiles(seen, S, t.queries, t.keys)
            steps = (*steps[:-2], tiles.stride(0) if len(tiles) > 1 else 0, *steps[-2:])
            _backward_keys[(B * K * triton.cdiv(S, t.keys),)](
                query, key, value, seen, tiles, bias, do, lse, delta, dk, dv, scale, softcap, H, H // K, T, S, *steps,
                *sizes, num_warps=t.warps,
            )  # fmt: skip
    return dq, dk, dv


def _tiles(seen: Tensor, S: int, M: int, N: int) -> Tensor:
    """For each block of N keys the first tile of M queries that sees any of it, and the one after the last, int32
    [B or 1, blocks, 2]."""
    count = triton.cdiv(seen.shape[1], M)
    first, last = torch.nn.functional.pad(seen, (0, 0, 0, count * M - seen.shape[1])).unbind(-1)
    lowest = torch.where(first < last, first, S).unflatten(1, (count, M)).amin(-1)
    highest = last.unflatten(1, (count, M)).amax(-1)
    blocks = torch.arange(0, S, N, device=seen.device)[:, None]
    meets = (lowest[:, None] < blocks + N) & (highest[:, None] > blocks)
    tile = torch.arange(count, device=seen.device)
    start = torch.where(meets, tile, count).amin(-1)
    return torch.stack([start, torch.where(meets, tile + 1, 0).amax(-1)], -1).int()
