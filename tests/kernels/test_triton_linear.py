"""The Triton kernels against plain arithmetic in float64: on the GPU, or interpreted where there is none."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, interpreted, load

from hf_accel_patch.ops import linear, packing

kernels = load("triton_linear")
triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 5, 16, 17, 40)
DENSE = kernels.MATMUL_ROWS + 2
SHAPES = (  # outputs, input features, B, G: odd numbers of blocks and groups too
    (32, 96, 32, 32),
    (96, 192, 32, 64),
    (32, 384, 32, 128),
    (64, 160, 64, 32),
    (192, 64, 64, 64),
    (64, 128, 64, 128),
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


def packed(codes, B):
    """Codes [N, K] in the layout of the kernels."""
    halves = codes.view(-1, 2, B // 2, codes.shape[1])
    return (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2).contiguous().to(DEVICE, torch.uint8)


class Int4:
    def __init__(self, N, K, B, G):
        codes = torch.randint(0, 16, (N, K), generator=generator(1))
        scales = torch.stack((normal(K // G, N, seed=2).abs() + 0.1, normal(K // G, N, seed=3)), -1).bfloat16()
        scale, zero = (each.T[..., None] for each in scales.double().unbind(-1))
        self.weight = ((codes.view(N, -1, G) - 8) * scale + zero).view(N, K)
        self.packed = packed(codes, B), scales.to(DEVICE)

    def rounded(self, rows, dtype):
        return rows > kernels.MATMUL_ROWS

    def linear(self, x):
        return kernels.linear_int4(x, *self.packed)

    def dequantize(self, dtype):
        return kernels.dequantize_int4(*self.packed, dtype)


class Table:
    def __init__(self, N, K, B, G):
        codes = torch.randint(0, 16, (N, K), generator=generator(1))
        absmax, table = normal(K // G, N, seed=2).abs() + 0.1, normal(17, seed=3)[1:]  # not aligned
        self.weight = (table.double()[codes].view(N, -1, G) * absmax.double().T[..., None]).view(N, K)
        self.packed = packed(codes, B), absmax.to(DEVICE), table.to(DEVICE)

    def rounded(self, rows, dtype):
        return rows > kernels.MATVEC_ROWS[dtype]

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
        return rows > kernels.MATMUL_ROWS

    def linear(self, x):
        return kernels.linear_int8(x, *self.packed)

    def dequantize(self, dtype):
        return kernels.dequantize_int8(*self.packed, dtype)


def check(weights, x):
    """One rounding of the result, and of the weights where they are rounded, beside the error of the sums."""
    ours = weights.linear(x)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, shape", [(Int4, SHAPES[1]), (Table, SHAPES[1]), (Int8, (130, 64))])
def test_many_rows_multiply_dequantized_weights(monkeypatch, kind, shape, dtype):
    monkeypatch.setattr(kernels, "DENSE_WEIGHTS", shape[1] * 64)  # in several pieces
    check(kind(*shape), normal(DENSE, shape[1]).to(DEVICE, dtype))


@pytest.mark.parametrize("kind, shape", [(Int4, SHAPES[1]), (Table, SHAPES[1]), (Int8, (130, 64))])
def test_older_gpus_multiply_dequantized_weights(monkeypatch, kind, shape):
    monkeypatch.setattr(kernels, "_tensor_cores", lambda device: False)
    for name in ("_matmul4", "_matmul8"):
        monkeypatch.delattr(kernels, name)
    monkeypatch.setattr(kernels, "MATMUL_ROWS", 0)  # where weights are rounded
    check(kind(*shape), normal(5, shape[1]).to(DEVICE, torch.float16))


@pytest.mark.parametrize("kind", [Int4, Table])
@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (2, torch.bfloat16)], ids=str)
def test_matvec_between_programs(kind, rows, dtype):
    N, K, B, G = 32, 257 * 32, 32, 32
    assert kernels.matvec_shape(N // B, K * B // 2, K // G, rows)[1] == 2
    check(kind(N, K, B, G), normal(rows, K, seed=5).to(DEVICE, dtype))


@pytest.mark.parametrize("kind, shape", [(Int4, (64, 544, 32, 32)), (Table, (64, 544, 32, 32)), (Int8, (70, 1100))])
@pytest.mark.parametrize("rows", [3, 40, 100])
def test_matmul_between_programs(monkeypatch, kind, shape, rows):
    splits = []
    choose = kernels.matmul_splits
    monkeypatch.setattr(kernels, "matmul_splits", lambda *sizes: splits.append(choose(*sizes)) or splits[-1])
    check(kind(*shape), normal(rows, shape[1]).to(DEVICE, torch.bfloat16))
    assert splits[0] > 1


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
        Int4(64, 64, 32, 32),
        Int4(64, 64, 64, 64),
        Table(64, 64, 32, 32),
        Table(64, 64, 64, 64),
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
    "N, K, B, G, rows, expected",
    [
        (14336, 4096, 32, 64, 1, (8, 1)),
        (4096, 14336, 32, 64, 1, (32, 1)),
        (4096, 14336, 32, 64, 2, (16, 1)),
        (4096, 14336, 64, 128, 1, (32, 2)),  # 64 blocks
        (1024, 4096, 32, 64, 1, (32, 1)),  # over before a second kernel starts
        (128256, 4096, 32, 64, 1, (4, 1)),
        (32, 96, 32, 32, 1, (2, 1)),
    ],
)
def test_matvec_shape(N, K, B, G, rows, expected):
    assert kernels.matvec_shape(N // B, K * B // 2, K // G, rows) == expected
    assert kernels.matvec_shape(N // B, K * B // 2, K // G, rows, wide=True) == (min(16, expected[0]), expected[1])


@pytest.mark.parametrize("tiles, steps, expected", [(16, 64, 8), (56, 64, 4), (1000, 64, 1), (8, 3, 1), (8, 9, 2)])
def test_matmul_splits(tiles, steps, expected):
    assert kernels.matmul_splits(tiles, steps) == expected


def test_what_the_kernels_cannot_read():
    weights = Int4(*SHAPES[0])
    with pytest.raises(
        TypeError, match=r"activations are torch.float64; the kernels take float32, bfloat16 or float16"
    ):
        weights.linear(torch.ones(1, 96, dtype=torch.float64, device=DEVICE))
    for shape in ((1, 64), (1, 1, 96)):
        with pytest.raises(RuntimeError, match="meet weights with 96 features"):
            weights.linear(torch.ones(shape, device=DEVICE))
    assert weights.linear(torch.ones(0, 96, device=DEVICE)).shape == (0, 32)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("kind, shape", [(Int4, (32, 8224, 32, 32)), (Table, SHAPES[1]), (Int8, SHAPES8[2])])
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
@pytest.mark.parametrize("scheme", ("int8", "llm.int8", "int4", "nf4", "fp4"))
def test_modules_reach_them(scheme, rows):
    """Codes and scales as a module holds them."""
    w, x = normal(96, 128, seed=5), normal(*rows, 128, seed=6).bfloat16()
    codes, bits = packing.pack(w, scheme, 64, 32)
    scales = bits.view(torch.float32 if bits.dtype == torch.int32 else torch.bfloat16)
    expected = linear.linear(x.float(), codes, scales, scheme, linear.Backend(False, 0))
    ours = linear.linear_triton(x.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE), scheme).cpu()
    assert ours.shape == expected.shape and ours.dtype == torch.bfloat16
    assert (ours.float() - expected.float()).norm() < 0.02 * expected.float().norm()


COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from hf_accel_patch.kernels import triton_linear as kernels

def compile(function, capability, warps, sizes, **types):
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

sizes = dict(ROWS=1, B=32, G=64, WARPS=16, table=None)
compile(kernels._matvec4, 80, 16, sizes, x="bf16", codes="i32", scales="i32", out="bf16")
rows, columns, warps = kernels.matmul_tile4(64, False)
sizes = dict(ROWS=rows, BLOCKS=columns // 16, B=32, G=64, STAGES=3)
types = dict(x="fp16", codes="u8", scales="fp32", table="fp32", out="fp16")
assert "mma.sync" in compile(kernels._matmul4, 80, warps, sizes, **types)
assert "wgmma" in compile(kernels._matmul4, 90, warps, sizes, **types)
"""


def test_it_compiles_for_a_gpu_that_is_not_there():
    """Within the shared memory of any GPU, and once for all numbers of rows."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
