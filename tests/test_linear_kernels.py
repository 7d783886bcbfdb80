"""benchmarks.linear_kernels: the products that are timed are those of the layout, and all of a step are there."""

import argparse
import json
import sys

import pytest
import torch

from benchmarks import linear_kernels
from benchmarks.gpu_table import gpu_markdown
from benchmarks.table import tables
from hf_accel_patch.ops.packing import unpack_codes
from hf_accel_patch.ops.quantize import TABLES

LAYER = [[(256, 256), (128, 256), (128, 256)], [(256, 256)], [(512, 256), (512, 256)], [(256, 512)]]
TINY = [[(1024, 256)], *LAYER, *LAYER]
SHAPES = [shape for some in TINY for shape in some]


def dense(system, held):
    """What the random codes and scales stand for, [N', K] in float64."""
    codes, scales = held[0], held[-1].double()
    if system == "bf16":
        return codes.double()
    if system == "int8":
        return codes[0].double() * scales[:, None]
    q = unpack_codes(codes)
    scale, zero = scales.unbind(-1) if system == "int4" else (scales, None)
    scale = scale.T.repeat_interleave(linear_kernels.GROUP, 1)
    if zero is None:
        return TABLES["nf4"].double()[q.long()] * scale
    return (q.double() - 8) * scale + zero.T.repeat_interleave(linear_kernels.GROUP, 1)


@pytest.mark.parametrize("system", ["bf16", "int8", "int4", "nf4"])
def test_random_codes_are_multiplied(system):
    call, held = linear_kernels.SYSTEMS[system](256, 128, "cpu")
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    right = x.double() @ dense(system, held).T
    assert call(x).shape == (3, 256) and call(x).dtype is torch.bfloat16
    assert (call(x).double() - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_products_together_are_those_of_each(scheme):
    products = linear_kernels.Products()
    products.add(f"{scheme}-together", [(128, 128), (64, 128)], "cpu")
    alone = linear_kernels.SYSTEMS[scheme](64, 128, "cpu")
    assert (products.count, products.features, len(products.calls)) == (2, [128], 1)
    x = torch.randn(3, 128).bfloat16()
    assert products.run({128: x}).shape == alone[0](x).shape
    assert products.weight_bytes == 3 * sum(each.nbytes for each in alone[1])


def test_a_step_has_every_linear_layer():
    assert linear_kernels.layers("tiny", None) == TINY
    large = linear_kernels.layers("llama-3.1-8b", None)
    assert sum(map(len, large)) == 7 * 32 + 1 and [(128256, 4096)] in large


def test_a_run_adds_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(linear_kernels, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("benchmarks.attention_kernels.LEAST_SECONDS", 1e-3)
    sizes = ["--shape", "tiny", "--single", "512", "256", "--rotate", "3e5", "--rows", "1", "3", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["linear_kernels", *sizes, "--out", str(out)])
    linear_kernels.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["shape"], row["rows"]) for row in rows[::9]] == [("512 x 256", 1), ("tiny", 1), ("tiny", 3)]
    assert [row["system"] for row in rows] == list(linear_kernels.NAMES) * 3
    found = {row["system"]: row for row in rows[9:18]}
    assert found["tinygemm-int4"]["reason"] == "the kernel is for CUDA"
    assert found["int4-together"]["reason"].startswith("on a CPU")
    weights = sum(N * K for N, K in SHAPES)
    assert found["bf16"]["weight_bytes"] == 2 * weights and found["bf16"]["products"] == len(SHAPES)
    assert found["int8"]["weight_bytes"] == weights + 2 * sum(N for N, _ in SHAPES)
    assert found["int4"]["weight_bytes"] == found["nf4"]["weight_bytes"] == weights // 2 + 4 * weights // 64
    assert all(len(found[name]["ms"]) == 2 for name in ("bf16", "int8", "int4", "nf4"))
    assert rows[0]["products"] == 2 and rows[1]["products"] == 3, "copies of 262144 and of 132096 bytes"
    assert "| 3 | **int8** |" in capsys.readouterr().out


def test_what_cannot_be_made_is_a_row_with_its_reason():
    options = argparse.Namespace(systems=["bf16", "int4"], device="cpu", rounds=1)
    made, reasons = linear_kernels.held([[(64, 96)]], options)
    assert list(made) == ["bf16"]
    assert reasons == {"int4": "ValueError: 96 input features are not whole groups of 64"}


MACHINE = {"hardware": {"gpu": "a GPU"}, "commit": "abc", "device": "cuda", "threads": 1}
MACHINE |= {"versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "part": "linear-kernels", "layers": None}


def row(system, ms, size, run="2026-02", **more):
    common = {"shape": "a-shape", "copies": False, "rows": 1, "products": 9, "bandwidth_bytes_per_s": 4e12}
    return MACHINE | common | {"system": system, "ms": ms, "weight_bytes": size, "run": run} | more


def test_the_table():
    rows = [
        row("int4", [9.0], 4e9, run="2026-01"),
        row("bf16", [8.0, 8.0, 4.0], 16e9),
        row("int4", [2.0, 2.0, 2.0], 4e9),
        row("bf16", [8.0], 16e9, rows=2),
        row("int4", [10.0], 1e9, copies=True, shape="4 x 8", products=100),
        row("bf16", [4.0], 1e9, copies=True, shape="4 x 8", products=10),
        MACHINE | {"run": "2026-02", "shape": "a-shape", "system": "tinygemm-int4", "rows": 1, "reason": "none"},
    ]
    made = tables(rows)["gpu-table"]
    assert made == gpu_markdown(rows)
    assert "**a-shape**, all linear layers of a step; bfloat16; a GPU, replayed as one CUDA graph" in made
    assert "| 1 | **int4, groups of 64** | 2.000 | 4.00 | 4.000 | 2000 | 50% |" in made and "9.000" not in made
    assert "| 2 | bf16 | 8.000 | 1.00 | 16.000 | 2000 | 50% |" in made and "PyTorch" not in made
    assert "| 1 | **int4, groups of 64** | 0.1000 | 4.00 | 0.010 | 100 | 2% |" in made, "each product, not its copies"
    assert gpu_markdown([]) == ""
