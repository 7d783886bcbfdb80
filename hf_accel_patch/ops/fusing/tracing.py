"""What a function does, as operators of PyTorch and calls of kernels that go past its dispatcher, with their memory.

A trace is run again on new memory, whole or changed. What the function reads from the host is noted as it was, and what
it did to other objects is not done again: as with a CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hf_accel_patch.ops.refusing import OWN, address, check, tensors_in

MOST_MADE = 2 << 30  # bytes that are kept while a function is noted
_threads = threading.local()


class Unfusable(Exception):
    """Why a function cannot be run again by what was noted of it."""


@dataclass(frozen=True)
class Node:
    """A call: what it has made, and what it has written to."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    made: list[Tensor]  # of the outputs, those in memory of their own
    written: list[Tensor]

    @property
    def given(self) -> list[Tensor]:
        return tensors_in(self.args, self.kwargs)


@dataclass
class Trace:
    """The calls of a function, in order, and its result. `made`: by address, one tensor of each piece of memory that it
    took, all of which live as long as this does, so that no address comes twice."""

    nodes: list[Node] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)
    made_bytes: int = 0
    output: Tensor | None = None

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, written: list[Tensor]) -> Any:
        """Raises Unfusable for what would be too much to keep."""
        known = {address(each) for each in tensors_in(args, kwargs)}
        outputs = tensors_in(result)
        fresh = [each for each in outputs if each.numel() and address(each) not in known]
        for each in fresh:
            if address(each) not in self.made:
                self.made[address(each)] = each.detach()
                self.made_bytes += each.untyped_storage().nbytes()
        if self.made_bytes > MOST_MADE:
            raise Unfusable(f"it makes more than {MOST_MADE >> 20} MiB in between")
        if fresh or written:
            self.nodes.append(Node(func, args, kwargs, outputs, fresh, written))
        return result


class Tracing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators. Raises Refused for those that no capture on this device takes, Unfusable for those that do not
    say what they do."""

    def __init__(self, trace: Trace, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.device = trace, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check(func, args, kwargs, self.device)
        written = _written(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise Unfusable(f"{func} changes what a tensor says of itself")
        if any(each.device.type != self.device.type for each in written):
            raise Unfusable(f"{func} writes to other memory")
        result = func(*args, **kwargs)
        if func.namespace not in OWN and not written and not tensors_in(result):
            raise Unfusable(f"{func} does not say what it does")
        return self.trace.note(func, args, kwargs, result, written)


def traced(function: Callable[[], Tensor], device: torch.device) -> Trace:
    """What a function does on this device: it is run. Raises Refused where it would wait for the device, and Unfusable
    where what it does cannot be noted."""
    trace = Trace()
    _threads.trace = trace
    try:
        # outside of inference mode, inside of which operators are not taken apart
        with torch.inference_mode(False), torch.no_grad(), Tracing(trace, device):
            trace.output = function()
    finally:
        _threads.trace = None
    return trace


def noted(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, which launches kernels that PyTorch's dispatcher does not see: it reads tensors among `args`,
    and writes to nothing but what it returns."""
    trace: Trace | None = getattr(_threads, "trace", None)
    if trace is None:
        return function(*args)
    with _disable_current_modes():
        result = function(*args)
    trace.note(function, args, {}, result, [])
    return result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
    return found
