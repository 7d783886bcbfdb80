"""A system in a process of its own: its memory is its own, and one that hangs or dies takes nothing else along."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

MOST_WARMUP_TOKENS = 8


class Failed(Exception):
    """Why a system gave no number."""


@dataclass(frozen=True)
class Job:
    """What a worker loads and runs. `layers`: cut to that many; `batch`, `prompt`, `tokens`, `padded`: its workload."""

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


class Worker:
    """One system, loaded and warmed up within `limit_s` seconds, whose turns may take as long again in all."""

    def __init__(self, job: Job, limit_s: float) -> None:
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
        self.left_s = limit_s

    def turn(self) -> dict[str, float] | None:
        """`{"prefill_ms": ..., "decode_ms": ...}` of one generation; None where the time of this system is used up."""
        if self.left_s <= 0:
            return None
        self.pipe.send("turn")
        return self._answer()

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


def _work(job: Job, pipe: Connection) -> None:
    """The other process: load, then answer each message."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    try:
        _serve(job, pipe)
    except (EOFError, BrokenPipeError):
        return
    except BaseException as error:
        text = " ".join(str(error).split())
        pipe.send({"reason": f"{type(error).__name__}: {text[:300]}"})


def _serve(job: Job, pipe: Connection) -> None:
    import torch

    from benchmarks.baselines import find, hugging_face
    from benchmarks.measure import PeakMemory, Workload, read_bytes, storages, time_generation, versions
    from benchmarks.shapes import SHAPES, build

    torch.set_num_threads(job.threads)
    system, variant = find(job.system)
    reason = system.available(variant, job.device)
    if reason:
        pipe.send({"reason": reason})
        return
    ids, mask = Workload(job.batch, job.prompt, job.tokens, job.padded).inputs(
        SHAPES[job.shape]["vocab_size"], job.device
    )
    build(job.shape, dtype=job.dtype, device="meta", layers=1)
    small = hugging_face(build("tiny", dtype=job.dtype, device=job.device))
    time_generation(small, ids % 2, mask, 2)  # what libraries load once is not the model's memory
    peak = PeakMemory(job.device)
    model = build(job.shape, dtype=job.dtype, device=job.device, layers=job.layers)
    gc.collect()
    peak.forget()  # building a tied model makes a second table for a moment, which is nobody's doing
    start = time.perf_counter()
    loaded = system.load(model, variant)
    load_s = time.perf_counter() - start
    del model, small
    time_generation(loaded, ids, mask, min(job.tokens, MOST_WARMUP_TOKENS))
    gc.collect()
    facts: dict[str, Any] = {"load_s": round(load_s, 3), "load_peak_bytes": None}
    facts |= {"weight_bytes": loaded.weight_bytes, "read_bytes": loaded.weight_bytes}
    if loaded.model is not None:
        facts["weight_bytes"] = sum(storages(loaded.model).values())
        facts["read_bytes"] = read_bytes(loaded.model)
        facts["load_peak_bytes"] = peak.bytes
    pipe.send({**facts, "peer": versions(*system.distributions)})
    peak.restart()
    while True:
        if pipe.recv() == "peak":
            pipe.send({"run_peak_bytes": peak.bytes})
        else:
            pipe.send(vars(time_generation(loaded, ids, mask, job.tokens)))
