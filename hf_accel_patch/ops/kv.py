# mypy: disable-error-code="no-untyped-call"
"""Keys and values in 8 or 4 bits: how they lie in memory.

Keys have channels of very different size, so they share a scale per channel, over a block of 64 tokens; values have
none, so they share one per token (arXiv 2402.02750). A key is minimum + scale * code; an int8 value is
scale * (code - 128), an int4 value minimum + scale * code. All of a block's numbers lie together, four that a dot
product adds up side by side, as the instructions and shaders that multiply bytes want them:

* key codes, uint8 [B, K, N, D' / 4, 64, 4] in int8: a token's channels 4i to 4i + 3; in int4 [B, K, N, D' / 8, 64, 4]:
  channels 4i to 4i + 3 in the low half of a byte, D' / 2 + 4i to D' / 2 + 4i + 3 in the high half;
* key scales, float16 [B, K, N, 2, D']: scales, then minima;
* value codes, uint8 [B, K, N, 16, V', 4] in int8: a channel of tokens 4i to 4i + 3; in int4 [B, K, N, 8, V', 4]: of
  tokens 4i to 4i + 3 in the low half, of 32 + 4i to 32 + 4i + 3 in the high half;
* value scales, float16 [B, K, N, 1, 1, 64] in int8; in int4 [B, K, N, 2, groups, 64]: scales, then minima, for groups
  of 64 channels where they divide V', else for all of them.

In 16 bits, which is where tokens are only kept elsewhere, codes are the keys [B, K, N, 64, D] and values as they are,
and scales are empty.

B batch, K key/value heads, N blocks of 64 tokens, D' the size of a key rounded up to a multiple of 8, V' that of a
value rounded up to a multiple of 16, with zeros.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens
VALUE_GROUP = 64  # channels of an int4 value that share a scale
LEAST, LARGEST = 2.0**-24, 65504.0  # of a positive float16

Bits = Literal[16, 8, 4]


class Packed(NamedTuple):
    """Blocks of quantized keys and values, laid out as above."""

    key_codes: Tensor
    key_scales: Tensor
    value_codes: Tensor
    value_scales: Tensor


def pack(keys: Tensor, values: Tensor, bits: Bits) -> Packed:
    """Quantize keys [B, K, 64 N, D] and values [B, K, 64 N, V]."""
    if bits == 16:
        codes = (each.unflatten(2, (-1, BLOCK)) for each in (keys, values))
        return Packed(*(part for each in codes for part in (each, each.new_empty((*each.shape[:3], 0)))))
    return Packed(*pack_keys(keys, bits), *pack_values(values, bits))


def unpack(packed: Packed, bits: Bits, key_size: int, value_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys [B, K, 64 N, key_size] and values [B, K, 64 N, value_size], from float32 sums rounded to `dtype`."""
    keys = unpack_keys(packed.key_codes, packed.key_scales, bits)[..., :key_size]
    values = unpack_values(packed.value_codes, packed.value_scales, bits)[..., :value_size]
    return keys.to(dtype), values.to(dtype)


def pack_keys(keys: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Codes and scales of keys [B, K, 64 N, D]."""
    blocks = F.pad(keys.float(), (0, -keys.shape[-1] % 8)).unflatten(2, (-1, BLOCK))
    low, high = blocks.aminmax(dim=3, keepdim=True)
    codes, scale, minimum = _affine(blocks, low, high, bits)
    scales = torch.cat((scale, minimum), dim=3)
    if bits == 8:
        return codes.unflatten(4, (-1, 4)).transpose(3, 4).contiguous(), scales
    halves = codes.unflatten(4, (2, -1, 4)).permute(4, 0, 1, 2, 5, 3, 6)
    return (halves[0] | halves[1] << 4).contiguous(), scales


def unpack_keys(codes: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """Keys [B, K, 64 N, D'] in float32, or as they were."""
    if bits == 16:
        return codes.flatten(2, 3)
    if bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=3)
    numbers = codes.transpose(3, 4).flatten(4).float()
    return torch.addcmul(scales[..., 1:, :].float(), numbers, scales[..., :1, :].float()).flatten(2, 3)


def pack_values(values: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Codes and scales of values [B, K, 64 N, V]."""
    blocks = F.pad(values.float(), (0, -values.shape[-1] % 16)).unflatten(2, (-1, BLOCK))
    if bits == 8:
        scale = _half(blocks.abs().amax(-1, keepdim=True) / 127, up=True)
        codes = ((blocks / scale.float()).round().clamp(-127, 127) + 128).to(torch.uint8)
        codes = codes.unflatten(3, (-1, 4)).transpose(4, 5).contiguous()
        return codes, scale.transpose(3, 4)[..., None, :].contiguous()
    groups = blocks.unflatten(4, (-1, value_group(blocks.shape[-1])))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    codes, scale, minimum = _affine(groups, low, high, bits)
    halves = codes.flatten(4).unflatten(3, (2, -1, 4)).permute(3, 0, 1, 2, 4, 6, 5)
    scales = torch.cat((scale, minimum), dim=-1).permute(0, 1, 2, 5, 4, 3).contiguous()
    return (halves[0] | halves[1] << 4).contiguous(), scales


def unpack_values(codes: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """Values [B, K, 64 N, V'] in float32, or as they were."""
    if bits == 16:
        return codes.flatten(2, 3)
    if bits == 8:
        numbers = codes.transpose(4, 5).flatten(3, 4).float() - 128
        return (numbers * scales[..., 0, 0, :, None].float()).flatten(2, 3)
    numbers = torch.cat((codes & 15, codes >> 4), dim=3).transpose(4, 5).flatten(3, 4).float()
    scale, minimum = scales.float().permute(3, 0, 1, 2, 5, 4)[..., None]
    groups = numbers.unflatten(4, (-1, value_group(numbers.shape[-1])))
    return torch.addcmul(minimum, groups, scale).flatten(4).flatten(2, 3)


def value_group(channels: int) -> int:
    """How many channels of an int4 value share a scale."""
    return VALUE_GROUP if channels % VALUE_GROUP == 0 else channels


def block_bytes(key_size: int, value_size: int, bits: Bits) -> int:
    """Bytes of a block of one head: codes and scales."""
    keys, values = key_size + -key_size % 8, value_size + -value_size % 16
    groups = 1 if bits == 8 else 2 * (values // value_group(values))
    return (keys + values) * BLOCK * bits // 8 + 2 * (2 * keys + groups * BLOCK)


def _affine(x: Tensor, low: Tensor, high: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and minimum. The codes are those for the scale and the minimum as float16 has them."""
    levels = 2**bits - 1
    minimum = _half(low)
    scale = _half((high - minimum.float()) / levels, up=True)
    codes = ((x - minimum.float()) / scale.float()).round().clamp(0, levels).to(torch.uint8)
    return codes, scale, minimum


def _half(x: Tensor, *, up: bool = False) -> Tensor:
    """As float16, finite; `up`: positive."""
    return x.clamp(LEAST if up else -LARGEST, LARGEST).half()
