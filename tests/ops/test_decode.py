"""Attention to exact and quantized caches against its definition in float64, with the compiled kernel and without."""

import pytest
import torch

from hf_accel_patch.kernels import cpu_decode
from hf_accel_patch.ops import decode
from hf_accel_patch.ops.attention import reference
from hf_accel_patch.ops.case import Causal, Dense, Everything, Variant
from hf_accel_patch.ops.decode import attend_cached, attend_parts, attend_stored
from hf_accel_patch.ops.kv import BLOCK, pack, unpack
from hf_accel_patch.ops.mask import DescribedMask
from hf_accel_patch.ops.stored import Content

B, H, D, V = 2, 4, 16, 24
EXACT = 2e-5  # float32 against float64, outputs of order one
KERNEL = 2e-3  # the kernel rounds queries and weights where they meet codes: 1e-3 of the result, and of larger parts
HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the output, and of keys and values before


@pytest.fixture(params=["kernel", "no kernel"])
def kernel(request, monkeypatch):
    if request.param == "no kernel":
        monkeypatch.setattr(cpu_decode, "library", lambda width=None: None)
    elif cpu_decode.library() is None:
        pytest.skip(cpu_decode.why_not())
    return request.param == "kernel"


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often the kernel was called."""
    calls, real = [], cpu_decode.attend

    def counted(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(cpu_decode, "attend", counted)
    return calls


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def content(bits=8, blocks=3, latest=10, skip=0, heads=2, key_size=D, value_size=V, dtype=torch.float32, room=1):
    tokens = blocks * BLOCK + latest
    keys, values = (
        numbers(B, heads, tokens + room * BLOCK, size, seed=i) for i, size in enumerate((key_size, value_size))
    )
    keys, values = keys.to(dtype), values.to(dtype)
    packed = (
        pack(keys[:, :, : (blocks + room) * BLOCK], values[:, :, : (blocks + room) * BLOCK], bits) if blocks else None
    )
    first = blocks * BLOCK
    return Content(bits, packed, blocks, skip, keys[:, :, first:tokens], values[:, :, first:tokens])


def seen_by_all(mask, T, S):
    """The mask as the reference takes it."""
    block = mask.block(0, T, 0, S)
    if block is None:
        return None
    block = block if block.dtype == torch.bool else block > -1e30
    return block.expand(B, H, T, S)


def causal(T, S):
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


def padded(T, S):
    mask = causal(T, S).expand(B, 1, T, S).clone()
    mask[1, :, :, : S // 2] = False
    return mask


VARIANTS = {
    "plain": Variant(0.3),
    "soft cap": Variant(0.3, softcap=2.0),
    "sinks": Variant(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]).view(1, 4, 1, 1)),
}
CONTENTS = {
    "int8": {},
    "int4": {"bits": 4},
    "skip": {"skip": 40},
    "int4, skip": {"skip": 63, "bits": 4, "latest": 1},
    "no blocks": {"blocks": 0, "latest": 60},
    "no latest": {"latest": 0},
    "many blocks": {"blocks": 37, "bits": 4},
    "mha": {"heads": 4},
    "mqa": {"heads": 1},
    "odd sizes": {"key_size": 20, "value_size": 36},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("T", [1, 5, 23])
def test_stored(name, variant, T, kernel, kernel_calls):
    each = content(**CONTENTS[name])
    query, S = numbers(B, H, T, each.keys.shape[-1], seed=2), each.length
    for mask in (Everything(S), Dense(causal(T, S)[None, None]), Dense(padded(T, S))):
        kernel_calls.clear()
        ours = attend_stored(query, each, mask, variant)
        expected = reference(query, *map(each.dense, (0, 1)), seen_by_all(mask, T, S), variant).transpose(1, 2)
        assert ours.shape == expected.shape and ours.is_contiguous()
        assert (ours - expected).abs().max() < (KERNEL if kernel and T <= decode.MOST_TOKENS else EXACT)
        assert bool(kernel_calls) == (kernel and T <= decode.MOST_TOKENS)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_cached(variant, heads, kernel, kernel_calls):
    buffers = numbers(B, heads, 200, D), numbers(B, heads, 200, V, seed=1)
    keys, values = (x[:, :, 7:107] for x in buffers)  # views of a buffer that begin within it
    for T in (1, 3, 16):
        query = numbers(B, H, T, D, seed=2)
        for mask in (None, causal(T, 100)[None, None], padded(T, 100), padded(T, 100).expand(B, H, T, 100)):
            ours = attend_cached(query, keys, values, mask, variant)
            if not kernel:
                assert ours is None
                continue
            full = None if mask is None else mask.expand(B, H, T, 100)
            assert (ours - reference(query, keys, values, full, variant).transpose(1, 2)).abs().max() < EXACT
    assert bool(kernel_calls) == kernel
    assert attend_cached(numbers(B, H, 17, D), keys, values, None, variant) is None


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", [8, 4])
def test_half_precision(dtype, bits, kernel):
    each, query = content(bits, dtype=dtype, skip=3), numbers(B, H, 3, D, seed=2, dtype=dtype)
    ours = attend_stored(query, each, Everything(each.length), Variant(0.3))
    assert ours.dtype == dtype
    expected = reference(query, *map(each.dense, (0, 1)), None, Variant(0.3)).transpose(1, 2)
    assert (ours - expected).abs().max() < HALF[dtype]


def test_sinks_that_differ_between_sequences_or_queries(kernel):
    each = content(heads=4)
    for shape in ((B, H, 1, 1), (B, H, 3, 1), (1, H, 3, 1)):
        T = 1 if shape[2] == 1 else 3
        query, variant = numbers(B, H, T, D, seed=2), Variant(0.3, sinks=numbers(*shape, seed=5) * 3)
        expected = reference(query, *map(each.dense, (0, 1)), None, variant).transpose(1, 2)
        assert (attend_stored(query, each, Everything(each.length), variant) - expected).abs().max() < EXACT
        exact = attend_cached(query, each.keys, each.values, None, variant)
        if exact is not None:
            expected = reference(query, each.keys, each.values, None, variant).transpose(1, 2)
            assert (exact - expected).abs().max() < EXACT


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("T", [1, 20])
def test_additive_masks(lowest, T, kernel):
    each = content(blocks=40)
    S = each.length
    seen = causal(T, S).expand(B, H, T, S).clone()
    seen[1, :, :, : S - T] = False  # whole parts are hidden
    mask = torch.zeros(B, 1, T, S).masked_fill(~seen[:, :1], lowest)
    ours = attend_stored(numbers(B, H, T, D, seed=2), each, Dense(mask), Variant(0.3))
    expected = reference(numbers(B, H, T, D, seed=2), *map(each.dense, (0, 1)), seen, Variant(0.3)).transpose(1, 2)
    assert (ours - expected).abs().max() < EXACT


@pytest.mark.parametrize("T", [2, 40])
def test_described_masks(T, kernel):
    each, asked = content(blocks=18, skip=9), []
    S = each.length
    dense = padded(T, S)

    def build(start, stop, first, last):
        asked.append((stop - start) * (last - first))
        return dense[:, :, start:stop, first:last]

    mask = DescribedMask((B, 1, T, S), torch.device("cpu"), build, offset=S - T, causal=True)
    query = numbers(B, H, T, D, seed=2)
    ours = attend_stored(query, each, mask, Variant(0.3))
    expected = reference(query, *map(each.dense, (0, 1)), dense.expand(B, H, T, S), Variant(0.3)).transpose(1, 2)
    assert (ours - expected).abs().max() < (KERNEL if kernel and T == 2 else EXACT)
    assert max(asked) <= (T * 1024 if T > decode.MOST_TOKENS else T * S)


def test_causal_masks_are_aligned_with_the_first_token(kernel):
    """As is_causal is under PyTorch: query t sees the keys up to t."""
    each, query = content(), numbers(B, H, 5, D, seed=2)
    seen = (torch.arange(each.length) <= torch.arange(5)[:, None]).expand(B, H, 5, -1)
    ours = attend_stored(query, each, Causal(each.length, query.device), Variant(0.3))
    assert (ours - reference(query, *map(each.dense, (0, 1)), seen, Variant(0.3)).transpose(1, 2)).abs().max() < KERNEL


@pytest.mark.parametrize("memory", [1 << 30, 8 * B * H * 1024 * 7])
@pytest.mark.parametrize("name", ["plain", "soft cap", "sinks", "sinks per query", "bias"])
def test_parts(name, memory, monkeypatch):
    monkeypatch.setattr(decode, "SCORE_BYTES", memory)
    T, S = 20, 1500
    keys, values, query = numbers(B, 2, S, D), numbers(B, 2, S, V, seed=1), numbers(B, H, T, D, seed=2)
    variants = VARIANTS | {
        "sinks per query": Variant(0.3, sinks=numbers(B, H, T, 1, seed=3)),
        "bias": Variant(0.3, bias=numbers(1, H, T, S, seed=4)),
    }
    mask = padded(T, S)
    parts = [(a, b, keys[:, :, a:b], values[:, :, a:b]) for a, b in ((0, 1), (1, 64), (64, 1200), (1200, 1500))]
    ours = attend_parts(query, parts, Dense(mask), variants[name])
    expected = reference(query, keys, values, mask.expand(B, H, T, S), variants[name])
    assert (ours - expected).abs().max() < EXACT


def test_parts_of_nothing():
    with pytest.raises(ValueError, match="no token"):
        attend_parts(numbers(B, H, 1, D), [], Everything(0), Variant(0.3))


@pytest.mark.parametrize("memory", [1 << 30, 8 * B * H * 1024 * 2])
def test_gradients_of_the_query(memory, monkeypatch):
    monkeypatch.setattr(decode, "SCORE_BYTES", memory)
    each, query = content(blocks=20), numbers(B, H, 3, D, seed=2).requires_grad_()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]).view(1, 4, 1, 1)
    variant = Variant(0.3, softcap=2.0, sinks=sinks)
    attend_stored(query, each, Everything(each.length), variant).square().sum().backward()
    ours, query.grad = query.grad, None
    reference(query, *map(each.dense, (0, 1)), None, variant).square().sum().backward()
    assert (ours - query.grad).abs().max() < 1e-4


def test_a_sink_that_is_trained_alone_gets_its_gradient():
    sinks = torch.zeros(1, H, 1, 1, requires_grad=True)
    keys, values, query = numbers(B, 2, 20, D), numbers(B, 2, 20, V), numbers(B, H, 1, D)
    assert attend_cached(query, keys, values, None, Variant(0.3, sinks=sinks)) is None
    each = content()
    attend_stored(query, each, Everything(each.length), Variant(0.3, sinks=sinks)).sum().backward()
    assert sinks.grad.abs().min() > 0


def test_the_cache_is_not_unpacked_as_a_whole(monkeypatch, kernel):
    sizes, real = [], Content.unpacked

    def counted(self, part, first, last):
        sizes.append(last - first)
        return real(self, part, first, last)

    monkeypatch.setattr(Content, "unpacked", counted)
    each = content(blocks=50)
    for T in (1, 30):
        attend_stored(numbers(B, H, T, D), each, Everything(each.length), Variant(0.3))
    assert max(sizes) <= 16


def test_what_was_packed_with_unpack_and_the_kernel_agree():
    """Not only with the definition, but code by code: a single token that is seen gives its own value."""
    if cpu_decode.library() is None:
        pytest.skip(cpu_decode.why_not())
    for bits in (8, 4):
        each = content(bits)
        values = unpack(each.packed, bits, D, V, torch.float32)[1]
        for token in (0, 31, 32, 63, 64, 191):
            mask = torch.zeros(1, 1, 1, each.length, dtype=torch.bool)
            mask[..., token] = True
            ours = attend_stored(numbers(B, H, 1, D), each, Dense(mask), Variant(0.3))
            expected = values[:, :, token].repeat_interleave(2, dim=1)[:, None]
            assert (ours - expected).abs().max() < 1e-2 * expected.abs().max()
