"""Attention sinks and a window (StreamingLLM, arXiv 2309.17453): text without end in constant memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from hf_accel_patch.compat import CACHE, given_cache, to_remove
from hf_accel_patch.families.rotation import Moves
from hf_accel_patch.passes.layers import WINDOW_LEAST, WINDOW_SLACK, InPlaceSlidingWindowLayer, _InPlace

MOST_EVICTED = 16  # tokens at a time, or a sixteenth of the window: the sinks are rotated anew each time
NOWHERE = 1 << 62  # a place that never comes
STREAM = "_hf_accel_stream"  # on a cache, where it stands


class SinksLayer(_InPlace):
    """The first tokens and the latest ones. While nothing has been evicted it is an exact cache; from then on its first
    tokens are the sinks, moved to stand right before the oldest of the others."""

    _slack, _least = WINDOW_SLACK, WINDOW_LEAST
    seen = 0
    sinks: tuple[Tensor, Tensor] | None = None  # keys and values as they were first cached
    places: Tensor | None = None  # [B, sinks], of these, counted in all tokens; NOWHERE if a sequence had fewer

    def take(self, keys: Tensor, values: Tensor) -> None:
        super().take(keys, values)
        self.seen = self.held()

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held() + query_length, self.seen - self.held()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        count, held = to_remove(tokens_to_remove, self.seen), self.held()
        if self.sinks is not None and count > held - self.sinks[0].shape[2]:
            raise RuntimeError(f"crop({tokens_to_remove}): the window has the last {held} of {self.seen} tokens")
        for each in (self._keys, self._values):
            if each is not None:
                each.drop(back=count)
        self.seen -= count

    def reset(self) -> None:
        self.seen, self.sinks, self.places = 0, None, None
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.places is not None:
            self._select(torch.arange(len(self.places)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if self.sinks is not None and self.places is not None:
            keys, values = (each[rows.to(each.device)] for each in self.sinks)
            self.sinks, self.places = (keys, values), self.places[rows.to(self.places.device)]

    def held(self) -> int:
        return 0 if self._keys is None else len(self._keys)

    def capture(self, count: int, padding: Tensor) -> None:
        """Keep the first `count` tokens of each sequence as they are. `padding` [B]: the tokens before the first."""
        places = padding[:, None] + torch.arange(count, device=padding.device)
        index = places.clamp(max=self.seen - 1)[:, None, :, None]
        keys, values = (
            each.gather(2, index.to(each.device).expand(-1, each.shape[1], -1, each.shape[3])).detach()
            for each in (self.keys, self.values)
        )
        self.sinks, self.places = (keys, values), places.masked_fill(places >= self.seen, NOWHERE)

    def evict(self, count: int) -> None:
        for each in (self._keys, self._values):
            if each is not None:
                each.drop(front=count)

    def place_sinks(self, first: int, offset: int, move: Moves) -> None:
        """Write the sinks before the oldest other token, the one at place `first`, and let them stand right before it.
        Of a padded sequence, some or all may still be among the others."""
        assert self.sinks is not None and self.places is not None
        length = self.sinks[0].shape[2]
        for part, (held, sinks) in enumerate(zip((self._keys, self._values), self.sinks, strict=True)):
            if move.rotation is not None and move.part == part:
                seen = (self.places < first).sum(-1)
                sinks = move.rotation(sinks, first - offset - seen - self.places[:, 0])
            assert held is not None
            held.writable()[:, :, :length].copy_(sinks)

    def move(self, distance: int, move: Moves) -> None:
        _move(self, distance, move, 0 if self.sinks is None else self.sinks[0].shape[2])


class MovingSlidingWindowLayer(InPlaceSlidingWindowLayer):
    """A window of the model's own, beside layers with sinks: its positions move with theirs."""

    def move(self, distance: int, move: Moves) -> None:
        _move(self, distance, move, 0)


STREAMING: dict[type, type] = {DynamicLayer: SinksLayer, DynamicSlidingWindowLayer: MovingSlidingWindowLayer}


@dataclass
class Stream:
    """Where a cache stands. Positions are counted in the window: when they would pass `limit`, all that is cached moves
    back, by a rotation, at most once while a token is in the window."""

    window: int
    count: int  # sinks
    limit: int
    first: int = 0  # the place in the stream of the oldest token that is no sink
    offset: int = 0  # positions of now are places in the stream less this

    def advance(self, layers: list[Any], moves: list[Moves], new: int, mask: Tensor | None) -> None:
        """Make room for `new` tokens. The sinks and what is kept are, with the new ones, at most a window."""
        full = [(layer, move) for layer, move in zip(layers, moves, strict=True) if isinstance(layer, SinksLayer)]
        if not full:
            return
        seen, held = full[0][0].seen, full[0][0].held()
        if not seen:  # a cache that was reset
            self.first = self.offset = 0
        moved = evicted = 0
        if held + new > self.window and held > self.count:
            step = max(1, min(MOST_EVICTED, self.window // 16))
            kept = max(self.count, self.window - new - step + 1)
            evicted = max(0, held - kept)
            self.first = seen - (held - evicted - self.count)
        if evicted and full[0][0].sinks is None:
            padding = self._padding(mask, full[0][0].keys)
            for layer, _ in full:
                layer.capture(self.count, padding)
        if seen + new - self.offset > self.limit and self.first > self.count:
            moved = self.first - self.count - self.offset
            self.offset += moved
        for layer, _ in full if evicted else ():
            layer.evict(evicted)
        for layer, move in zip(layers, moves, strict=True) if moved else ():
            layer.move(-moved, move)
        for layer, move in full if evicted or moved else ():
            if layer.sinks is not None:
                layer.place_sinks(self.first, self.offset, move)

    def visible(self, mask: Tensor, layer: SinksLayer) -> Tensor:
        """A padding mask [B, all tokens] in which the places before `first` stand for the sinks."""
        if layer.sinks is None or layer.places is None:
            return mask
        mask = mask.clone()
        mask[:, self.first - self.count : self.first] = (layer.places < self.first).to(mask)
        return mask

    @staticmethod
    def _padding(mask: Tensor | None, keys: Tensor) -> Tensor:
        if mask is None or mask.ndim != 2:
            return torch.zeros(keys.shape[0], dtype=torch.long, device=keys.device)
        return mask.long().argmax(-1)


@dataclass(frozen=True)
class Advancing:
    """The hook on the decoder: before it makes masks and positions, the cache makes room, and positions are those in
    the window."""

    moves: tuple[Moves, ...] = field(repr=False)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        names = list(inspect.signature(module.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        cache: Any = given_cache(given)
        stream: Stream | None = vars(cache).get(STREAM) if isinstance(cache, Cache) else None
        if stream is None or torch.compiler.is_compiling():
            return None
        layers = streaming_layers(cache)
        inputs: Any = given.get("input_ids")
        inputs = given["inputs_embeds"] if inputs is None else inputs
        new, seen, mask = inputs.shape[1], cache.get_seq_length(), given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        with torch.no_grad():
            stream.advance(layers, list(self.moves), new, mask)
        full = next((layer for layer in layers if isinstance(layer, SinksLayer)), None)
        if mask is not None and stream.first and full is not None:
            given["attention_mask"] = stream.visible(mask, full)
        if stream.offset:
            positions = given.get("position_ids")
            if positions is None:
                positions = torch.arange(seen, seen + new, device=inputs.device)[None]
            given["position_ids"] = positions - stream.offset
        return (), given


def streaming_layers(cache: Cache) -> list[Any]:
    """The layers that hold keys and values."""
    return [layer for layer in cache.layers if isinstance(layer, SinksLayer | MovingSlidingWindowLayer)]


@dataclass(frozen=True)
class PrefillInChunks:
    """A `_prefill` that reads a prompt beyond the model's context as what comes later: through the window."""

    chunk_tokens: int
    context: int
    inner: Callable[..., Any] | None = field(default=None, repr=False)  # what the model had

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: Any,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        ours = isinstance(model_kwargs.get(CACHE), Cache) and model_kwargs.get("inputs_embeds") is None
        whole = generation_config.output_attentions or generation_config.output_hidden_states
        if generation_config.prefill_chunk_size is None and ours and not whole and input_ids.shape[1] > self.context:
            generation_config.prefill_chunk_size = self.chunk_tokens
        prefill = partial(self.inner or type(model)._prefill, model)
        return prefill(input_ids, generation_config, model_kwargs, *rest, **kw)


def _move(layer: _InPlace, distance: int, move: Moves, start: int) -> None:
    held = (layer._keys, layer._values)[move.part]
    if move.rotation is not None and held is not None:
        some = held.writable()[:, :, start:]
        some.copy_(move.rotation(some, torch.tensor([distance])))
