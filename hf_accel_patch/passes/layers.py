"""The layers of an exact cache: transformers' own, but keys and values are written in place.

A layer of a `DynamicCache` becomes one of these by a change of its class (see passes/cache.py), so whatever made the
cache, and whatever it was told, stays as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel_patch.compat import (
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    to_remove,
)
from hf_accel_patch.ops.growing import Growing

SLACK, LEAST = 1 / 8, 64  # at most an eighth of a buffer, or 64 tokens, is empty; a token is copied about eight times
WINDOW_SLACK, WINDOW_LEAST = 1 / 32, 16  # of a window; in order, not as a ring: masks and biases are in order


@dataclass(frozen=True)
class Places:
    """Where each sequence of a batch goes on, for one pass: entries [B, T], and the number of entries with them.

    With `rows` [B, 1], as in a step that is recorded: the buffer has room for them, and how many entries a layer counts
    stays what it was."""

    entries: Tensor
    stop: int
    rows: Tensor | None = None


class _InPlace(DynamicLayer):
    """`keys` and `values` are views of buffers with room for more. What is assigned to them stays where it is if it is
    a slice of the view, as in `crop`, and becomes the buffer otherwise; all but `update` is inherited."""

    restores = True  # whether `state` is all that it holds
    _slack, _least = SLACK, LEAST
    _keys: Growing | None = None
    _values: Growing | None = None
    apart: Places | None = None  # where to write instead of behind the last entry

    def _get(self, name: str) -> Tensor | None:
        held: Growing | None = getattr(self, name)
        if held is None and self.is_initialized:
            return torch.tensor([], dtype=self.dtype, device=self.device)
        if held is None:
            return None
        held.lent = True
        return held.view()

    def _set(self, name: str, content: Tensor | None) -> None:
        held: Growing | None = getattr(self, name)
        if content is None or content.ndim < 4:  # the empty tensor of a layer that has just been initialized
            setattr(self, name, None)
        elif held is None:
            setattr(self, name, Growing(content, self._slack, self._least))
        else:
            held.adopt(content)

    keys = property(lambda self: self._get("_keys"), lambda self, value: self._set("_keys", value))
    values = property(lambda self: self._get("_values"), lambda self, value: self._set("_values", value))

    def tell(self, options: Any, rotate: Any) -> None:
        """Nothing to be told."""

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Start with what another layer has held."""
        self.keys, self.values = keys, values

    def state(self) -> dict[str, Tensor]:
        """All that it holds, as tensors of their own."""
        held = {"keys": self._keys, "values": self._values}
        return {name: each.view().contiguous().clone() for name, each in held.items() if each is not None}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Hold what `state` said. Its tensors are read, and never written."""
        keys, values = state["keys"], state["values"]
        self.lazy_initialization(keys, values)
        self._keys, self._values = (Growing(x, self._slack, self._least) for x in (keys, values))

    def whole(self) -> bool:
        """Whether it holds all tokens that it has seen."""
        return True

    def get_seq_length(self) -> int:
        return 0 if self._keys is None else len(self._keys)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._append(key_states, value_states)

    def reset(self) -> None:
        """Forget everything; transformers before 5.23 would keep as many zeros."""
        self._keys = self._values = None
        self.is_initialized = False
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams that stay where they are need no copy."""
        if self._keys is None or not all_stay(beam_idx, self._keys.buffer.shape[0]):
            super().reorder_cache(beam_idx)

    def __copy__(self) -> _InPlace:
        other: Any = object.__new__(type(self))
        vars(other).update(vars(self), _keys=copy.copy(self._keys), _values=copy.copy(self._values))
        return other

    def placed(self) -> tuple[Growing, Growing] | None:
        """Where its keys and values are."""
        return None if self._keys is None or self._values is None else (self._keys, self._values)

    def first(self) -> int:
        """The place of the first token that it holds."""
        return 0

    def relocate(self, keys: Growing, values: Growing) -> None:
        """Be there from now on: `keys` and `values` hold the same entries."""
        self._keys, self._values = keys, values

    def settle(self, length: int) -> None:
        """So many tokens were seen, the latest of which a replay has written, each to its place in the buffer."""
        for each in (self._keys, self._values):
            if each is not None:
                each.settle(0, length)

    def _put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.apart is not None and self.apart.rows is not None
        assert self._keys is not None and self._values is not None
        entries, stop, rows = self.apart.entries, self.apart.stop, self.apart.rows
        return self._keys.put(keys, rows, entries, stop), self._values.put(values, rows, entries, stop)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            self._keys, self._values = (Growing(x[:, :, :0], self._slack, self._least) for x in (keys, values))
        return self._keys.append(keys), self._values.append(values)


class InPlaceLayer(_InPlace):
    """Full attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.apart is None or self._keys is None or self._values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        if self.apart.rows is not None:
            return self._put(key_states, value_states)
        entries, stop = self.apart.entries, self.apart.stop
        return self._keys.write(key_states, entries, stop), self._values.write(value_states, entries, stop)

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers'."""
        removed = to_remove(tokens_to_remove, self.get_seq_length())
        for each in (self._keys, self._values):
            if each is not None and removed:
                each.drop(back=removed)


class Windowed(DynamicSlidingWindowLayer):
    """What a layer with a window knows beside its tokens: how many it has seen. To be put before the class that
    keeps the tokens, whose `state` it completes."""

    record_past = False  # older transformers has no such attribute

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = super().state()
        return state | {"seen": torch.tensor(self.cumulative_length)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.cumulative_length = int(state["seen"])

    def whole(self) -> bool:
        return self.cumulative_length < self.sliding_window

    def get_seq_length(self) -> int:
        return self.cumulative_length


class InPlaceSlidingWindowLayer(Windowed, _InPlace, DynamicSlidingWindowLayer):
    """Sliding windows and chunks: what has left the window makes room for what comes."""

    _slack, _least = WINDOW_SLACK, WINDOW_LEAST

    def first(self) -> int:
        return self.cumulative_length - (0 if self._keys is None else len(self._keys))

    def settle(self, length: int) -> None:
        self.cumulative_length, kept = length, self.sliding_window - 1
        for each in (self._keys, self._values):
            if each is not None:
                each.settle(each.start if self.record_past else max(each.start, length - kept), length)

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers', which keeps none of the views that it takes."""
        held = [each for each in (self._keys, self._values) if each is not None]
        lent = [each.lent for each in held]
        super().crop(tokens_to_remove)
        for each, before in zip(held, lent, strict=True):
            each.lent = before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.apart is not None:
            return self._put(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, kept = key_states.shape[2], self.sliding_window - 1
        self.cumulative_length += new
        if self.record_past:
            keys, values = self._append(key_states, value_states)
            return keys[:, :, -kept - new :], values[:, :, -kept - new :]
        held = 0 if self._keys is None else len(self._keys)
        if held + new > kept and new > max(WINDOW_LEAST, int(kept * WINDOW_SLACK)):  # a prompt: keep its end only
            keys, values = key_states, value_states
            if held:
                keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
            self._keys = self._values = None
            self._append(*(each[:, :, each.shape[2] - kept :] for each in (keys, values)))
            return keys, values
        keys, values = self._append(key_states, value_states)
        for each in (self._keys, self._values):
            if each is not None:
                each.drop(front=max(0, len(each) - kept))
        return keys, values


class InPlaceIndexedLayer(_InPlace, DynamicIndexedLayer):
    """Full attention, with the keys of an indexer beside it, which stay as they are."""

    restores = False


class InPlaceHybridLayer(_InPlace, LinearAttentionAndFullAttentionLayer):
    """Full attention and a recurrent state in one layer."""

    restores = False


class InPlaceHybridSlidingWindowLayer(InPlaceSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """A sliding window and a recurrent state in one layer."""

    restores = False


def all_stay(indices: Tensor, batch: int) -> bool:
    """Whether these indices leave every row of a batch where it is. On a GPU nobody waits to find out."""
    return indices.device.type == "cpu" and indices.tolist() == list(range(batch))


IN_PLACE: dict[type, type] = {
    DynamicLayer: InPlaceLayer,
    DynamicSlidingWindowLayer: InPlaceSlidingWindowLayer,
    DynamicIndexedLayer: InPlaceIndexedLayer,
    LinearAttentionAndFullAttentionLayer: InPlaceHybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: InPlaceHybridSlidingWindowLayer,
}
