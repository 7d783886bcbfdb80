"""Cached keys whose positions are remembered, for what rotates them again later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from hf_accel_patch.families.rotary import Key, Turn, cos_sin, latest
from hf_accel_patch.families.rotation import Rotation
from hf_accel_patch.passes.layers import _InPlace

MOST_PARTS = 64  # steps whose positions are kept apart
KEPT_STEPS = 4  # from one set of positions to the next ones, which layers share


class Places:
    """The positions [R, S] of cached tokens, R the batch or 1. Never changed, so that the layers of a cache, which go
    through the same steps, share one, and the angles computed from it."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts if len(parts) <= MOST_PARTS else (_joined(parts),)
        self.length = sum(part.shape[1] for part in parts)
        self._next: tuple[tuple[Any, Places], ...] = ()
        self._angles: dict[Key, tuple[object, Any]] = {}

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

    def between(self, first: int, last: int) -> Places:
        return self._then(("between", first, last), lambda: Places(self.whole()[:, first:last]))

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

    def angles(self, key: Key, turn: object, make: Callable[[], Any]) -> Any:
        """What `make` gives for this turn, computed once."""
        held = self._angles.get(key)
        if held is None or held[0] is not turn:
            held = self._angles[key] = (turn, make())
        return held[1]

    def _then(self, step: Any, make: Callable[[], Places]) -> Places:
        found = next((places for held, places in self._next if _is_same(held, step)), None)
        if found is None:
            found = make()
            self._next = ((step, found), *self._next[: KEPT_STEPS - 1])
        return found


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, tuple) and isinstance(b, tuple) and a == b)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    rows = max(len(part) for part in parts)
    return torch.cat([part.expand(rows, -1) for part in parts], dim=1)


@dataclass(frozen=True, eq=False)
class Rotated:
    """How the keys of one layer are rotated."""

    rotation: Rotation
    part: int  # of keys and values, which has them
    key: Key

    def __deepcopy__(self, memo: Any) -> Rotated:
        return self  # a copy of a cache is one of the same model

    def by(self, keys: Tensor, places: Places, turn: object, frequencies: Tensor, at: Tensor, back: bool) -> Tensor:
        """`keys` at `places`, rotated by `frequencies` times `at`, or back; the angles are computed once a turn."""

        cos, sin = places.angles(self.key, turn, lambda: self.angles(frequencies, at))
        return self.rotation.by(keys, cos.to(keys.device), (-sin if back else sin).to(keys.device))

    def angles(self, frequencies: Tensor, at: Tensor) -> Any:
        """cos and sin of `frequencies` [R, D / 2] times `at` [R or 1, S]."""
        like = torch.empty(0, dtype=torch.float32, device=at.device)
        return cos_sin(self.rotation.rotary, frequencies, like, at, self.key[1], scaling=1.0)


class PlacedLayer(_InPlace):
    """Keys and values, with the positions of their tokens. Some keys may be held in another rotation than they came in,
    until they are unsettled."""

    turning: Any  # a Rotated
    places: Places | None = None
    _met: Turn | None = None  # the latest

    def unsettle(self) -> None:
        """Hold all keys as they came."""
        raise NotImplementedError

    def forget(self) -> None:
        """Other keys are held now, and none is settled."""
        raise NotImplementedError

    def crop(self, *args: Any, **kwargs: Any) -> None:
        before = self.get_seq_length()
        super().crop(*args, **kwargs)
        if self.places is not None:  # a window forgets the latest, and the earliest that it kept for that
            self.places = self.places.first(self.places.length - before + self.get_seq_length()).last(self._count())

    def reset(self) -> None:
        super().reset()
        if not self._count():  # older transformers only writes zeros
            self.places = None
            self.forget()

    def take(self, keys: Tensor, values: Tensor) -> None:
        super().take(keys, values)
        self.begin()

    def begin(self) -> None:
        """What it holds was cached elsewhere, in one piece from position 0, as short texts rotate it."""
        held = (self._keys, self._values)[self.turning.part]
        if held is not None and len(held):
            self.places = Places(torch.arange(len(held), device=held.buffer.device)[None])

    def state(self) -> dict[str, Tensor]:
        self.unsettle()
        return super().state()

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.forget()
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

    def _turn(self, new: int) -> Turn:
        """The call of the rotary module that this many new tokens come from."""
        turn = latest(self.turning.key)
        if turn is None or turn is self._met or turn.positions.shape[1] != new:
            raise RuntimeError(
                f"{new} keys were cached without a call of the rotary module in this thread, or under torch.compile, "
                "so their positions are unknown"
            )
        self._met = turn
        return turn

    def _held(self, part: int) -> Any:
        return (self._keys, self._values)[part]

    def _count(self) -> int:
        held = self._held(self.turning.part)
        return 0 if held is None else len(held)


class PlacedStaticLayer(StaticLayer):
    """Keys and values in buffers of a fixed size. The positions of new tokens are given before each of their calls, to
    be found in compiled calls as well."""

    turning: Any  # a Rotated
    given: Turn | None

    def begin(self) -> None:
        """It is one of these from now on; what it holds was cached elsewhere."""
        raise NotImplementedError

    def expect(self, positions: Tensor | None) -> None:
        """A text begins, at these positions [R, T], or at 0."""
        raise NotImplementedError


def fresh(turn: Turn) -> Places:
    """The places of a turn's own tokens."""
    if "places" not in turn.angles:
        turn.angles["places"] = Places(turn.positions)
    found: Places = turn.angles["places"]
    return found
