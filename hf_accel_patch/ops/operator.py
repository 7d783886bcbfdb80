"""An entry of a list that compiled code runs (kernels/steps.c), and what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.kernels.cpu_steps import Kind, packed


@dataclass(frozen=True)
class Operand:
    """A tensor, from `skip` bytes on."""

    tensor: Tensor
    skip: int = 0


@dataclass
class Operator:
    """One entry of a list for kernels/steps.c: the output, up to two inputs, and the strides of all in elements."""

    kind: Kind
    out: Operand
    inputs: tuple[Operand | None, ...] = ()
    sizes: Sequence[int] = ()
    strides: Sequence[Sequence[int]] = ()
    scalar: float = 0.0
    extra: tuple[int | Operand, ...] = ()
    fixed: tuple[Tensor, ...] = ()  # tensors whose addresses somebody else has noted
    argument: Any = None  # memory that must last as long as the list
    unwritten: tuple[Tensor, ...] = ()  # what PyTorch's operator gives besides, and nobody may read

    @property
    def operands(self) -> list[Operand]:
        every = (self.out, *self.inputs, *self.extra)
        return [each for each in every if isinstance(each, Operand)]

    def packed(self, pointer: Callable[[Operand], int]) -> bytes:
        """As compiled code reads it. `pointer`: where an operand is."""
        every = (self.out, *self.inputs)
        dtypes = [torch.float32 if each is None else each.tensor.dtype for each in every]
        extra = [pointer(each) if isinstance(each, Operand) else each for each in self.extra]
        pointers = [0 if each is None else pointer(each) for each in every]
        return packed(self.kind, dtypes, self.sizes, self.strides, pointers, self.scalar, extra)
