"""PyTorch's fused attention with grouped heads, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from hf_accel_patch.ops import fused
from hf_accel_patch.ops.attention import attend, reference
from hf_accel_patch.ops.case import Causal, Variant
from hf_accel_patch.ops.fused import fused_attention

B, H, K, T, D = 2, 6, 2, 9, 16
TOLERANCE = 2e-5


def inputs(S=T):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(B, T, H, D, generator=generator).transpose(1, 2)
    return query, *(torch.randn(B, K, S, D, generator=generator) for _ in range(2))


@pytest.fixture
def calls(monkeypatch):
    """Those of PyTorch, where it stores all scores for grouped heads: heads of queries and of keys."""
    monkeypatch.setattr(fused, "_groups_store_scores", lambda *_: True)
    real, seen = F.scaled_dot_product_attention, []

    def attention(query, key, *rest, enable_gqa=False, **options):
        assert query.shape[1] == key.shape[1] and not enable_gqa
        seen.append((tuple(query.shape), options.get("is_causal", False)))
        return real(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return seen


def test_causal_heads_of_a_group_are_a_call_each(calls):
    query, key, value = inputs()
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, H, T, T)
    ours = fused_attention(query, key, value, None, 0.0, 0.3, causal=True)
    assert calls == [((B, K, T, D), True)] * (H // K)
    assert (ours - reference(query, key, value, mask, Variant(0.3))).abs().max() < TOLERANCE


@pytest.mark.parametrize("shape", [None, (1, 1, T, 20), (B, 1, 1, 20), (B, H, T, 20)], ids=str)
def test_other_heads_of_a_group_are_rows(calls, shape):
    query, key, value = inputs(20)
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    ours = fused_attention(query, key, value, mask, 0.0, 0.3)
    assert calls == [((B, K, H // K * T, D), False)]
    mask = mask if mask is None else mask.expand(B, H, T, 20)
    assert (ours - reference(query, key, value, mask, Variant(0.3))).abs().max() < TOLERANCE


def test_sequences_of_a_padded_batch_go_the_same_way(calls):
    query, key, value = inputs()
    mask = Causal(T, query.device)
    object.__setattr__(mask, "spans", lambda: [(0, T), (3, T)])
    ours = attend(query, key, value, mask, Variant(0.3))
    assert [shape[2] for shape, causal in calls if causal] == [T] * 3 + [T - 3] * 3
    dense = torch.ones(T, T, dtype=torch.bool).tril().expand(B, H, T, T).clone()
    dense[1, :, :, :3] = False
    assert (ours - reference(query, key, value, dense, Variant(0.3))).abs().max() < TOLERANCE


class Like:
    """What the choice looks at."""

    is_cpu, is_cuda = False, True

    def __init__(self, dtype, size):
        self.dtype, self.shape = dtype, (1, 1, 1, size)


@pytest.mark.parametrize(
    "dtype, size, autocast, stores",
    [
        (torch.bfloat16, 128, None, False),
        (torch.float16, 256, None, False),
        (torch.float32, 128, None, True),
        (torch.bfloat16, 512, None, True),
        (torch.float32, 128, torch.bfloat16, False),
    ],
    ids=str,
)
def test_where_pytorch_stores_all_scores(dtype, size, autocast, stores, monkeypatch):
    """The rule for graphs and autocast; elsewhere PyTorch is asked."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: autocast)
    each = Like(dtype, size)
    assert fused._groups_store_scores(each, each, each, None, 0.0, True) == stores


def test_pytorch_is_asked(monkeypatch):
    asked = []
    for name in ("flash", "cudnn"):
        monkeypatch.setattr(
            torch.backends.cuda,
            f"can_use_{name}_attention",
            lambda case, name=name: asked.append((name, case)) and None,
        )
    query, key, value = inputs()

    class Queries(torch.Tensor):
        is_cpu, is_cuda = False, True

    assert fused._groups_store_scores(query.as_subclass(Queries), key, value, None, 0.0, True)
    assert [name for name, _ in asked] == ["flash", "cudnn"] and asked[0][1].is_causal and asked[0][1].enable_gqa
    assert not fused._groups_store_scores(query, key, value, None, 0.0, True)  # on a CPU
