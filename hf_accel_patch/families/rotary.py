"""A rotary module that keeps no state.

Transformers' modules of dynamic NTK and of longrope write the frequencies of the latest call into the module. Every
later call and every other thread sees them. The class made here computes those of its own call, from its positions.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel_patch.families.positions import buffer_prefix
from hf_accel_patch.ops.rope import Lengths

SCALED = "_hf_accel_rope"  # on a rotary module: its `Scaled`
Key = tuple[int, str | None]  # which rotary module of a model, for which type of layers


@dataclass(frozen=True, eq=False)
class Scaled:
    """What a rotary module needs to know: which one of its model it is, and its frequencies."""

    index: int
    lengths: dict[str | None, Lengths]


@dataclass(frozen=True, eq=False)
class Turn:
    """What one call of a rotary module was about."""

    positions: Tensor  # [R, T]; R is the batch, or 1
    frequencies: Tensor  # [R, D / 2]
    scaled: Lengths
    past: bool | None  # whether a text is longer than the limit; None where only the device knows
    angles: dict[Any, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Turn:
        return self

    @property
    def lengths(self) -> Tensor:
        """Tokens of the texts so far [R]."""
        return self.positions.amax(-1) + 1

    @property
    def difference(self) -> Tensor:
        """To the frequencies of short texts [R, D / 2]."""
        return self.frequencies - self.scaled.on(self.frequencies.device)[0]


_turns: ContextVar[dict[Key, Turn] | None] = ContextVar("hf_accel_rope_turns", default=None)


def latest(key: Key) -> Turn | None:
    """The latest call of this rotary module in this thread or task."""
    return (_turns.get() or {}).get(key)


def turn_at(module: nn.Module, layer_type: str | None, positions: Tensor) -> Turn:
    """What a call of a rotary module of a stateless class is about, at these positions [R, T]."""
    scaled: Scaled = vars(module)[SCALED]
    return _turn(scaled.lengths[layer_type], positions)


@functools.cache
def stateless(kind: Any) -> Any:
    """The class that a rotary module of class `kind` is changed to."""
    stock = kind.forward
    typed = "layer_type" in inspect.signature(stock).parameters

    @functools.wraps(stock)
    @torch.no_grad()
    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        scaled: Scaled = vars(self)[SCALED]
        lengths = scaled.lengths.get(layer_type)
        if lengths is None or position_ids.ndim != 2:
            return stock(self, x, position_ids, layer_type) if typed else stock(self, x, position_ids)
        turn = _turn(lengths, position_ids)
        if not torch.compiler.is_compiling():
            _turns.set({**(_turns.get() or {}), (scaled.index, layer_type): turn})
        return cos_sin(self, turn.frequencies, x, position_ids, layer_type)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Classes made at run time are made again where a pickle is read."""
        return _remake, (kind,), self.__getstate__()

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind)(kind.__name__, (kind,), {**names, "forward": forward, "__reduce_ex__": __reduce_ex__})


def _remake(kind: Any) -> Any:
    made = stateless(kind)
    return made.__new__(made)


def _turn(lengths: Lengths, positions: Tensor) -> Turn:
    past = None
    if positions.device.type == "cpu" and not torch.compiler.is_compiling():
        past = int(positions.max()) >= lengths.limit
    short = past is False
    frequencies = lengths.on(positions.device)[0][None] if short else lengths.at(positions.amax(-1) + 1)
    return Turn(positions.clone(), frequencies, lengths, past)  # a caller may write the next positions over these


@torch.no_grad()
def cos_sin(
    module: Any,
    frequencies: Tensor,
    x: Tensor,
    positions: Tensor,
    layer_type: str | None,
    scaling: float | None = None,
) -> Any:
    """What the module's own formula gives for other frequencies [R, D / 2], at positions [R or 1, S]."""
    kind: Any = type(module)
    raw = inspect.unwrap(kind.forward)  # without what writes the latest frequencies into the module
    prefix = buffer_prefix(layer_type)
    given: dict[str, Any] = {} if scaling is None else {f"{prefix}attention_scaling": scaling}
    options = {} if layer_type is None else {"layer_type": layer_type}

    def one(row: Tensor, at: Tensor) -> Any:
        return raw(_With(module, {**given, f"{prefix}inv_freq": row}), x, at, **options)

    if len(frequencies) == 1:
        return one(frequencies[0], positions)
    rows = [one(row, positions[r : r + 1] if len(positions) > 1 else positions) for r, row in enumerate(frequencies)]
    return tuple(torch.cat(each) for each in zip(*rows, strict=True))


class _With:
    """A module with some attributes replaced, for one call of its forward."""

    def __init__(self, module: nn.Module, given: dict[str, Any]) -> None:
        vars(self).update(given, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)
