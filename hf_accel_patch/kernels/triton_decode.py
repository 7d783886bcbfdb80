# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# mypy: disable-error-code="assignment"
"""Attention of a few queries to exact or quantized keys and values on NVIDIA GPUs, in Triton, split along the tokens
("Flash-Decoding"). Needs triton; imported only when used.

Programs split the tokens of a key/value head, and a second kernel adds what they found. Sums are float32 and always in
the same order; how tokens are split follows from shapes. Nothing waits for the device or depends on the data, so CUDA
graphs can record it. All query rows of a key/value head, H / K * T, share one pass, up to 16 with codes and 32 with
exact 16-bit keys and values (of float32 8 and 16); more are passes that meet in the L2 cache. Caches without codes are
read by triton_decode_exact.py, most with codes by triton_decode_codes.py.

The rest, float32 queries, more than 8 rows, a mask of their own for rows, a bias, other head sizes, is for
triton_decode_digits.py.

It is fast where D and V are multiples of 16 and rows are aligned to 16 bytes: others are not read 16 bytes at a time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hf_accel_patch.kernels import triton_decode_codes as coded
from hf_accel_patch.kernels import triton_decode_exact as exact
from hf_accel_patch.kernels.triton_decode_digits import TAIL, attend_digits
from hf_accel_patch.kernels.triton_decode_parts import combine

PROCESSORS = 132  # of an H100 or H200; not asked of the device, so that every GPU adds in the same order
LOADED_BYTES = 65536  # ahead
COMBINED = 16  # channels at a time

Stored = tuple[Tensor, Tensor, Tensor, Tensor]  # codes and scales of keys, and of values


def attend(
    query: Tensor,
    packed: Stored | None,
    bits: int,
    blocks: int,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of query [B, H, T, D] to `blocks` blocks of 64 tokens of `packed` (key codes and scales, value codes
    and scales as in ops.kv, with room for C >= blocks), then to keys [B, K, R, D] and values [B, K, R, V] in the dtype
    of query: [B, T, H, V] in that dtype. The last stride of query, keys, values and mask is 1; a head of `packed` is
    contiguous.

    mask: bool [B or 1, H or 1, T or 1, 64 blocks + R], True where seen; a row that sees nothing gives zeros. scale is
    positive. softcap: scores become softcap * tanh(scale * scores / softcap). sinks: float32 [H], one more score per
    head, without a value.
    """
    B, H, T, _ = query.shape
    _check(query, keys, values, mask, 64 * blocks + keys.shape[2])
    out = query.new_empty(B, T, H, values.shape[3])
    if not out.numel():
        return out
    given = _Given(query, keys, values, mask, scale, softcap, sinks, out)
    with torch.cuda.device_of(query):
        if packed is None or not blocks:
            _attend_exact(given)
        elif bias is None and _codes_take(given, packed, bits):
            _attend_codes(given, packed, bits, blocks)
        else:
            _attend_digits(given, packed, bits, blocks, bias)
    return out


class _Given(NamedTuple):
    """What `attend` was called with, and where its answer goes."""

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    out: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, K, G, T, R, D and V."""
        (B, H, T, D), (K, R, V) = self.query.shape, self.values.shape[1:]
        return B, K, H // K, T, R, D, V

    @property
    def mask_bytes(self) -> Tensor | None:
        return None if self.mask is None else self.mask.view(torch.uint8)


def _attend_exact(given: _Given) -> None:
    query, keys, values, mask, scale, softcap, sinks, out = given
    B, K, G, T, R, D, V = given.sizes
    DP, VP = _power_of_2(max(D, 16)), _power_of_2(max(V, 16))
    t = exact.tiling(G * T, DP, VP, query.dtype is torch.float32)
    tiles = triton.cdiv(G * T, t.rows)
    splits, steps = split(B * K * tiles, triton.cdiv(R, t.tokens), t.fit)
    parts, stats = _parts(out, K, splits)
    m_b, m_h, m_t = _mask_strides(mask)
    exact.attend_exact[(B * K * tiles, splits)](
        query, keys, values, given.mask_bytes, sinks, stats, parts,
        K, G, T, R, steps, scale, softcap, *query.stride()[:3], *keys.stride()[:2], *values.stride()[:2],
        m_b, m_h, m_t, keys.stride(2), values.stride(2), D, V, DP, VP, m_h != 0, m_t != 0, splits > 1,
        t.rows, t.pieces, t.tokens, t.stages, num_warps=t.warps, maxnreg=_registers(t.warps, t.fit),
    )  # fmt: skip
    _combined(parts, stats, sinks, out, K, splits)


def _codes_take(given: _Given, packed: Stored, bits: int) -> bool:
    """Whether triton_decode_codes.py is for this."""
    _, _, G, T, _, D, V = given.sizes
    sizes = packed[1].shape[-1] == D and packed[2].shape[4] == V and given.query.dtype is not torch.float32
    same = given.mask is None or given.mask.shape[1:3] == (1, 1)
    return sizes and same and coded.takes(bits, G * T, D, V)


def _attend_codes(given: _Given, packed: Stored, bits: int, blocks: int) -> None:
    query, keys, values, mask, scale, softcap, sinks, out = given
    B, K, G, T, R, D, V = given.sizes
    key_codes, key_scales, value_codes, value_scales = packed
    key_words, value_words = key_codes.view(torch.int32), value_codes.view(torch.int32)
    rows = 4 if G * T <= 4 else 8
    stages, fit = coded.STAGES[bits], coded.fit(rows, max(D, V))
    tiles = triton.cdiv(G * T, rows)
    first, steps = split(B * K * tiles, blocks, fit)
    rest, rest_steps = split(B * K * tiles, triton.cdiv(R, coded.TAIL_TOKENS), fit) if R else (0, 1)
    splits = first + rest
    parts, stats = _parts(out, K, splits)
    coded.attend_codes[(B * K * tiles, splits)](
        query, keys, values, key_words, key_scales, value_words, value_scales, given.mask_bytes, sinks, stats, parts,
        K, G, T, blocks, R, steps, first, rest_steps, scale, softcap,
        *query.stride()[:3], *keys.stride()[:2], *values.stride()[:2], *_strides(key_words), *_strides(key_scales),
        *_strides(value_words), *_strides(value_scales), _mask_strides(mask)[0],
        keys.stride(2), values.stride(2), D, V, value_scales.shape[4], bits, splits > 1, rows,
        coded.TAIL_TOKENS, stages, not coded.INTERPRETED, num_warps=1, maxnreg=_registers(1, fit),
    )  # fmt: skip
    _combined(parts, stats, sinks, out, K, splits)


def _attend_digits(given: _Given, packed: Stored, bits: int, blocks: int, bias: Tensor | None) -> None:
    query, keys, values, mask, scale, softcap, sinks, out = given
    B, K, G, T, R, D, V = given.sizes
    codes, key_scales, value_codes, value_scales = packed
    KEY, VALUE, groups = key_scales.shape[-1], value_codes.shape[4], value_scales.shape[4]
    t = tiling(bits, G * T, max(D, KEY), VALUE, query.dtype is torch.float32)
    tiles = triton.cdiv(G * T, t.rows)
    splits, steps = split(B * K * tiles, triton.cdiv(blocks, t.warps) + triton.cdiv(R, TAIL.value * t.warps))
    parts, stats = _parts(out, K, splits)
    attend_digits[(B * K * tiles, splits)](
        query, keys, values, codes, key_scales, value_codes, value_scales, given.mask_bytes, sinks, bias, stats, parts,
        K, G, T, D, V, blocks, R, steps, scale, softcap,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        *_strides(codes), *_strides(key_scales), *_strides(value_codes), *_strides(value_scales),
        *_mask_strides(mask), *_mask_strides(bias),
        KEY, VALUE, groups, bits, splits > 1, t.warps, t.rows, t.pieces, t.digits, _power_of_2(max(D, 16)),
        t.key_chunk, triton.cdiv(KEY, t.key_chunk), t.value_chunk, triton.cdiv(VALUE, t.value_chunk),
        t.stages, num_warps=t.warps,
    )  # fmt: skip
    _combined(parts, stats, sinks, out, K, splits)


def _parts(out: Tensor, K: int, splits: int) -> tuple[Tensor, Tensor | None]:
    """Room for what each split finds: sums of values, and the largest logits and the sums of weights."""
    if splits == 1:
        return out, None
    B, T, H, V = out.shape
    parts = torch.empty(B * K, splits, H // K * T, V, dtype=torch.float32, device=out.device)
    return parts, torch.empty(B * K, splits, H // K * T, 2, dtype=torch.float32, device=out.device)


def _combined(parts: Tensor, stats: Tensor | None, sinks: Tensor | None, out: Tensor, K: int, splits: int) -> None:
    if stats is not None:
        B, T, H, V = out.shape
        grid = B * H * T, triton.cdiv(V, COMBINED)
        combine[grid](parts, stats, sinks, out, H, T, H // K, V, splits, 128, COMBINED, num_warps=4)


def _registers(warps: int, fit: int) -> int:
    """The most that a thread may take for `fit` programs to fit on a processor."""
    return min(255, 65536 // (32 * warps * fit) // 8 * 8)


class Tiling(NamedTuple):
    """The sizes of a program."""

    warps: int
    rows: int
    pieces: int  # rows of a tensor core's operand per row
    digits: int  # of base 256, of what meets codes
    key_chunk: int  # channels of quantized keys at a time
    value_chunk: int
    stages: int


@lru_cache(maxsize=1024)
def tiling(bits: int, rows: int, key_size: int, value_size: int, float32: bool) -> Tiling:
    """For `rows` query rows per key/value head. What is loaded ahead stays below 64 KB, for two programs to fit on an
    H100's processor and one on GPUs that let a program have 99 KB."""
    tile = 8 if rows <= 8 or float32 else 16
    pieces, digits = (4, 3) if float32 else (2, 2)
    key_chunk = max(64 if bits == 4 else 32, min(128, _power_of_2(key_size)))
    value_chunk = max(16, min(64, _power_of_2(value_size)))
    channels = triton.cdiv(key_size, key_chunk) * key_chunk + triton.cdiv(value_size, value_chunk) * value_chunk
    warp_bytes = channels * max(8 * bits, TAIL.value * (8 if float32 else 0))
    warps = 4
    while warps > 1 and warps * warp_bytes > LOADED_BYTES:
        warps //= 2
    stages = min(3, max(2, 1 + LOADED_BYTES // (warps * warp_bytes)))
    return Tiling(warps, tile, pieces, digits, key_chunk, value_chunk, stages)


@lru_cache(maxsize=4096)
def split(programs: int, steps: int, fit: int = 2) -> tuple[int, int]:
    """How many programs share the steps of each of `programs`, and how many steps each takes: what is over first where
    `fit` programs fit on a processor and to start one takes as long as a step; then, what has the fewest."""
    steps, choices = max(steps, 1), []
    for splits in range(1, max(1, min(steps, max(8, fit) * PROCESSORS // programs)) + 1):
        each = triton.cdiv(steps, splits)
        waves = triton.cdiv(programs * triton.cdiv(steps, each), fit * PROCESSORS)
        choices.append((waves * (each + 1), triton.cdiv(steps, each), each))
    _, splits, each = min(choices)
    return splits, each


def _check(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, length: int) -> None:
    """The kernels trust what they are given."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"queries are {query.dtype}; the kernels take float32, bfloat16 or float16")
    if not query.dtype == keys.dtype == values.dtype:
        raise TypeError(f"queries are {query.dtype}, keys {keys.dtype}, values {values.dtype}; they must be the same")
    if mask is not None and (mask.dtype is not torch.bool or mask.shape[-1] != length):
        raise TypeError(f"the mask is {mask.dtype} for {mask.shape[-1]} tokens; it must be torch.bool for {length}")
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (query, keys, values, *([] if mask is None else [mask]))):
        raise ValueError("the last stride of queries, keys, values and mask must be 1")


def _power_of_2(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Of B, H and T; zero where there is but one."""
    if mask is None:
        return 0, 0, 0
    b, h, t = (0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    return b, h, t
