# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="assignment"
"""Attention of many queries to keys and values on NVIDIA GPUs, in Triton, forward and backward, in linear memory
(FlashAttention-2, arXiv 2307.08691). Needs triton; imported only when used.

Which keys a query sees is an interval [first, last) of its own, two int32 per query. That says causal masks at any
offset, sliding windows, chunks, left and right padding and packed sequences alike. A program has a tile of queries of
one head and goes over the blocks of keys between the lowest `first` and the highest `last` of its tile, so a window of
W costs T x W; only blocks that some query of the tile does not see whole are masked. The tiles with the most keys, the
last ones of a causal mask, start first. Heads of a group read the same keys and values; nothing is copied.

Scores and sums are float32 and are added in one order, so results repeat bit for bit; weights are rounded to the dtype
of the values before they meet them. float32 is three products of tf32. The backward computes the weights again from the
log-sum-exp (kernels/triton_prefill_backward.py).

Per block of N keys, M queries and head size 128 the tensor cores of an H100 take M * N / 8 cycles of a processor (989
TFLOP/s in 16 bits); its exp2, 16 a cycle, M * N / 16; and 11.2 instructions per score, as Triton 3.6 compiles the loop,
M * N / 11. Warps wait for one another at every block, so little of it overlaps. A soft cap adds two instructions per
score, a tanh as slow as exp2 among them. Keys and values come from the L2 cache, 32 KB per 64 keys and 128 queries, at
400 TFLOP/s 13 of some 25 bytes per cycle; with tiles of 64 queries that would be the limit. For sm_90, head size 128
takes wgmma, 128 KB and all 255 registers in 8 warps. The FlashAttention-3 paper shows 395 TFLOP/s for such a kernel in
Triton, 370 for FlashAttention-2, 595 for cuDNN (H100, head size 128, 16k tokens, not causal).

On an H200 with 32 heads, causal, in turns with itself: 489 TFLOP/s, with sinks 482, with ALiBi 418, with a soft cap
403. Blocks of 128 keys reach 475 and 411 (with ALiBi 305, where they spill), 64 queries in 4 warps 454 and 398, a stage
less 409 and 362; a stage more gives the same with plain attention and soft caps, and 3 to 5 % less with the others
(benchmarks.attention_kernels --tiles, benchmarks/results/gpu.jsonl). The bias was read 4 bytes at a time then, and 444
instructions of a warp per block, 359 without it; by pairs and in base 2 they are 420.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel_patch.kernels.triton_prefill_parts import BIAS_ROOM, LOG2E, bounds, load_rows, to_scores, unit_of

INTERPRETED = bool(triton.knobs.runtime.interpret)  # as it was when the kernels were decorated
MOST_CHANNELS = 256
HOPPER_BYTES = 200 << 10  # of shared memory, that older GPUs do not have


@triton.jit
def _forward_blocks(
    sums, m, total, q, k, v, bias, first, last, start, stop, scale, cap, k_s, v_s, S,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    unit = unit_of(scale, cap)
    if bias is not None:
        unit = 1.0
    for begin in tl.range(start, stop, N, num_stages=STAGES):
        column = tl.multiple_of(begin, N) + tl.arange(0, N)
        keys = load_rows(k, begin, k_s, S, D, N, DP, WHOLE)
        scores = to_scores(tl.dot(q, tl.trans(keys), input_precision="tf32x3"), scale, cap, FAST)
        if bias is not None:
            scores = scores * unit_of(scale, cap) + tl.load(bias + column)[None, :]
        if not WHOLE:
            seen = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        most = tl.maximum(m, tl.max(scores, axis=1))
        shift = most
        if not WHOLE:  # rows that have seen nothing yet
            shift = tl.where(most == float("-inf"), 0.0, most)
        p = tl.exp2(scores * unit - (shift * unit)[:, None])  # the largest need not be in base 2: one operation less
        alpha = tl.exp2((m - shift) * unit)
        total = total * alpha + tl.sum(p, axis=1)
        values = load_rows(v, begin, v_s, S, V, N, VP, WHOLE)
        sums = tl.dot(p.to(values.dtype), values, sums * alpha[:, None], input_precision="tf32x3")
        m = most
    return sums, m, total


@triton.jit(do_not_specialize=["H", "G", "T", "S", "seen_b", "bias_b", "bias_h"])
def _forward(
    q, k, v, seen, sinks, bias, out, lse, scale, cap, H, G, T, S,
    q_b, q_h, q_t, k_b, k_k, k_s, v_b, v_k, v_s, seen_b, bias_b, bias_h,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """M queries of one head: out [B, T, H, V] and the log-sum-exp [B, H, T]."""
    tiles = tl.cdiv(T, M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    line = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = line // H, line % H
    row = tile * M + tl.arange(0, M)
    k += batch * k_b + head // G * k_k
    v += batch * v_b + head // G * v_k
    if bias is not None:
        bias += tl.multiple_of(batch * bias_b + head * bias_h, BIAS_ROOM)
    first, last, start, stop, inner, outer = bounds(seen + batch * seen_b, row, T, S, N)
    queries = load_rows(q + batch * q_b + head * q_h, tile * M, q_t, T, D, M, DP, False)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, VP], tl.float32)
    sums, m, total = _forward_blocks(
        sums, m, total, queries, k, v, bias, first, last, start, tl.minimum(inner, stop), scale, cap, k_s, v_s, S,
        D, V, DP, VP, N, False, STAGES, FAST)  # fmt: skip
    sums, m, total = _forward_blocks(
        sums, m, total, queries, k, v, bias, first, last, inner, outer, scale, cap, k_s, v_s, S,
        D, V, DP, VP, N, True, STAGES, FAST)  # fmt: skip
    sums, m, total = _forward_blocks(
        sums, m, total, queries, k, v, bias, first, last, tl.maximum(inner, outer), stop, scale, cap, k_s, v_s, S,
        D, V, DP, VP, N, False, STAGES, FAST)  # fmt: skip
    if bias is None:
        m *= unit_of(scale, cap)
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        most = tl.maximum(m, sink)
        shift = tl.where(most == float("-inf"), 0.0, most)
        alpha = tl.exp2(m - shift)
        sums *= alpha[:, None]
        total = total * alpha + tl.exp2(sink - shift)
        m = most
    divisor = tl.where(total == 0, 1.0, total)
    sums /= divisor[:, None]
    channel = tl.arange(0, VP)[None, :]
    at = ((batch * T + row) * H + head)[:, None] * V + channel
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(row < T)[:, None] & (channel < V))
    found = tl.where(total == 0, float("-inf"), (m + tl.log2(divisor)) / LOG2E)
    tl.store(lse + line * T + row, found, mask=row < T)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query [B, H, T, D] to key [B, K, S, D] and value [B, K, S, V]: [B, T, H, V] in their dtype, and the
    log-sum-exp of the scores and the sink, float32 [B, H, T], without gradient.

    seen: int32 [B or 1, T, 2], the first key that a query sees and the one after the last, in 0..S; a query that sees
    nothing gives zeros. scale is positive. softcap: scores become softcap * tanh(scale * scores / softcap). bias:
    float32 [B or 1, H or 1, 1, S], added after that, without gradient. sinks: [H], one more score per head, without a
    value. Gradients reach query, key, value and sinks.
    """
    _check(query, key, value, seen, bias)
    sinks = None if sinks is None else sinks.float().contiguous()
    inputs = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    out, lse = _Attention.apply(*inputs, sinks, seen.contiguous(), bias, scale, softcap)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, seen: Tensor, bias: Tensor | None,
        scale: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (B, H, T, D), (K, S, V) = query.shape, value.shape[1:]
        out = query.new_empty(B, T, H, V)
        lse = query.new_empty(B, H, T, dtype=torch.float32)
        bias = None if bias is None else prepared(bias)
        if out.numel():
            t = tiling(D, V, query.dtype is torch.float32, shared_memory(query.device))
            with torch.cuda.device_of(query):
                _forward[(B * H * triton.cdiv(T, t.queries),)](
                    query, key, value, seen, sinks, bias, out, lse, scale, softcap, H, H // K, T, S,
                    *strides(query, key, value, seen, bias), D, V, room(D), room(V), t.queries, t.keys, t.stages,
                    approximates(query), num_warps=t.warps,
                )  # fmt: skip
        ctx.save_for_backward(query, key, value, sinks, seen, bias, out, lse)
        ctx.scale, ctx.softcap = scale, softcap
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from hf_accel_patch.kernels.triton_prefill_backward import gradients

        query, key, value, sinks, seen, bias, out, lse = ctx.saved_tensors
        delta = (do.float() * out.float()).sum(-1).transpose(1, 2).contiguous()  # [B, H, T]
        inputs = query, key, value, seen, bias, do.contiguous(), lse, delta
        dq, dk, dv = gradients(*inputs, ctx.scale, ctx.softcap)
        dsinks = None
        if sinks is not None:
            dsinks = -(torch.exp(sinks[None, :, None] - lse) * delta).nan_to_num(0).sum((0, 2))
        return dq, dk, dv, dsinks, None, None, None, None


class Tiling(NamedTuple):
    """The sizes of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)
def tiling(key_size: int, value_size: int, float32: bool, shared_bytes: int, backward: bool = False) -> Tiling:
    """What is loaded ahead must fit into the shared memory of a program: 227 KB on an H100, 99 KB on small GPUs."""
    widest, width = max(room(key_size), room(value_size)), 4 if float32 else 2
    channels = room(key_size) + room(value_size)
    queries, keys, warps = 128, 64, 4 if widest <= 64 else 8
    older = shared_bytes < HOPPER_BYTES  # queries stay in registers, of which there are too few for 128 of 256 channels
    if backward:  # 8 warps on 64 queries would compute each score twice, for the layout that the products want
        queries, keys = (32, 32) if widest > 128 else (64 if older or warps == 4 else 128, 64)
    elif widest > 128:
        queries, keys = 64 if older else 128, 32
    if float32:
        queries, keys = (32, 32) if widest <= 128 else (16, 16)
        warps = 8 if backward and widest > 64 else 4
    stages = 3
    ahead, held = keys, 0 if older else queries
    if backward:  # queries or keys are held, and the others come
        ahead, held = max(queries, keys), min(queries, keys)
    while stages > 1 and (stages * ahead + held) * channels * width > shared_bytes * 7 // 8:
        stages -= 1
    return Tiling(queries, keys, warps, stages)


def approximates(query: Tensor) -> bool:
    """Whether a soft cap is computed to 11 bits: no fewer than 16-bit scores would have. The interpreter has no such
    instruction."""
    return query.dtype is not torch.float32 and not INTERPRETED


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def prepared(bias: Tensor) -> Tensor:
    """In base 2, and with room for whole blocks of keys, so that the kernels read it unmasked and two at a time."""
    return torch.nn.functional.pad(bias * LOG2E.value, (0, -bias.shape[-1] % BIAS_ROOM.value)).contiguous()


def room(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def strides(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """Zero where one serves all."""
    added = (0, 0) if bias is None else (bias.stride(i) if bias.shape[i] > 1 else 0 for i in (0, 1))
    own = seen.stride(0) if len(seen) > 1 else 0
    return (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], own, *added)


def _check(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None) -> None:
    (B, H, T, D), (K, S, V) = query.shape, value.shape[1:]
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"queries are {query.dtype}; the kernels take float32, bfloat16 or float16")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"queries are {query.dtype}, keys {key.dtype}, values {value.dtype}; they must be the same")
    if max(D, V) > MOST_CHANNELS:
        raise ValueError(f"head sizes are {D} and {V}; the kernels take up to {MOST_CHANNELS}")
    if H % K or key.shape != (B, K, S, D) or value.shape[0] != B:
        raise ValueError(f"queries are {list(query.shape)}, keys {list(key.shape)}, values {list(value.shape)}")
    if seen.dtype != torch.int32 or seen.shape not in ((B, T, 2), (1, T, 2)):
        raise TypeError(f"seen is {seen.dtype} {list(seen.shape)}; it must be torch.int32 {[B, T, 2]} or {[1, T, 2]}")
    if bias is not None and (bias.dtype != torch.float32 or bias.ndim != 4 or bias.shape[2:] != (1, S)):
        raise TypeError(f"the bias is {bias.dtype} {list(bias.shape)}; it must be torch.float32, one row of {S}")
