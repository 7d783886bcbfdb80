"""Compiled attention of a few tokens against plain attention in float64, with vectors of either size."""

import math

import pytest
import torch

from hf_accel_patch.kernels import cpu_decode
from hf_accel_patch.ops import kv
from hf_accel_patch.ops.attention import reference
from hf_accel_patch.ops.case import Variant

# Of the largest number in the result, with float32 results; narrower ones are rounded once more. Quantized, queries and
# weights are integers of 15 bits, without the instructions for products of bytes of 13.
EXACT, QUANTIZED = 2e-6, {64: 5e-4, 32: 2e-3}
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
BITS = pytest.mark.parametrize("bits", [None, 8, 4])
SHAPES = [  # B, H, K, T, D, V, blocks, exact tokens
    (1, 8, 8, 1, 64, 64, 3, 10),
    (2, 8, 2, 1, 128, 128, 10, 0),
    (1, 4, 1, 5, 80, 80, 9, 67),
    (2, 6, 2, 3, 96, 96, 1, 1),
    (1, 7, 1, 1, 192, 128, 2, 33),
    (1, 9, 3, 2, 33, 17, 2, 50),
    (1, 16, 2, 1, 256, 256, 2, 7),
    (1, 8, 1, 16, 32, 64, 8, 130),
]


@pytest.fixture(params=[64, 32])
def width(request):
    if reason := cpu_decode.why_not(request.param):
        pytest.skip(reason)
    return request.param


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coin(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.7


class Cache:
    """A cache with a part that is quantized, or none, and one that is exact; and both as they are in float64."""

    def __init__(self, B, K, D, V, blocks, recent, dtype, bits):
        self.bits, self.blocks, self.packed, S = bits or 0, 0, None, 64 * blocks + recent
        self.keys, self.values = normal(B, K, S, D, seed=1).to(dtype), normal(B, K, S, V, seed=2).to(dtype)
        self.all = self.keys.double(), self.values.double()
        if bits and blocks:
            old, new = [[x[:, :, start:stop] for x in (self.keys, self.values)]
                        for start, stop in ((0, 64 * blocks), (64 * blocks, S))]  # fmt: skip
            self.packed, self.blocks = kv.pack(*old, bits), blocks
            self.keys, self.values = new
            dequantized = kv.unpack(self.packed, bits, D, V, torch.float32)
            self.all = tuple(torch.cat((x.double(), y.double()), dim=2) for x, y in zip(dequantized, new, strict=True))

    def attend(self, width, query, mask=None, softcap=None, sinks=None, bias=None):
        return cpu_decode.attend(
            cpu_decode.library(width), query, self.packed, self.bits, self.blocks, self.keys, self.values, mask,
            query.shape[-1] ** -0.5, softcap, sinks, bias,
        )  # fmt: skip

    def exact(self, query, mask=None, softcap=None, sinks=None, bias=None):
        B, H, T, D = query.shape
        keys, values = (x.repeat_interleave(H // x.shape[1], dim=1) for x in self.all)
        scores = query.double() @ keys.mT
        if bias is not None:
            scores[..., : bias.shape[-1]] += bias
        scores = scores * D**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[None, :, None, None].expand(B, H, T, 1)), dim=3)
        return (scores.softmax(-1).nan_to_num()[..., : values.shape[2]] @ values).transpose(1, 2)

    def check(self, width, query, **options):
        ours, exact = self.attend(width, query, **options), self.exact(query, **options)
        bound = ROUNDING[query.dtype] + (EXACT if self.packed is None else QUANTIZED[width])
        assert ours.dtype == query.dtype and ours.shape == exact.shape and ours.is_contiguous()
        assert (ours.double() - exact).abs().amax() <= bound * exact.abs().amax()


@DTYPES
@BITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(width, shape, bits, dtype):
    B, H, K, T, D, V, blocks, recent = shape
    cache, query = Cache(B, K, D, V, blocks, recent, dtype, bits), normal(B, H, T, D).to(dtype)
    cache.check(width, query)
    cache.check(width, query, mask=coin(B, H, T, 64 * blocks + recent), softcap=3.0, sinks=normal(H, seed=3))


@BITS
@pytest.mark.parametrize("name", ["left padding", "one for all", "per head", "per query", "window", "sliced"])
def test_masks(width, name, bits):
    B, H, K, T, S = 2, 4, 2, 3, 64 * 9 + 30
    cache, query = Cache(B, K, 64, 64, 9, 30, torch.float32, bits), normal(B, H, T, 64)
    places = torch.arange(S)
    mask = {
        "left padding": (places >= torch.tensor([0, 200])[:, None])[:, None, None],
        "one for all": coin(1, 1, 1, S),
        "per head": coin(1, H, 1, S),
        "per query": coin(B, 1, T, S),
        "window": ((places > 300) & (places < S - 3 + torch.arange(T)[:, None] + 1))[None, None],
        "sliced": coin(B, H, T + 2, S + 9)[:, :, 2:, 5:-4],
    }[name]
    cache.check(width, query, mask=mask)
    cache.check(width, query, mask=mask, sinks=normal(H, seed=4))


@BITS
def test_a_row_that_sees_nothing_is_zero(width, bits):
    cache, query = Cache(1, 2, 64, 64, 9, 5, torch.float32, bits), normal(1, 4, 2, 64)
    mask = coin(1, 4, 2, 64 * 9 + 5)
    mask[0, 1, 1] = False
    for sinks in (None, normal(4)):
        assert not cache.attend(width, query, mask=mask, sinks=sinks)[0, 1, 1].any()
        cache.check(width, query, mask=mask, sinks=sinks)
    assert not cache.attend(width, query, mask=torch.zeros_like(mask)).any()


def test_an_empty_cache_gives_zeros(width):
    assert not Cache(1, 2, 64, 64, 0, 0, torch.float32, None).attend(width, normal(1, 4, 1, 64)).any()


@DTYPES
@BITS
def test_views_into_larger_buffers(width, bits, dtype):
    """Slack in every dimension that may have it; what lies outside would show."""
    B, H, K, T, D, V, blocks, recent = 2, 4, 2, 2, 48, 80, 3, 21
    cache, query = Cache(B, K, D, V, blocks, recent, dtype, bits), normal(B, H, T, D).to(dtype)
    expected = cache.attend(width, query)

    def slack(x, *shape):
        whole = torch.full(shape, 255 if x.dtype is torch.uint8 else math.nan, dtype=x.dtype)
        view = whole[tuple(slice(size) for size in x.shape)]
        return view.copy_(x)

    S = cache.keys.shape[2]
    cache.keys = slack(cache.keys, B + 1, K, S + 50, D)
    cache.values = slack(cache.values.transpose(1, 2), B, S + 9, K + 1, V).transpose(1, 2)
    if cache.packed is not None:
        cache.packed = tuple(slack(x, B, K + 1, blocks + 4, *x.shape[3:]) for x in cache.packed)
    query = slack(query.transpose(1, 2), B, T + 1, H + 1, D).transpose(1, 2)
    assert torch.equal(cache.attend(width, query), expected)


@BITS
def test_threads_change_nothing(width, bits):
    cache, query = Cache(1, 2, 64, 64, 40, 30, torch.bfloat16, bits), normal(1, 8, 3, 64).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cache.attend(width, query))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@BITS
def test_scores_that_are_large(width, bits):
    """The largest ones do not overflow, the others vanish."""
    cache, query = Cache(1, 1, 64, 64, 9, 3, torch.float32, bits), normal(1, 2, 1, 64) * 1000
    ours, exact = cache.attend(width, query), cache.exact(query)
    assert torch.allclose(ours.double(), exact, atol=2e-2 if bits else 1e-4)


@BITS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(width, bits, value):
    cache, query = Cache(1, 2, 64, 64, 2, 3, torch.float32, bits), normal(1, 4, 1, 64)
    query[0, 1, 0, 5] = value
    ours = cache.attend(width, query)[0, 0]
    assert not ours[1].isfinite().any() and ours[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bias_of_packed_keys(width, bits):
    cache = Cache(2, 2, 32, 48, 9, 5, torch.float32, bits)
    bias = normal(2, 8, 3, 9 * 64 + 7, seed=4)[..., : 9 * 64]
    cache.check(width, normal(2, 8, 3, 32), bias=bias, softcap=20.0)


@DTYPES
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("S", [1, 63, 130, 1500])
def test_what_is_added_to_the_scores(width, S, heads, dtype):
    query, keys, values = (normal(2, H, n, 32, seed=n).to(dtype) for H, n in ((8, 3), (2, S), (2, S)))
    added = 5 * normal(1, heads, 1, S, seed=5)
    mask = torch.rand(2, 1, 3, S, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[..., 0] = True
    call = (query, None, 8, 0, keys, values, mask, 0.2, 10.0, None)
    ours = cpu_decode.attend(cpu_decode.library(width), *call, added=added)
    exact = reference(query, keys, values, mask.expand(2, 8, 3, S), Variant(0.2, softcap=10.0, bias=added))
    assert (ours.transpose(1, 2) - exact).abs().max() < (1e-5 if dtype is torch.float32 else 2e-2)


@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "B, K, N, D, V", [(1, 2, 1, 64, 64), (2, 3, 3, 80, 96), (1, 1, 2, 33, 17), (1, 2, 9, 128, 192)]
)
def test_packing_gives_the_same_bits(width, B, K, N, D, V, bits, dtype):
    keys = (normal(B, K, 64 * N + 5, D) * 10 * normal(D, seed=1)).to(dtype)[:, :, 2:-3]
    values = normal(B, 64 * N, K, V, seed=2).to(dtype).transpose(1, 2)
    keys[0, 0, :, 3], values[0, 0, 3] = 1.5, 0  # a scale of nothing
    if dtype is torch.float32:
        keys[0, 0, 5, 4], values[0, 0, 4, 2] = 1e30, -1e9  # more than a scale holds
    expected = kv.pack(keys, values, bits)
    for ours, theirs in zip(cpu_decode.pack(cpu_decode.library(width), keys, values, bits), expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
