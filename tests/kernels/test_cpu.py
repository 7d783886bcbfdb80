"""The compiled kernels against plain arithmetic in float64, in every layout that this processor can have."""

import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

from hf_accel_patch.kernels import cpu, cpu_prefill
from hf_accel_patch.ops.packing import pack_int4, pack_table
from hf_accel_patch.ops.quantize import (
    TABLES,
    dequantize_int4,
    dequantize_int8,
    dequantize_table,
    quantize_int4,
    quantize_int8,
    quantize_table,
)

ROUNDING = {torch.float32: 2**-13, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of activations and of results

STREAMED = 1 << 19  # weights, from more of which at a time on they are written past the caches


@pytest.fixture(params=[64, 32])
def block(request):
    if reason := cpu.why_not(request.param):
        assert " failed: " not in reason, reason  # there is a compiler, and it does not take the source
        pytest.skip(reason)
    return request.param


class Kernels(NamedTuple):
    library: Any
    block: int  # rows of int4 codes


@pytest.fixture(params=["few, 64", "few, 32", "many"])
def kernels(request):
    """Those for few rows of activations, in both layouts, and those for many, which do for few as well."""
    few, _, block = request.param.partition(", ")
    made, block = (cpu, int(block)) if few == "few" else (cpu_prefill, cpu_prefill.BLOCK)
    arguments = (block,) if made is cpu else ()
    if reason := made.why_not(*arguments):
        assert " failed: " not in reason, reason
        pytest.skip(reason)
    return Kernels(made.library(*arguments), block)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours, expected):
    """Elementwise, relative to the largest of the row."""
    bound = ROUNDING[ours.dtype] * expected.abs().amax(-1, keepdim=True)
    return bool(((ours.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 33])
@pytest.mark.parametrize("N, K, group_size", [(64, 64, 64), (200, 96, 32), (130, 384, 128), (300, 1024, 64)])
def test_int4(kernels, N, K, group_size, rows, dtype):
    w, x = normal(N, K), normal(rows, K, seed=1).to(dtype)
    packed, scales = pack_int4(w, group_size, kernels.block)
    ours = cpu.linear_int4(kernels.library, x, packed, scales, None)
    assert ours.dtype == dtype and ours.shape == (rows, len(packed) * kernels.block)
    codes, scale, zero = quantize_int4(w, group_size)
    assert close(ours[:, :N], x.double() @ dequantize_int4(codes, scale.double(), zero.double()).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 9, 49])
@pytest.mark.parametrize("scheme", sorted(TABLES))
@pytest.mark.parametrize("N, K, group_size", [(64, 64, 64), (200, 96, 32), (130, 384, 128)])
def test_tables(kernels, N, K, group_size, scheme, rows, dtype):
    w, x = normal(N, K), normal(rows, K, seed=1).to(dtype)
    packed, scales = pack_table(w, group_size, kernels.block, scheme)
    ours = cpu.linear_int4(kernels.library, x, packed, scales, TABLES[scheme])
    codes, absmax = quantize_table(w, group_size, TABLES[scheme])
    exact = dequantize_table(codes, absmax.double(), TABLES[scheme])
    step = absmax.double().amax() * group_size / 2**16  # the kernel rounds the 16 values to integers: 0.3 of it, random
    bound = ROUNDING[dtype] * (x.double() @ exact.T).abs().amax(-1, keepdim=True)
    bound = bound + 5 * 0.3 * step * x.double().norm(dim=-1)[:, None]
    assert ours.dtype == dtype and ours.shape == (rows, len(packed) * kernels.block)
    assert bool(((ours[:, :N].double() - x.double() @ exact.T).abs() <= bound).all())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_sums_of_a_table_do_not_overflow(kernels, group_size):
    """Weights and activations as large as they get, all of one sign."""
    w, x = torch.ones(64, 256), torch.full((1, 256), 1.9999)
    packed, scales = pack_table(w, group_size, kernels.block, "nf4")
    ours = cpu.linear_int4(kernels.library, x, packed, scales, TABLES["nf4"])
    assert torch.allclose(ours, torch.tensor(256 * 1.9999), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 9, 33])
@pytest.mark.parametrize("N, K", [(1, 1), (33, 100), (130, 384), (40, 240), (70, 4000)])
def test_int8(kernels, N, K, rows, dtype):
    w, x = normal(N, K), normal(rows, K, seed=1).to(dtype)
    codes, scales = quantize_int8(w)
    ours = cpu.linear_int8(kernels.library, x, codes, scales)
    assert ours.dtype == dtype and ours.shape == (rows, N)
    assert close(ours, x.double() @ dequantize_int8(codes, scales.double()).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 33, 70])
@pytest.mark.parametrize("N, K", [(1, 1), (33, 127), (130, 384), (70, 4000)])
def test_float(kernels, N, K, rows, dtype):
    w, x = normal(N, K).to(dtype), normal(rows, K, seed=1).to(dtype)
    bias = normal(N, seed=2).to(dtype) if N > 1 else None
    ours = cpu.linear_float(kernels.library, x, w, bias)
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    assert ours.dtype == dtype and ours.shape == (rows, N)
    rounding = torch.finfo(dtype).eps * exact.abs()
    assert bool(((ours.double() - exact).abs() <= rounding + 1e-6 * (x.double().abs() @ w.double().abs().T)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N, K", [(37, 127), (6, 20), (96, 256)])
def test_a_row_gives_the_same_bits_among_others(kernels, N, K, dtype):
    w, x = normal(N, K).to(dtype), normal(70, K, seed=1).to(dtype)
    library, bias = kernels.library, normal(N, seed=2).to(dtype)
    alone = torch.cat([cpu.linear_float(library, x[row : row + 1], w, bias) for row in range(len(x))])
    for rows in (*range(2, 14), 64, 65, 70):
        assert torch.equal(cpu.linear_float(library, x[:rows], w, bias), alone[:rows])


def test_bfloat16_activations_are_held_exactly(kernels):
    """Integer weights and activations of few bits: every product and sum is exact."""
    x = torch.tensor([1.0, -96.0, 3.0, 0.0, 127.0, -2.5, 64.0, 1.5] * 16).bfloat16()[None]
    codes = torch.arange(-64, 64, dtype=torch.int8).repeat(4, 1)
    ours = cpu.linear_int8(kernels.library, x.float(), codes, torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(ours, x.float() @ codes.float().T)


@pytest.mark.parametrize("large", [1e30, 1e-30, 1e-38, 1e4])
def test_a_large_activation_costs_only_its_own_group(kernels, large):
    """Others keep their precision, as they would not with one scale for all features."""
    x = normal(1, 256)
    x[0, :128] *= large
    w = normal(64, 256, seed=1)
    w[:, :128] = 0
    codes, scales = quantize_int8(w)
    ours = cpu.linear_int8(kernels.library, x, codes, scales)
    assert close(ours, x.double() @ dequantize_int8(codes, scales.double()).T)
    packed, scales = pack_int4(w, 64, kernels.block)
    codes, scale, zero = quantize_int4(w, 64)
    ours = cpu.linear_int4(kernels.library, x, packed, scales, None)[:, :64]
    exact = x.double() @ dequantize_int4(codes, scale.double(), zero.double()).T
    bound = 2**-12 * (x.double().abs() @ dequantize_int4(codes, scale.double(), zero.double()).abs().T)
    assert bool(((ours - exact).abs() <= bound).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(kernels, value):
    x = normal(3, 128).bfloat16()
    x[1, 70] = value
    packed, scales = pack_int4(normal(64, 128), 64, kernels.block)
    codes, row_scales = quantize_int8(normal(64, 128))
    library = kernels.library
    for ours in (cpu.linear_int4(library, x, packed, scales, None), cpu.linear_int8(library, x, codes, row_scales)):
        assert not ours[1].isfinite().any() and ours[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scheme", ["int4", *sorted(TABLES)])
@pytest.mark.parametrize("group_size, N", [(32, 300), (64, 300), (128, 300), (64, STREAMED // 384 + 70)])
def test_unpacking_rounds_to_bfloat16_once(block, group_size, N, scheme):
    w, table = normal(N, 384), TABLES.get(scheme)
    if table is None:
        packed, scales = pack_int4(w, group_size, block)
        codes, scale, zero = quantize_int4(w, group_size)
        exact = dequantize_int4(codes, scale.double(), zero.double())
    else:
        packed, scales = pack_table(w, group_size, block, scheme)
        codes, absmax = quantize_table(w, group_size, table)
        exact = dequantize_table(codes, absmax.double(), table)
    expected = exact.float().bfloat16()
    for start, stop in ((0, len(packed)), (1, 3)):
        ours = cpu.unpack_int4(cpu.library(block), packed, scales, table, start, stop)
        first, last = start * block, min(stop * block, N)
        assert torch.equal(ours[:, : last - first].T, expected[first:last])


@pytest.mark.parametrize("columns", [5, STREAMED // 256 + 3])
def test_unpacking_int8_is_exact(block, columns):
    codes = torch.arange(-128, 128).to(torch.int8)[:, None].repeat(1, columns)
    assert torch.equal(cpu.unpack_int8(cpu.library(block), codes), codes.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_in_8_bits(block, dtype):
    x, skip = normal(5, 700).to(dtype), torch.zeros(700, dtype=torch.bool)
    x[2, 3], x[4] = 1e3, 0
    skip[3] = True
    q, scales = cpu.narrow_rows(cpu.library(block), x, skip)
    kept = x.float().masked_fill(skip, 0)
    assert torch.allclose(scales, kept.abs().amax(1) / 127) and not q[:, 3].any()
    assert bool(((q * scales[:, None] - kept).abs() <= 0.501 * scales[:, None]).all())
    products, out = torch.randint(-(2**14), 2**14, (5, 48), dtype=torch.int32), torch.empty(5, 64, dtype=dtype)
    columns = normal(48, seed=3).bfloat16()
    cpu.scale_products(cpu.library(block), products, scales, columns, out[:, :48])
    exact = products.double() * scales.double()[:, None] * columns.double()
    assert torch.allclose(out[:, :48].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_threads_change_nothing(kernels):
    packed, scales = pack_int4(normal(512, 256), 64, kernels.block)
    x, threads, results = normal(5, 256), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cpu.linear_int4(kernels.library, x, packed, scales, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.fixture
def many():
    """The kernels for many rows."""
    if reason := cpu_prefill.why_not():
        assert " failed: " not in reason, reason
        pytest.skip(reason)
    return cpu_prefill.library()


@pytest.mark.parametrize("rows", [191, 192, 193, 385, 768, 769])
def test_blocks_of_many_rows(many, rows):
    """To every number of panels that a block of rows or what is laid out at once can have, and one beside it."""
    w, x = normal(150, 300).bfloat16(), normal(rows, 300, seed=1).bfloat16()
    assert close(cpu.linear_float(many, x, w, None), x.double() @ w.double().T)
    codes, scales = quantize_int8(w.float())
    assert close(cpu.linear_int8(many, x, codes, scales), x.double() @ dequantize_int8(codes, scales.double()).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 12, 70])
@pytest.mark.parametrize("N, K", [(1, 1), (33, 127), (16, 600), (128, 256)])
def test_weights_that_lie_the_other_way(many, N, K, rows, dtype):
    w, x, bias = normal(N, K).to(dtype), normal(rows, K, seed=1).to(dtype), normal(N, seed=2).to(dtype)
    ours = cpu.linear_float(many, x, w.T.contiguous().T, bias)
    assert torch.equal(ours, cpu.linear_float(many, x, w, bias))


@pytest.mark.parametrize("scheme", ["int4", *sorted(TABLES)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_gives_the_same_bits_for_few_and_many(many, group_size, scheme):
    if reason := cpu.why_not(cpu_prefill.BLOCK):
        pytest.skip(reason)
    w, x = normal(200, 384), normal(20, 384, seed=1).bfloat16()
    table = TABLES.get(scheme)
    packed, scales = pack_int4(w, group_size, 32) if table is None else pack_table(w, group_size, 32, scheme)
    assert cpu_prefill.takes_int4(packed, scales)
    few = cpu.linear_int4(cpu.library(32), x, packed, scales, table)
    assert torch.equal(cpu.linear_int4(many, x, packed, scales, table), few)


def test_no_rows(many):
    assert cpu.linear_float(many, normal(0, 32), normal(48, 32), None).shape == (0, 48)


def run(code, **environment):
    """What a fresh process prints."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert not process.returncode, process.stderr
    return process.stdout


REPORT = """
from hf_accel_patch.kernels import cpu, cpu_prefill
from hf_accel_patch.ops.linear import backend_for
from hf_accel_patch.ops.packing import int4_block
block = int4_block()
print(cpu.library(block) is not None, backend_for("int4", True).compiled, cpu.why_not(block))
"""


def test_without_a_compiler_the_kernels_of_pytorch_remain(tmp_path):
    assert run(REPORT, CC="/no/such/compiler", XDG_CACHE_HOME=str(tmp_path)).startswith("False False /no/such/comp")


def test_a_compiler_that_fails_says_so(tmp_path):
    output = run(REPORT, CC="/bin/false", XDG_CACHE_HOME=str(tmp_path))
    assert output.startswith("False False /bin/false failed")


def test_the_library_is_made_once_and_kept(tmp_path, block):
    output = run(REPORT, XDG_CACHE_HOME=str(tmp_path))
    made = list((tmp_path / "hf_accel_patch").iterdir())
    if output.startswith("False"):
        pytest.skip(output)
    stamps = {path: path.stat().st_mtime_ns for path in made if path.suffix == ".so"}
    assert len(stamps) == 3, "with and without prefetching, of which the faster one is used, and for many rows"
    run(REPORT, XDG_CACHE_HOME=str(tmp_path))
    assert stamps == {path: path.stat().st_mtime_ns for path in made if path.suffix == ".so"}
    assert (tmp_path / "hf_accel_patch").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("faster", [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1]], ids=str)
def test_what_reads_faster_is_taken(faster, block, monkeypatch):
    asked = []

    def answer(plain, other, rows):
        assert rows == block
        asked.extend([getattr(kernels, name) for name in cpu.FETCHING] for kernels in (other, plain))
        return faster

    monkeypatch.setattr(cpu, "_read_faster", answer)
    monkeypatch.setattr(cpu, "remembered", lambda question, measure: measure())
    kernels, reason = cpu._load.__wrapped__(block)
    if kernels is None:
        pytest.skip(reason)
    for place, name in enumerate(cpu.FETCHING):
        assert getattr(kernels, name) is asked[faster[place]][place]


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 13])
@pytest.mark.parametrize("N, K", [(33, 100), (130, 384), (70, 4000)])
def test_what_is_fetched_changes_no_bits(N, K, rows, block, monkeypatch):
    def products(faster):
        monkeypatch.setattr(cpu, "remembered", lambda question, measure: [faster] * len(cpu.FETCHING))
        kernels, reason = cpu._load.__wrapped__(block)
        if kernels is None:
            pytest.skip(reason)
        made = [cpu.linear_float(kernels, x.to(dtype), w.to(dtype), None) for dtype in ROUNDING]
        made.append(cpu.linear_int8(kernels, x, *quantize_int8(w)))
        if K % 32 == 0:
            made.append(cpu.linear_int4(kernels, x, *pack_int4(w, 32, block), None))
        return made

    w, x = normal(N, K), normal(rows, K, seed=1)
    assert all(map(torch.equal, products(0), products(1)))


def test_the_measurement_of_what_reads_faster(block, monkeypatch):
    monkeypatch.setattr(cpu, "SPAN", 1 << 20)
    answer = cpu._read_faster(cpu.library(block), cpu.library(block), block)
    assert len(answer) == len(cpu.FETCHING) and set(answer) <= {0, 1}


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path, block):
    folder = tmp_path / "hf_accel_patch"
    folder.mkdir()
    folder.chmod(0o777)
    run(REPORT, XDG_CACHE_HOME=str(tmp_path))
    assert not list(folder.iterdir())
