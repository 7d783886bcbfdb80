"""Fewer key/value heads: which heads share a group, and what one head stands for all of them.

Shapes: query [H, D, F], key [K, D, F], value [K, V, F], output [H, V, E]; F counts the input features and a column for
biases. H query heads, K key/value heads; head h reads key/value head h // (H / K). All math is in float64;
queries and outputs, which are only read head by head, may come and go in their own dtype.

What a group shares is chosen for the inputs' second moments C [F, F], in closed form. Scores are bilinear, so heads
need not be equal to be merged without loss, only equal up to a matrix that can be moved into the queries or the output
projection. For values that is any matrix, and the best shared head spans the leading directions of all values of its
group, as the outputs weigh them. So it is for keys that no position rotates. Keys under RoPE may be mixed only by
what commutes with its rotations: within a pair of channels a complex factor, that is a turn (arXiv 2412.20677) and a
scale; the best shared pair is the leading eigenvector of a Hermitian matrix of the group's size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EPSILON = 1e-10  # of the mean of the diagonal: what keeps a matrix of weights invertible


@dataclass(frozen=True)
class Freedom:
    """How the channels of a head may be mixed. Those that are in neither stay as they are."""

    pairs: Tensor  # [P, 2], rotated together by positions: mixed by a complex factor
    free: Tensor  # [R], mixed by any matrix

    @classmethod
    def none(cls) -> Freedom:
        return cls(torch.empty(0, 2, dtype=torch.long), torch.empty(0, dtype=torch.long))

    @classmethod
    def full(cls, channels: int) -> Freedom:
        return cls(torch.empty(0, 2, dtype=torch.long), torch.arange(channels))

    def to(self, device: torch.device) -> Freedom:
        return Freedom(self.pairs.to(device), self.free.to(device))


@dataclass(frozen=True)
class Heads:
    """The four projections of one attention layer, head by head; keys and values in float64."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    def ordered(self, order: list[int]) -> Heads:
        """Key/value heads in this order, each with the query heads that read it."""
        K = len(order)

        def moved(x: Tensor) -> Tensor:
            return _by_key(x, K)[order].flatten(0, 1)

        return Heads(moved(self.query), self.key[order], self.value[order], moved(self.output))


def partition(cost: Tensor, groups: int) -> list[list[int]]:
    """Heads in groups of equal size with a small sum of `cost` [K, K] over the pairs inside: built up from the cheapest
    pair, then improved by exchanges of two heads until none helps."""
    c, left = cost.tolist(), list(range(len(cost)))
    size, found = len(left) // groups, []
    while left:
        group = [min(left, key=lambda i: min((c[i][j] for j in left if j != i), default=0.0))]
        left.remove(group[0])
        while len(group) < size:
            group.append(min(left, key=lambda i: sum(c[i][j] for j in group)))
            left.remove(group[-1])
        found.append(group)

    def gain(a: list[int], i: int, b: list[int], j: int) -> float:
        rest = [c[a[i]][x] - c[b[j]][x] for x in a if x != a[i]] + [c[b[j]][x] - c[a[i]][x] for x in b if x != b[j]]
        return sum(rest)

    exchanged = size > 1
    while exchanged:
        exchanged = False
        for a in range(groups):
            for b in range(a):
                for i in range(size):
                    for j in range(size):
                        if gain(found[a], i, found[b], j) > 1e-12:
                            found[a][i], found[b][j], exchanged = found[b][j], found[a][i], True
    return sorted(sorted(group) for group in found)


@dataclass(frozen=True)
class Aligned:
    """One layer's heads with what it costs to merge them, under second moments of the inputs."""

    heads: Heads
    keys: Freedom
    values: Freedom
    key_gram: Tensor  # [K, D, K, D], of keys over the inputs
    value_gram: Tensor  # [K, V, K, V]
    weight: Tensor  # [K, D, D], of errors of keys: second moments of the queries that read them
    out: Tensor  # [K, V, V], of errors of values: the output projection times itself

    @classmethod
    def of(cls, heads: Heads, moments: Tensor, keys: Freedom, values: Freedom) -> Aligned:
        K = len(heads.key)
        query, output = _by_key(heads.query, K), _by_key(heads.output, K)
        weight = torch.stack([_second(x.double(), moments) for x in query])
        out = torch.stack([_second(x.double(), None) for x in output])
        return cls(heads, keys, values, _gram(heads.key, moments), _gram(heads.value, moments), weight, out)

    def cost(self) -> Tensor:
        """What merging two heads loses [K, K]: of the scores and of the values, each as a share of all."""
        keys = _cost(self.key_gram, self.weight, self.keys)
        return keys + _cost(self.value_gram, self.out, self.values)

    def merged(self, groups: list[list[int]]) -> Heads:
        """The heads of each group merged into one; those that read them lie together."""
        K = len(self.heads.key)
        query, output = _by_key(self.heads.query, K), _by_key(self.heads.output, K)
        queries, keys, values, outputs = [], [], [], []
        for group in groups:
            key, maps = _merged(self.heads.key[group], self.key_gram, self.weight, self.keys, group)
            queries.append(_mapped(maps, query[group]))
            value, turns = _merged(self.heads.value[group], self.value_gram, self.out, self.values, group)
            outputs.append(_mapped(turns, output[group]))
            keys.append(key)
            values.append(value)
        return Heads(torch.cat(queries), torch.stack(keys), torch.stack(values), torch.cat(outputs))


def pooled(heads: Heads, groups: int, merge: str, generator: torch.Generator) -> Heads:
    """Consecutive heads by their mean, the first of them, or new ones of normal numbers of the same size (the
    baselines of arXiv 2305.13245)."""

    def merged(x: Tensor) -> Tensor:
        parts = _by_key(x, groups)
        if merge == "random":
            drawn = torch.randn(parts[:, 0].shape, generator=generator, dtype=torch.float64)
            return drawn.to(x) * x.square().mean().sqrt()
        return parts[:, 0] if merge == "first" else parts.mean(1)

    return replace(heads, key=merged(heads.key), value=merged(heads.value))


def _by_key(x: Tensor, K: int) -> Tensor:
    """[H, ...] as [K, H / K, ...]"""
    return x.reshape(K, -1, *x.shape[1:])


def _second(x: Tensor, moments: Tensor | None) -> Tensor:
    """Second moments [D, D] of the channels of heads [H, D, F], summed over the heads."""
    weighted = x if moments is None else x @ moments
    return torch.einsum("hdf,hef->de", weighted, x)


def _mapped(maps: Tensor, x: Tensor) -> Tensor:
    """maps^T x in float64, head by head, for x [K, H / K, D, F]; [H, D, F] in the dtype of x."""
    parts = [(each.T @ heads.double()).to(x.dtype) for each, heads in zip(maps, x, strict=True)]
    return torch.cat(parts)


def _gram(x: Tensor, moments: Tensor) -> Tensor:
    K, D, _ = x.shape
    rows = x.flatten(0, 1)
    return (rows @ moments @ rows.T).view(K, D, K, D)


def _cost(gram: Tensor, weight: Tensor, freedom: Freedom) -> Tensor:
    K = len(gram)
    cost = gram.new_zeros(K, K)
    total = torch.einsum("kdkd,kd->", gram, weight.diagonal(dim1=1, dim2=2))
    if len(freedom.pairs):
        G = _paired_gram(gram, weight, freedom.pairs)  # [P, K, K]
        own = G.diagonal(dim1=1, dim2=2).real
        difference, apart = own[:, :, None] - own[:, None], (4 * G.abs() ** 2)
        cost += ((own[:, :, None] + own[:, None] - (difference**2 + apart).sqrt()) / 2).sum(0)
    if len(freedom.free):
        G = _weighted_gram(gram, weight, freedom.free)
        R = G.shape[1]
        for i in range(K):
            for j in range(i):
                both = G[[i, j]][:, :, [i, j]].reshape(2 * R, 2 * R)
                cost[i, j] += torch.linalg.eigvalsh(both)[:R].sum()
                cost[j, i] = cost[i, j]
    if fixed := _fixed(gram.shape[1], freedom):
        energy = weight.diagonal(dim1=1, dim2=2)[:, fixed]
        crossed = gram[:, fixed][:, :, :, fixed].diagonal(dim1=1, dim2=3)  # [K, K, D]
        own = crossed.diagonal(dim1=0, dim2=1).T
        apart = own[:, None] + own[None] - crossed - crossed.transpose(0, 1)
        cost += ((energy[:, None] + energy[None]) / 4 * apart).sum(-1)
    cost.fill_diagonal_(0.0)
    return cost / total


def _merged(rows: Tensor, gram: Tensor, weight: Tensor, freedom: Freedom, group: list[int]) -> tuple[Tensor, Tensor]:
    """One head [D, F] and a map [D, D] to each of the group's: `rows[i] ~ maps[i] @ merged`."""
    m, D, _ = rows.shape
    merged, maps = rows.mean(0), torch.eye(D).to(rows).repeat(m, 1, 1)
    gram, weight = gram[group][:, :, group], weight[group]
    if len(freedom.free):
        free = freedom.free
        merged[free], maps[:, free[:, None], free] = _subspace(rows[:, free], gram, weight, free)
    if len(freedom.pairs):
        x, y = freedom.pairs.T
        shared, factor = _direction(torch.complex(rows[:, x], rows[:, y]), gram, weight, freedom.pairs)
        merged[x], merged[y] = shared.real, shared.imag
        maps[:, x, x], maps[:, y, y], maps[:, y, x], maps[:, x, y] = factor.real, factor.real, factor.imag, -factor.imag
    return merged, maps


def _subspace(rows: Tensor, gram: Tensor, weight: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The R directions that lose least of all heads' rows [m, R, F], turned to be near what the heads were."""
    m, R, _ = rows.shape
    roots = _roots(weight, free)
    whole = _weighted_gram(gram, weight, free).reshape(m * R, m * R)
    leading = torch.linalg.eigh(whole).eigenvectors[:, -R:].view(m, R, R)
    merged = torch.einsum("mrs,mrf->sf", leading, roots @ rows)
    maps = torch.linalg.solve_triangular(roots, leading, upper=True)
    left, _, right = torch.linalg.svd(maps.mean(0))
    turn = left @ right
    scale = rows.norm() / (m**0.5 * merged.norm()).clamp(min=1e-300)
    return scale * turn @ merged, maps @ turn.T / scale


def _direction(z: Tensor, gram: Tensor, weight: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair of channels the complex row [P, F] that loses least of all heads' [m, P, F], and the factors [m, P]
    with which it stands for them. Its size and angle are the mean of theirs."""
    G = _paired_gram(gram, weight, pairs)  # [P, m, m]
    energy = _energy(weight, pairs)  # [m, P]
    root = energy.clamp(min=EPSILON * energy.mean().clamp(min=1e-300)).sqrt()
    leading = torch.linalg.eigh(G).eigenvectors[:, :, -1].T.contiguous()  # [m, P]
    shared = (leading.conj() * root)[:, :, None].mul(z).sum(0)
    factor = leading / root
    middle = factor.mean(0)
    turn = torch.where(middle.abs() > 0, middle / middle.abs().clamp(min=1e-300), torch.ones_like(middle))
    size = z.abs().square().sum(-1).mean(0).sqrt() / shared.abs().square().sum(-1).sqrt().clamp(min=1e-300)
    change = turn * size
    return shared * change[:, None], factor / change.where(size > 0, torch.ones_like(change))


def _paired_gram(gram: Tensor, weight: Tensor, pairs: Tensor) -> Tensor:
    """Inner products of the complex rows of two heads, z_i z_j^H, times the roots of both weights [P, K, K]."""
    x, y = pairs.T
    K = len(gram)

    def part(a: Tensor, b: Tensor) -> Tensor:
        return gram[:, a, :, b]  # [P, K, K]: advanced indices that are apart go first

    product = torch.complex(part(x, x) + part(y, y), part(y, x) - part(x, y))
    root = _energy(weight, pairs)
    root = root.clamp(min=EPSILON * root.mean().clamp(min=1e-300)).sqrt().T  # [P, K]
    assert product.shape == (len(pairs), K, K)
    return product * root[:, :, None] * root[:, None]


def _energy(weight: Tensor, pairs: Tensor) -> Tensor:
    own = weight.diagonal(dim1=1, dim2=2)
    return own[:, pairs[:, 0]] + own[:, pairs[:, 1]]


def _roots(weight: Tensor, free: Tensor) -> Tensor:
    """Upper triangles R with R^T R the weight of these channels [K, R, R]."""
    part = weight[:, free[:, None], free]
    size = part.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-300)
    return torch.linalg.cholesky(part + EPSILON * size * torch.eye(len(free)).to(part)).transpose(1, 2)


def _weighted_gram(gram: Tensor, weight: Tensor, free: Tensor) -> Tensor:
    """[K, R, K, R]"""
    roots = _roots(weight, free)
    return torch.einsum("irs,isjt,jut->irju", roots, gram[:, free][:, :, :, free], roots)


def _fixed(channels: int, freedom: Freedom) -> list[int]:
    return sorted(set(range(channels)) - {*freedom.free.tolist(), *freedom.pairs.flatten().tolist()})
