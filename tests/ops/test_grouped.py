"""Two score matrices, joined by fused kernels or computed block by block, against query by query in float64."""

import pytest
import torch

from hf_accel_patch.kernels import cpu_decode
from hf_accel_patch.ops import grouped
from hf_accel_patch.ops.case import Causal, Dense, Everything, Variant
from hf_accel_patch.ops.grouped import Grouping, Keys, attend_grouped, scored_grouped

B, H, K, D = 2, 4, 2, 16


def states(T, S, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((H, T), (H, T), (K, S), (K, S), (K, S))
    return [torch.randn(B, heads, count, D, generator=generator).to(dtype) for heads, count in sizes]


def reference(query, far_query, key, far_key, value, seen, window, scale, softcap=None):
    T, S = query.shape[2], key.shape[2]
    output = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            k, f, v = (x[b, h * K // H].double() for x in (key, far_key, value))
            for t in range(T):
                near = torch.arange(S) > S - T + t - window
                scores = torch.where(near, k @ query[b, h, t].double(), f @ far_query[b, h, t].double()) * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                visible = seen[b if len(seen) > 1 else 0, 0, t] & (torch.arange(S) <= S - T + t)
                if visible.any():
                    output[b, h, t] = torch.softmax(scores[visible], 0) @ v[visible]
    return output


def check(T, S, window, mask=None, settled=0, dtype=torch.float32, tolerance=1e-5, grad=False, **options):
    query, far_query, key, far_key, value = states(T, S, dtype=dtype)
    seen = torch.ones(1, 1, T, S, dtype=torch.bool) if mask is None else mask
    expected = reference(query, far_query, key, far_key, value, seen, window, 0.3, **options)
    first = max(0, S - T - window + 1)
    far = [each for each in (far_key[:, :, :settled], far_key[:, :, settled : S - window]) if each.shape[2]]
    given = query, far_query, Keys(far, key[:, :, first:]), value
    described = Everything(S) if T == 1 else Causal(S, query.device) if T == S and mask is None else None
    if mask is not None or described is None:
        causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        described = Dense(seen & causal)
    variant = Variant(0.3, **options)
    with torch.set_grad_enabled(grad):
        found = attend_grouped(*given, described, variant, window)
        output, weights = scored_grouped(*given, described, variant, window)
    live = expected.abs().sum(-1) > 0
    assert (found.double() - expected)[live].abs().max() < tolerance
    assert (output.double() - expected)[live].abs().max() < tolerance
    assert weights.shape == (B, H, T, S)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "T, S, window, settled", [(50, 50, 8, 0), (1, 50, 8, 42), (1, 50, 1, 49), (5, 50, 8, 38), (20, 50, 7, 10)]
)
def test_against_query_by_query(T, S, window, settled, grad, monkeypatch):
    monkeypatch.setattr(grouped, "LEAST_ROWS", 16)  # several blocks
    check(T, S, window, settled=settled, grad=grad)


@pytest.mark.parametrize("T, S, settled", [(40, 40, 0), (1, 40, 32), (3, 40, 30), (20, 40, 13)])
def test_rows_that_see_little(T, S, settled):
    """Padding on the left hides all far keys of some queries, and all keys of others."""
    padding = torch.arange(S) >= torch.tensor([0, 35])[:, None]
    check(T, S, 8, padding[:, None, None].expand(B, 1, T, S), settled)


def test_a_soft_cap():
    check(30, 30, 8, softcap=2.0)


def test_in_16_bits():
    check(30, 30, 8, dtype=torch.bfloat16, tolerance=0.05)
    check(1, 30, 8, settled=22, dtype=torch.bfloat16, tolerance=0.05)


def test_an_additive_mask():
    T = S = 30
    hidden = torch.arange(S) < torch.tensor([0, 25])[:, None]
    seen = (~hidden)[:, None, None] & torch.ones(T, S, dtype=torch.bool).tril()
    query, far_query, key, far_key, value = states(T, S)
    given = query, far_query, Keys([far_key[:, :, : S - 8]], key), value
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros(seen.shape).masked_fill(~seen, lowest)
    with torch.no_grad():
        found, expected = (attend_grouped(*given, Dense(mask), Variant(0.3), 8) for mask in (added, seen))
    assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.allclose(
        found[1, :, 25:], expected[1, :, 25:], atol=1e-5
    )


def test_groups():
    grouping = Grouping(8, 3, 64)
    positions = torch.arange(200)
    queries, keys = positions + grouping.of_queries(positions), positions + grouping.of_keys(positions)
    assert torch.equal(keys, positions // 3) and torch.equal(queries, positions // 3 + 8 - 2)
    assert torch.equal(grouping.sharpness(positions[:64]), torch.ones(64))
    assert torch.allclose(grouping.sharpness(torch.tensor([64**2 - 1])), torch.tensor(2.0))


@pytest.mark.skipif(cpu_decode.library() is None, reason=cpu_decode.why_not())
@pytest.mark.parametrize("T", [1, 3])
def test_the_sums_of_the_compiled_kernel(T):
    query, _, key, _, value = states(T, 300)
    seen = torch.rand(B, 1, T, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[1, 0, -1] = False
    sums = torch.empty(B, T, H)
    cpu_decode.attend(cpu_decode.library(), query, None, 8, 0, key, value, seen, 0.3, None, None, sums=sums)
    scores = (query.double() @ key.double().repeat_interleave(H // K, 1).mT * 0.3).masked_fill(~seen, -torch.inf)
    expected = scores.logsumexp(-1).transpose(1, 2)
    assert torch.equal(sums.isinf(), expected.isinf()) and sums[1, -1].isinf().all()
    assert torch.allclose(sums.double()[~sums.isinf()], expected[~expected.isinf()], atol=1e-5)
