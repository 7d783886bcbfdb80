"""What the demo, verify and bench measure of a model: peak memory, speed, perplexity; and windows of a text."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.generation.streamers import BaseStreamer


class PeakMemory:
    """The peak of memory since `reset`, in bytes above what was in use when this was made.

    On CUDA what PyTorch has allocated, on Linux the resident memory of the process. Elsewhere the peak of a process
    cannot be reset, so two phases of it cannot be told apart: `read` returns None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = self.reset()

    def reset(self) -> int | None:
        """Start again from what is in use now; returns that, in bytes."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        if sys.platform != "linux":
            return None
        _return_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not permitted in some containers
            return None
        return _status("VmRSS")

    def read(self) -> int | None:
        """The peak since the last `reset`, in bytes above what was in use at first; None where it cannot be known."""
        if self._base is None:
            return None
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else _status("VmHWM")
        return None if peak is None else max(peak - self._base, 0)


def _return_freed_memory() -> None:
    """Hand what malloc keeps of freed blocks back to the system, which counts it as resident otherwise (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int | None:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


class Clock(BaseStreamer):  # type: ignore[misc]
    """A streamer that notes when each token came: first the prompt, then the tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def token_ms(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Milliseconds per token of prefill and of decode, of one greedy `generate` for prompt [B, T]; the tokens of all
    rows count. The mean over the steps of decode, for drafts bring several tokens at once."""
    clock, limits = Clock(), {"max_new_tokens": new_tokens + 1, "min_new_tokens": new_tokens + 1}
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, do_sample=False, num_beams=1, streamer=clock, **limits)
    start, first, *_, last = clock.times
    return 1000 * (first - start) / prompt.numel(), 1000 * (last - first) / (new_tokens * len(prompt))


def timed_in_turn(
    models: Sequence[Any], prompt: Tensor, new_tokens: int, most_rounds: int = 15, most_seconds: float = 40
) -> list[list[tuple[float, float]]]:
    """`token_ms` of each model, over rounds in which all are timed in turn: what else the machine does falls on all of
    them. A first round does not count; at least 3 do, then as many as fit into the time."""
    for model in models:
        token_ms(model, prompt, 2)
    rounds: list[list[tuple[float, float]]] = []
    start = time.perf_counter()
    while len(rounds) < 3 or (len(rounds) < most_rounds and time.perf_counter() - start < most_seconds):
        rounds.append([token_ms(model, prompt, new_tokens) for model in models])
    return [list(times) for times in zip(*rounds, strict=True)]


def interleaved_ms(
    models: Sequence[Any], prompt: Tensor, new_tokens: int, most_rounds: int = 15, most_seconds: float = 40
) -> list[tuple[float, float]]:
    """The medians of `timed_in_turn`."""
    by_model = timed_in_turn(models, prompt, new_tokens, most_rounds, most_seconds)
    return [(median(prefill for prefill, _ in times), median(decode for _, decode in times)) for times in by_model]


def spread_windows(tokenizer: Any, text: str, count: int, length: int) -> list[Tensor]:
    """At most `count` windows of `length` tokens each, [1, T], spread evenly over the text."""
    return spread(tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"], count, length)


def spread(ids: Tensor, count: int, length: int) -> list[Tensor]:
    """At most `count` windows of `length` tokens each, spread evenly over token ids [1, S]."""
    whole = ids.shape[1] // length
    chosen = sorted({number * whole // count for number in range(count)})
    return [ids[:, number * length : (number + 1) * length] for number in chosen if number < whole]


@torch.no_grad()
def perplexity(model: Any, windows: Sequence[Tensor]) -> float:
    """exp of the mean cross-entropy of every token of the windows but their first."""
    total, tokens = 0.0, 0
    for window in windows:
        ids = window.to(model.device)
        scores = model(ids, use_cache=False).logits[0, :-1].float()
        total += cross_entropy(scores, ids[0, 1:], reduction="sum").double().item()
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens)
