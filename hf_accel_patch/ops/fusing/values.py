"""What a kernel computes: values that say how each of their elements follows from those of others.

A value is asked for an element at an index and writes the lines of Triton that compute it (ops/fusing/writing.py).
Numbers are computed in float32 and rounded to the dtype that PyTorch's operator would have given, so what is fused
differs in the order of sums only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_accel_patch.ops.fusing.affine import ZERO, Affine, Index, is_vector, through_view

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {
    torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16",
    torch.int64: "tl.int64", torch.int32: "tl.int32", torch.bool: "tl.int1",
}  # fmt: skip
# Conditions under which an element is asked for, and whether they differ between columns; elsewhere it may be anything.
Guard = tuple[tuple[str, bool], ...]
MOST_COLUMNS = 16384  # that one program sums


class Writer(Protocol):
    """What values write to."""

    def line(self, text: str) -> str:
        """A new variable that is this."""

    def load(self, tensor: Tensor, at: Affine, guard: Guard, row: Row | None = None) -> str:
        """An element of a tensor, so many elements behind its first, and so many rows."""

    def reduce(self, reduced: Reduced) -> tuple[Affine, str]:
        """The index, and the condition, of all columns that are reduced. Raises Misplaced where several programs would
        compute the same sum."""

    def spread(self, name: str, n: int) -> str:
        """A variable as a vector of n columns."""

    def full(self, number: float, dtype: torch.dtype) -> str:
        """A vector of this number."""

    def divided(self, index: Affine, by: int) -> tuple[Affine, Affine]:
        """New variables that are the quotient and the remainder."""

    def element(self, value: Value, at: Index, guard: Guard) -> str:
        """The variable that is this element of a value, which is written if it is not there yet."""


@dataclass(frozen=True)
class Row:
    """The number of a row that is read from memory, a variable; numbers from `n` on are not there. `at`: where it is
    read. `stride`: elements between rows."""

    name: str
    n: int
    stride: int
    at: Index


@dataclass(eq=False)
class Value:
    """Elements in a shape."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        raise NotImplementedError

    @property
    def inputs(self) -> tuple[Value, ...]:
        return ()


class Unwritable(Exception):
    """A value that has to be in memory before another one can be computed from it."""

    def __init__(self, value: Pending) -> None:
        super().__init__("it has to be in memory")
        self.value = value


class Misplaced(Exception):
    """Sums that many programs would compute, or none can at this index."""


@dataclass(eq=False)
class Memory(Value):
    """What lies in memory."""

    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Memory:
        return cls(tuple(tensor.shape), tensor.dtype, tensor)

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        return to.load(self.tensor, linear(at, self.tensor.stride()), guard)


@dataclass(eq=False)
class Pending(Value):
    """What a tensor will hold: `how` computes it, or, once that has happened, it lies in memory."""

    tensor: Tensor
    how: Value
    stored: bool = False
    replaced: bool = False  # by what was done to it in place, so that nothing may put it into memory any more

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        if self.stored:
            return to.load(self.tensor, linear(at, self.tensor.stride()), guard)
        try:
            return to.element(self.how, at, guard)
        except Misplaced:
            raise Unwritable(self) from None

    @property
    def inputs(self) -> tuple[Value, ...]:
        return () if self.stored else (self.how,)


@dataclass(eq=False)
class View(Value):
    """A view of what a tensor will hold."""

    tensor: Tensor
    of: Pending

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        if self.of.stored:
            return to.load(self.tensor, linear(at, self.tensor.stride()), guard)
        whole = self.of.tensor
        inside = through_view(whole.shape, whole.stride(), int(whole.storage_offset()), self.tensor, at, to.divided)
        if inside is None:
            raise Unwritable(self.of)
        return to.element(self.of, inside, guard)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.of,)


@dataclass(eq=False)
class Constant(Value):
    """One number everywhere."""

    number: float

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        return to.full(self.number, self.dtype)


@dataclass(eq=False)
class Range(Value):
    """start, start + step, ..."""

    start: int
    step: int

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        if not at[0].terms:
            return to.full(self.start + self.step * at[0].constant, torch.int64)
        return to.line(f"({at[0].text()}).to(tl.int64) * {self.step} + {self.start}")


@dataclass(eq=False)
class Pointwise(Value):
    """A function of elements of others, which are broadcast. `form`: text with {0}, {1}, ... for them."""

    form: str
    of: tuple[Value, ...]
    compute: torch.dtype | None = None  # what they are computed in, by default float32 or their own integers

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        names = []
        for each in self.of:
            name = to.element(each, broadcast(each.sizes, at), guard)
            names.append(_as(name, each.dtype, self.compute) if self.compute is not None else name)
        return rounded(to, self.form.format(*names), self.dtype)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.of


@dataclass(eq=False)
class Joined(Value):
    """Two tensors, one behind the other in a dimension (`torch.cat`)."""

    of: tuple[Value, Value]
    dim: int

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        first, second = self.of
        n, where = first.sizes[self.dim], at[self.dim]
        behind = *at[: self.dim], where.shifted(-n), *at[self.dim + 1 :]
        before, vector = to.line(f"({where.text()}) < {n}"), any(is_vector(name) for name, _ in where.terms)
        a = to.element(first, at, (*guard, (before, vector)))
        b = to.element(second, behind, (*guard, (f"({before} == 0)", vector)))
        return to.line(f"tl.where({before}, {a}, {b})")

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.of


@dataclass(eq=False)
class Stacked(Value):
    """Tensors side by side in a new dimension (`torch.stack`)."""

    of: tuple[Value, ...]
    dim: int

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        where, rest = at[self.dim], (*at[: self.dim], *at[self.dim + 1 :])
        if not where.terms:
            return to.element(self.of[where.constant], rest, guard)
        name = to.element(self.of[0], rest, guard)
        for i, each in enumerate(self.of[1:], 1):
            name = to.line(f"tl.where(({where.text()}) == {i}, {to.element(each, rest, guard)}, {name})")
        return name

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.of


@dataclass(eq=False)
class Gathered(Value):
    """Rows of a tensor in memory, by their numbers: [..., *rows] of a table [N, *rows]. Of rows that are not there,
    zeros."""

    table: Tensor
    of: Value

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        dims = len(self.of.sizes)
        row = Row(to.element(self.of, at[:dims], guard), len(self.table), self.table.stride(0), at[:dims])
        return to.load(self.table, linear(at[dims:], self.table.stride()[1:]), guard, row)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.of,)


@dataclass(eq=False)
class Reduced(Value):
    """Over the last dimension, which is kept with size 1 or left out. `form`: text with {0} for a vector of its
    elements, behind which comes `other`."""

    form: str
    of: Value
    other: str = "0.0"

    def write(self, to: Writer, at: Index, guard: Guard) -> str:
        rows = at[: len(self.of.sizes) - 1]
        if any(is_vector(name) for each in rows for name, _ in each.terms):
            raise Misplaced
        column, inside = to.reduce(self)
        element = to.element(self.of, (*rows, column), tuple(each for each in guard if not each[1]))
        element = to.spread(element, self.of.sizes[-1])  # what is the same in all columns is a number
        if inside:
            element = to.line(f"tl.where({inside}, {element}, {self.other})")
        return rounded(to, self.form.format(element), self.dtype)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.of,)


def literal(number: float) -> str:
    """A number in the text of a kernel."""
    return repr(number) if not isinstance(number, float) or math.isfinite(number) else f'float("{number}")'


def rounded(to: Writer, text: str, dtype: torch.dtype) -> str:
    """In the variables' dtypes: float32 with the precision of this one, integers and bools as they are."""
    if dtype in (torch.bfloat16, torch.float16):
        return to.line(f"({text}).to({DTYPES[dtype]}).to(tl.float32)")
    if dtype is torch.bool:
        return to.line(f"({text}) != 0")
    return to.line(f"({text}).to({DTYPES[dtype]})")


def _as(name: str, dtype: torch.dtype, compute: torch.dtype) -> str:
    """A variable of a value, as what is computed with."""
    held = torch.float32 if dtype in FLOATS else dtype
    return name if held is compute else f"{name}.to({DTYPES[compute]})"


def broadcast(sizes: tuple[int, ...], at: Index) -> Index:
    """The index into an operand of these sizes, for that of a result."""
    last = at[len(at) - len(sizes) :]
    return tuple(ZERO if n == 1 else each for n, each in zip(sizes, last, strict=True))


def linear(at: Index, strides: Sequence[int]) -> Affine:
    total = ZERO
    for each, stride in zip(at, strides, strict=True):
        total = total + each * stride
    return total
