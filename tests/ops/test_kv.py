"""Packed keys and values: how near they are, where they lie, how much they take."""

import pytest
import torch

from hf_accel_patch.ops import kv
from hf_accel_patch.ops.kv import BLOCK, Packed, block_bytes, pack, unpack

SIZES = [(16, 16), (64, 128), (20, 36), (8, 16), (80, 80), (576, 64)]
bits = pytest.mark.parametrize("bits", (8, 4))


def states(key_size, value_size, blocks=3, batch=2, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, blocks * BLOCK)
    keys = torch.randn(*shape, key_size, generator=generator) * torch.logspace(-1, 1, key_size) + 3
    return keys, torch.randn(*shape, value_size, generator=generator)


@bits
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_errors_are_at_most_half_a_step(bits, sizes):
    keys, values = states(*sizes)
    found = unpack(pack(keys, values, bits), bits, *sizes, torch.float32)
    blocks = keys.unflatten(2, (-1, BLOCK))
    steps = (blocks.amax(3) - blocks.amin(3)) / (2**bits - 1)
    error = (found[0] - keys).abs().unflatten(2, (-1, BLOCK)).amax(3)
    half = torch.finfo(torch.float16).eps * blocks.abs().amax(3)  # what float16 scales and minima cost
    assert (error <= steps * 0.505 + half).all()

    group = kv.value_group(sizes[1] + -sizes[1] % 16) if bits == 4 else sizes[1]
    for first in range(0, sizes[1], group):
        some = values[..., first : first + group]
        span = 2 * some.abs().amax(-1, keepdim=True) / 254 if bits == 8 else None
        if span is None:  # padding adds a zero to the range
            low, high = some.amin(-1, keepdim=True).clamp(max=0), some.amax(-1, keepdim=True).clamp(min=0)
            span = (high - low) / 15
        half = torch.finfo(torch.float16).eps * some.abs().amax(-1, keepdim=True)
        assert ((found[1][..., first : first + group] - some).abs() <= span * 0.505 + half).all()


@bits
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bytes(bits, sizes):
    keys, values = states(*sizes)
    packed = pack(keys, values, bits)
    assert sum(each.nbytes for each in packed) == 2 * 2 * 3 * block_bytes(*sizes, bits)
    assert all(each.is_contiguous() for each in packed)


@bits
def test_every_code_is_where_the_documentation_says(bits):
    keys, values = states(16, 32, blocks=2)
    packed = pack(keys, values, bits)
    dense = unpack(packed, bits, 16, 32, torch.float32)
    for token, channel in [(0, 0), (5, 3), (63, 15), (64, 8), (127, 12), (100, 7)]:
        n, t = divmod(token, BLOCK)
        scale, minimum = packed.key_scales[0, 1, n, :, channel].float()
        half, rest = divmod(channel, 8) if bits == 4 else (0, channel)
        code = packed.key_codes[0, 1, n, rest // 4, t, rest % 4].item() >> 4 * half & (2**bits - 1)
        assert dense[0][0, 1, token, channel] == pytest.approx((minimum + scale * code).item(), rel=1e-6)

        channel += 16
        if bits == 8:
            number = packed.value_codes[0, 1, n, t // 4, channel, t % 4].float() - 128
            expected = packed.value_scales[0, 1, n, 0, 0, t].float() * number
        else:
            half, rest = divmod(t, 32)
            code = packed.value_codes[0, 1, n, rest // 4, channel, rest % 4].item() >> 4 * half & 15
            scale, minimum = packed.value_scales[0, 1, n, :, 0, t].float()
            expected = minimum + scale * code
        assert dense[1][0, 1, token, channel] == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)


@bits
def test_constant_zero_and_huge_numbers(bits):
    keys, values = states(16, 16, blocks=1)
    keys[..., 0], keys[..., 1], keys[..., 2] = 0.0, 7.25, 1e6
    values[:, :, 0], values[:, :, 1], values[:, :, 2] = 0.0, 7.25, 1e6
    found = unpack(pack(keys, values, bits), bits, 16, 16, torch.float32)
    assert all(each.isfinite().all() for each in found)
    assert (found[0][..., 0] == 0).all() and (found[0][..., 1] == 7.25).all()
    assert (found[1][:, :, 0] == 0).all() and (found[1][:, :, 1] - 7.25).abs().max() < 0.01
    assert (found[0][..., 2] >= 65504).all(), "beyond float16, the largest that there is"


@bits
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision(bits, dtype):
    keys, values = (each.to(dtype) for each in states(64, 64))
    packed = pack(keys, values, bits)
    same = pack(keys.float(), values.float(), bits)
    assert all(torch.equal(*pair) for pair in zip(packed, same, strict=True))
    assert unpack(packed, bits, 64, 64, dtype)[0].dtype == dtype


@bits
def test_blocks_stand_alone(bits):
    keys, values = states(24, 40)
    whole = pack(keys, values, bits)
    some = pack(keys[:, :, BLOCK : 2 * BLOCK], values[:, :, BLOCK : 2 * BLOCK], bits)
    assert all(torch.equal(a[:, :, 1:2], b) for a, b in zip(whole, some, strict=True))
    part = unpack(Packed(*(each[:, :, 1:2] for each in whole)), bits, 24, 40, torch.float32)
    dense = unpack(whole, bits, 24, 40, torch.float32)
    assert all(torch.equal(a, b[:, :, BLOCK : 2 * BLOCK]) for a, b in zip(part, dense, strict=True))
