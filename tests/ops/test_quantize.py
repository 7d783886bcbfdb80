"""Codes, layouts and products of quantized weights against plain arithmetic."""

import pytest
import torch
from cases import tiny

from hf_accel_patch import patch
from hf_accel_patch.ops import linear, packing, quantize
from hf_accel_patch.ops.gptq import quantize_gptq
from hf_accel_patch.ops.linear import ALWAYS, Backend, linear_int4, linear_int8
from hf_accel_patch.ops.packing import pack_codes, pack_int4, pack_table, rows_int4, unpack_codes, unpack_int4
from hf_accel_patch.ops.quantize import (
    TABLES,
    dequantize_int4,
    dequantize_int8,
    dequantize_table,
    quantize_int4,
    quantize_int8,
    quantize_table,
)

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


@pytest.mark.parametrize("scheme", sorted(TABLES))
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_codes_of_a_table_are_the_nearest(scheme, group_size):
    w, table = weights(), TABLES[scheme]
    w[3, :group_size] = 0
    codes, absmax = quantize_table(w, group_size, table)
    assert torch.equal(absmax, w.view(100, -1, group_size).abs().amax(-1))
    errors = (w.view(100, -1, group_size, 1) - table * absmax[..., None, None]).abs()
    ours = (dequantize_table(codes, absmax, table) - w).abs()
    assert torch.allclose(ours, errors.amin(-1).view_as(w), atol=1e-9)


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    w = weights()
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    codes, absmax = quantize_table(w, 64, TABLES["nf4"])
    assert torch.equal(dequantize_table(codes, absmax, TABLES["nf4"]), theirs)


@pytest.mark.parametrize("scheme", ["int4", *sorted(TABLES)])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("N", [64, 100, 7])
def test_packing_is_undone_by_unpacking(block, N, scheme):
    w, table = weights(N), TABLES.get(scheme)
    if table is None:
        packed, scales = pack_int4(w, 64, block)
        codes, *rest = quantize_int4(w, 64)
        expected = dequantize_int4(codes, *rest)
    else:
        packed, scales = pack_table(w, 64, block, scheme)
        codes, absmax = quantize_table(w, 64, table)
        expected = dequantize_table(codes, absmax, table)
    restored = unpack_int4(packed, scales, table, 0, len(packed)).transpose(1, 2).reshape(-1, 128)[:N]
    assert packed.shape == (-(-N // block), 128, block // 2)
    assert torch.equal(unpack_codes(packed)[:N], codes) and torch.equal(pack_codes(unpack_codes(packed), block), packed)
    assert error(restored, expected) < BFLOAT16
    index = torch.tensor([0, N - 1, N // 2])
    assert error(rows_int4(packed, scales, table, index), expected[index]) < BFLOAT16


def inputs(rows=600, K=128):
    """Correlated, of unequal size, and one feature that is always zero."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 8, generator=generator) @ torch.randn(8, K, generator=generator)
    x = (x + torch.randn(rows, K, generator=generator)) * torch.rand(K, generator=generator).exp()
    x[:, 17] = 0
    return x


def slow_gptq(w, H, scale, zero, group_size):
    """The paper's procedure in float64, without blocks: quantize a column, then move the others to where the error of
    the product is least, given those fixed so far."""
    w, H = w.double().clone(), H.double().clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    order = H.diagonal().argsort(descending=True).tolist()
    diagonal += 0.01 * diagonal.mean()
    codes = torch.empty_like(w)
    for i, k in enumerate(order):
        s, z = scale[:, k // group_size].double(), zero[:, k // group_size].double()
        codes[:, k] = ((w[:, k] - z) / s + 8).round().clamp(0, 15)
        error = w[:, k] - ((codes[:, k] - 8) * s + z)
        left = order[i:]
        inverse = torch.linalg.inv(H[left][:, left])
        w[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_gptq(group_size):
    w, x = weights(24), inputs()
    H = x.T @ x
    codes, scale, zero = quantize_gptq(w, H, group_size)
    assert (codes == slow_gptq(w, H, scale, zero, group_size)).double().mean() > 0.99  # ties fall either way
    target = x.double() @ w.double().T
    ours, nearest = (
        error(x.double() @ dequantize_int4(*each).double().T, target)
        for each in ((codes, scale, zero), quantize_int4(w, group_size))
    )
    assert ours < 0.7 * nearest


def test_gptq_spans_blocks_of_columns(monkeypatch):
    w, x = weights(16), inputs()
    whole = quantize_gptq(w, x.T @ x, 64)
    monkeypatch.setattr("hf_accel_patch.ops.gptq.COLUMNS", 24)
    parts = quantize_gptq(w, x.T @ x, 64)
    assert (whole[0] == parts[0]).double().mean() > 0.99


def test_importance_moves_the_fit():
    w, importance = weights(), torch.ones(128)
    importance[:4] = 1000.0
    plain, weighted = (quantize_int4(w, 64, importance=each) for each in (None, importance))
    assert error(dequantize_int4(*weighted)[:, :4], w[:, :4]) < 0.75 * error(dequantize_int4(*plain)[:, :4], w[:, :4])
    alike = quantize_int4(w, 64, importance=torch.zeros(128))
    assert all(torch.equal(a, b) for a, b in zip(alike, plain, strict=True))


def test_blocks_of_rows_change_nothing(monkeypatch):
    w = weights(300)
    whole = pack_int4(w, 64, 64), quantize_int8(w)
    monkeypatch.setattr(quantize, "BLOCK_ELEMENTS", 64 * 128)
    parts = pack_int4(w, 64, 64), quantize_int8(w)
    assert all(torch.equal(a, b) for one, two in zip(whole, parts, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 3, 70])
def test_int4_products(rows):
    block = packing.int4_block()
    w, x = weights(200), torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed, scales = pack_int4(w, 64, block or 64)
    expected = x.double() @ dequantize_int4(*quantize_int4(w, 64)).double().T
    for kernel_rows in (0, ALWAYS) if block else (0,):
        ours = linear_int4(x, packed, scales, None, Backend(False, kernel_rows))[:, :200]
        assert ours.dtype == torch.bfloat16 and ours.shape == expected.shape
        assert rows == 0 or error(ours, expected) < 2 * BFLOAT16


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 70])
@pytest.mark.parametrize("scheme", sorted(TABLES))
def test_table_products(scheme, rows, compiled):
    block = packing.int4_block() or 64
    w, x = weights(200), torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed, scales = pack_table(w, 64, block, scheme)
    codes, absmax = quantize_table(w, 64, TABLES[scheme])
    expected = x.double() @ dequantize_table(codes, absmax, TABLES[scheme]).double().T
    for kernel_rows in (0, ALWAYS):
        ours = linear_int4(x, packed, scales, TABLES[scheme], Backend(compiled, kernel_rows))[:, :200]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [208, 200])
@pytest.mark.parametrize("outliers", [0, 3])
def test_activations_in_8_bits_but_for_outliers(outliers, N, dtype):
    """A large feature costs the others nothing. 200 is no multiple of 16: those weights are unpacked."""
    w, x = weights(N), torch.randn(70, 128, generator=torch.Generator().manual_seed(1))
    x[:, 5 : 5 + outliers] *= 100
    x = x.clamp(-6, 6) if not outliers else x
    codes, scales = quantize_int8(w)
    expected = x.to(dtype).double() @ dequantize_int8(codes, scales.double()).T
    ours = linear_int8(x.to(dtype), codes, scales, Backend(True, 0, decomposed=True))
    assert ours.dtype == dtype and error(ours, expected) < 0.012  # a step of 4 / 127 by sqrt(12)
    without = x.to(dtype)
    without[:, 5 : 5 + outliers] = 0
    small = linear_int8(without, codes, scales, Backend(True, 0, decomposed=True))
    assert error(small, without.double() @ dequantize_int8(codes, scales.double()).T) < 0.012


SCHEMES = ("int8", "int4", "nf4", "llm.int8")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_crossover_is_measured(scheme, compiled):
    backend = linear.backend_for(scheme, compiled)
    assert backend.rows in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
    if backend.rows:
        assert str(backend).startswith("compiled" if backend.compiled else "PyTorch")


def test_the_measurement_is_on_the_cpu_wherever_it_is_asked_for():
    packing.int4_block.cache_clear()
    with torch.device("meta"):
        block = packing.int4_block()
    packing.int4_block.cache_clear()
    assert block == packing.int4_block()


@pytest.mark.parametrize("scheme", ("int8", "int4", "nf4", "llm.int8"))
@pytest.mark.parametrize("rows", (1, 300))
def test_codes_on_another_device_are_not_read(scheme, rows):
    model = patch(tiny("llama"), quantize=scheme)
    model.lm_head.to("meta")
    with torch.no_grad(), pytest.raises(RuntimeError, match="on cpu and the quantized weight is on meta"):
        model.lm_head(torch.randn(rows, 64))
