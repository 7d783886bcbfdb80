"""What is measured, and how: milliseconds per token, bytes, read bandwidth, and where it was measured."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.generation.streamers import BaseStreamer

from benchmarks.baselines import Loaded

GIB = 2**30


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when tokens came: first when the prompt goes in, then at each new token.

    transformers copies a token to the host before it streams it, so the times hold for a GPU too.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor | None = None) -> None:
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Workload:
    """One `generate` call: greedy, `batch` random prompts of `prompt` tokens, `tokens` new ones each.

    `padded`: the prompts are padded on the left, the first by nothing and the last by half its length.
    """

    batch: int
    prompt: int
    tokens: int
    padded: bool

    def inputs(self, vocabulary: int, device: str) -> tuple[Tensor, Tensor]:
        """Token ids [batch, prompt] and their attention mask."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, vocabulary, (self.batch, self.prompt), generator=generator)
        mask = torch.ones_like(ids)
        if self.padded:
            for row in range(1, self.batch):
                mask[row, : self.prompt // 2 * row // (self.batch - 1)] = 0
        return ids.to(device), mask.to(device)


@dataclass(frozen=True)
class Turn:
    """One timed generation: `prefill_ms` from the prompt to the first token, `decode_ms` per token after it."""

    prefill_ms: float
    decode_ms: float


def time_generation(loaded: Loaded, ids: Tensor, mask: Tensor, tokens: int) -> Turn:
    """Time one greedy generation of `tokens` new tokens, at least 2; `decode_ms` is the median over them."""
    clock = Clock()
    with torch.no_grad():
        loaded.generate(ids, mask, tokens, clock)
    steps = [after - before for before, after in zip(clock.seconds, clock.seconds[1:], strict=False)]
    return Turn(1000 * steps[0], 1000 * median(steps[1:]))


@torch.no_grad()
def cross_entropies(loaded: Loaded, windows: Sequence[Sequence[int]], device: str) -> list[float]:
    """Of each window of token ids, the mean cross-entropy of its tokens but the first, in nats."""
    found = []
    for window in windows:
        ids = torch.tensor([window], device=device)
        scores = loaded.logits(ids)[:-1].float()
        found.append(cross_entropy(scores, ids[0, 1:].to(scores.device)).item())
    return found


def read_bandwidth(device: str, repeats: int = 7) -> float:
    """Bytes per second of the fastest of several sums over 1 GiB: what reading weights can reach here."""
    data, seconds = torch.ones(GIB // 4, device=device), []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return GIB / min(seconds)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_call(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


class PeakMemory:
    """Bytes that this process takes at most, above what it has now: resident memory, or its allocations on the GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.start = 0
        self.restart()

    def restart(self) -> None:
        """Count from the memory of this moment."""
        self.forget()
        if self.start >= 0:
            self.start = torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")

    def forget(self) -> None:
        """Leave the peak so far out. Where that cannot be done (no Linux), `bytes` is None."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.start = -1

    @property
    def bytes(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.start
        return None if self.start < 0 else max(0, _status("VmHWM") - self.start)


def return_freed_memory() -> None:
    """Hand back to the system what was freed and is kept for reuse, or it hides what is taken next."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def live_bytes(device: str) -> int:
    """Bytes of all tensors alive in this process on the device, whatever holds them; shared storage counts once."""
    gc.collect()
    kind, found = torch.device(device).type, {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == kind:
            try:
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except (NotImplementedError, RuntimeError):  # a wrapper around other tensors, which count themselves
                continue
    found.pop(0, None)
    return sum(found.values())


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def storages(root: object) -> dict[int, int]:
    """Bytes of every storage reachable from a module, tensor or container, by address.

    Looks into tensor subclasses (quantized weights are made of several tensors) and into plain objects that modules
    and tensors carry (scales, states), so nothing that a peer keeps is missed.
    """
    found: dict[int, int] = {}
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type | str | bytes | int | float):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if hasattr(item, "__tensor_flatten__"):
                todo += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
            elif item.device.type != "meta":
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            todo += vars(item).values()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif isinstance(item, nn.Module) or type(item).__module__.partition(".")[0] not in ("builtins", "types"):
            todo += getattr(item, "__dict__", {}).values()
    found.pop(0, None)
    return found


def read_bytes(model: nn.Module) -> int:
    """Bytes of the weights that one token of a decode reads: all but an embedding table that the head does not share,
    of which it reads a row."""
    everything, table = storages(model), storages(model.get_input_embeddings())  # type: ignore[operator]
    head = storages(model.get_output_embeddings())  # type: ignore[operator]
    return sum(everything.values()) - sum(size for at, size in table.items() if at not in head)


def hardware(device: str) -> dict[str, Any]:
    """What it ran on: the processor, or the GPU and its memory. No name of the machine."""
    described: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()}
    described["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return described


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(*distributions: str) -> dict[str, str]:
    """The versions of python and of these distributions; of the package, its own also where it is not installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == "hf_accel_patch":
                found[name] = __import__(name).__version__
    return found


def git_commit() -> str | None:
    """The commit that was measured, with `-dirty` where files other than results differ from it; None outside a
    repository."""
    root = Path(__file__).parent.parent

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
