"""Kernels from values: their text in Triton, and how they are launched.

A kernel has a part for each shape that it stores, and a program of it computes a row of that shape, or a piece of one.
Sizes and strides are arguments, as far as no vector depends on them, so that layers, batches and numbers of tokens
share a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_accel_patch.ops.fusing.affine import ZERO, Affine, Index, is_vector
from hf_accel_patch.ops.fusing.stores import Store
from hf_accel_patch.ops.fusing.values import (
    DTYPES,
    FLOATS,
    MOST_COLUMNS,
    Guard,
    Misplaced,
    Reduced,
    Row,
    Unwritable,
    Value,
    literal,
)
from hf_accel_patch.ops.refusing import address

PIECE = 512  # columns that a program computes where it needs no sums of them
MOST_LINES = 600  # of a kernel
LANES = 128  # columns for each warp


class Refusal(Exception):
    """Why a kernel cannot be written."""


@dataclass
class Launch:
    """One start of a kernel: its text, the tensors whose memory it is given, and numbers. `stored`: the tensors that it
    writes."""

    source: str
    tensors: list[Tensor] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    programs: int = 0
    warps: int = 1
    stored: list[Tensor] = field(default_factory=list)


def launches(stores: Sequence[Store], *, apart: bool = False) -> list[Launch]:
    """The kernels that store these, in order: one, but for what has to be in memory before. Raises Refusal. `apart`: a
    program for each element, as sums want that leave their dimension out."""
    before: list[Launch] = []
    rest = list(stores)
    while rest:
        try:
            return [*before, _written(rest, apart)]
        except Unwritable as error:
            needed = error.value
        alone = len(rest) == 1 and rest[0].fills(needed)
        if needed.replaced or (alone and apart):
            raise Refusal("it would have to be in memory before it is computed")
        before += launches([Store(needed.tensor, needed)], apart=alone)
        needed.stored = True
        rest = [each for each in rest if not each.fills(needed)]
    return before


def _written(stores: Sequence[Store], apart: bool) -> Launch:
    launch, by_shape = Launch(""), dict[tuple[int, ...], list[Store]]()
    for each in stores:
        by_shape.setdefault(each.value.sizes, []).append(each)
    parts = []
    for number, (sizes, some) in enumerate(by_shape.items()):
        rows = (*sizes, 1) if apart or not sizes else sizes
        part = _Part(launch, number, rows, whole=any(_sums(each.value, rows[-1]) for each in some))
        part.index = part.index[: len(sizes)]
        for each in some:
            part.store(each)
        parts.append(part)
    _join(launch, parts)
    launch.stored = [each.target for each in stores]
    return launch


class _Part:
    """Lines that compute one shape."""

    def __init__(self, launch: Launch, number: int, sizes: tuple[int, ...], whole: bool) -> None:
        self.launch, self.name, self.whole = launch, str(number), whole
        self.lines: list[str] = []
        self.known: dict[tuple[int, Index, Guard], str] = {}
        self.loaded: dict[tuple[str, str, bool], str] = {}
        self.columns = sizes[-1]
        self.block = _power_of_2(self.columns) if whole else min(PIECE, _power_of_2(self.columns))
        self.pieces = -(-self.columns // self.block)
        self.rows = math.prod(sizes[:-1])
        self.programs = self.rows * self.pieces
        if whole and self.columns > MOST_COLUMNS:
            raise Refusal(f"sums of {self.columns} columns")
        self.masks: dict[str, str] = {}
        self.most: dict[str, int] = {}  # that a vector holds
        self.wrapped: dict[tuple[str, str, str], str] = {}
        self.quotients: dict[tuple[Affine, int], tuple[Affine, Affine]] = {}
        self.index = self._begin(sizes)

    def _begin(self, sizes: tuple[int, ...]) -> Index:
        column, row, text = f"c{self.name}", f"r{self.name}", f"tl.arange(0, {self.block})"
        at, dims = [ZERO] * len(sizes), [i for i, n in enumerate(sizes[:-1]) if n > 1]
        self.lines.append(f"{row} = pid.to(tl.int64)")
        if self.pieces > 1:
            pieces = self._number(self.pieces, self.launch.sizes, "n")
            text = f"({row} % {pieces}).to(tl.int32) * {self.block} + {text}"
        self.lines.append(f"{column} = {text}")
        if self.pieces > 1:
            self.lines.append(f"{row} = {row} // {pieces}")
        for i in reversed(dims):
            name = f"{row}_{i}"
            if i == dims[0]:
                self.lines.append(f"{name} = {row}")
            else:
                n = self._number(sizes[i], self.launch.sizes, "n")
                self.lines += [f"{name} = {row} % {n}", f"{row} = {row} // {n}"]
            at[i] = Affine.of(name)
        self.most[column] = self.pieces * self.block
        if self.columns > 1:
            at[-1] = Affine.of(column)
        if self.columns % self.block:
            n = str(self.columns) if self.whole else self._number(self.columns, self.launch.sizes, "n")
            self.masks[column] = f"({column} < {n})"
        return tuple(at)

    def line(self, text: str) -> str:
        name = f"v{self.name}_{len(self.lines)}"
        if len(self.lines) > MOST_LINES:
            raise Refusal("too many operators for one kernel")
        self.lines.append(f"{name} = {text}")
        return name

    def element(self, value: Value, at: Index, guard: Guard) -> str:
        key = id(value), at, guard
        if key not in self.known:
            self.known[key] = value.write(self, at, guard)
        return self.known[key]

    def load(self, tensor: Tensor, at: Affine, guard: Guard, row: Row | None = None) -> str:
        rows = [row] if row is not None else []
        text, mask = self._pointer(tensor, at, rows), self._mask(at, guard, rows)
        key = text, mask, tensor.dtype is torch.bool
        if key not in self.loaded:
            loaded = f"tl.load({text}, mask={mask}, other=0)" if mask else f"tl.load({text})"
            if tensor.dtype is torch.bool:
                loaded = f"{loaded} != 0"
            elif tensor.dtype in FLOATS and tensor.dtype is not torch.float32:
                loaded = f"{loaded}.to(tl.float32)"
            self.loaded[key] = self.line(loaded)
        return self.loaded[key]

    def store(self, store: Store) -> None:
        value = self.element(store.value, self.index, ())
        at, rows = store.address(self, self.index)
        dtype = "tl.uint8" if store.target.dtype is torch.bool else DTYPES[store.target.dtype]
        mask = self._mask(Affine.of(f"c{self.name}"), (), rows)
        place = self._pointer(store.target, at, rows)
        if not any(is_vector(name) for name, _ in at.terms):  # a row of one column
            place = f"{place} + tl.zeros([{self.block}], tl.int32)"
        self.lines.append(f"tl.store({place}, {value}.to({dtype}){f', mask={mask}' if mask else ''})")

    def reduce(self, reduced: Reduced) -> tuple[Affine, str]:
        (*rows, n), column = reduced.of.sizes, f"c{self.name}"
        if math.prod(rows) != self.rows or self.pieces > 1 or n > MOST_COLUMNS:
            raise Misplaced
        if n != self.columns or n == 1:
            column = f"{column}_{n}"
            if column not in self.masks:
                self.lines.append(f"{column} = tl.arange(0, {_power_of_2(n)})")
                self.most[column] = _power_of_2(n)
                self.masks[column] = "" if n == _power_of_2(n) else f"({column} < {n})"
        return Affine.of(column), self.masks.get(column, "")

    def divided(self, index: Affine, by: int) -> tuple[Affine, Affine]:
        vector = any(is_vector(name) for name, _ in index.terms)
        key = index, by
        if key not in self.quotients:
            n, letter = str(by) if vector else self._argument(by), "c" if vector else "r"
            names = [f"{letter}{self.name}_{len(self.lines) + i}q" for i in (0, 1)]
            self.lines += [f"{names[0]} = ({index.text()}) // {n}", f"{names[1]} = ({index.text()}) % {n}"]
            self.quotients[key] = Affine.of(names[0]), Affine.of(names[1])
            most = sum(abs(factor) * self.most.get(name, 0) for name, factor in index.terms)
            mask = " & ".join(self.masks[name] for name, _ in index.terms if self.masks.get(name))
            self.most |= {names[0]: most // by, names[1]: by}
            self.masks |= dict.fromkeys(names, mask) if vector else {}
        return self.quotients[key]

    def _argument(self, number: int) -> str:
        return self._number(number, self.launch.strides, "s")

    def spread(self, name: str, n: int) -> str:
        return self.line(f"tl.broadcast_to({name}, [{_power_of_2(n)}])")

    def full(self, number: float, dtype: torch.dtype) -> str:
        text = literal(torch.tensor(number, dtype=dtype).item())
        return self.line(f"tl.full([1], {text}, {DTYPES[torch.float32 if dtype in FLOATS else dtype]})")

    def _row(self, row: Row) -> tuple[str, str]:
        """What it is to be added, and whether it is there. PyTorch stops the device where it is not."""
        n, name = self._argument(row.n), row.name
        key = "row", name, n
        if key not in self.wrapped:
            self.wrapped[key] = self.line(f"tl.where({name} < 0, {name} + {n}, {name}).to(tl.int64)")
        name = self.wrapped[key]
        return f"{name} * {self._argument(row.stride)}", f"(({name} >= 0) & ({name} < {n}))"

    def _pointer(self, tensor: Tensor, at: Affine, rows: Sequence[Row]) -> str:
        parts = [self._tensor(tensor)]
        numbers = [name if factor == 1 else f"{name} * {self._argument(factor)}" for name, factor in at.terms
                   if not is_vector(name)]  # fmt: skip
        if at.constant:
            numbers.append(self._argument(at.constant))
        if numbers:
            parts.append(f"({' + '.join(numbers)})")
        parts += [self._row(each)[0] for each in rows]
        for name, factor in at.terms:
            if is_vector(name):  # 32 bits are enough, but for the longest strides
                long = ".to(tl.int64)" if abs(factor) * self.most[name] >= 1 << 31 else ""
                parts.append(name + long if factor == 1 else f"{name}{long} * {factor}")
        return " + ".join(parts)

    def _mask(self, at: Affine, guard: Guard, rows: Sequence[Row] = ()) -> str:
        """Of an element that is read: where it is one for all columns, only what holds for all says whether."""
        terms = [*at.terms, *(term for row in rows for index in row.at for term in index.terms)]
        columns = {name: self.masks.get(name, "") for name, _ in terms if is_vector(name)}
        guards = [text for text, vector in guard if columns or not vector]
        guards += [self._row(row)[1] for row in rows]
        return " & ".join(dict.fromkeys([each for each in columns.values() if each] + guards))

    def _tensor(self, tensor: Tensor) -> str:
        key = address(tensor), tensor.storage_offset(), tensor.dtype
        for i, each in enumerate(self.launch.tensors):
            if (address(each), each.storage_offset(), each.dtype) == key:
                return f"p{i}"
        self.launch.tensors.append(tensor)
        return f"p{len(self.launch.tensors) - 1}"

    @staticmethod
    def _number(number: int, among: list[int], letter: str) -> str:
        if number not in among:
            among.append(number)
        return f"{letter}{among.index(number)}"


def _sums(value: Value, columns: int) -> bool:
    """Whether a value needs sums over so many columns."""
    seen, todo = set[int](), [value]
    while todo:
        each = todo.pop()
        if isinstance(each, Reduced) and each.of.sizes[-1] == columns:
            return True
        if id(each) not in seen:
            seen.add(id(each))
            todo += each.inputs
    return False


def _join(launch: Launch, parts: Sequence[_Part]) -> None:
    body, depth = [], 1
    for i, part in enumerate(parts):
        if i < len(parts) - 1:
            launch.sizes.append(part.programs)  # an argument of its own
            body += ["    " * depth + f"if pid < n{len(launch.sizes) - 1}:"]
            body += ["    " * (depth + 1) + line for line in part.lines]
            body += ["    " * depth + "else:"]
            depth += 1
            body += ["    " * depth + f"pid -= n{len(launch.sizes) - 1}"]
        else:
            body += ["    " * depth + line for line in part.lines]
    names = [f"p{i}" for i in range(len(launch.tensors))]
    names += [f"s{i}" for i in range(len(launch.strides))] + [f"n{i}" for i in range(len(launch.sizes))]
    launch.source = "\n".join([f"def fused({', '.join(names)}):", "    pid = tl.program_id(0)", *body, ""])
    launch.programs = sum(part.programs for part in parts)
    launch.warps = max(1, min(16, max(part.block for part in parts) // LANES))


def _power_of_2(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << max(0, n - 1).bit_length()
