"""Cached keys under frequencies that change with the length of the text (dynamic NTK, longrope).

Scores depend on the distance of a query and a key only if both are rotated with the same frequencies. So keys are
held as the frequencies of short texts rotate them, and handed out rotated by position x (frequencies of the length in
force - those of short texts): each step past the trained length reads and writes all keys once more. Up to it, nothing
is done. Of longrope, whose frequencies change only once, the keys are changed once where they are held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from hf_accel_patch.families.rotary import Key, Turn, cos_sin, latest
from hf_accel_patch.families.rotation import Rotation
from hf_accel_patch.passes.layers import InPlaceLayer, InPlaceSlidingWindowLayer, _InPlace

MARK = "_hf_accel_turning"  # on a cache whose layers turn their keys
MOST_PARTS = 64  # steps whose positions are kept apart


class Places:
    """The positions [R, S] of cached tokens, R the batch or 1. Never changed, so that the layers of a cache, which go
    through the same steps, share one, and the angles computed from it."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts if len(parts) <= MOST_PARTS else (_joined(parts),)
        self.length = sum(part.shape[1] for part in parts)
        self._next: tuple[Any, Places] | None = None
        self._angles: dict[Key, tuple[Turn, Any]] = {}

    def __deepcopy__(self, memo: Any) -> Places:
        return self

    def append(self, positions: Tensor) -> Places:
        return self._then(positions, lambda: Places(*self.parts, positions))

    def first(self, count: int) -> Places:
        return self if count >= self.length else self._then(("first", count), lambda: Places(self.whole()[:, :count]))

    def last(self, count: int) -> Places:
        if count >= self.length:
            return self
        return self._then(("last", count), lambda: Places(self.whole()[:, self.length - count :]))

    def select(self, rows: Tensor) -> Places:
        whole = self.whole()
        return self if len(whole) == 1 else self._then(rows, lambda: Places(whole[rows.to(whole.device)]))

    def repeat(self, repeats: int) -> Places:
        whole = self.whole()
        return self if len(whole) == 1 else Places(whole.repeat_interleave(repeats, dim=0))

    def whole(self) -> Tensor:
        if len(self.parts) > 1:
            self.parts = (_joined(self.parts),)
        return self.parts[0]

    def angles(self, key: Key, turn: Turn, make: Callable[[], Any]) -> Any:
        """What `make` gives for this turn, computed once."""
        held = self._angles.get(key)
        if held is None or held[0] is not turn:
            held = self._angles[key] = (turn, make())
        return held[1]

    def _then(self, step: Any, make: Callable[[], Places]) -> Places:
        held = self._next
        if held is None or not _is_same(held[0], step):
            held = self._next = (step, make())
        return held[1]


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, tuple) and isinstance(b, tuple) and a == b)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    rows = max(len(part) for part in parts)
    return torch.cat([part.expand(rows, -1) for part in parts], dim=1)


@dataclass(frozen=True, eq=False)
class Turning:
    """How the keys of one layer are rotated."""

    rotation: Rotation
    part: int  # of keys and values, which has them
    key: Key

    def __deepcopy__(self, memo: Any) -> Turning:
        return self  # a copy of a cache is one of the same model

    def turn(self, keys: Tensor, places: Places, turn: Turn, *, back: bool = False) -> Tensor:
        """`keys` at `places`, from the frequencies of short texts to those of this turn, or back."""
        module, layer_type = self.rotation.rotary, self.key[1]
        whole = places.whole()

        def make() -> Any:
            like = torch.empty(0, dtype=torch.float32, device=whole.device)
            return cos_sin(module, turn.difference, like, whole, layer_type, scaling=1.0)

        cos, sin = places.angles(self.key, turn, make)
        return self.rotation.by(keys, cos.to(keys.device), (-sin if back else sin).to(keys.device))


class _TurningLayer(_InPlace):
    """Keys and values, with the positions of their tokens."""

    turning: Turning
    places: Places | None = None
    ahead = 0  # tokens that the first positions are further than the count of tokens says
    met: Turn | None = None  # the latest
    longer: Turn | None = None  # keys are held as this turn rotates them, which is how all later ones will (longrope)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, part, turn = [key_states, value_states], self.turning.part, latest(self.turning.key)
        T = new[part].shape[2]
        if turn is None or turn is self.met or turn.positions.shape[1] != T:
            raise RuntimeError(
                f"{T} keys were cached without a call of the rotary module in this thread, or under torch.compile, so "
                "their positions are unknown"
            )
        self.met = turn
        known, past = self.places, turn.past
        if past is None:
            if known is None:  # the only time that the device is waited for
                self.ahead = max(0, int(turn.positions.max()) + 1 - self.get_seq_length() - T)
            past = self.get_seq_length() + T + self.ahead > turn.scaled.limit
        turns = past and self.longer is None
        if turns:
            new[part] = self.turning.turn(new[part], _fresh(turn), turn, back=True)
        out = list(super().update(new[0], new[1], *args, **kwargs))
        places = _fresh(turn) if known is None else known.append(turn.positions)
        S = out[part].shape[2]
        self.places = places.last(max(S, self._count()))
        if turns:
            given = (key_states, value_states)[part]
            if S > T:
                older = self.turning.turn(out[part][:, :, : S - T], places.last(S).first(S - T), turn)
                given = torch.cat((older, given), dim=2)
            out[part] = given
            self._settle(turn)
        return out[0], out[1]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self._unsettle()
        before = self._count()
        super().crop(*args, **kwargs)
        if self.places is not None and (gone := before - self._count()) > 0:
            self.places = self.places.first(self.places.length - gone)

    def reset(self) -> None:
        super().reset()
        if not self._count():  # older transformers only writes zeros
            self.places, self.longer, self.ahead = None, None, 0

    def take(self, keys: Tensor, values: Tensor) -> None:
        super().take(keys, values)
        self.begin()

    def begin(self) -> None:
        """What it holds was cached elsewhere, in one piece from position 0, as short texts rotate it."""
        held = (self._keys, self._values)[self.turning.part]
        if held is not None and len(held):
            self.places = Places(torch.arange(len(held), device=held.buffer.device)[None])

    def state(self) -> dict[str, Tensor]:
        self._unsettle()
        return super().state()

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.longer = None
        self.begin()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.places = self.places and self.places.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.places = self.places and self.places.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.places = self.places and self.places.repeat(repeats)

    def _settle(self, turn: Turn) -> None:
        """Once no text is short any more, frequencies that will not change are those in which keys are held."""
        if turn.scaled.longer is None or torch.is_grad_enabled() or not bool((turn.lengths > turn.scaled.limit).all()):
            return
        self._rotate_held(turn)
        self.longer = turn

    def _unsettle(self) -> None:
        if self.longer is not None:
            self._rotate_held(self.longer, back=True)
            self.longer = None

    def _rotate_held(self, turn: Turn, *, back: bool = False) -> None:
        held = self._held(self.turning.part)
        if self.places is not None and len(held):
            some = held.writable()
            some.copy_(self.turning.turn(some, self.places.last(len(held)), turn, back=back))

    def _held(self, part: int) -> Any:
        return (self._keys, self._values)[part]

    def _count(self) -> int:
        held = self._held(self.turning.part)
        return 0 if held is None else len(held)


def _fresh(turn: Turn) -> Places:
    """The places of a turn's own tokens."""
    if "places" not in turn.angles:
        turn.angles["places"] = Places(turn.positions)
    found: Places = turn.angles["places"]
    return found


class TurningLayer(_TurningLayer, InPlaceLayer):
    """Full attention."""


class TurningSlidingWindowLayer(_TurningLayer, InPlaceSlidingWindowLayer):
    """A sliding window."""


TURNING: dict[type, type] = {
    DynamicLayer: TurningLayer,
    InPlaceLayer: TurningLayer,
    DynamicSlidingWindowLayer: TurningSlidingWindowLayer,
    InPlaceSlidingWindowLayer: TurningSlidingWindowLayer,
}


@dataclass(frozen=True)
class ConvertingToTurning:
    """The hook on the first layer that meets a cache: those of its layers whose keys need it become ones that turn."""

    found: tuple[tuple[Rotation, int, Key] | None, ...] = field(repr=False)  # of each layer that holds keys

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((each for each in (*kwargs.values(), *args) if isinstance(each, Cache)), None)
        if cache is None or vars(cache).get(MARK) or torch.compiler.is_compiling():
            return
        vars(cache)[MARK] = True
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        turnings = [each and Turning(*each) for each in self.found]
        holding = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
        if len(holding) == len(turnings):
            for layer, turning in zip(holding, turnings, strict=True):
                if turning is not None and type(layer) in TURNING:
                    _convert(layer, turning)
        elif not holding and cache.layer_class_to_replicate in TURNING:
            same = {each and (each.part, each.key) for each in turnings}
            if len(same) == 1 and turnings[0] is not None:
                cache.layer_class_to_replicate = partial(_new, TURNING[cache.layer_class_to_replicate], turnings[0])


def _convert(layer: Any, turning: Turning) -> None:
    held = isinstance(layer, _InPlace)
    keys, values = (None, None) if held else (vars(layer).pop(name, None) for name in ("keys", "values"))
    layer.__class__ = TURNING[type(layer)]
    layer.turning = turning
    if keys is not None and keys.ndim == 4:
        layer.take(keys, values)
    elif held:
        layer.begin()


def _new(kind: Any, turning: Turning) -> Any:
    layer = kind()
    layer.turning = turning
    return layer
