"""Where the keys and values of a cache lie while steps over them are recorded: buffers that stay where they are.

A recorded step reads and writes at addresses. So a cache whose steps are to be recorded moves into a room, once, with
space for the tokens that are still to come; when it is gone, the room and all that was recorded in it serve the next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel_patch.ops.graphs import Recorded
from hf_accel_patch.ops.growing import Growing
from hf_accel_patch.passes.layers import _InPlace

SPARE = 16  # entries behind the last one, for tokens that fill up a pass
LEAST_VISIBLE = 256  # entries; recorded steps see a few lengths only
Of = weakref.ref[nn.Module] | None
RESERVE, RESERVE_BYTES = 4096, 1 << 30  # tokens to come that a room has space for at most; then the cache moves again
CHANGES = object()  # in the place of a mask that is another one at every pass


@dataclass
class Pass:
    """What goes through the model: tokens [B, t], each with its place among the entries of its sequence, [B, t] or the
    first place of all, and its position [B or 1, t], by default the place. `stop`: entries with them. `mask`, [B, n]:
    which of the first n entries are no padding; None: all. `plain` runs it the ordinary way."""

    cache: Any
    tokens: Tensor
    places: Tensor | int
    positions: Tensor | None
    stop: int
    mask: Tensor | None
    plain: Callable[[], Any]
    changing: bool = True  # whether the mask is another one than the last time
    keep: int = 0  # of the last tokens, logits are asked for; 0: of all


@dataclass
class Inputs:
    """What a recorded step of T tokens reads, each [B, T]; `steps` counts from 0."""

    tokens: Tensor
    places: Tensor
    positions: Tensor
    steps: Tensor


@dataclass
class Step:
    """A recorded step, and what the model returned beside it. `tried`: whether a replay was as the model says."""

    recorded: Recorded
    kind: Any
    tried: bool = False


class Room:
    """Buffers [B, K, C, D] for the keys and the values of each layer, and the steps recorded over them."""

    def __init__(self, layers: Sequence[_InPlace], capacity: int) -> None:
        self.capacity = capacity
        self.steps: dict[tuple[int, int, bool, Of], Step] = {}  # by tokens, visible entries, whether in inference mode
        self._held: list[tuple[Growing, Growing]] = []
        self._holders: list[weakref.ref[_InPlace]] = []
        self._inputs: dict[int, Inputs] = {}
        self._told: object = None  # which mask `seen` is of; None: nothing is hidden
        with torch.inference_mode(False), torch.no_grad():
            shapes = [[_shape(each, capacity) for each in _placed(layer)] for layer in layers]
            self._buffers = [[like.new_zeros(shape) for like, shape in pair] for pair in shapes]
            first = self._buffers[0][0]
            self.seen = torch.ones(len(first), capacity, dtype=torch.bool, device=first.device)
            self.columns = torch.arange(capacity, device=first.device)
            self.rows = torch.arange(len(first), device=first.device)[:, None]

    def holds(self, layers: Sequence[_InPlace]) -> bool:
        """Whether these layers are in this room."""
        if len(layers) != len(self._held):
            return False
        if any(ref() is not layer for ref, layer in zip(self._holders, layers, strict=True)):
            return False
        for layer, pair, buffers in zip(layers, self._held, self._buffers, strict=True):
            for now, held, buffer in zip(_placed(layer), pair, buffers, strict=True):
                if now is not held or held.buffer is not buffer or held.shared or held.start != layer.first():
                    return False
        return True

    def knows(self, layer: _InPlace) -> bool:
        """Whether this layer has moved in, whatever has become of it."""
        return bool(self._holders) and self._holders[0]() is layer

    def left(self) -> bool:
        """Whether whoever was here is gone."""
        return all(ref() is None for ref in self._holders)

    def free(self) -> bool:
        """Whether, besides, nobody can have kept a view of it."""
        return self.left() and not any(each.shared or each.lent for pair in self._held for each in pair)

    def suits(self, layers: Sequence[_InPlace]) -> bool:
        """Whether these layers could move in, if they are not too long."""
        if len(layers) != len(self._buffers):
            return False
        for layer, buffers in zip(layers, self._buffers, strict=True):
            for held, buffer in zip(_placed(layer), buffers, strict=True):
                like = held.buffer
                same = like.dtype == buffer.dtype and like.device == buffer.device
                if not same or like.shape[:2] != buffer.shape[:2] or like.shape[3:] != buffer.shape[3:]:
                    return False
        return True

    def take(self, layers: Sequence[_InPlace]) -> None:
        """Let these layers move in, with what they hold."""
        self._held, self._holders = [], [weakref.ref(layer) for layer in layers]
        with torch.no_grad():
            for layer, buffers in zip(layers, self._buffers, strict=True):
                keys, values = (
                    Growing.within(buffer, held.view(), layer.first(), held.slack, held.least)
                    for held, buffer in zip(_placed(layer), buffers, strict=True)
                )
                layer.relocate(keys, values)
                self._held.append((keys, values))
            self.seen.fill_(True)
        self._told = None

    def step(self, width: int, stop: int, of: Of = None) -> Step | None:
        """The recorded step of so many tokens that sees the fewest entries, of those that see `stop`."""
        mode = torch.is_inference_mode_enabled()
        sizes = [key[1] for key in self.steps if (key[0], *key[2:]) == (width, mode, of) and key[1] >= stop]
        size = min(sizes, default=None)
        if size is None or size > 2 * visible(stop):
            return None
        return self.steps[width, size, mode, of]

    def add(self, width: int, size: int, step: Step, of: Of = None) -> None:
        """A step of the model, or of another one that works on the same cache, with what it sees."""
        self.steps = {key: each for key, each in self.steps.items() if key[3] is None or key[3]() is not None}
        self.steps[width, size, torch.is_inference_mode_enabled(), of] = step

    def inputs(self, width: int) -> Inputs:
        """The inputs of steps of so many tokens."""
        if width not in self._inputs:
            with torch.inference_mode(False):
                steps = torch.arange(width, device=self.rows.device).repeat(len(self.rows), 1)
                self._inputs[width] = Inputs(steps.clone(), steps.clone(), steps.clone(), steps)
        return self._inputs[width]

    def fill(self, width: int, given: Pass) -> None:
        """Write the inputs of a pass where a step of so many tokens reads them. Tokens that fill it up follow the last
        one, at its position."""
        into, (_, t) = self.inputs(width), given.tokens.shape
        into.tokens[:, :t].copy_(given.tokens)
        if isinstance(given.places, int):
            torch.add(into.steps, given.places, out=into.places)
        else:
            into.places[:, :t].copy_(given.places)
        positions = into.places[:, :t] if given.positions is None else given.positions
        into.positions[:, :t].copy_(positions)
        if t < width:
            into.tokens[:, t:].copy_(given.tokens[:, -1:])
            into.positions[:, t:].copy_(positions[:, -1:])
            if not isinstance(given.places, int):
                torch.add(given.places[:, -1:], into.steps[:, 1 : width - t + 1], out=into.places[:, t:])
        self._hide(given)

    def _hide(self, given: Pass) -> None:
        if given.mask is None:
            if self._told is not None:
                self.seen.fill_(True)
            self._told = None
        elif given.changing:
            self.seen[:, : given.mask.shape[1]].copy_(given.mask)
            self._told = CHANGES
        elif self._told is not given.mask:
            self.seen.fill_(True)
            self.seen[:, : given.mask.shape[1]].copy_(given.mask)
            self._told = given.mask


def visible(length: int) -> int:
    """How many entries a step sees that has to see so many: at most an eighth more, or a few hundred."""
    grain = max(LEAST_VISIBLE, 1 << max(0, length.bit_length() - 4))
    return -(-length // grain) * grain


def reserve(layers: Sequence[_InPlace]) -> int:
    """For how many tokens to come a room has space: as many as the cache holds, or of a gigabyte, if that is more."""
    return max(LEAST_VISIBLE, min(RESERVE, max(RESERVE_BYTES // token_bytes(layers), layers[0].get_seq_length())))


def token_bytes(layers: Sequence[_InPlace]) -> int:
    """What a token takes in the cache."""
    return sum(each.buffer[:, :, :1].nbytes for layer in layers for each in layer.placed() or ())


def _placed(layer: _InPlace) -> tuple[Growing, Growing]:
    held = layer.placed()
    assert held is not None
    return held


def _shape(held: Growing, capacity: int) -> tuple[Tensor, tuple[int, ...]]:
    like = held.buffer
    return like, (*like.shape[:2], capacity, *like.shape[3:])
