"""The Triton kernels against plain arithmetic in float64: on the GPU, or interpreted where there is none."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, interpreted, load

from hf_accel_patch.ops import linear, packing, together

kernels = load("triton_linear")
triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 5, 16, 17, 40)
DENSE = kernels.MATMUL_ROWS + 2
SHAPES = (  # outputs, input features, G: odd numbers of pairs and groups too, and fewer groups than parts of K
    (34, 96, 32),
    (98, 192, 64),
    (32, 384, 128),
    (2, 160, 32),
    (190, 64, 64),
    (64, 640, 64),
)
SHAPES8 = ((1, 1), (33, 100), (21, 384), (5, 1030))  # outputs, input features

# Of the sum of |x| |w|. float32 is summed with codes that are up to 24 too large for codes of 8; in 16 bits up to 136,
# and tensor cores cut off a bit or two that float32 would keep. A code off by one would be 2^-13 or more.
SUMS = {torch.float32: 2**-20, torch.bfloat16: 2**-15, torch.float16: 2**-15}


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with interpreted():
        yield


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def packed(codes):
    """Codes [N, K] in the layout of the kernels."""
    return (codes[::2] | codes[1::2] << 4)[..., None].to(DEVICE, torch.uint8)


class Int4:
    def __init__(self, N, K, G):
        codes = torch.randint(0, 16, (N, K), generator=generator(1))
        scales = torch.stack((normal(K // G, N, seed=2).abs() + 0.1, normal(K // G, N, seed=3)), -1).bfloat16()
        scale, zero = (each.T[..., None] for each in scales.double().unbind(-1))
        self.weight = ((codes.view(N, -1, G) - 8) * scale + zero).view(N, K)
        self.packed = packed(codes), scales.to(DEVICE)

    def rounded(self, rows, dtype):
        return rows > (kernels.EXACT_ROWS if dtype is torch.float32 else kernels.MATMUL_ROWS)

    def linear(self, x):
        return kernels.linear_int4(x, *self.packed)

    def dequantize(self, dtype):
        return kernels.dequantize_int4(*self.packed, dtype)


class Table:
    def __init__(self, N, K, G):
        codes = torch.randint(0, 16, (N, K), generator=generator(1))
        absmax, table = normal(K // G, N, seed=2).abs() + 0.1, normal(16, seed=3)
        self.weight = (table.double()[codes].view(N, -1, G) * absmax.double().T[..., None]).view(N, K)
        self.packed = packed(codes), absmax.to(DEVICE), kernels.Table.of(table, DEVICE)

    def rounded(self, rows, dtype):
        return dtype is not torch.float32 or rows > kernels.EXACT_ROWS

    def linear(self, x):
        return kernels.linear_table(x, *self.packed)

    def dequantize(self, dtype):
        return kernels.dequantize_table(*self.packed, dtype)


class Int8:
    def __init__(self, N, K):
        codes = torch.randint(-128, 128, (N, K), generator=generator(1), dtype=torch.int8)
        scales = (normal(N, seed=2).abs() + 0.1).bfloat16()
        self.weight = codes.double() * scales.double()[:, None]
        self.packed = codes.to(DEVICE), scales.to(DEVICE)

    def rounded(self, rows, dtype):
        return rows > (kernels.EXACT_ROWS if dtype is torch.float32 else kernels.MATMUL_ROWS)

    def linear(self, x):
        return kernels.linear_int8(x, *self.packed)

    def dequantize(self, dtype):
        return kernels.dequantize_int8(*self.packed, dtype)


def check(weights, x, ours=None):
    """One rounding of the result, and of the weights where they are rounded, beside the error of the sums."""
    ours = weights.linear(x) if ours is None else ours
    x, dtype, w = x.double().cpu(), x.dtype, weights.weight
    assert ours.dtype == dtype and ours.shape == (len(x), len(w))
    exact, eps = x @ w.T, torch.finfo(dtype).eps
    relative = SUMS[dtype] + (eps if weights.rounded(len(x), dtype) else 0)
    excess = (ours.double().cpu() - exact).abs() - eps * exact.abs() - relative * (x.abs() @ w.abs().T)
    assert excess.max() <= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [Int4, Table])
def test_half_bytes(kind, shape, dtype):
    weights = kind(*shape)
    for rows in ROWS:
        check(weights, normal(rows, shape[1], seed=rows).to(DEVICE, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES8, ids=str)
def test_int8(shape, dtype):
    weights = Int8(*shape)
    for rows in ROWS:
        check(weights, normal(rows, shape[1], seed=rows).to(DEVICE, dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("outputs", [(34, 98), (64, 2, 70), (70, 30, 16)], ids=str)
@pytest.mark.parametrize("kind, K", [(Int4, (192, 64)), (Table, (96, 32)), (Int8, (100,)), (Int8, (384,))])
def test_weights_together(kind, K, outputs, dtype):
    """Queries, keys and values, say: each product as alone."""
    weights = [kind(N, *K) for N in outputs]
    table = weights[0].packed[2] if kind is Table else None
    for rows in (1, 3, 16, 17):
        x = normal(rows, K[0], seed=rows).to(DEVICE, dtype)
        for each, ours in zip(weights, kernels.linear_together(x, [w.packed[:2] for w in weights], table), strict=True):
            check(each, x, ours)


def test_what_is_better_apart():
    """Numbers that tensor cores would round, many rows, and few outputs for which programs share K."""
    weights = [Int4(*SHAPES[0]).packed] * 2
    assert kernels.linear_together(normal(1, 96).to(DEVICE), weights, None) is None
    assert kernels.linear_together(normal(DENSE, 96).to(DEVICE, torch.bfloat16), weights, None) is None
    weights = [Int4(32, 8224, 32).packed] * 2
    assert kernels.linear_together(normal(8, 8224).to(DEVICE, torch.bfloat16), weights, None) is None
    weights = [Int8(16, 16512).packed] * 2
    assert kernels.linear_together(normal(8, 16512).to(DEVICE, torch.bfloat16), weights, None) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, shape", [(Int4, SHAPES[1]), (Table, SHAPES[1]), (Int8, (130, 64))])
def test_many_rows_multiply_dequantized_weights(monkeypatch, kind, shape, dtype):
    monkeypatch.setattr(kernels, "DENSE_WEIGHTS", shape[1] * 64)  # in several pieces
    check(kind(*shape), normal(DENSE, shape[1]).to(DEVICE, dtype))


@pytest.mark.parametrize("kind, shape", [(Int4, SHAPES[1]), (Table, SHAPES[1]), (Int8, (130, 64))])
def test_older_gpus_multiply_dequantized_weights(monkeypatch, kind, shape):
    asked, weights = [], kind(*shape)
    monkeypatch.setattr(kernels, "_tensor_cores", lambda device: bool(asked.append(device)))
    for name in ("_product4", "_product8"):
        monkeypatch.delattr(kernels, name)
    monkeypatch.setattr(weights, "rounded", lambda rows, dtype: True)
    check(weights, normal(5, shape[1]).to(DEVICE, torch.float16))
    assert asked


@pytest.mark.parametrize("kind, shape", [(Int4, (34, 1056, 32)), (Table, (34, 1056, 32)), (Int8, (70, 4200))])
@pytest.mark.parametrize("rows", [9, 40, 100])
def test_k_is_split_between_programs(monkeypatch, kind, shape, rows):
    made, choose = [], kernels.splits
    monkeypatch.setattr(kernels, "splits", lambda *sizes: made.append(choose(*sizes)) or made[-1])
    check(kind(*shape), normal(rows, shape[1]).to(DEVICE, torch.bfloat16))
    assert made[0] > 1


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("N", [16, 8192, 65536])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_every_tile(monkeypatch, N, rows, dtype):
    """What is chosen for this many outputs, on fewer."""
    tiles = kernels.tile4, kernels.tile8
    monkeypatch.setattr(kernels, "tile4", lambda M, _, group: tiles[0](M, N, group))
    monkeypatch.setattr(kernels, "tile8", lambda M, _: tiles[1](M, N))
    check(Int4(38, 832, 64), normal(rows, 832, seed=rows).to(DEVICE, dtype))
    check(Int8(37, 900), normal(rows, 900, seed=rows).to(DEVICE, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind, shape", [*((kind, shape) for kind in (Int4, Table) for shape in SHAPES), (Int8, (33, 100))]
)
def test_dequantizing(kind, shape, dtype):
    weights = kind(*shape)
    ours, exact = weights.dequantize(dtype), weights.weight
    assert ours.dtype == dtype
    bound = torch.finfo(dtype).eps * exact.abs() + SUMS[torch.float32] * exact.abs().max()  # the interpreter cuts off
    assert bool(((ours.double().cpu() - exact).abs() <= bound).all())


@pytest.mark.parametrize("kind, shape", [(Int4, SHAPES[1]), (Table, SHAPES[1]), (Int8, SHAPES8[1])])
@pytest.mark.parametrize("rows", [1, 5, DENSE])
def test_strides_and_repetition_change_nothing(kind, shape, rows):
    weights, x = kind(*shape), normal(rows, shape[1]).to(DEVICE, torch.bfloat16)
    first = weights.linear(x)
    assert torch.equal(first, weights.linear(x))
    assert torch.equal(first, weights.linear(x.T.contiguous().T))
    assert torch.equal(first, weights.linear(torch.stack((x, -x), -1)[..., 0]))


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_every_code_is_its_own(rows):
    """A one-hot x reads the weights themselves: a code in the wrong place or half shows."""
    for weights in (
        Int4(64, 64, 32),
        Int4(64, 64, 64),
        Table(64, 64, 32),
        Table(64, 64, 64),
        Int8(64, 64),
    ):
        expected = weights.weight.T[-rows:]
        ours = weights.linear(torch.eye(64, dtype=torch.bfloat16)[-rows:].to(DEVICE)).double().cpu()
        assert torch.allclose(ours, expected, rtol=2**-6, atol=2**-10)


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, which interprets
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind, shape", [(Int4, SHAPES[0]), (Table, SHAPES[0]), (Int8, SHAPES8[1])])
def test_what_is_not_finite_shows_in_its_row_alone(kind, shape, value):
    x = normal(5, shape[1])
    x[1, 7] = value
    for dtype in DTYPES:
        ours = kind(*shape).linear(x.to(DEVICE, dtype))
        assert not ours[1].isfinite().any() and ours[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize(
    "tiles, steps, M, expected", [(16, 64, 1, 4), (256, 56, 8, 2), (512, 64, 1, 1), (64, 28, 16, 3), (1, 999, 64, 8)]
)
def test_splits(tiles, steps, M, expected):
    assert kernels.splits(tiles, steps, M) == expected


@pytest.mark.parametrize("N", [1024, 4096, 14336, 128256])
def test_tiles_fit(N):
    """Tensor cores want 16 rows and 8 columns at least; what is loaded ahead fits into any GPU's shared memory."""
    for M in range(1, 129):
        for tile in (kernels.tile4(M, N, 64), kernels.tile4(M, N, 128), kernels.tile8(M, N)):
            assert tile.rows * tile.parts <= tile.columns and tile.rows >= min(M, 64)
            assert tile.outputs * tile.parts % 16 == 0 and tile.columns % 8 == 0
            step = tile.step * (tile.outputs * tile.parts + 2 * tile.columns)
            assert tile.stages * tile.unroll * step <= 99 << 10


def test_scales_that_begin_anywhere():
    weights, x = Int4(34, 96, 32), normal(2, 96).to(DEVICE, torch.bfloat16)
    codes, scales = weights.packed
    apart = torch.cat((scales.new_zeros(2), scales.flatten()))[2:].view(scales.shape)  # four bytes on
    assert torch.equal(kernels.linear_int4(x, codes, apart), weights.linear(x))


def test_what_the_kernels_cannot_read():
    weights = Int4(*SHAPES[0])
    with pytest.raises(RuntimeError, match="codes lie in blocks of 32 rows; the kernels take those of 2"):
        kernels.linear_int4(torch.ones(1, 96, device=DEVICE), weights.packed[0].expand(-1, -1, 16), weights.packed[1])
    with pytest.raises(
        TypeError, match=r"activations are torch.float64; the kernels take float32, bfloat16 or float16"
    ):
        weights.linear(torch.ones(1, 96, dtype=torch.float64, device=DEVICE))
    for shape in ((1, 64), (1, 1, 96)):
        with pytest.raises(RuntimeError, match="meet weights with 96 features"):
            weights.linear(torch.ones(shape, device=DEVICE))
    assert weights.linear(torch.ones(0, 96, device=DEVICE)).shape == (0, 34)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("kind, shape", [(Int4, (32, 8224, 32)), (Table, SHAPES[1]), (Int8, SHAPES8[2])])
@pytest.mark.parametrize("rows", [1, 5])
def test_cuda_graphs_record_it(kind, shape, rows):
    weights, x = kind(*shape), normal(rows, shape[1]).to(DEVICE, torch.bfloat16)
    expected = weights.linear(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = weights.linear(x)
    graph.replay()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("rows", ((1,), (2, 3), (140,)), ids=str)
@pytest.mark.parametrize("block", (2, 32))
@pytest.mark.parametrize("scheme", ("int8", "llm.int8", "int4", "nf4", "fp4"))
def test_modules_reach_them(scheme, block, rows):
    """Codes and scales as a module holds them, or as one on a CPU does."""
    w, x = normal(96, 128, seed=5), normal(*rows, 128, seed=6).bfloat16()
    codes, bits = packing.pack(w, scheme, 64, block)
    scales = bits.view(torch.float32 if bits.dtype == torch.int32 else torch.bfloat16)
    expected = linear.linear(x.float(), codes, scales, scheme, linear.Backend(False, 0))
    ours = linear.linear_triton(x.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE), scheme).cpu()
    assert ours.shape == expected.shape and ours.dtype == torch.bfloat16
    assert (ours.float() - expected.float()).norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("scheme", ("int8", "int4", "nf4"))
def test_modules_reach_them_together(scheme):
    x = normal(2, 3, 128, seed=6).bfloat16()
    packs = [packing.pack(normal(N, 128, seed=N), scheme, 64, 32) for N in (96, 32, 64)]
    codes = [codes for codes, _ in packs]
    scales = [bits.view(torch.float32 if bits.dtype == torch.int32 else torch.bfloat16) for _, bits in packs]
    rest = scheme, False, 0, False
    expected = together.linear_together(x.float(), codes, scales, *rest)
    on_device = [each.to(DEVICE) for each in codes], [each.to(DEVICE) for each in scales]
    ours = together.together_triton(x.to(DEVICE), *on_device, scheme)
    for y, truth in zip(ours, expected, strict=True):
        assert y.shape == truth.shape == (2, 3, truth.shape[-1]) and y.dtype == torch.bfloat16
        assert (y.cpu().float() - truth).norm() < 0.02 * truth.norm()


COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from hf_accel_patch.kernels import triton_linear as kernels
from hf_accel_patch.ops.quantize import TABLES

def compile(function, capability, warps, sizes, **types):
    three = {f"{name}_{i}": each for name, each in types.items() for i in range(3) if f"{name}_0" in function.arg_names}
    types = {name: each for name, each in types.items() if f"{name}_0" not in three} | three
    unspecialized = {each.name for each in function.params if each.do_not_specialize}
    assert "M" in unspecialized and not {"N", "K"} & unspecialized  # nothing is compiled anew for another prompt
    types = {name: "*" + each for name, each in types.items()}
    signature = {name: "constexpr" if name in sizes else types.get(name, "i32") for name in function.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name] != "constexpr" and (name in types or name in "NK")
    }
    source = triton.compiler.ASTSource(function, signature, sizes, attributes)
    binary = triton.compile(source, GPUTarget("cuda", capability, 32), dict(num_warps=warps))
    assert binary.metadata.shared <= 99 << 10, binary.metadata.shared
    assert binary.asm["ptx"].count("ld.local") == 0
    return binary.asm["ptx"]

def product(kind, M, capability, dtype):
    t = kernels.tile8(M, 4096) if kind == "int8" else kernels.tile4(M, 4096, 64)
    sizes = dict(ROWS=t.rows, COLUMNS=t.columns, S=t.parts, STAGES=t.stages, FAST=True)
    types = dict(x=dtype, codes="i8" if kind == "int8" else "u8", scales="bf16" if kind == "int8" else "i64", out=dtype)
    if kind == "int8":
        sizes |= dict(OUTPUTS=t.outputs, STEP=t.step)
    else:
        sizes |= dict(PAIRS=t.outputs, G=64, UNROLL=t.unroll)
        table = kernels.Table.of(TABLES["nf4"], "cpu")
        found = dict(LOOKUP=table.bfloat16 if dtype == "bf16" else table.float16)
        sizes |= found if kind == "table" else dict(LOOKUP="", table=None)
    if kind == "table":
        types |= dict(table="fp32")
    alone, three = (kernels._product8, kernels._three8) if kind == "int8" else (kernels._product4, kernels._three4)
    wide = []
    for function in (alone, three):
        ptx = compile(function, capability, t.warps, sizes, **types)
        assert "mma" in ptx and "prmt" in ptx
        wide.append(ptx.count("cp.async.cg.shared.global"))
    assert wide[0] == wide[1] > 0  # 16 bytes at a time

for dtype in ("bf16", "fp16"):
    for kind in ("int4", "int8", "table"):
        product(kind, 1, 90, dtype)
    product("int4", 5, 80, dtype)
product("int4", 100, 80, "bf16")
product("int8", 9, 80, "bf16")
sizes = dict(ROWS=2, STEP=512)
compile(kernels._exact4, 80, 4, sizes | dict(PAIRS=4, G=64, table=None), x="fp32", codes="u8", scales="i64", out="fp32")
compile(kernels._exact8, 80, 4, sizes | dict(OUTPUTS=4), x="fp32", codes="i8", scales="bf16", out="fp32")
"""


def test_it_compiles_for_a_gpu_that_is_not_there():
    """Within the shared memory of any GPU, and once for all numbers of rows."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
