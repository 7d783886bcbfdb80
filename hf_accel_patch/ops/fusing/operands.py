"""What operators of PyTorch are given, as values of a kernel."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hf_accel_patch.ops.fusing.values import DTYPES, FLOATS, Constant, Pointwise, Value


class Elsewhere(Exception):
    """A tensor that no kernel on this device reads."""


class Read(Protocol):
    """Says what a tensor holds. Raises Elsewhere for one on another device."""

    def __call__(self, tensor: Tensor) -> Value: ...

    def in_memory(self, tensor: Tensor) -> bool:
        """Whether it lies in memory already."""


def operand(given: Any, dtype: torch.dtype, device: torch.device, read: Read) -> Value | None:
    """What an operator in this dtype is given: a tensor, which is rounded to it, or a number, which is not, also where
    that is a tensor on the host beside those on a GPU."""
    if isinstance(given, Tensor) and given.device == device:
        return cast(read(given), dtype)
    found = number_of(given)
    return None if found is None else Constant((), torch.float32 if dtype in FLOATS else dtype, found)


def number_of(given: Any) -> bool | int | float | None:
    """A number of Python's, or in a tensor on the host."""
    if isinstance(given, Tensor):
        given = given.item() if given.device.type == "cpu" and not given.dim() else None
    return given if isinstance(given, bool | int | float) else None


def cast(value: Value, dtype: torch.dtype) -> Value:
    if value.dtype is dtype:
        return value
    return Pointwise(value.sizes, dtype, "{0}", (value,), torch.float32 if dtype in FLOATS else None)


def spread(value: Value, sizes: tuple[int, ...]) -> Value:
    """In more elements, by broadcasting."""
    return value if value.sizes == sizes else Pointwise(sizes, value.dtype, "{0}", (value,))


def readable(tensor: Tensor, device: torch.device) -> bool:
    known = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype in DTYPES
    return known and (tensor.device == device or not tensor.dim()) and not tensor.is_conj() and not tensor.is_neg()


def dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, each element once."""
    elements = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.storage_offset() == 0 and tensor.numel() <= elements and not overlaps(tensor) and tensor.numel() > 0


def overlaps(tensor: Tensor) -> bool:
    expected = 1
    for stride, n in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < expected:
            return True
        expected = stride * n
    return False
