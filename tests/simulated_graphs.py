"""A CUDA graph on a CPU: what a capture does with operators, and what it forbids.

At the capture every operator is noted with its very memory. A replay runs just these again, on the same memory, and
nothing of Python. As on a GPU, nothing counts as computed by the capture itself: what it wrote is taken back, and
its output is not a number until the first replay; whatever would wait for the device fails; and a tensor that was made
inside may not outlive the capture, for its memory serves other operators.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from interpreter import interpreted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_accel_patch.kernels import cpu_steps
from hf_accel_patch.ops.fusing.running import Runner, runner
from hf_accel_patch.ops.graphs import Watching
from hf_accel_patch.ops.refusing import Refused, check
from hf_accel_patch.ops.tape import Tape, TapeRecorder

CPU = torch.device("cpu")


class Simulated:
    """What was recorded."""

    fused = 0

    def __init__(self, output: Tensor, run: list[tuple[Any, Any, Any, list[Tensor]]]) -> None:
        self.output, self.run, self.replays = output, run, 0

    def replay(self) -> Tensor:
        self.replays += 1
        with torch.inference_mode(self.output.is_inference()), _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, outputs in self.run:
                found = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
                for new, old in zip(found, outputs, strict=bool(outputs)):
                    old.copy_(new)
            return self.output.clone()


class Counting:
    """A recorder that knows what it has made."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.made: list[Any] = []

    @property
    def replays(self) -> int:
        return sum(each.replays for each in self.made)


class SimulatedRecorder(Counting):
    """Records as `CudaRecorder` does: a first run that is watched, then the capture."""

    passes: int = 64
    most_bytes: int | None = None

    def __call__(self, function: Callable[[], Tensor]) -> Simulated:
        with ExitStack() as stack:
            for name in ("tolist", "numpy", "cpu"):  # no operators on a CPU, where there is nothing to wait for
                stack.enter_context(patch.object(Tensor, name, _refusing(name)))
            with Watching(CPU):
                function()
            stack.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: True))
            with Capturing() as capture:
                output = function()
        capture.end(output)
        self.made.append(Simulated(output, capture.run))
        return self.made[-1]


class FusedRecorder(Counting):
    """Plans as `CudaRecorder` does on a GPU, with kernels that are interpreted, and carries the plan out at each
    replay."""

    passes: int = 8
    most_bytes: int | None = None

    def __call__(self, function: Callable[[], Tensor]) -> Fused:
        with interpreted():
            made = Fused(runner(function, self.device), function())
        self.made.append(made)
        return made


class Fused:
    """A plan, what the function gave that it was made of, and what it gives itself on the same."""

    def __init__(self, runner: Runner, expected: Tensor) -> None:
        self.runner, self.expected, self.first, self.replays = runner, expected.clone(), runner(), 0

    @property
    def fused(self) -> int:
        return self.runner.plan.fused

    def replay(self) -> Tensor:
        self.replays += 1
        with interpreted():
            return self.runner()


class CountedTape:
    """What is replayed on a CPU, counted."""

    fused = 0

    def __init__(self, tape: Tape) -> None:
        self.tape, self.replays = tape, 0

    def replay(self) -> Tensor:
        self.replays += 1
        return self.tape.replay()


class CountingTapes(TapeRecorder):
    """The recorder for CPUs, with what it has made."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__(cpu_steps.library(), device)
        self.made: list[CountedTape] = []

    @property
    def replays(self) -> int:
        return sum(each.replays for each in self.made)

    def __call__(self, function: Callable[[], Tensor]) -> CountedTape:
        self.made.append(CountedTape(super().__call__(function)))
        return self.made[-1]


class Capturing(TorchDispatchMode):
    """Notes operators, and refuses what a capture does."""

    def __init__(self) -> None:
        super().__init__()
        self.run: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.inside: dict[int, Tensor] = {}  # storages that were made here, by address; kept, so that none comes twice
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what other storages held before they were written to
        self.alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check(func, args, kwargs, CPU)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        known = {_address(each) for each in given}
        if func._schema.is_mutable:
            for argument, value in self._written(func, args, kwargs):
                self._save(argument, value)
        result = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        fresh = [each for each in outputs if _address(each) not in known and each.numel()]
        for each in fresh:
            self.inside[_address(each)] = each.detach()
        self.alive += [weakref.ref(each) for each in outputs if not any(each is other for other in given)]
        views = outputs and not fresh and not func._schema.is_mutable
        if not views:
            alias = lambda tensor: tensor.detach()  # noqa: E731
            mine = tree_map_only(Tensor, alias, args), tree_map_only(Tensor, alias, kwargs)
            self.run.append((func, *mine, [each.detach() for each in outputs] if fresh else []))
        return result

    def end(self, output: Tensor) -> None:
        """Only the output is left, and nothing of it is computed."""
        gc.collect()
        alive = [each for ref in self.alive if (each := ref()) is not None]
        left = [each for each in alive if _address(each) != _address(output)]
        if left:
            raise Refused(f"tensors of shapes {[tuple(each.shape) for each in left]} are kept outside of the capture")
        with torch.no_grad(), torch.inference_mode(output.is_inference()):
            for storage, content in self.before.values():
                storage.copy_(content)
            output.fill_(torch.nan)

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Tensor]]:
        names = [(argument, index) for index, argument in enumerate(func._schema.arguments)]
        found = [(each, args[i] if i < len(args) else kwargs.get(each.name)) for each, i in names]
        written = [(each, value) for each, value in found if each.alias_info and each.alias_info.is_write]
        return [(each, value) for each, value in written if isinstance(value, Tensor)]

    def _save(self, argument: Any, tensor: Tensor) -> None:
        at = _address(tensor)
        if at not in self.inside and at not in self.before:
            whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
            self.before[at] = whole, whole.clone()


def _refusing(name: str) -> Any:
    def refuse(*args: Any) -> Any:
        raise Refused(f"{name} waits for numbers")

    return refuse


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
