"""Static caches under frequencies that change with the length of the text, compiled or not.

As in scaling_cache.py, keys are held as the frequencies of short texts rotate them, and handed out rotated on to those
of the length in force. Buffers stay where they are; the length in force is a tensor, which nobody waits for. Where only
the device knows it, a layer of full attention turns its keys at each step if its room goes beyond the trained length:
up to there by no angle, which leaves them as they are to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from hf_accel_patch.families.rotary import Turn
from hf_accel_patch.passes.placed import PlacedStaticLayer
from hf_accel_patch.passes.scaling_cache import TURNING_DYNAMIC, Turning


class _TurningStatic(PlacedStaticLayer):
    """Keys and values, with the positions of their tokens."""

    turning: Turning
    positions: Any  # [B, L] of the tokens in the buffers; None before there are any
    ahead: int | None  # tokens that positions are at most further than the count says; None: unknown
    settled: bool  # keys are held as all later texts rotate them (longrope)

    def begin(self) -> None:
        self.given = self.positions = self.ahead = None  # of its own: compiled calls look at where they are
        self.settled = False
        if self.is_initialized:
            self._make_positions(len(self.keys), self.keys.device)
            first = max(0, int(self.get_seq_length()) - self.max_cache_len)
            self.positions.add_(torch.arange(first, first + self.max_cache_len, device=self.positions.device))

    def expect(self, positions: Tensor | None) -> None:
        self.ahead = 0 if positions is None else max(0, int(positions.max()) + 1 - positions.shape[-1])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._make_positions(len(key_states), key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, part = [key_states, value_states], self.turning.part
        given = new[part]
        turn = self._take(given.shape[2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        turns = self._turns(turn)
        if turns:
            new[part] = self._turned(given, turn, turn.positions, "new", back=True)
        slots, at = self._place(turn.positions)
        out = list(super().update(new[0], new[1], *args, **kwargs))
        if turns:
            kind = f"{type(self).__name__}{'' if at is self.positions else ' and new'}"
            out[part] = self._turned(out[part], turn, at, kind)
            out[part][:, :, slots] = given
            self._settle(turn)
        return out[0], out[1]

    def reset(self) -> None:
        super().reset()
        if self.positions is not None:
            self.positions.zero_()
        self.settled, self.ahead = False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))

    def _make_positions(self, rows: int, device: torch.device) -> None:
        self.positions = torch.zeros((rows, self.max_cache_len), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.positions)

    def _take(self, new: int) -> Turn:
        """The call of the rotary module that this many new tokens come from."""
        turn, self.given = self.given, None
        if turn is None or turn.positions.shape[1] != new:
            raise RuntimeError(f"{new} keys were cached whose positions the model's layers were not given")
        return turn

    def _turns(self, turn: Turn) -> bool:
        """Whether a text may be beyond the trained length with these tokens."""
        if self.settled:
            return False
        if self.ahead is None and not torch.compiler.is_compiling():
            self.ahead = self._ahead(turn)
        if turn.past is not None:
            return turn.past
        return self.ahead is None or self._most(turn) + self.ahead > turn.scaled.limit

    def _ahead(self, turn: Turn) -> int:
        """The device is waited for, once for a text."""
        if "ahead" not in turn.angles:
            count = int(self.get_seq_length()) + turn.positions.shape[1]
            turn.angles["ahead"] = max(0, int(turn.positions.max()) + 1 - count)
        return int(turn.angles["ahead"])

    def _most(self, turn: Turn) -> int:
        """Tokens that may have been seen with these."""
        return self.max_cache_len

    def _place(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Note the positions of new tokens, which are about to be cached. In what will be handed out: their indices
        [T], and all positions [B, S]."""
        slots = torch.arange(positions.shape[1], device=self.device) + self.cumulative_length
        self.positions[:, slots] = positions
        return slots, self.positions

    def _turned(self, keys: Tensor, turn: Turn, at: Tensor, kind: str, *, back: bool = False) -> Tensor:
        """From the frequencies of short texts to those of this turn, or back. The angles are computed once for all
        layers, which hold the same positions if they are of the same kind and size."""
        found = turn.angles.get(kind)
        if found is None or found[0] != at.shape[1]:
            found = turn.angles[kind] = (at.shape[1], *self.turning.angles(turn.difference, at))
        return self.turning.rotation.by(keys, found[1], -found[2] if back else found[2])

    def _settle(self, turn: Turn) -> None:
        """Once no text is short any more, frequencies that will not change are those in which keys are held."""
        if turn.scaled.longer is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if turn.past is None and turn.positions.shape[1] == 1:  # nobody waits for the device at each step
            return
        if "settled" not in turn.angles:
            turn.angles["settled"] = bool((turn.lengths > turn.scaled.limit).all())
        if turn.angles["settled"]:
            held = (self.keys, self.values)[self.turning.part]
            held.copy_(self._turned(held, turn, self.positions, type(self).__name__))
            self.settled = True


class TurningStaticLayer(_TurningStatic):
    """Full attention."""


class TurningStaticSlidingWindowLayer(_TurningStatic, StaticSlidingWindowLayer):
    """A sliding window; positions move as the keys do in StaticSlidingWindowLayer.update."""

    def _most(self, turn: Turn) -> int:
        return self.cumulative_length_int + turn.positions.shape[1]

    def _place(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        T, L, seen = positions.shape[1], self.max_cache_len, self.cumulative_length_int
        if seen + T <= L:
            return super()._place(positions)
        positions = positions.expand(len(self.positions), -1)
        if seen >= L and T == 1:
            self.positions.copy_(torch.cat((self.positions[:, 1:], positions), dim=1))
            return torch.tensor([L - 1], device=self.device), self.positions
        at = torch.cat((self.positions[:, 1:] if seen >= L else self.positions[:, :seen], positions), dim=1)
        self.positions.copy_(at[:, -L:])
        S = at.shape[1]
        return torch.arange(S - T, S, device=self.device), at


TURNING: dict[type, type] = {
    **TURNING_DYNAMIC,
    StaticLayer: TurningStaticLayer,
    StaticSlidingWindowLayer: TurningStaticSlidingWindowLayer,
}
