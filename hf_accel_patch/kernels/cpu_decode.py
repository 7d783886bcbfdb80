"""Attention of a few new tokens over an exact or quantized cache on x86 processors, in C (decode.c).

`library()` is None where that is not possible, and `why_not()` says why; see compiling.py for how it is made and kept.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hf_accel_patch.kernels import compiling, cpu
from hf_accel_patch.kernels.noting import Call, notes, unnoted

SOURCE = Path(__file__).with_name("decode.c")
BLOCK = 64  # tokens
FLAGS = {64: (), 32: ("-mno-avx512f",)}  # by the bytes of a vector
CALL = struct.Struct("@12q3P9qP3q4P8q2P3q2P4qP3q2dP")  # `attention` in decode.c
PACKING = struct.Struct("@9q2P6q4P")  # `packing`

Packed = tuple[Tensor, Tensor, Tensor, Tensor]  # as ops/kv.py has it: key codes and scales, value codes and scales


def library(width: int | None = None) -> ctypes.CDLL | None:
    """The kernels, with vectors of `width` bytes or else of the most that there can be, or None."""
    return _load(width)[0]


def why_not(width: int | None = None) -> str:
    """Why there are none."""
    return _load(width)[1]


def attend(
    kernels: ctypes.CDLL,
    query: Tensor,
    packed: Packed | None,
    bits: int,
    blocks: int,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None = None,
    rest: Tensor | None = None,
    added: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Attention of query [B, H, T, D] over the first `blocks` blocks of `packed`, then the exact keys [B, K, R, D] and
    values [B, K, R, V]: [B, T, H, V], like the query.

    With mask, bool [B or 1, 1 or H, 1 or T, S], a token sees the keys where it is True; where there are none, the
    result is zero. `softcap` limits scores to cap * tanh(score / cap); `sinks`, float32 [H], are scores without a
    value. `bias`, float32 [B, H, T, 64 blocks], is added to the products of query and packed keys, before the scale.
    `added`, float32 [B or 1, H or 1, T or 1, S], is added to the scores, after the scale and the cap.
    Where the last channels of exact keys lie apart, they are the `rest`, and the `keys` are the first ones.
    `sums`, float32 [B, T, H], gets the logarithms of the sums of exp(score), -inf where no key is seen.
    Keys and values have the dtype of the query. The last dimension of every tensor is contiguous, in packed
    ones all from the third on. Sums are float32; rounding queries and weights where they meet codes costs less than
    1e-3 of the result.
    """
    (B, H, T, D), (K, R, V) = query.shape, values.shape[1:]
    out = torch.empty((B, T, H, V), dtype=query.dtype, device="cpu")
    if packed is None:
        groups, pointers, strides = 1, [0] * 4, [0] * 8
    else:
        groups = packed[3].shape[4]
        pointers = [tensor.data_ptr() for tensor in packed]
        strides = [stride for tensor in packed for stride in tensor.stride()[:2]]
    seen, seen_strides = _broadcast(mask)
    more, more_strides = _broadcast(added)
    arguments = CALL.pack(
        B, K, H // K, T, D, V, blocks, R, bits, cpu.DTYPES[query.dtype], torch.get_num_threads(), groups,
        query.data_ptr(), keys.data_ptr(), values.data_ptr(),
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        seen, *seen_strides, *pointers, *strides,
        0 if sinks is None else sinks.data_ptr(), 0 if bias is None else bias.data_ptr(),
        *((0, 0, 0) if bias is None else bias.stride()[:3]), out.data_ptr(),
        *((0, 0, 0, 0, 0) if rest is None else (rest.data_ptr(), rest.shape[3], *rest.stride()[:3])),
        more, *more_strides, scale, softcap or 0.0, 0 if sums is None else sums.data_ptr(),
    )  # fmt: skip
    if kernels.attend(arguments):
        raise MemoryError("no memory for the parts of an attention")
    if (tell := notes()) is not None:
        read = (keys, values, *(packed or ()), mask, sinks, bias, rest, added, sums)
        tell(Call(kernels.attend, query, out, read, argument=arguments))
    return out


def _broadcast(tensor: Tensor | None) -> tuple[int, list[int]]:
    """Where it is, and its strides but for the last, 0 where it has one row for all."""
    if tensor is None:
        return 0, [0] * 3
    return tensor.data_ptr(), [0 if tensor.shape[i] == 1 else tensor.stride(i) for i in range(3)]


def pack(kernels: ctypes.CDLL, keys: Tensor, values: Tensor, bits: int) -> Packed:
    """What ops.kv.pack makes, to the bit, of keys [B, K, 64 N, D] and values [B, K, 64 N, V] of one dtype, with the
    last dimension contiguous."""
    unnoted("pack")
    (B, K, S, D), V = keys.shape, values.shape[3]
    N, D_packed, V_packed = S // BLOCK, -(-D // 8) * 8, -(-V // 16) * 16
    groups = V_packed // 64 if bits == 4 and V_packed % 64 == 0 else 1
    ways = 1 if bits == 8 else 2
    shapes = (
        (D_packed // ways // 4, BLOCK, 4),
        (2, D_packed),
        (BLOCK // ways // 4, V_packed, 4),
        (ways, groups, BLOCK),
    )
    packed = [
        torch.empty((B, K, N, *shape), dtype=(torch.uint8, torch.float16)[i % 2], device="cpu")
        for i, shape in enumerate(shapes)
    ]
    kernels.pack(
        PACKING.pack(
            B, K, N, D, V, bits, cpu.DTYPES[keys.dtype], torch.get_num_threads(), groups,
            keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], *values.stride()[:3],
            *[tensor.data_ptr() for tensor in packed],
        )
    )  # fmt: skip
    return packed[0], packed[1], packed[2], packed[3]


@cache
def _load(width: int | None) -> tuple[ctypes.CDLL | None, str]:
    if width is None:
        return _load(64) if _load(64)[0] is not None else _load(32)
    kernels, reason = compiling.load(SOURCE, width, *FLAGS[width])
    if kernels is not None:
        kernels.attend.argtypes = kernels.pack.argtypes = [ctypes.c_char_p]
        kernels.pack.restype = None
    return kernels, reason
