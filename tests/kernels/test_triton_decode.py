"""Attention over caches in Triton against float64: on the GPU, or interpreted where there is none."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, interpreted, load

from hf_accel_patch.ops import kv

kernels = load("triton_decode")
triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with interpreted():
        yield


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = ((2, 2), (8, 2), (5, 1), (40, 1))  # query and key/value heads

# Of the largest value, beside the rounding of the result. What meets codes has 16 bits, of float32 23; weights that
# meet 16-bit values have at least twice the bits of these, but for more than eight rows.
BOUNDS = {torch.float32: 2**-17, torch.bfloat16: 2**-12, torch.float16: 2**-12}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


class Case:
    """A cache of `blocks` quantized blocks in a larger room and `recent` tokens that are a view, and its queries."""

    def __init__(self, dtype, bits, *, heads=(4, 2), B=1, T=1, D=32, V=32, blocks=2, recent=5, room=1):
        (self.H, self.K), self.bits, self.blocks = heads, bits, blocks if bits else 0
        channels = 4 * normal(self.K, 1, D, seed=9).exp() * normal(self.K, 1, D, seed=8)  # keys have some large ones
        self.query = normal(B, T, self.H, D, seed=1).to(DEVICE, dtype).transpose(1, 2)
        length = 64 * self.blocks
        keys, values = (
            normal(B, self.K, length + recent, D, seed=2) + channels,
            normal(B, self.K, length + recent, V, seed=3),
        )
        self.packed = None
        parts = keys[:, :, :0].double(), values[:, :, :0].double()
        if bits:
            live = kv.pack(keys[:, :, :length], values[:, :, :length], bits)
            parts = kv.unpack(live, bits, D, V, torch.float64)
            self.packed = tuple(self.roomy(x, room) for x in live)
        self.keys, self.values = (
            torch.cat((x[:, :, length:], normal(B, self.K, 3, x.shape[-1])), 2).to(DEVICE, dtype)[:, :, :recent]
            for x in (keys, values)
        )
        if not bits:  # [B, R, K, D], as some caches lie
            self.keys, self.values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (self.keys, self.values))
        self.all = [
            torch.cat((a, b.double().cpu()), 2).repeat_interleave(self.H // self.K, 1)
            for a, b in zip(parts, (self.keys, self.values), strict=True)
        ]
        self.scale, self.length = D**-0.5, length + recent

    @staticmethod
    def roomy(x, room):
        """A view into room for more blocks, heads and sequences, which hold what must not be read."""
        B, K, N = x.shape[:3]
        whole = torch.full((B + 1, K + 1, N + room, *x.shape[3:]), 255 if x.dtype is torch.uint8 else float("nan"))
        whole = whole.to(DEVICE, x.dtype)
        whole[:B, :K, :N] = x
        return whole[:B, :K]

    def attend(self, mask=None, softcap=None, sinks=None, bias=None):
        mask, sinks, bias = (None if x is None else x.to(DEVICE) for x in (mask, sinks, bias))
        return kernels.attend(
            self.query, self.packed, self.bits, self.blocks, self.keys, self.values, mask, self.scale, softcap, sinks,
            bias,
        )  # fmt: skip

    def exact(self, mask=None, softcap=None, sinks=None, bias=None):
        keys, values = self.all
        scores = self.query.double().cpu() @ keys.mT * self.scale
        if bias is not None:
            scores[..., : bias.shape[-1]] += bias * self.scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            sinks = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1).nan_to_num(0)[..., : self.length]
        return (weights @ values).transpose(1, 2)

    def check(self, **options):
        ours, exact = self.attend(**options), self.exact(**options)
        assert ours.dtype == self.query.dtype and ours.shape == exact.shape and ours.is_contiguous()
        eps, largest = torch.finfo(ours.dtype).eps, self.all[1].abs().max() if self.length else 1
        once = not self.bits and self.query.shape[2] * self.H // self.K > 8
        bound = eps * exact.abs() + (BOUNDS[ours.dtype] + (eps if once else 0)) * largest
        assert bool(((ours.double().cpu() - exact).abs() <= bound).all())
        return ours


def mask(*shape, seed=4):
    return torch.rand(*shape, generator=generator(seed)) < 0.6


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_and_queries(dtype, bits, heads):
    T = 3 if heads == (8, 2) else 1
    Case(dtype, bits, heads=heads, T=T, recent=5 if bits else 70).check()


@pytest.mark.parametrize("sizes", [(16, 16), (40, 24), (80, 80), (128, 64), (136, 144)], ids=str)
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_sizes(bits, sizes):
    D, V = sizes
    Case(torch.float32, bits, D=D, V=V, recent=21).check()


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("blocks, recent", [(0, 0), (0, 1), (0, 67), (1, 0), (4, 16), (5, 1), (5, 67)])
def test_lengths(blocks, recent, bits):
    Case(torch.float32, bits, heads=(2, 1), B=2, blocks=blocks, recent=recent, room=0 if recent == 1 else 3).check()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_masks(bits, shape):
    dtype = torch.bfloat16 if shape[1] == 4 else torch.float32
    case = Case(dtype, bits, B=2 if shape[0] == 2 else 1, T=3, recent=9 if bits else 90)
    seen = mask(*shape, case.length)
    seen[0, 0, -1] = False
    assert not case.check(mask=seen)[0, -1, 0].any()
    case.check(mask=mask(*shape, case.length + 7)[..., 3:-4], softcap=2.0, sinks=normal(case.H))
    case.check(mask=seen & False, sinks=normal(case.H))


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_and_sinks(dtype, bits):
    case, sinks = Case(dtype, bits), normal(4, seed=5)
    case.check(softcap=3.0)
    case.check(sinks=sinks)
    case.check(softcap=20.0, sinks=sinks.index_fill(0, torch.tensor([1]), float("-inf")))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bias_of_packed_keys(bits):
    case = Case(torch.float32, bits, B=2, T=2, blocks=3)
    bias = normal(2, 4, 2, 3 * 64 + 7, seed=6)[..., : 3 * 64]
    case.check(bias=bias, softcap=20.0, mask=mask(2, 1, 2, case.length))


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_splits_agree(monkeypatch, bits):
    case = Case(torch.float32, bits, heads=(4, 1), T=2, blocks=10, recent=40 if bits else 300)
    options = {"mask": mask(1, 1, 2, case.length), "sinks": normal(4)}
    options["mask"][..., : case.length // 2] = False  # splits that see nothing
    seen = set()
    for splits in (1, 3):

        def choose(programs, steps, fit=2, splits=splits):
            each = triton.cdiv(steps, splits)
            seen.add(triton.cdiv(steps, each))
            return triton.cdiv(steps, each), each

        monkeypatch.setattr(kernels, "split", choose)
        assert torch.equal(case.check(**options), case.attend(**options))
    assert len(seen) > 1


@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_is_its_own(bits):
    """One-hot queries of great weight read single tokens: a code in the wrong place or half shows."""
    N = 2
    keys = torch.zeros(1, 1, 64 * N, 64 * N)
    keys[0, 0] = torch.eye(64 * N)
    values = torch.arange(64.0 * N)[:, None] + torch.arange(32.0)[None, :] * 4
    packed = kv.pack(keys, values[None, None], bits)
    unpacked = kv.unpack(packed, bits, 64 * N, 32, torch.float32)[1][0, 0]
    query = (1e4 * torch.eye(64 * N))[None, None].to(DEVICE)
    none = torch.zeros(1, 1, 0, 64 * N, device=DEVICE), torch.zeros(1, 1, 0, 32, device=DEVICE)
    ours = kernels.attend(query, tuple(x.to(DEVICE) for x in packed), bits, N, *none, None, 1.0, None, None)
    assert torch.allclose(ours[0, :, 0].cpu(), unpacked, rtol=1e-4, atol=1e-3)


@pytest.fixture
def alone(monkeypatch):
    """How often programs of one warp were used."""
    calls, real = [], kernels._attend_codes
    monkeypatch.setattr(kernels, "_attend_codes", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.mark.parametrize("bits", [8, 4])
def test_programs_of_one_warp(alone, monkeypatch, bits):
    """For rows of 16 bits whose mask is the same, and head sizes that are powers of two."""
    for dtype, heads, B, T, D, V, blocks, recent in (
        (torch.bfloat16, (4, 2), 1, 1, 128, 128, 3, 21),
        (torch.float16, (4, 1), 2, 2, 64, 64, 2, 0),
        (torch.float16, (2, 2), 1, 1, 64, 128, 1, 1),
    ):
        case, sinks = Case(dtype, bits, heads=heads, B=B, T=T, D=D, V=V, blocks=blocks, recent=recent), normal(heads[0])
        case.check()
        seen = mask(B, 1, 1, case.length)
        seen[:, :, :, -70:] = False  # a whole block, or nearly
        case.check(mask=seen, softcap=20.0, sinks=sinks)
        assert not case.check(mask=seen & False).any()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "split", lambda programs, steps, fit=2: (1, max(steps, 1)))
            assert torch.equal(case.check(mask=seen, sinks=sinks), case.attend(mask=seen, sinks=sinks))
        assert len(alone) == 5, (dtype, heads)
        case.check(mask=mask(B, heads[0], T, case.length))  # not for these
        assert len(alone) == 5
        alone.clear()


@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_is_its_own_for_programs_of_one_warp(alone, bits):
    keys, values = torch.eye(128)[None, None], torch.arange(128.0)[:, None] + torch.arange(64.0)[None, :] * 4
    packed = kv.pack(keys, values[None, None], bits)
    unpacked = kv.unpack(packed, bits, 128, 64, torch.float32)[1][0, 0]
    none = torch.zeros(1, 1, 0, 128, device=DEVICE).half(), torch.zeros(1, 1, 0, 64, device=DEVICE).half()
    for queries in (1e4 * torch.eye(128)).half().split(8):
        args = queries[None, None].to(DEVICE), tuple(x.to(DEVICE) for x in packed), bits, 2, *none
        ours = kernels.attend(*args, None, 1.0, None, None)[0, :, 0]
        expected = unpacked[queries.argmax(-1)]
        assert torch.allclose(ours.cpu().float(), expected, rtol=2e-3, atol=1e-3)
    assert len(alone) == 16


def test_programs_of_one_warp_keep_weak_channels(alone):
    """Scales are relative to the largest of a block: channels with small keys lose nothing."""
    case = Case(torch.bfloat16, 8, heads=(4, 2), D=64, V=64, blocks=2, recent=0)
    size = torch.where(torch.arange(64) % 2 == 0, 1.0, 1e-4)
    keys, values = normal(1, 2, 128, 64, seed=2) * size, normal(1, 2, 128, 64, seed=3)
    case.query = case.query * torch.where(size == 1, 0.0, 1e4).to(case.query)  # the weak ones alone say what is seen
    packed = kv.pack(keys, values, 8)
    case.packed = tuple(x.to(DEVICE) for x in packed)
    case.all = [x.repeat_interleave(2, 1) for x in kv.unpack(packed, 8, 64, 64, torch.float64)]
    case.check()
    assert len(alone) == 1


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")  # of NumPy, which interprets
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row_alone(value, bits):
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(dtype, bits, T=3, blocks=1)
        case.query[0, 2, 1, 7] = value
        ours = case.attend()
        assert not ours[0, 1, 2].isfinite().any()
        ours[0, 1, 2] = 0
        assert ours.isfinite().all()


def test_small_and_large_weights_of_a_quantized_block():
    """Digits are relative to the largest weight of a block: others of the same row keep 16 bits beside it."""
    case = Case(torch.float32, 8, blocks=3, recent=0)
    case.query *= 8
    case.check()


@pytest.mark.parametrize(
    "programs, steps, expected",
    [(8, 512, (32, 16)), (8, 16, (16, 1)), (1, 4, (4, 1)), (300, 10, (2, 5)), (2000, 10, (1, 10)), (8, 0, (1, 1))],
)
def test_split(programs, steps, expected):
    assert kernels.split(programs, steps) == expected


def test_what_the_kernels_cannot_read():
    q, k = torch.zeros(1, 2, 1, 16, device=DEVICE), torch.zeros(1, 1, 3, 16, device=DEVICE)

    def attend(q, k, mask=None):
        return kernels.attend(q, None, 0, 0, k, k, mask, 1.0, None, None)

    with pytest.raises(TypeError, match=r"queries are torch.float64; the kernels take float32, bfloat16 or float16"):
        attend(q.double(), k)
    with pytest.raises(TypeError, match=r"queries are torch.float32, keys torch.float16, values torch.float16; they "):
        attend(q, k.half())
    with pytest.raises(TypeError, match=r"the mask is torch.bool for 4 tokens; it must be torch.bool for 3"):
        attend(q, k, torch.ones(1, 1, 1, 4, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="the last stride of queries, keys, values and mask must be 1"):
        attend(q, torch.zeros(1, 1, 16, 3, device=DEVICE).mT)
    assert attend(q[:0], k[:0]).shape == (0, 1, 2, 16)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_cuda_graphs_record_it(bits):
    case = Case(torch.bfloat16, bits, D=128, V=128, blocks=20, recent=40 if bits else 2000)
    expected = case.check()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = case.attend()
    graph.replay()
    assert torch.equal(ours, expected)


COMPILES = """
import re
import triton
from triton.backends.compiler import GPUTarget
from hf_accel_patch.kernels import triton_decode as kernels, triton_decode_codes as codes
from hf_accel_patch.kernels import triton_decode_exact as exact


def compiled(kernel, type, sizes, warps, registers=None, word="u8"):
    types = dict(q=type, k=type, v=type, key_codes=word, value_codes=word, key_scales="fp16", value_scales="fp16")
    types |= dict(out="fp32", stats="fp32", mask="u8")
    types = {name: "*" + each for name, each in types.items()} | dict(scale="fp32")
    sizes |= dict(sinks=None, cap=None, T=1)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else types.get(name, "i32") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] != "constexpr" and (name in types or "_" in name or name in "DV")
        and name not in ("scale", "mask", "m_b", "m_h", "m_t")
    }
    source = triton.compiler.ASTSource(kernel, signature, sizes, attributes)
    binary = triton.compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=warps, maxnreg=registers))
    assert binary.metadata.shared <= 99 << 10 and len(binary.asm["cubin"]), binary.metadata.shared
    for line in binary.asm["ttgir"].splitlines():  # what a lane gets of a row, four times, is within the row
        if "tt.dot %" in line:
            row = re.search(r": tensor<[0-9x]*?([0-9]+)x[a-z][a-z0-9]*, #ttg.dot_op.*?kWidth = ([0-9]+)", line)
            assert 4 * int(row[2]) <= int(row[1]), line
    return binary.asm


for bits, size in ((8, 64), (4, 64), (8, 128), (4, 128)):
    groups = 1 if bits == 8 else size // 64
    sizes = dict(k_r=size, v_r=size, D=size, V=size, GROUPS=groups, BITS=bits, SPLIT=True, ROWS=4)
    stages, fit = codes.STAGES[bits], codes.fit(4, size)
    sizes |= dict(N=16, STAGES=stages, ASM=True)
    asm = compiled(codes.attend_codes, "fp16", sizes, 1, kernels._registers(1, fit), "i32")
    if size == 64:
        continue
    assert asm["ptx"].count("cp.async.cg.shared.global") >= 2 * bits * stages
    assert asm["ptx"].count("lop3.b32") >= 256 and "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in asm["ptx"]

for bits, type in ((8, "bf16"), (4, "fp16"), (4, "fp32")):
    t = kernels.tiling(bits, 4, 64, 64, type == "fp32")
    sizes = dict(KEY=64, VALUE=64, groups=1, BITS=bits, SPLIT=True, W=t.warps, ROWS=t.rows, DP=64, bias=None, mask=None)
    sizes |= dict(PIECES=t.pieces, DIGITS=t.digits, KC=t.key_chunk, KCS=1, VC=t.value_chunk, VCS=1)
    asm = compiled(kernels.attend_digits, type, sizes | dict(STAGES=t.stages), t.warps)
    assert any("contiguity = 16" in line for line in asm["ttgir"].splitlines() if "async_copy_global_to_local" in line)
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in asm["ptx"]

for type, each in (("bf16", False), ("bf16", True), ("fp32", False)):
    t = exact.tiling(4, 128, 128, type == "fp32")
    sizes = dict(k_r=128, v_r=128, D=128, V=128, DP=128, VP=128, HEADS=each, TIMES=each, SPLIT=True)
    sizes |= dict(ROWS=t.rows, PIECES=t.pieces, N=t.tokens, STAGES=t.stages)
    asm = compiled(exact.attend_exact, type, sizes, t.warps, kernels._registers(t.warps, t.fit))
    assert "cp.async.cg.shared.global" in asm["ptx"] and "cp.async.ca.shared.global" not in asm["ptx"], type
    lines = asm["ttgir"].splitlines()
    blocked = {line.split(" = ")[0] for line in lines if line.startswith("#") and "#ttg.blocked" in line}
    exp2 = [line.partition(" loc(")[0] for line in lines if "math.exp2" in line and f"x{t.tokens}xf32" in line]
    assert len(exp2) == 2 and not any(name + ">" in line for line in exp2 for name in blocked), exp2
"""


def test_it_compiles_for_a_gpu_that_is_not_there():
    """Within the shared memory of any GPU; what is cached is read 16 bytes at a time, codes are multiplied as bytes,
    and the softmax of exact keys is in the layout of products."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
