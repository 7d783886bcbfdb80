"""Indices of tensors inside a kernel: sums of loop variables, each times a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

COLUMN = "c"  # the variable that is a vector, as are others that begin so; the rest are numbers


@dataclass(frozen=True)
class Affine:
    """constant + sum of coefficients times variables; no coefficient is zero."""

    constant: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, variable: str) -> Affine:
        return cls(0, ((variable, 1),))

    def __add__(self, other: Affine) -> Affine:
        terms = dict(self.terms)
        for name, coefficient in other.terms:
            terms[name] = terms.get(name, 0) + coefficient
        return Affine(self.constant + other.constant, tuple(sorted((k, v) for k, v in terms.items() if v)))

    def __mul__(self, factor: int) -> Affine:
        return Affine(self.constant * factor, tuple((k, v * factor) for k, v in self.terms) if factor else ())

    def shifted(self, by: int) -> Affine:
        return Affine(self.constant + by, self.terms)

    def text(self) -> str:
        parts = [name if factor == 1 else f"{name} * {factor}" for name, factor in self.terms]
        return " + ".join([*parts, *([str(self.constant)] if self.constant or not parts else [])])


Index = tuple[Affine, ...]  # of an element, one for each dimension
Divided = Callable[[Affine, int], tuple[Affine, Affine]]  # the quotient and the remainder of an index
ZERO = Affine()


def through_view(
    sizes: Sequence[int], strides: Sequence[int], offset: int, view: Tensor, at: Index, divided: Divided
) -> Index | None:
    """Where the element `at` of a view lies in the tensor that it is a view of, which has these sizes and strides and
    begins at this element of its memory; None where that is no sum of variables. A variable that runs through two
    dimensions at once, as where a view joins them, is `divided` by the size of the inner one."""
    order = sorted((i for i, n in enumerate(sizes) if n > 1), key=lambda i: -strides[i])
    rest, found, most = int(view.storage_offset()) - offset, [0] * len(sizes), [0] * len(sizes)
    if rest < 0:
        return None
    for i in order:
        found[i], rest = divmod(rest, strides[i])
        most[i] = found[i]
    if rest:
        return None
    index = [Affine(each) for each in found]
    runs = [(n, stride, where) for n, stride, where in zip(view.shape, view.stride(), at, strict=True) if n > 1]
    while runs:
        n, stride, where = runs.pop()
        if stride == 0:
            continue
        inside = [i for i in order if strides[i] <= stride]
        i = inside[0] if inside else 0
        if not inside or stride % strides[i]:
            return None
        step = stride // strides[i]
        if found[i] + (n - 1) * step >= sizes[i]:
            inner = sizes[i] // step
            if found[i] or sizes[i] % step or n % inner:
                return None
            quotient, remainder = divided(where, inner)
            runs += [(inner, stride, remainder)] if inner > 1 else []
            runs.append((n // inner, stride * inner, quotient))
            if len(runs) > 2 * len(at) + len(sizes) or not any(strides[j] == stride * inner for j in order):
                return None
            continue
        index[i] = index[i] + where * step
        most[i] += (n - 1) * step
    if any(most[i] >= sizes[i] for i in order):
        return None
    return tuple(index)


def is_vector(variable: str) -> bool:
    """Whether a loop variable stands for all columns at once."""
    return variable.startswith(COLUMN)
