"""Attention in blocks against its definition in float64."""

import pytest
import torch

from hf_accel_patch.ops import attention
from hf_accel_patch.ops.attention import Causal, Dense, Everything, Variant, attend, reference, scored
from hf_accel_patch.ops.mask import DescribedMask, contiguous_runs

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


def test_values_of_another_size():
    query, key, value = inputs(V=5)
    ours = attend(query, key, value, Causal(T, query.device), Variant(0.3))
    assert (ours - reference(query, key, value, causal(), Variant(0.3))).abs().max() < TOLERANCE


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
