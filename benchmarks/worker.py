"""A system in a process of its own: its memory is its own, and one that hangs or dies takes nothing else along."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from benchmarks.measure import Workload

MOST_WARMUP_TOKENS = 8


class Failed(Exception):
    """Why a system gave no number."""


@dataclass(frozen=True)
class Job:
    """What a worker loads and runs. `layers`: cut to that many; `batch`, `prompt`, `tokens`, `padded`: its workload;
    `texts`: what it may calibrate with."""

    system: str
    shape: str
    layers: int | None
    dtype: str
    device: str
    threads: int
    batch: int
    prompt: int
    tokens: int
    padded: bool
    texts: tuple[str, ...] = ()

    def serve(self, pipe: Connection) -> None:
        _serve(self, pipe)


class Serving(Protocol):
    """What a worker does: load, send facts or a reason, then answer each message until the pipe ends."""

    def serve(self, pipe: Connection) -> None: ...


class Worker:
    """One system, loaded and warmed up within `limit_s` seconds, whose turns may take `run_limit_s` in all."""

    def __init__(self, job: Serving, limit_s: float, run_limit_s: float) -> None:
        self.left_s = limit_s
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.facts: dict[str, Any] = self._answer()
        except Failed:
            self.close(at_once=True)
            raise
        self.left_s = run_limit_s

    def turn(self, workload: Workload | None = None) -> dict[str, Any] | None:
        """`{"prefill_ms": ..., "decode_ms": ...}` of one generation; None where the time of this system is used up.

        With another workload than its job's, a system that does not take it answers `{"refused": why}`.
        """
        if self.left_s <= 0:
            return None
        self.pipe.send(workload or "turn")
        return self._answer()

    def ask(self, *message: Any) -> dict[str, Any]:
        """The answer to a message that the job knows."""
        self.pipe.send(message)
        return self._answer()

    def score(self, windows: list[list[int]]) -> list[float]:
        """Of each window of token ids, the mean cross-entropy of its tokens but the first, in nats."""
        self.pipe.send(windows)
        nats: list[float] = self._answer()["nats"]
        return nats

    def peak_bytes(self) -> int | None:
        """What the timed turns took at most, above the weights."""
        self.pipe.send("peak")
        peak: int | None = self._answer()["run_peak_bytes"]
        return peak

    def close(self, *, at_once: bool = False) -> None:
        self.pipe.close()  # which an idle worker takes as its end
        self.process.join(0 if at_once else 5)
        self.process.kill()
        self.process.join()

    def _answer(self) -> dict[str, Any]:
        start, limit = time.monotonic(), max(self.left_s, 30.0)  # a turn that has begun may end
        try:
            if not self.pipe.poll(limit):
                raise Failed(f"no answer in {limit:.0f} s")
            answer: dict[str, Any] = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise Failed(f"the process ended with exit code {self.process.exitcode}") from error
        finally:
            self.left_s -= time.monotonic() - start
        if "reason" in answer:
            raise Failed(answer["reason"])
        return answer


def _work(job: Serving, pipe: Connection) -> None:
    """The other process: load, then answer each message."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    try:
        job.serve(pipe)
    except (EOFError, BrokenPipeError):
        return
    except BaseException as error:
        pipe.send({"reason": _reason(error)})


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _serve(job: Job, pipe: Connection) -> None:
    import torch

    from benchmarks.baselines import FORMATS, find
    from benchmarks.measure import (
        PeakMemory,
        Workload,
        cross_entropies,
        read_bytes,
        storages,
        time_generation,
        versions,
    )
    from benchmarks.shapes import SHAPES, build

    torch.set_num_threads(job.threads)
    system, variant = find(job.system)
    reason = system.available(variant, job.device)
    if reason:
        pipe.send({"reason": reason})
        return
    vocabulary = SHAPES[job.shape]["vocab_size"]
    ids, mask = Workload(job.batch, job.prompt, job.tokens, job.padded).inputs(vocabulary, job.device)
    build(job.shape, dtype=job.dtype, device="meta", layers=1)
    _, plain = find(FORMATS.get(job.system, job.system))
    small = system.load(build("tiny", dtype=job.dtype, device=job.device), plain, ())
    time_generation(small, ids % 2, mask, 2)  # what is loaded or compiled once is not this model's memory and time
    peak = PeakMemory(job.device)
    model = build(job.shape, dtype=job.dtype, device=job.device, layers=job.layers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gc.collect()
    peak.forget()  # building a tied model makes a second table for a moment, which is nobody's doing
    start = time.perf_counter()
    loaded = system.load(model, variant, job.texts)
    load_s = time.perf_counter() - start
    del model, small
    time_generation(loaded, ids, mask, min(job.tokens, MOST_WARMUP_TOKENS))
    gc.collect()
    facts: dict[str, Any] = {"parameters": parameters, "load_s": round(load_s, 3), "load_peak_bytes": None}
    facts |= {"note": loaded.note} if loaded.note else {}
    facts |= {"weight_bytes": loaded.weight_bytes, "read_bytes": loaded.weight_bytes}
    if loaded.model is not None:
        facts["weight_bytes"] = sum(storages(loaded.model).values())
        facts["read_bytes"] = read_bytes(loaded.model)
        facts["load_peak_bytes"] = peak.bytes
    pipe.send({**facts, "peer": versions(*system.distributions)})
    peak.restart()
    while True:
        asked = pipe.recv()
        if asked == "peak":
            pipe.send({"run_peak_bytes": peak.bytes})
        elif asked == "turn":
            pipe.send(vars(time_generation(loaded, ids, mask, job.tokens)))
        elif isinstance(asked, Workload):
            try:
                turn = time_generation(loaded, *asked.inputs(vocabulary, job.device), asked.tokens)
            except Exception as error:  # a peer raises anything
                pipe.send({"refused": _reason(error)})
            else:
                pipe.send(vars(turn))
        else:
            pipe.send({"nats": cross_entropies(loaded, asked, job.device)})
