"""Steps of a model recorded once and replayed: on CUDA as CUDA graphs, which launch hundreds of kernels as one, with
small operators fused (ops/fusing/), on a CPU as ops/tape.py says.

A replay does to the same memory what the recorded function did, and runs nothing of Python. So the function has to read
what changes between its calls from tensors that stay where they are, and must neither wait for the device nor keep a
tensor beyond its end.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_accel_patch.kernels import cpu_steps
from hf_accel_patch.logs import get_logger
from hf_accel_patch.ops.fusing.running import Runner, runner
from hf_accel_patch.ops.launching import unsuitable
from hf_accel_patch.ops.refusing import Refused, check
from hf_accel_patch.ops.tape import TapeRecorder

logger = get_logger(__name__)
STATE = threading.local()
RACES = 5  # replays of each way, by turns
LOCK = threading.RLock()  # of captures and replays of all models: a capture waits for the whole device


class Recorded(Protocol):
    """A function that was recorded. `fused`: operators that are no kernel of their own any more."""

    @property
    def fused(self) -> int: ...

    def replay(self) -> Tensor:
        """Run it again. Returns a copy of what it computed, which no other replay changes."""


class Recorder(Protocol):
    """Records a function: runs it, more than once, and returns what replays it. Raises Refused, or whatever the
    function raises; the function may have run by then."""

    device: torch.device

    @property
    def passes(self) -> int:
        """In which a recording pays."""

    @property
    def most_bytes(self) -> int | None:
        """Of buffers that a cache is moved to for it."""

    def __call__(self, function: Callable[[], Tensor]) -> Recorded: ...


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on this device; None where nothing does."""
    if device.type == "cpu":
        kernels = cpu_steps.library()
        return None if kernels is None else TapeRecorder(kernels)
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return CudaRecorder(device)


def recording() -> bool:
    """Whether this thread runs a function to record it."""
    return getattr(STATE, "on", False)


@contextmanager
def marked() -> Iterator[None]:
    """Inside, `recording` says so."""
    STATE.on = True
    try:
        yield
    finally:
        STATE.on = False


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises Refused where a function would wait for the device, or copy from other memory, which a capture forbids: an
    error before the capture leaves CUDA as it was, one within it need not."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check(func, args, kwargs, self.device)
        return func(*args, **kwargs)


@dataclass
class CudaRecorded:
    """A CUDA graph."""

    output: Tensor
    graph: torch.cuda.CUDAGraph
    by: CudaRecorder
    fused: int = 0

    def replay(self) -> Tensor:
        """On the current stream, after the last replay of any graph that shares this one's memory. Such a replay may
        write to the output of another graph, so nobody comes between this one and the copy."""
        stream = torch.cuda.current_stream(self.by.device)
        with LOCK:
            if self.by.last is not None and self.by.last != stream:
                stream.wait_stream(self.by.last)
            self.graph.replay()
            self.by.last = stream
            return self.output.clone()


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One for all captures on a device: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class CudaRecorder:
    """Makes CUDA graphs that share the memory of what they compute in between. That memory goes with the last of them,
    and its handle is of no use afterwards."""

    passes, most_bytes = 64, None  # a recording takes about as long as so many passes
    fuses = True  # small operators become few kernels
    races = True  # they have to be faster: the first step that has such is recorded both ways, which settles it for all

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.pool: Any = None
        self.made: list[weakref.ref[CudaRecorded]] = []
        self.stream = _side_stream(index)
        self.last: torch.cuda.Stream | None = None

    def __call__(self, function: Callable[[], Tensor]) -> CudaRecorded:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            try:
                with torch.cuda.stream(self.stream):
                    tried = self._tried(function)
            finally:
                current.wait_stream(self.stream)
            recorded = self._recorded(tried)
            if recorded.fused and self.races:
                self.races = False
                recorded = self._faster(recorded, function)
            return recorded

    def _recorded(self, function: Callable[[], Tensor]) -> CudaRecorded:
        with LOCK, _uncollected():
            self.made = [each for each in self.made if each() is not None]
            if not self.made:
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            fused = function.plan.fused if isinstance(function, Runner) else 0
            recorded = CudaRecorded(self._capture(graph, function), graph, self, fused)
            self.made.append(weakref.ref(recorded))
            return recorded

    def _faster(self, fused: CudaRecorded, function: Callable[[], Tensor]) -> CudaRecorded:
        """The one that is replayed in less time, at its best, of this and what is recorded kernel by kernel. If that is
        the latter, so is whatever is recorded later."""
        try:
            apart = self._recorded(function)
        except Exception as error:  # the memory of both, say
            logger.info(f"fused steps are not compared with others: {_line(error)}")
            return fused
        rounds = [(_milliseconds(apart), _milliseconds(fused)) for _ in range(RACES)]
        least, least_fused = map(min, zip(*rounds, strict=True))
        logger.info(f"a step is replayed in {least_fused:.3f} ms fused, {least:.3f} ms kernel by kernel")
        self.fuses = least_fused <= least
        return fused if self.fuses else apart

    def _tried(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What does the same, if possible in fewer kernels. It has run: libraries are loaded and have taken their
        workspaces, kernels are compiled."""
        reason = unsuitable(self.device.index) if self.fuses else "asked not to"
        if not reason:
            try:
                return runner(function, self.device)
            except Refused:
                raise
            except Exception as error:
                reason = _line(error)
        logger.info(f"a step is recorded kernel by kernel: {reason}")
        with Watching(self.device):
            function()
        return function

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], Tensor]) -> Tensor:
        """What `torch.cuda.graph` does, which leaves its stream in use, and its memory in recording, if CUDA has
        refused something."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(self.stream):
            try:
                with torch.inference_mode(False), torch.no_grad(), _set_aside(self.device):
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                output = function()
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
        return output

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture, whatever has become of it."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):  # the allocator was told of the end
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                torch._C._cuda_releasePool(self.device.index, self.pool)


def _milliseconds(recorded: CudaRecorded) -> float:
    """Of one replay."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    started.record()
    recorded.replay()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected inside: what it might free of another graph, no capture survives."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _set_aside(device: torch.device) -> Iterator[None]:
    """Random numbers have another state inside, a copy. A capture takes the one that it finds: until its end, and for
    ever if it fails, nobody else could draw with that."""
    generator = torch.cuda.default_generators[device.index]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)
