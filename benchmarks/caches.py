"""The k/v caches compared, and the process in which one is filled, timed and scored.

Peers are transformers' own `QuantizedCache` with its backends, on a stock model and with the settings that its
documentation recommends. Nothing of a layer's insides is assumed: tokens go in through `update` and through the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, QuantizedCache

from benchmarks.baselines import missing
from benchmarks.measure import PeakMemory, live_bytes, return_freed_memory, synchronize, time_call, versions
from benchmarks.shapes import build

SPAN = 64  # tokens: contexts are whole spans; a cache of ours packs one at a time
WARM = 256  # tokens
TAIL = 31  # tokens that come after the first ones in `fill`
PEAKS = 3  # steps whose peak of memory is taken


@dataclass(frozen=True)
class Kind:
    """A cache. `patched`: keywords of `patch`, None for a stock model; `quantized`: those of `QuantizedCache`.

    `packs_every`: so many tokens are kept as they are before all or some of them are packed, which one step pays for.
    """

    patched: dict[str, Any] | None = None
    quantized: dict[str, Any] | None = None
    packs_every: int | None = None
    modules: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()


QUANTO = {"packs_every": 128, "modules": ("optimum.quanto",), "distributions": ("optimum-quanto",)}
HQQ = {"packs_every": 128, "modules": ("hqq.core.quantize",), "distributions": ("hqq",)}
AXES = {
    "axis_key": 1,
    "axis_value": 1,
}  # what transformers' documentation recommends for hqq; 0, the default, for quanto
CACHES: dict[str, Kind] = {
    "stock": Kind(),
    "exact": Kind({}),
    "int8": Kind({"cache": "int8"}, packs_every=SPAN),
    "int4": Kind({"cache": "int4"}, packs_every=SPAN),
    "cache=False": Kind({"cache": False}),  # all else that `patch` does, so what the cache alone gives can be told
    "fp8": Kind(quantized={"backend": "fp8"}),
    "quanto-4bit": Kind(quantized={"backend": "quanto", "nbits": 4}, **QUANTO),
    "hqq-8bit": Kind(quantized={"backend": "hqq", "nbits": 8} | AXES, **HQQ),
    "hqq-4bit": Kind(quantized={"backend": "hqq", "nbits": 4} | AXES, **HQQ),
}


def find(system: str) -> Kind:
    """Of `CACHES`, or "sinks:W"."""
    return Kind({"cache": system}) if system.startswith("sinks:") else CACHES[system]


@dataclass(frozen=True)
class CacheJob:
    """A model with one kind of cache. `layers`: cut to that many."""

    system: str
    shape: str
    layers: int | None
    dtype: str
    device: str
    threads: int

    def serve(self, pipe: Connection) -> None:
        """Answer messages (name, arguments...) with what the method of this name returns."""
        torch.set_num_threads(self.threads)
        kind = find(self.system)
        reason = missing(*kind.modules)
        if reason:
            pipe.send({"reason": reason})
            return
        held = self.hold(kind)
        pipe.send({"peer": versions(*kind.distributions)})
        while True:
            name, *arguments = pipe.recv()
            pipe.send(getattr(held, name)(*arguments))

    def hold(self, kind: Kind) -> Held:
        return Held(self, kind)


class Held:
    """The model and its cache, in the worker."""

    def __init__(self, job: CacheJob, kind: Kind) -> None:
        self.device, self.kind = job.device, kind
        self.model = build(job.shape, dtype=job.dtype, device=job.device, layers=job.layers)
        if kind.patched is not None:
            from hf_accel_patch import patch

            patch(self.model, **kind.patched)
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.row_shape, self.layer_count = (heads, size), config.num_hidden_layers
        self.token_bytes = 2 * 2 * heads * size * config.num_hidden_layers  # of keys and values in 16 bits
        self.token = torch.ones(1, 1, dtype=torch.long, device=job.device)
        self.cache: Any = None
        self.late = 0  # tokens after the last whole span of the fill
        with torch.no_grad():
            self.model(self.token, use_cache=False)  # what is made once, whatever the cache, is not the cache's

    def new_cache(self) -> Any:
        if self.kind.quantized is not None:
            return QuantizedCache(config=self.model.config, **self.kind.quantized)
        return DynamicCache(config=self.model.config)  # as the model would make it

    def warm(self) -> dict[str, Any]:
        """Have compiled or measured what is at first use, by a small cache."""
        self.fill(WARM)
        return self.pack()

    @torch.no_grad()
    def fill(self, context: int) -> dict[str, Any]:
        """A new cache, filled to half a span below `context`: the middle of what is timed is about there.

        Its first token comes from the model, which may make the cache its own; then random ones through `update`, in
        two parts, so that some tokens have come since the last were packed. Facts: bytes and what a step needs.
        """
        self.cache = None
        return_freed_memory()
        self.before = live_bytes(self.device)
        start = time.perf_counter()
        self.cache = self.new_cache()
        self._step()
        self._update(context - SPAN)
        self._update(TAIL)
        synchronize(self.device)
        facts: dict[str, Any] = {"fill_s": round(time.perf_counter() - start, 3)}
        self.late = 1 + TAIL
        self._step()
        facts |= {"layer": self._layer(), "token_bytes": self.token_bytes}
        facts |= {"cache_tokens": self.cache.get_seq_length(), "cache_bytes": live_bytes(self.device) - self.before}
        peaks, memory = [], PeakMemory(self.device)
        for _ in range(PEAKS):
            return_freed_memory()
            memory.restart()
            self._step()
            peaks.append(memory.bytes)
        known = [peak for peak in peaks if peak is not None]
        return facts | {"step_peak_bytes": median(known) if known else None}

    @torch.no_grad()
    def steps(self, count: int) -> dict[str, Any]:
        """Milliseconds of so many decode steps, each: one token through the model."""
        return {"step_ms": [round(self._timed(), 3) for _ in range(count)]}

    @torch.no_grad()
    def pack(self) -> dict[str, Any]:
        """Go to where the tokens kept as they are fill what is kept for them, and time the step that packs them; then
        the bytes again, for a buffer with room may have grown in the meantime."""
        every = self.kind.packs_every or SPAN
        missing_tokens = (every - 1 - self.late) % every
        if missing_tokens:
            self._update(missing_tokens)
            self.late += missing_tokens
        pack_ms = max(self._timed(), self._timed())  # peers pack behind a step, this package before the next one
        facts: dict[str, Any] = {"packs_every": self.kind.packs_every}
        facts["pack_ms"] = round(pack_ms, 3) if self.kind.packs_every else None
        facts |= {"later_tokens": self.cache.get_seq_length()}
        return facts | {"later_bytes": live_bytes(self.device) - self.before}

    @torch.no_grad()
    def score(self, windows: Sequence[Sequence[int]], piece: int) -> dict[str, Any]:
        """Of each window, fed through a new cache in pieces, the mean cross-entropy of all tokens after the first
        piece, in nats. The first token of a piece is predicted by the last one of the piece before."""
        nats = []
        for window in windows:
            ids, cache = torch.tensor([window], device=self.device), self.new_cache()
            logits = [self.model(each, past_key_values=cache, use_cache=True).logits[0] for each in ids.split(piece, 1)]
            predicted = torch.cat(logits)[piece - 1 : -1].float()
            nats.append(cross_entropy(predicted, ids[0, piece:]).item())
        self.cache = cache
        return {"nats": nats, "layer": self._layer()}

    @torch.no_grad()
    def stream(self, ids: Sequence[int], places: Sequence[int]) -> dict[str, Any]:
        """Cross-entropy of the tokens after these places, in a stream of which each token is read once: `nats`; and the
        mean over all tokens but the first: `stream_nats`."""
        tokens, losses = torch.tensor([ids], device=self.device), []
        self.cache = self.new_cache()
        for at in range(len(ids) - 1):
            logits = self.model(tokens[:, at : at + 1], past_key_values=self.cache, use_cache=True).logits[0].float()
            losses.append(cross_entropy(logits, tokens[0, at + 1 : at + 2]))
        found = torch.stack(losses).tolist()
        facts = {"nats": [round(found[place], 5) for place in places], "layer": self._layer()}
        return facts | {"stream_nats": sum(found) / len(found)}

    @torch.no_grad()
    def recompute(self, ids: Sequence[int], places: Sequence[int], window: int) -> dict[str, Any]:
        """The same, each from a forward of its own over the last `window` tokens, without a cache."""
        tokens, nats = torch.tensor(ids, device=self.device), []
        for place in places:
            inputs = tokens[None, place - window + 1 : place + 1]
            logits = self.model(inputs, use_cache=False, logits_to_keep=1).logits[0].float()
            nats.append(round(cross_entropy(logits, tokens[place + 1 : place + 2]).item(), 5))
        return {"nats": nats}

    def _step(self) -> None:
        self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.late += 1

    def _timed(self) -> float:
        return time_call(self._step, self.device)

    def _update(self, count: int) -> None:
        shape = (1, self.row_shape[0], count, self.row_shape[1])
        keys, values = (torch.randn(shape, dtype=self.model.dtype, device=self.device) for _ in range(2))
        for layer in range(self.layer_count):
            self.cache.update(keys, values, layer)

    def _layer(self) -> str:
        """The class of a layer; ValueError where a patched model has not made the cache its own, or any other has."""
        kind = type(self.cache.layers[0])
        name = f"{kind.__module__}.{kind.__qualname__}"
        expected = self.kind.patched is not None and self.kind.patched.get("cache") is not False
        if name.startswith("hf_accel_patch.") != expected:
            raise ValueError(f"the cache that was to be measured has layers of {name}")
        return name
