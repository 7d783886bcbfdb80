"""Weights, cache and activations of a model under some passes, in bytes, without touching the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from hf_accel_patch.families import View, context_tokens, dtype_of
from hf_accel_patch.journal import Journal
from hf_accel_patch.passes import GQA, Attention, KVCache, Prefill, Quantize, Speculative
from hf_accel_patch.passes.cache import BITS
from hf_accel_patch.plan import Pass, Step
from hf_accel_patch.planning.caches import kept
from hf_accel_patch.planning.trace import Traced, quantized_names, traced, twin

FEW = 64  # tokens of the shorter trace of a recurrent model
DEFAULT_TOKENS = 2048  # where neither the user nor the configuration says how many


@dataclass(frozen=True)
class Size:
    """Bytes. `activations` are those of the prompt at its widest, or of its last piece where `generate` reads it in
    pieces; or of the last token's step, if that needs more with the room that a growing cache has. `peak` is their sum
    with the weights and the cache."""

    weights: int
    cache: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.activations

    def to_dict(self) -> dict[str, int]:
        sizes = {"weights": self.weights, "cache": self.cache, "activations": self.activations}
        return sizes | {"peak": self.peak}


@dataclass
class Estimates:
    """Of one model for `batch` sequences of `tokens`. What has been found out is kept for the next question.

    Weights are counted as the passes would leave them, exactly. The cache is counted from the shapes in which a run on
    the meta device hands keys and values to it. Activations are those that live in that run.
    """

    view: View
    tokens: int
    batch: int = 1
    skeleton: View | None = None  # the same model in float weights on the meta device, if there is one
    patched: bool = False  # whether the passes are on already: then the skeleton is asked what they would do
    beside: int = 0  # bytes of originals that a patched model keeps
    _traces: dict[Any, Traced] = field(default_factory=dict, repr=False)
    _weights: dict[Any, tuple[int, frozenset[str]]] = field(default_factory=dict, repr=False)
    _saved: dict[Any, tuple[int, float]] = field(default_factory=dict, repr=False)

    def stock(self) -> Size:
        """Of the model as it is, by stock transformers."""
        return self._size(None, None, None, None, ours=False)

    def of(self, passes: Iterable[Pass]) -> Size:
        """Of the model under these passes. Raises UnsupportedModel where it cannot have one."""
        found: dict[type, Any] = {type(each): each for each in passes}
        prefill = found.get(Prefill)
        chunk = None if prefill is None else prefill.chunk(self._unpatched())
        piece = chunk if chunk is not None and chunk < self.tokens else None
        size = self._size(found.get(Quantize), found.get(KVCache), found.get(GQA), piece, ours=Attention in found)
        drafts: Speculative | None = found.get(Speculative)
        copied = 0 if drafts is None else drafts.copy_bytes(self._unpatched())
        return replace(size, weights=size.weights + self.beside + copied)

    @property
    def problem(self) -> str:
        """Why activations are a rule of thumb, or nothing."""
        return next((each.problem for each in self._traces.values() if each.problem), "")

    def _size(
        self, quantize: Quantize | None, cache: KVCache | None, gqa: GQA | None, piece: int | None, *, ours: bool
    ) -> Size:
        weights, names = self._weighed(quantize)
        if cache is not None and not isinstance(cache.inspect(self._unpatched()), Step):
            cache = None
        trace = self._trace(ours, cache, names, piece)
        saved, share = self._grouped(gqa)
        rows = [replace(row, heads=max(1, round(row.heads * share))) for row in trace.rows]
        sizes = kept(cache, rows, self.tokens, self.batch, dtype_of(self.view.model).itemsize, piece)
        held, during = sizes.prompt + trace.states, trace.activations
        if cache is None:  # a window of stock's is a slice of the whole prompt until the next token
            during += max(0, int(trace.held * share) - held)
        after = sizes.grown - sizes.prompt + trace.activations // (piece or self.tokens)
        return Size(weights - saved * weights // self.view.weight_bytes(), held, max(during, after))

    def _weighed(self, quantize: Quantize | None) -> tuple[int, frozenset[str]]:
        key = None if quantize is None else (quantize.scheme, quantize.group_size, quantize.skip, quantize.originals)
        if key not in self._weights:
            size, names = self.view.weight_bytes(), quantized_names(self.view)
            if quantize is not None:
                targets, _ = quantize.choose(self.view)
                if quantize.originals != "keep":
                    size -= sum(p.numel() * p.element_size() for target in targets for p in target.parameters())
                size += sum(target.packed_bytes for target in targets)
                names |= {name for target in targets for name, _ in target.modules}
            self._weights[key] = size, names
        return self._weights[key]

    def _grouped(self, gqa: GQA | None) -> tuple[int, float]:
        """The bytes of weights that fewer key/value heads save, less those of originals that are kept, and which share
        of the cache is left."""
        if gqa not in self._saved:
            decided = None if gqa is None or self.patched else gqa.inspect(self.view)
            if gqa is None or not isinstance(decided, Step):
                self._saved[gqa] = (0, 1.0)
                return self._saved[gqa]
            facts = decided.facts
            saved = facts["bytes_before"] - facts["bytes_after"]
            if gqa.originals == "keep":
                saved -= sum(layout.replaced_bytes() for layout in decided.work[0].layouts)
            self._saved[gqa] = saved, facts["kv_heads"] / facts["was"]
        return self._saved[gqa]

    def _trace(self, ours: bool, cache: KVCache | None, names: frozenset[str], piece: int | None) -> Traced:
        packed = cache is not None and cache.kind in BITS
        key = ours, cache if piece else packed, names, piece
        if key not in self._traces:
            skeleton, most = self._skeleton(), piece or self.tokens

            def run(tokens: int) -> Traced:
                past = self.tokens - tokens if piece else 0
                return traced(skeleton, tokens, self.batch, ours=ours, cache=cache, quantized=names, past=past)

            recurrent = getattr(skeleton.model, "_is_stateful", False)  # goes from token to token, in Python
            long = recurrent and most > 2 * FEW
            self._traces[key] = extended(run(FEW), run(2 * FEW), most) if long else run(most)
        return self._traces[key]

    def _skeleton(self) -> View:
        self.skeleton = self.skeleton or twin(self.view)
        return self.skeleton

    def _unpatched(self) -> View:
        """What passes are asked about: of a patched model they would say that it cannot have them."""
        return self._skeleton() if self.patched else self.view


def kept_bytes(model: nn.Module, journal: Journal) -> int:
    """Of the originals that a patched model keeps for undo."""
    here = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {each.untyped_storage()._cdata: each for each in journal.shared() if isinstance(each, Tensor)}
    return sum(each.untyped_storage().nbytes() for key, each in kept.items() if key not in here)


def extended(one: Traced, two: Traced, tokens: int) -> Traced:
    """A trace of more tokens, from those of FEW and of twice as many: what grows does so in proportion."""

    def at(first: int, second: int) -> int:
        return second + (second - first) * (tokens - 2 * FEW) // FEW

    return replace(two, activations=at(one.activations, two.activations), held=at(one.held, two.held))


def tokens_of(view: View, context: int | None) -> int:
    """How many tokens to count: those asked for, or what the model was made for."""
    return context or context_tokens(view.config) or DEFAULT_TOKENS
