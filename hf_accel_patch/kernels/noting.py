"""Calls of compiled code, told to whoever notes what a function does.

They go past PyTorch's dispatcher, where nothing else would see them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_threads = threading.local()


class Unnoted(Exception):
    """A call that cannot be run again by what would be noted of it."""


@dataclass(frozen=True)
class Call:
    """A call that can be run again: x [..., K] times a weight [N, K], or what `argument` says. `rest`: tensors whose
    memory is read or written besides; `group`: input features per scale."""

    function: Any
    x: Tensor
    out: Tensor
    rest: tuple[Tensor | None, ...]
    group: int = 0
    argument: bytes = b""


def notes() -> Callable[[Call], None] | None:
    """What is told of every call in this thread, if anything is."""
    return getattr(_threads, "notes", None)


@contextmanager
def noting(tell: Callable[[Call], None]) -> Iterator[None]:
    """Inside, `tell` is told of every call, under one dispatch mode that sees all operators."""
    _threads.notes = tell
    try:
        yield
    finally:
        _threads.notes = None


def unnoted(name: str) -> None:
    """Raise Unnoted where calls are noted, for one that cannot be."""
    if notes() is not None:
        raise Unnoted(f"{name} keeps what it computes where the next call finds it")
