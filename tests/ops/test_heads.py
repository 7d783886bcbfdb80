"""Grouping, alignment and merging of heads against slow searches and definitions in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_accel_patch.ops.heads import Aligned, Freedom, Heads, partition, pooled

K, D, V, F, E = 4, 8, 6, 20, 10
HALVES = torch.stack([torch.arange(D // 2), torch.arange(D // 2) + D // 2], 1)
NEIGHBOURS = torch.arange(D).view(-1, 2)
NOTHING = torch.empty(0, dtype=torch.long)
FREEDOMS = {
    "half-split": Freedom(HALVES, NOTHING),
    "interleaved": Freedom(NEIGHBOURS, NOTHING),
    "partial": Freedom(NEIGHBOURS[:2], torch.arange(4, D)),
    "free": Freedom.full(D),
    "fixed": Freedom.none(),
}
every_freedom = pytest.mark.parametrize("keys", FREEDOMS.values(), ids=FREEDOMS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_heads(groups: int = 2) -> Heads:
    return Heads(
        drawn(K * groups, D, F), drawn(K, D, F, seed=1), drawn(K, V, F, seed=2), drawn(K * groups, V, E, seed=3)
    )


def moments(seed: int = 4) -> Tensor:
    x = drawn(3 * F, F, seed=seed) * torch.linspace(0.1, 2, F, dtype=torch.float64)
    return x.T @ x / len(x)


def rotation(freedom: Freedom, position: int) -> Tensor:
    """What positions do to the channels of a key: a turn of each pair by its own frequency."""
    found = torch.eye(D, dtype=torch.float64)
    for index, (x, y) in enumerate(freedom.pairs.tolist()):
        angle = position * 0.7 / (index + 1)
        found[x, x] = found[y, y] = math.cos(angle)
        found[x, y], found[y, x] = -math.sin(angle), math.sin(angle)
    return found


def scores(heads: Heads, freedom: Freedom, x: Tensor) -> Tensor:
    """[H, T, T]: each query head with its own key head, rotated to their positions, in loops."""
    H, T = len(heads.query), len(x)
    found = torch.empty(H, T, T, dtype=torch.float64)
    for h in range(H):
        key = heads.key[h * len(heads.key) // H]
        for t, s in itertools.product(range(T), range(T)):
            query, rotated = rotation(freedom, t) @ heads.query[h] @ x[t], rotation(freedom, s) @ key @ x[s]
            found[h, t, s] = query @ rotated
    return found


def outputs(heads: Heads, x: Tensor) -> Tensor:
    """[H, T, E]: what each query head adds to the output where it attends to one token only."""
    H = len(heads.query)
    return torch.stack([x @ heads.value[h * len(heads.value) // H].T @ heads.output[h] for h in range(H)])


def random_map(channels: int, freedom: Freedom, seed: int) -> Tensor:
    found, R = torch.eye(channels, dtype=torch.float64), len(freedom.free)
    if R:
        found[freedom.free[:, None], freedom.free] = drawn(R, R, seed=seed)
    for index, (x, y) in enumerate(freedom.pairs.tolist()):
        a, b = drawn(2, seed=100 * seed + index).tolist()
        found[x, x], found[x, y], found[y, x], found[y, y] = a, -b, b, a
    return found


@every_freedom
def test_transformed_copies_merge_without_loss(keys: Freedom) -> None:
    """Whatever commutes with the positions is taken back by queries and outputs, in any order of the heads."""
    base, source = some_heads(), [1, 0, 0, 1]
    key = torch.stack([random_map(D, keys, 10 + i) @ base.key[s] for i, s in enumerate(source)])
    value = torch.stack([drawn(V, V, seed=20 + i) @ base.value[s] for i, s in enumerate(source)])
    heads = Heads(base.query, key, value, base.output)
    before = Aligned.of(heads, moments(), keys, Freedom.full(V))
    groups = partition(before.cost(), 2)
    assert groups == [[0, 3], [1, 2]]
    merged, order = before.merged(groups), [0, 3, 1, 2]
    assert merged.key.shape == (2, D, F) and merged.value.shape == (2, V, F)
    x, moved = drawn(5, F, seed=5), heads.ordered(order)
    torch.testing.assert_close(scores(merged, keys, x), scores(moved, keys, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs(merged, x), outputs(moved, x), rtol=1e-6, atol=1e-6)


def loss(heads: Heads, merged: Heads, keys: Freedom, C: Tensor) -> tuple[float, float]:
    """What merging loses, from its definition: of scores, for each pair of channels at the phases 0 and 90 degrees and
    for the others together; of outputs."""
    root = torch.linalg.cholesky(C)
    H, parts = len(heads.query), [*keys.pairs.tolist(), *([keys.free.tolist()] if len(keys.free) else [])]
    of_scores = of_outputs = 0.0
    for h in range(H):
        key, other = heads.key[h * len(heads.key) // H], merged.key[h * len(merged.key) // H]
        for part in parts:
            quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
            for turn in [torch.eye(len(part), dtype=torch.float64), *([quarter] if len(part) == 2 else [])]:
                was = root.T @ heads.query[h][part].T @ turn @ key[part] @ root
                now = root.T @ merged.query[h][part].T @ turn @ other[part] @ root
                of_scores += (was - now).square().sum().item()
        value, shared = heads.value[h * len(heads.value) // H], merged.value[h * len(merged.value) // H]
        of_outputs += ((heads.output[h].T @ value - merged.output[h].T @ shared) @ root).square().sum().item()
    return of_scores, of_outputs


@pytest.mark.parametrize("label", ["half-split", "interleaved", "free"])
def test_nothing_near_loses_less(label: str) -> None:
    """The closed form is a minimum: moving the shared heads, and answering with the best queries and outputs that there
    are for them, never loses less."""
    keys, C, heads = FREEDOMS[label], moments(), some_heads()
    groups = [[0, 1], [2, 3]]
    merged = Aligned.of(heads, C, keys, Freedom.full(V)).merged(groups)
    best = loss(heads, merged, keys, C)
    assert best[0] > 0 and best[1] > 0
    for seed in range(6):
        key, value = (x + 0.05 * drawn(*x.shape, seed=50 + seed) for x in (merged.key, merged.value))
        query, output = torch.empty_like(heads.query), torch.empty_like(heads.output)
        for h in range(len(query)):
            k, shared = heads.key[h // 2], key[h // 4]
            v, common = heads.value[h // 2], value[h // 4]
            output[h] = torch.linalg.solve(common @ C @ common.T, common @ C @ v.T) @ heads.output[h]
            if len(keys.free):
                query[h] = torch.linalg.solve(shared @ C @ shared.T, shared @ C @ k.T) @ heads.query[h]
            for x, y in keys.pairs.tolist():
                z, w = torch.complex(k[x], k[y]), torch.complex(heads.query[h, x], heads.query[h, y])
                c = torch.complex(shared[x], shared[y])
                factor = (c.conj() @ (C + 0j) @ z) / (c.conj() @ (C + 0j) @ c)
                answer = factor.conj() * w
                query[h, x], query[h, y] = answer.real, answer.imag
        other = loss(heads, Heads(query, key, value, output), keys, C)
        assert other[0] > best[0] and other[1] > best[1]


def test_cost_is_the_loss_of_a_pair() -> None:
    keys, C, heads = FREEDOMS["half-split"], moments(), some_heads()
    cost = Aligned.of(heads, C, keys, Freedom.full(V)).cost()
    torch.testing.assert_close(cost, cost.T)
    assert not cost.diagonal().any()
    lost = {}
    for i, j in itertools.combinations(range(K), 2):
        two = Heads(heads.query.view(K, 2, D, F)[[i, j]].flatten(0, 1), heads.key[[i, j]], heads.value[[i, j]],
                    heads.output.view(K, 2, V, E)[[i, j]].flatten(0, 1))  # fmt: skip
        lost[i, j] = loss(two, Aligned.of(two, C, keys, Freedom.full(V)).merged([[0, 1]]), keys, C)
    pairs = [*lost]
    scale = torch.tensor([lost[pair] for pair in pairs], dtype=torch.float64)
    found = torch.tensor([cost[pair] for pair in pairs])
    fitted = torch.linalg.lstsq(scale, found[:, None]).solution  # a share of all scores, and one of all outputs
    assert (fitted > 0).all()
    torch.testing.assert_close(scale @ fitted[:, 0], found, rtol=1e-6, atol=1e-9)


def test_partition_of_planted_groups() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    group = torch.arange(12)[order] % 3
    cost = (group[:, None] != group[None]).double() * (1 + drawn(12, 12).abs())
    found = partition(cost + cost.T, 3)
    assert sorted(len(each) for each in found) == [4, 4, 4]
    assert all(len({int(group[i]) for i in each}) == 1 for each in found)
    assert sorted(head for each in found for head in each) == list(range(12)) and found == sorted(found)


@pytest.mark.parametrize("seed", range(4))
def test_partition_is_nearly_the_best(seed: int) -> None:
    cost = drawn(8, 8, seed=seed).abs()
    cost = (cost + cost.T).fill_diagonal_(0)

    def total(groups: list[list[int]]) -> float:
        return sum(cost[i, j].item() for group in groups for i, j in itertools.combinations(group, 2))

    def pairings(left: list[int]) -> list[list[list[int]]]:
        if not left:
            return [[]]
        return [[[left[0], x], *rest] for x in left[1:] for rest in pairings([y for y in left[1:] if y != x])]

    assert total(partition(cost, 4)) <= 1.25 * min(map(total, pairings(list(range(8)))))


def test_one_group_and_as_many_as_heads() -> None:
    cost = drawn(4, 4).abs()
    assert partition(cost, 1) == [[0, 1, 2, 3]] and partition(cost, 4) == [[0], [1], [2], [3]]


def test_pooled() -> None:
    heads, generator = some_heads(), torch.Generator().manual_seed(0)
    mean, first, drawn_anew = (pooled(heads, 2, merge, generator) for merge in ("mean", "first", "random"))
    torch.testing.assert_close(mean.key[1], (heads.key[2] + heads.key[3]) / 2)
    assert torch.equal(first.value[1], heads.value[2]) and first.query is heads.query and mean.output is heads.output
    assert drawn_anew.key.shape == (2, D, F) and not torch.isclose(drawn_anew.key, heads.key[:2]).any()
    assert abs(drawn_anew.key.std() / heads.key.std() - 1) < 0.2
    again = pooled(heads, 2, "random", torch.Generator().manual_seed(0))
    assert torch.equal(again.key, drawn_anew.key)


@every_freedom
def test_dead_heads_stay_finite(keys: Freedom) -> None:
    """A head that is all zeros, as pruning leaves it."""
    heads = some_heads()
    for part in (heads.key, heads.value):
        part[1] = 0
    heads.query[2:4], heads.output[2:4] = 0, 0
    for groups in ([[0, 1], [2, 3]], [[0, 1, 2, 3]]):
        before = Aligned.of(heads, moments(), keys, Freedom.full(V))
        merged = before.merged(groups)
        assert before.cost().isfinite().all()
        assert all(x.isfinite().all() for x in (merged.query, merged.key, merged.value, merged.output))
