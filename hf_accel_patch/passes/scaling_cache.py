"""Cached keys under frequencies that change with the length of the text (dynamic NTK, longrope).

Scores depend on the distance of a query and a key only if both are rotated with the same frequencies. So keys are
held as the frequencies of short texts rotate them, and handed out rotated by position x (frequencies of the length in
force - those of short texts): each step past the trained length reads and writes all keys once more. Up to it, nothing
is done. Of longrope, whose frequencies change only once, the keys are changed once where they are held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel_patch.families.rotary import Turn
from hf_accel_patch.passes.layers import InPlaceLayer, InPlaceSlidingWindowLayer
from hf_accel_patch.passes.placed import PlacedLayer, Places, Rotated, fresh


@dataclass(frozen=True, eq=False)
class Turning(Rotated):
    """Between the frequencies of short texts and those of a turn."""

    def turn(self, keys: Tensor, places: Places, turn: Turn, *, back: bool = False) -> Tensor:
        """`keys` at `places`, from the frequencies of short texts to those of this turn, or back."""
        return self.by(keys, places, turn, turn.difference, places.whole(), back)


class _TurningLayer(PlacedLayer):
    """Keys and values, with the positions of their tokens."""

    ahead = 0  # tokens that the first positions are further than the count of tokens says
    longer: Turn | None = None  # keys are held as this turn rotates them, which is how all later ones will (longrope)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, part = [key_states, value_states], self.turning.part
        T = new[part].shape[2]
        turn = self._turn(T)
        known, past = self.places, turn.past
        if past is None:
            if known is None:  # the only time that the device is waited for
                self.ahead = max(0, int(turn.positions.max()) + 1 - self.get_seq_length() - T)
            past = self.get_seq_length() + T + self.ahead > turn.scaled.limit
        turns = past and self.longer is None
        if turns:
            new[part] = self.turning.turn(new[part], fresh(turn), turn, back=True)
        out = list(super().update(new[0], new[1], *args, **kwargs))
        places = fresh(turn) if known is None else known.append(turn.positions)
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
        self.unsettle()
        super().crop(*args, **kwargs)

    def unsettle(self) -> None:
        if self.longer is not None:
            self._rotate_held(self.longer, back=True)
            self.longer = None

    def forget(self) -> None:
        self.longer, self.ahead = None, 0

    def _settle(self, turn: Turn) -> None:
        """Once no text is short any more, frequencies that will not change are those in which keys are held."""
        if turn.scaled.longer is None or torch.is_grad_enabled() or not bool((turn.lengths > turn.scaled.limit).all()):
            return
        self._rotate_held(turn)
        self.longer = turn

    def _rotate_held(self, turn: Turn, *, back: bool = False) -> None:
        held = self._held(self.turning.part)
        if self.places is not None and len(held):
            some = held.writable()
            some.copy_(self.turning.turn(some, self.places.last(len(held)), turn, back=back))


class TurningLayer(_TurningLayer, InPlaceLayer):
    """Full attention."""


class TurningSlidingWindowLayer(_TurningLayer, InPlaceSlidingWindowLayer):
    """A sliding window."""


TURNING_DYNAMIC: dict[type, type] = {
    DynamicLayer: TurningLayer,
    InPlaceLayer: TurningLayer,
    DynamicSlidingWindowLayer: TurningSlidingWindowLayer,
    InPlaceSlidingWindowLayer: TurningSlidingWindowLayer,
}
