"""Attention of many queries in Triton against float64: on the GPU, or interpreted where there is none."""

import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, interpreted, load

kernels = load("triton_prefill")
backward, parts = load("triton_prefill_backward"), load("triton_prefill_parts")
tl = importlib.import_module("triton.language")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ERROR = 2.0**-11  # of tanh.approx.f32, relative


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with interpreted():
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that few tokens are many tiles."""
    if INTERPRETED:
        monkeypatch.setattr(
            kernels, "tiling", lambda *_, backward=False: kernels.Tiling(32 if backward else 16, 16, 4, 1)
        )


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def causal(T, S=None, window=None, start=0, stop=None):
    """Intervals [1, T, 2] of queries at the end of S keys, of which only start..stop count."""
    S = T if S is None else S
    last = torch.arange(T) + S - T + 1
    first = torch.zeros_like(last) if window is None else last - window
    seen = torch.stack([first.clamp(min=start), last.clamp(max=S if stop is None else stop)], -1)
    seen[seen[:, 0] >= seen[:, 1]] = 0
    return seen[None]


def packed(*lengths):
    parts, begin = [], 0
    for length in lengths:
        parts.append(causal(length) + begin)
        begin += length
    return torch.cat(parts, 1)


def exact(query, key, value, seen, scale, softcap=None, sinks=None, bias=None, tanh=torch.tanh):
    """In float64, and the log-sum-exp."""
    H, K, S = query.shape[1], key.shape[1], key.shape[2]
    key, value = (each.double().repeat_interleave(H // K, 1) for each in (key, value))
    scores = query.double() @ key.mT * scale
    if softcap:
        scores = softcap * tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    column = torch.arange(S)
    mask = (column >= seen[..., :1]) & (column < seen[..., 1:])
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)[..., :S]
    return (weights @ value).transpose(1, 2), scores.logsumexp(-1)


def check(seen, *, dtype=torch.float32, heads=(4, 2), B=1, S=None, D=16, V=16, gradients=False, **options):
    (H, K), T = heads, seen.shape[1]
    S = T if S is None else S
    inputs = [normal(B, T, H, D, seed=1).transpose(1, 2), normal(B, S, K, D, seed=2).transpose(1, 2)]
    inputs = [each.to(dtype) for each in (*inputs, normal(B, K, S, V, seed=3))]
    ours = [each.to(DEVICE).detach().requires_grad_(gradients) for each in inputs]
    theirs = [each.double().requires_grad_(gradients) for each in inputs]
    if "sinks" in options:
        own = options["sinks"]
        ours.append(own.to(DEVICE).detach().requires_grad_(gradients))
        theirs.append(own.double().requires_grad_(gradients))
    bias = options.get("bias")
    added = (options.get("softcap"), ours[3] if len(ours) > 3 else None, None if bias is None else bias.to(DEVICE))
    output, lse = kernels.attend(*ours[:3], seen.int().to(DEVICE), D**-0.5, *added)
    right, norm = exact(*theirs[:3], seen, D**-0.5, added[0], theirs[3] if len(theirs) > 3 else None, bias)
    assert output.dtype == dtype and output.shape == (B, T, H, V) and output.is_contiguous()
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 2**-18
    rough = (added[0] or 0) * ERROR if kernels.approximates(ours[0]) else 0  # how far scores may be off
    assert (output.double().cpu() - right).abs().max() <= 2 * (eps + rough) * inputs[2].abs().max()
    there = norm.isfinite()
    assert torch.equal(lse.isfinite().cpu(), there) and torch.allclose(
        lse.double().cpu()[there], norm[there], atol=1e-5 + rough
    )
    if gradients:
        wanted = normal(*output.shape, seed=7)
        output.backward(wanted.to(DEVICE, dtype))
        right.backward(wanted.to(dtype).double())
        for mine, other in zip(ours, theirs, strict=True):
            largest = other.grad.abs().max() if other.grad.abs().max() > 0 else 1
            assert (mine.grad.double().cpu() - other.grad).abs().max() <= 4 * (eps + rough) * largest
    return output


SEEN = {
    "causal": causal(37),
    "everything": torch.tensor([0, 37]).expand(1, 37, 2),
    "window": causal(70, window=20),
    "a window of one": causal(37, window=1),
    "chunks": packed(24, 24, 9),
    "packed": packed(5, 30, 1, 12),
    "left and right padding": torch.cat([causal(40, start=21), causal(40, stop=18), causal(40, start=3, stop=3)]),
}


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_what_queries_see(seen):
    check(seen, heads=(2, 1), B=max(2, len(seen)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (5, 1)], ids=str)
def test_heads_and_dtypes(heads, dtype):
    check(causal(20), dtype=dtype, heads=heads)


@pytest.mark.parametrize("sizes", [(16, 16), (40, 24), (8, 80), (192, 128), (256, 256)], ids=str)
def test_sizes(sizes):
    check(causal(20), D=sizes[0], V=sizes[1], heads=(2, 1))


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("T, S", [(1, 40), (7, 40), (33, 64)])
def test_a_cache_that_is_continued(T, S, window):
    check(causal(T, S, window), S=S)
    check(causal(T, S, window), S=S + 9)  # room behind the queries


def row(H, S):
    return (2.0 ** -torch.arange(1, H + 1)).view(1, H, 1, 1) * torch.arange(1.0 - S, 1)


OPTIONS = {
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": normal(4, seed=5)},
    "no sink": {"sinks": torch.tensor([0.0, -torch.inf, 3.0, -5.0])},
    "ALiBi": {"bias": row(4, 40)},
    "a row per head": {"bias": normal(1, 4, 1, 40, seed=6)},
    "rows that lie between each other": {"bias": normal(1, 40, 1, 4, seed=6).transpose(1, 3)},
    "all": {"softcap": 2.0, "sinks": normal(4, seed=5), "bias": row(4, 40)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    check(SEEN["left and right padding"][:2], B=2, **options)
    check(causal(40, window=18), dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_gradients(options):
    check(causal(40, window=18), V=24, gradients=True, **options)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tiles_of_heads_of_128(softcap, window):
    """On a GPU, tiles of 128 queries and keys: several, with whole blocks and masked ones."""
    T = 40 if INTERPRETED else 700
    options = {"bias": row(2, T)} if window is None else {}
    check(causal(T, window=window), dtype=torch.bfloat16, heads=(2, 1), D=128, V=128, gradients=True,
          softcap=softcap, **options)  # fmt: skip


def test_gradients_of_padded_batches():
    """Where a query sees nothing they are zero. The bias is each sequence's own."""
    seen = SEEN["left and right padding"]
    check(seen, B=3, heads=(2, 1), gradients=True, sinks=normal(2, seed=5), bias=normal(3, 1, 1, 40, seed=6))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_in_16_bits(dtype):
    check(packed(20, 13), dtype=dtype, gradients=True, softcap=3.0, S=40)


class Approximate(torch.autograd.Function):
    """tanh with the largest error that the instruction may have, and the gradient that the kernels take for its own."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        y = y * torch.where(y.abs() > 0.5, 1 + ERROR, 1 - ERROR)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


def approximate(x):
    """The same for the interpreter."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    y = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    return y * tl.where(tl.abs(y) > 0.5, 1 + ERROR, 1 - ERROR)


@pytest.fixture
def approximated(monkeypatch):
    """Soft caps as 16-bit inputs have them on a GPU, but for the interpreter and with float32 inputs."""
    if not INTERPRETED:
        pytest.skip("a GPU has the instruction")
    for module in (kernels, backward):
        monkeypatch.setattr(module, "approximates", lambda query: True)
    monkeypatch.setattr(parts, "approximate_tanh", approximate)


@pytest.mark.parametrize("softcap", [1.0, 4.0])
@pytest.mark.parametrize("added", [{}, {"bias": row(2, 40)}], ids=["alone", "with a bias"])
def test_the_instruction_for_tanh_is_used_right(approximated, softcap, added):
    """In float32 nothing but its error is between the kernels and a reference that has the same error."""
    seen = causal(40, window=30)
    inputs = [3 * normal(1, heads, 40, 16, seed=heads + i) for i, heads in enumerate((2, 1, 1))]
    ours, theirs = (
        [each.to(dtype, copy=True).requires_grad_() for each in inputs] for dtype in (torch.float32, torch.float64)
    )
    output, lse = kernels.attend(*ours, seen.int(), 0.25, softcap, **added)
    right, norm = exact(*theirs, seen, 0.25, softcap, **added, tanh=Approximate.apply)
    assert torch.allclose(lse.double(), norm, atol=1e-5) and torch.allclose(output.double(), right, atol=1e-4)
    assert (lse.double() - exact(*theirs, seen, 0.25, softcap, **added)[1]).abs().max() > softcap * ERROR / 4
    wanted = normal(*output.shape, seed=7)
    output.backward(wanted)
    right.backward(wanted.double())
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad.double() - other.grad).abs().max() <= 2**-16 * other.grad.abs().max()


def test_the_instruction_for_tanh_costs_less_than_scores_in_16_bits(approximated):
    """No score is further off than 2^-11 of itself, nor a weight than twice as much, and rounding each step of the
    scores to bfloat16, as transformers does, costs more."""
    seen, softcap = causal(40), 5.0
    query, key, value = (4 * normal(1, 1, 40, 16, seed=i) for i in range(3))
    output, lse = kernels.attend(query, key, value, seen.int(), 0.25, softcap)
    right, norm = exact(query, key, value, seen, 0.25, softcap)
    most = ERROR * softcap
    assert (lse - norm).abs().max() <= most + 1e-5
    assert (output - right).abs().max() <= 2 * most * value.abs().max()
    scores = ((query.bfloat16() @ key.bfloat16().mT * 0.25 / softcap).tanh() * softcap).float()
    scores = scores.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf)
    stock = (scores.softmax(-1) @ value).transpose(1, 2)
    assert (output - right).norm() < 0.5 * (stock - right).norm()


def test_keys_outside_a_window_are_not_read():
    seen = causal(64, window=16)
    query, key, value = normal(1, 2, 64, 16), normal(1, 1, 64, 16), normal(1, 1, 64, 16)
    query, key, value = (each.to(DEVICE) for each in (query, key, value))
    whole = kernels.attend(query, key, value, seen.int().to(DEVICE), 0.25)[0]
    far = key.clone()
    far[:, :, :16] = torch.nan  # the blocks of these are those of the first tile of queries alone
    ours = kernels.attend(query, far, value, seen.int().to(DEVICE), 0.25)[0]
    if INTERPRETED:  # a GPU's tiles are larger
        assert torch.equal(ours[:, 32:], whole[:, 32:])
    assert ours[:, :16].isnan().all()


def test_queries_that_see_nothing_say_so_anywhere():
    seen = torch.arange(1, 61)[None, :, None].expand(1, 60, 2).clone()
    seen[0, 50:, 0] = 45
    assert not check(seen, heads=(2, 1), gradients=True)[0, :50].any()


def test_views_with_strides():
    whole = normal(1, 20, 3, 4, 16).to(DEVICE)  # a fused projection
    query, key, value = (whole[:, :, i].transpose(1, 2) for i in range(3))
    ours = kernels.attend(query, key, value, causal(20).int().to(DEVICE), 0.25)[0]
    right, _ = exact(query.cpu(), key.cpu(), value.cpu(), causal(20), 0.25)
    assert (ours.cpu() - right).abs().max() < 1e-5


def test_what_the_kernels_cannot_read():
    q, k = torch.zeros(1, 2, 3, 16, device=DEVICE), torch.zeros(1, 1, 3, 16, device=DEVICE)
    seen = causal(3).int().to(DEVICE)
    with pytest.raises(TypeError, match=r"queries are torch.float64; the kernels take float32, bfloat16 or float16"):
        kernels.attend(q.double(), k, k, seen, 1.0)
    with pytest.raises(TypeError, match=r"queries are torch.float32, keys torch.float16, values torch.float16; they "):
        kernels.attend(q, k.half(), k.half(), seen, 1.0)
    with pytest.raises(ValueError, match=r"head sizes are 264 and 16; the kernels take up to 256"):
        kernels.attend(q.repeat(1, 1, 1, 17)[..., :264], k.repeat(1, 1, 1, 17)[..., :264], k, seen, 1.0)
    with pytest.raises(TypeError, match=r"seen is torch.int64 \[1, 3, 2\]; it must be torch.int32 \[1, 3, 2\] or "):
        kernels.attend(q, k, k, seen.long(), 1.0)
    with pytest.raises(TypeError, match=r"the bias is torch.float32 \[1, 1, 3, 3\]; it must be torch.float32, one row"):
        kernels.attend(q, k, k, seen, 1.0, bias=torch.zeros(1, 1, 3, 3, device=DEVICE))
    assert kernels.attend(q[:0], k[:0], k[:0], seen, 1.0)[0].shape == (0, 3, 2, 16)


@pytest.mark.parametrize("length", [128, 130])
def test_rows_of_a_bias_are_read_in_whole_blocks(length):
    bias = normal(2, length, 1, 3).transpose(1, 3)
    prepared = kernels.prepared(bias)
    assert prepared.is_contiguous() and prepared.shape == (2, 3, 1, -(-length // 128) * 128)
    assert torch.allclose(prepared[..., :length] / math.log2(math.e), bias) and not prepared[..., length:].any()


COMPILES = """
import torch, triton
from triton.backends.compiler import GPUTarget
from hf_accel_patch.kernels import triton_prefill as kernels, triton_prefill_backward as backward
DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)

def compile(function, type, t, **options):
    sizes = dict(D=128, V=128, DP=128, VP=128, M=t.queries, N=t.keys, STAGES=t.stages, cap=None, sinks=None, bias=None)
    sizes["FAST"] = kernels.approximates(torch.empty(0, dtype=DTYPES[type]))
    sizes = {name: value for name, value in sizes.items() if name in function.arg_names and name not in options}
    types = dict.fromkeys(("q", "k", "v", "do", "out", "dq", "dk", "dv"), type) | dict(seen="i32", tiles="i32")
    types |= dict.fromkeys(("lse", "delta", "sinks", "bias"), "fp32")
    types = {name: "*" + each for name, each in types.items()}
    values = types | dict(scale="fp32", cap="fp32")
    signature = {name: "constexpr" if name in sizes else values.get(name, "i32") for name in function.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name] != "constexpr" and (name in types or "_" in name)
    }
    source = triton.compiler.ASTSource(function, signature, sizes, attributes)
    binary = triton.compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=t.warps))
    assert binary.metadata.shared <= 227 << 10 and len(binary.asm["cubin"]), binary.metadata.shared
    assert ("wgmma" in binary.asm["ptx"]) == (type != "fp32")
    assert ("tanh.approx.f32" in binary.asm["ptx"]) == ("cap" in options and type != "fp32")

for type in ("bf16", "fp32"):
    compile(kernels._forward, type, kernels.tiling(128, 128, type == "fp32", 227 << 10), cap=1, sinks=1, bias=1)
t = kernels.tiling(128, 128, False, 227 << 10, backward=True)
compile(backward._backward_queries, "fp16", t)
compile(backward._backward_keys, "fp16", t, cap=1, bias=1)
"""


def test_it_compiles_for_a_gpu_that_is_not_there():
    """Within the shared memory of an H100, on its tensor cores, and with its tanh for 16 bits alone."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("options", [{}, {"backward": True}], ids=["forward", "backward"])
def test_tiles_fit_into_shared_memory(size, shared, options, monkeypatch):
    monkeypatch.undo()
    for float32 in (False, True):
        t = kernels.tiling(size, size, float32, shared << 10, **options)
        ahead = (
            t.stages * (max(t.queries, t.keys) if options else t.keys) * 2 * kernels.room(size) * (4 if float32 else 2)
        )
        assert t.stages == 1 or ahead < shared << 10
