"""Attention in blocks against its definition in float64."""

import pytest
import torch

from hf_accel_patch.ops import attention
from hf_accel_patch.ops.attention import attend, reference, scored
from hf_accel_patch.ops.case import Causal, Dense, Everything, Variant
from hf_accel_patch.ops.mask import Carried, DescribedMask, contiguous_runs, last_keys

B, T, D = 2, 13, 8
TOLERANCE = 1e-5  # float32 against float64, outputs of order one


def inputs(H=4, K=2, S=T, V=D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, V))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def causal(H=4, S=T):
    return (torch.arange(S) <= torch.arange(S - T, S)[:, None]).expand(B, H, T, S)


@pytest.fixture(autouse=True, params=[1 << 30, 2000], ids=["one block", "many blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(attention, "SCORE_BYTES", request.param)


VARIANTS = {
    "plain": Variant(0.3),
    "soft cap": Variant(0.3, softcap=2.0),
    "sinks": Variant(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]).view(1, 4, 1, 1)),
    "sinks per query": Variant(0.3, sinks=torch.randn(B, 4, T, 1, generator=torch.Generator().manual_seed(2))),
    "bias": Variant(0.3, bias=torch.randn(1, 4, T, T, generator=torch.Generator().manual_seed(1))),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_variants(variant, heads):
    query, key, value = inputs(*heads)
    ours = attend(query, key, value, Causal(T, query.device), variant)
    assert (ours - reference(query, key, value, causal(), variant)).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_float64(variant):
    """Its lowest number is none of float32, in which scores are."""
    query, key, value = inputs(dtype=torch.float64)
    with torch.no_grad():
        ours = attend(query, key, value, Dense(causal()), variant)
    assert ours.dtype == torch.float64
    assert (ours - reference(query, key, value, causal(), variant)).abs().max() < TOLERANCE


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_scores_are_overwritten_without_gradients(variant, additive):
    """Queries that see nothing give all weight to the sink, where there is one."""
    query, key, value = inputs()
    seen = causal().clone()
    seen[:, :, 3] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if additive else seen
    expected = reference(query, key, value, seen, variant)
    found = []
    for keep in (True, False):
        with torch.set_grad_enabled(keep):
            output, weights = scored(query, key, value, mask, variant.bias, variant)
        found.append(torch.cat((output, weights), dim=-1))
        rows = torch.arange(T) != (3 if variant.sinks is None else T)
        assert (output - expected)[:, :, rows].abs().max() < TOLERANCE
    real = found[0].isfinite()
    assert (found[1] - found[0])[real].abs().max() < TOLERANCE and found[1].isfinite().all()


SEEN = {
    "causal": lambda: (Causal(T, torch.device("cpu")), causal()),
    "holes": lambda: (described(T, T, HOLES, square=True), causal() & HOLES[:, None, None]),
    "window": lambda: (described(T, T).windowed(4), windowed(4).expand(B, 4, T, T)),
    "bool": lambda: (Dense(causal()[:, :1]), causal()),
    "additive": lambda: (Dense(torch.zeros(T, T).masked_fill(~causal(), -torch.inf)), causal()),
    "lowest": lambda: (Dense(~causal() * torch.finfo(torch.float32).min), causal()),
}


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("V", [D, 5, 20])
@torch.no_grad()
def test_sinks_behind_the_fused_kernel(V, heads, seen, monkeypatch):
    """It gives the sums away, of which a sink takes its share; without gradients. A query that sees nothing gives all
    its weight to the sink."""
    monkeypatch.setattr(attention, "PADDED_FROM", 0)
    monkeypatch.setattr(attention, "PADDED_ROWS", 1)
    monkeypatch.setattr(attention, "scored", None)
    (query, key, value), (mask, dense) = inputs(*heads, V=V), seen()
    for sinks in (torch.tensor([0.5, -1.0, 20.0, -torch.inf]).view(1, 4, 1, 1), torch.randn(B, 4, 1, 1)):
        variant = Variant(0.3, sinks=sinks)
        ours = attend(query, key, value, mask, variant)
        assert (ours - reference(query, key, value, dense, variant)).abs().max() < TOLERANCE


@torch.no_grad()
def test_sinks_of_sequences_apart():
    query, key, value = inputs()
    mask = DescribedMask((B, 1, T, T), query.device, pytest.fail, causal=True, runs=lambda: contiguous_runs(PADDING))
    variant = Variant(0.3, sinks=torch.randn(B, 4, 1, 1))
    ours = attend(query, key, value, mask, variant)
    expected = reference(query, key, value, causal() & PADDING[:, None, None], variant)
    assert (ours - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_sinks_in_16_bits_are_as_exact_as_where_all_scores_are_stored():
    query, key, value = inputs(dtype=torch.bfloat16)
    variant = VARIANTS["sinks"]
    exact = reference(query, key, value, causal(), variant)
    stored = scored(query, key, value, causal(), None, variant)[0]
    ours = attend(query, key, value, Causal(T, query.device), variant)
    assert (ours - exact).square().mean() < 1.5 * (stored - exact).square().mean()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("padded", [False, True], ids=["scores", "zeros behind"])
@pytest.mark.parametrize("V", [5, 20])
def test_values_of_another_size(V, padded, biased, heads, monkeypatch):
    monkeypatch.setattr(attention, "PADDED_FROM", 0 if padded else 1 << 30)
    monkeypatch.setattr(attention, "PADDED_ROWS", 1)
    fused, called = attention.fused_attention, []
    spy = lambda *args, **options: called.append(args) or fused(*args, **options)  # noqa: E731
    monkeypatch.setattr(attention, "fused_attention", spy)
    query, key, value = inputs(*heads, V=V)
    variant = VARIANTS["bias" if biased else "plain"]
    ours = attend(query, key, value, Causal(T, query.device), variant)
    assert ours.shape == (B, 4, T, V) and bool(called) is padded
    assert (ours - reference(query, key, value, causal(), variant)).abs().max() < TOLERANCE


def test_few_queries_copy_no_cache(monkeypatch):
    """Zeros behind all keys or values would be written anew for them."""
    monkeypatch.setattr(attention, "equal_sizes", None)
    query, key, value = (torch.randn(1, 2, length, size) for length, size in ((20, 8), (5000, 8), (5000, 12)))
    seen = torch.ones(1, 1, 20, 5000, dtype=torch.bool).tril(4980)
    ours = attend(query, key, value, Dense(seen), Variant(0.3))
    expected = reference(query, key, value, seen.expand(1, 2, 20, 5000), Variant(0.3))
    assert (ours - expected).abs().max() < TOLERANCE


def test_everything_is_seen_without_a_mask():
    query, key, value = inputs(S=20)
    ours = attend(query, key, value, Everything(20), Variant(0.3))
    assert (ours - reference(query, key, value, None, Variant(0.3))).abs().max() < TOLERANCE


@pytest.mark.parametrize("additive", [False, True])
def test_dense_masks(additive):
    query, key, value = inputs(S=20)
    seen = causal(S=20)[:, :1]
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if additive else seen
    ours = attend(query, key, value, Dense(mask), Variant(0.3))
    assert (ours - reference(query, key, value, causal(S=20), Variant(0.3))).abs().max() < TOLERANCE


def windowed(window, S=T, offset=0):
    rows, columns = torch.arange(T)[:, None] + offset, torch.arange(S)
    return (columns <= rows) & (columns > rows - window)


@pytest.mark.parametrize("window", [1, 4, 100])
def test_described_windows_leave_keys_out(window):
    query, key, value = inputs()
    dense, asked = windowed(window), []

    def build(start, stop, first, last):
        asked.append((last - first, stop - start))
        return dense[None, None, start:stop, first:last]

    mask = DescribedMask((B, 1, T, T), query.device, build, causal=True, window=window)
    ours = attend(query, key, value, mask, Variant(0.3))
    assert (ours - reference(query, key, value, dense.expand(B, 4, T, T), Variant(0.3))).abs().max() < TOLERANCE
    assert all(keys <= rows + window - 1 for keys, rows in asked)


def test_runs_of_padded_batches():
    query, key, value = inputs()
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[1, :5] = False
    mask = DescribedMask((B, 1, T, T), query.device, pytest.fail, causal=True, runs=lambda: contiguous_runs(padding))
    ours = attend(query, key, value, mask, Variant(0.3))
    expected = reference(query, key, value, causal() & padding[:, None, None], Variant(0.3))
    real = padding[:, None, :, None]
    assert ((ours - expected) * real).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([[1, 1, 1], [0, 1, 1]], [(0, 3), (1, 3)]),
        ([[1, 1, 0], [0, 1, 0]], [(0, 2), (1, 2)]),
        ([[1, 0, 1]], None),
        ([[0, 0, 0]], [(0, 0)]),
    ],
)
def test_contiguous_runs(rows, expected):
    assert contiguous_runs(torch.tensor(rows).bool()) == expected


def test_weights_are_a_distribution_and_give_the_output():
    query, key, value = inputs()
    output, weights = scored(query, key, value, causal()[:, :1], None, Variant(0.3))
    assert torch.allclose(weights.sum(-1), torch.ones(B, 4, T))
    assert weights[..., 0, 1:].abs().max() == 0
    assert torch.allclose(output, weights @ value.repeat_interleave(2, 1), atol=1e-6)


def test_gradients_flow_through_blocks():
    query, key, value = (x.requires_grad_() for x in inputs())
    attend(query, key, value, Causal(T, query.device), Variant(0.3)).square().sum().backward()
    ours = [x.grad.clone() for x in (query, key, value)]
    for x in (query, key, value):
        x.grad = None
    reference(query, key, value, causal(), Variant(0.3)).square().sum().backward()
    assert all((x.grad - grad).abs().max() < 1e-4 for x, grad in zip((query, key, value), ours, strict=True))


def test_a_described_mask_is_a_dense_one_to_whoever_computes_with_it():
    dense = windowed(3)[None, None]
    mask = DescribedMask((1, 1, T, T), torch.device("cpu"), lambda a, b, c, d: dense[:, :, a:b, c:d])
    assert mask.shape == dense.shape and mask.dtype == torch.bool
    assert torch.equal(mask[..., :5], dense[..., :5])
    assert torch.equal(torch.where(mask, 1.0, 2.0), torch.where(dense, 1.0, 2.0))
    assert "DescribedMask" in repr(mask)


def row(H=4, S=T, batch=1):
    """ALiBi, as it is for every query."""
    slopes = 2.0 ** -torch.arange(1, H + 1).view(1, H, 1, 1)
    return (slopes * torch.arange(1 - S, 1)).expand(batch, H, 1, S)


def described(T_, S, padding=None, square=False):
    def build(start, stop, first, last):
        seen = torch.arange(first, last) <= torch.arange(start, stop)[:, None] + S - T_
        return seen[None, None] if padding is None else seen & padding[:, None, None, first:last]

    shape = (B if padding is not None else 1, 1, T_, S)
    options = {"offset": S - T_, "causal": True, "square": square, "padding": padding}
    return DescribedMask(shape, torch.device("cpu"), build, **options)


PADDING = torch.arange(T) >= torch.tensor([[0], [5]])
HOLES = ~PADDING | (torch.arange(T) < 3)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("padding", [None, PADDING, HOLES], ids=["whole", "left", "holes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bias_that_is_the_same_for_all_queries(heads, padding, dtype):
    query, key, value = inputs(*heads, dtype=dtype)
    mask = Causal(T, query.device) if padding is None else described(T, T, padding, square=True)
    ours = attend(query, key, value, mask, Variant(0.3, bias=row()))
    seen = causal() if padding is None else causal() & padding[:, None, None]
    error = (ours - reference(query, key, value, seen, Variant(0.3, bias=row()))).abs().max()
    assert error < (2e-2 if dtype == torch.bfloat16 else TOLERANCE)


@pytest.mark.parametrize("S", [T, 30])
def test_a_bias_over_a_cache_that_is_continued(S):
    query, key, value = inputs(S=S)
    variant = Variant(0.3, bias=row(S=S))
    ours = attend(query, key, value, described(T, S), variant)
    assert (ours - reference(query, key, value, causal(S=S), variant)).abs().max() < TOLERANCE
    one = attend(query[:, :, -1:], key, value, Everything(S), variant)
    assert (one - ours[:, :, -1:]).abs().max() < TOLERANCE


def test_queries_that_see_nothing_have_no_gradient():
    query, key, value = (each.requires_grad_() for each in inputs(4, 4))
    attend(query, key, value, described(T, T, PADDING, square=True), Variant(0.3, bias=row())).sum().backward()
    assert query.grad[1, :, :5].abs().max() == key.grad[1, :, :5].abs().max() == 0
    seen = (causal() & PADDING[:, None, None]) | torch.eye(T, dtype=torch.bool)
    dense = [each.detach().double().requires_grad_() for each in (query, key, value)]
    scores = 0.3 * dense[0] @ dense[1].transpose(2, 3) + row()
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) * PADDING[:, None, :, None]
    (weights @ dense[2]).sum().backward()
    for ours, exact in zip((query, key, value), dense, strict=True):
        assert (ours.grad - exact.grad).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [D, 5, 20])
def test_a_bias_as_more_channels(dtype, V):
    """What a GPU computes, whose fused kernels take no bias; the positions are as far apart as in a long text."""
    query, key, value = inputs(4, 4, V=V, dtype=dtype)
    variant = Variant(0.3, bias=row() * 500)
    ours = attention._row_as_channels(query, key, value, variant)
    error = (ours - reference(query, key, value, causal(), variant)).abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 2e-2)
    apart = attention._by_sequence(query, key, value, [(0, T), (5, T)], variant)
    exact = reference(query, key, value, causal() & PADDING[:, None, None], variant)
    assert (apart - exact)[1, :, 5:].abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("S", [T, 30])
@pytest.mark.parametrize("window", [1, 4, 40])
def test_masks_that_get_a_window(S, window):
    mask = described(T, S, PADDING if S == T else None)
    near = torch.arange(S) > torch.arange(S - T, S)[:, None] - window
    assert torch.equal(mask.windowed(window).dense(), mask.dense() & near)
    assert all(
        mask.windowed(window).keys(t, t + 1)[1] - mask.windowed(window).keys(t, t + 1)[0] <= window for t in range(T)
    )
    real = mask.dense().any(-1, keepdim=True) & mask.dense().diagonal(S - T, -2, -1)[..., None]
    assert torch.equal(last_keys(mask.dense(), window) & real, mask.windowed(window).dense() & real)


def test_masks_on_their_way():
    """What code does that hands masks on leaves them as they are; what computes with them gets the dense one."""
    for content in (None, described(T, T), described(T, T).dense()):
        carried = Carried(content, (1, T, T), torch.device("cpu"))
        assert carried.to(torch.bool) is carried and carried.ndim == 3 and carried.detach().content is content
        assert torch.equal(carried & True, torch.ones(1, T, T, dtype=torch.bool).tril())
    mask = described(T, T)
    assert isinstance(mask.detach(), DescribedMask) and torch.equal(mask.detach().dense(), mask.dense())
