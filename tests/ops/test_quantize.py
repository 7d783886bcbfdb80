"""Codes, layouts and products of quantized weights against plain arithmetic."""

import pytest
import torch

from hf_accel_patch.ops import linear, quantize
from hf_accel_patch.ops.linear import ALWAYS, Backend, linear_int4, linear_int8, pack_int4, rows_int4, unpack_int4
from hf_accel_patch.ops.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

BFLOAT16 = 2**-8  # relative rounding error, twice


def weights(N=100, K=128, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.02


def error(approximation, exact):
    return ((approximation.double() - exact.double()).norm() / exact.double().norm()).item()


def test_int8_rounds_to_nearest():
    w = weights()
    codes, scales = quantize_int8(w)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert (
        (dequantize_int8(codes, scales) - w).abs() <= 0.5001 * scales[:, None].float() + 127 * 1e-9
    ).float().mean() > 0.98
    assert error(dequantize_int8(codes, scales), w) < 0.01


def test_int8_of_zeros_and_single_values():
    w = torch.zeros(2, 64)
    w[1, 3] = 5.0
    restored = dequantize_int8(*quantize_int8(w))
    assert torch.equal(restored[0], w[0]) and abs(restored[1, 3] - 5) < 0.02


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_beats_rounding_to_nearest(group_size, monkeypatch):
    w = weights()
    fitted = error(dequantize_int4(*quantize_int4(w, group_size)), w)
    monkeypatch.setattr(quantize, "REFINEMENTS", 0)
    monkeypatch.setattr(quantize, "SHRINK", 1.0)
    nearest = error(dequantize_int4(*quantize_int4(w, group_size)), w)
    assert fitted < 0.97 * nearest


def test_int4_codes_are_the_best_for_their_scales():
    w = weights()
    codes, scale, zero = quantize_int4(w, 64)
    ours = (dequantize_int4(codes, scale, zero) - w).abs()
    for step in (-1, 1):
        moved = (codes.int() + step).clamp(0, 15)
        assert (ours <= (dequantize_int4(moved, scale, zero) - w).abs() + 1e-7).all()


def test_int4_of_a_constant_group_is_exact_to_bfloat16():
    w = torch.full((4, 64), 0.3)
    assert error(dequantize_int4(*quantize_int4(w, 64)), w) < BFLOAT16


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("N", [64, 100, 7])
def test_packing_is_undone_by_unpacking(block, N):
    w = weights(N)
    packed, scales = pack_int4(w, 64, block)
    restored = unpack_int4(packed, scales, block, 0, len(packed) // block).transpose(1, 2).reshape(-1, 128)[:N]
    expected = dequantize_int4(*quantize_int4(w, 64))
    assert packed.shape[1] == 64 and len(packed) % block == 0
    assert error(restored, expected) < BFLOAT16
    index = torch.tensor([0, N - 1, N // 2])
    assert error(rows_int4(packed, scales, block, index), expected[index]) < BFLOAT16


def test_blocks_of_rows_change_nothing(monkeypatch):
    w = weights(300)
    whole = pack_int4(w, 64, 64), quantize_int8(w)
    monkeypatch.setattr(quantize, "BLOCK_ELEMENTS", 64 * 128)
    parts = pack_int4(w, 64, 64), quantize_int8(w)
    assert all(torch.equal(a, b) for one, two in zip(whole, parts, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 3, 70])
def test_int4_products(rows):
    block = linear.int4_block()
    w, x = weights(200), torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed, scales = pack_int4(w, 64, block or 64)
    expected = x.double() @ dequantize_int4(*quantize_int4(w, 64)).double().T
    for kernel_rows in (0, ALWAYS) if block else (0,):
        ours = linear_int4(x, packed, scales, block or 64, Backend(False, kernel_rows))[:, :200]
        assert ours.dtype == torch.bfloat16 and ours.shape == expected.shape
        assert rows == 0 or error(ours, expected) < 2 * BFLOAT16


@pytest.mark.parametrize("rows", [0, 1, 3, 70])
def test_int8_products(rows):
    w, x = weights(200), torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes, scales = quantize_int8(w)
    expected = x.double() @ dequantize_int8(codes, scales.double()).T
    for kernel_rows in (0, ALWAYS):
        ours = linear_int8(x, codes, scales, Backend(False, kernel_rows))
        assert ours.dtype == torch.bfloat16 and ours.shape == expected.shape
        assert rows == 0 or error(ours, expected) < 2 * BFLOAT16


@pytest.mark.parametrize("compiled", [False, True])
def test_the_crossover_is_measured(compiled):
    for backend in (linear.backend_int4(compiled), linear.backend_int8(compiled)):
        assert backend.rows in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
        assert str(backend).startswith(
            "unpacked" if not backend.rows else "compiled" if backend.compiled else "PyTorch"
        )
