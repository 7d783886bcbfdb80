"""Attention and cache of models whose positions are grouped beyond a window of neighbours (ops/grouped.py).

Keys are cached as the model rotates them. A key that no later token can see as a neighbour is rotated to its group's
position, once and where it is held: the cache takes no more memory than without, and a step rotates one key and its
query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families.rotary import SCALED, Key, Scaled, Turn, cos_sin, latest
from hf_accel_patch.families.rotation import Rotation
from hf_accel_patch.ops.case import Variant
from hf_accel_patch.ops.grouped import Grouping, Keys, attend_grouped, scored_grouped
from hf_accel_patch.ops.lazy import Lazy
from hf_accel_patch.ops.mask import mask_of
from hf_accel_patch.ops.rope import Lengths
from hf_accel_patch.passes.attention import attention_forward
from hf_accel_patch.passes.described import describe_mask
from hf_accel_patch.passes.handwritten import EXTENDED_KEY
from hf_accel_patch.passes.layers import InPlaceLayer
from hf_accel_patch.passes.placed import PlacedLayer, Places, Rotated, fresh

GROUPED = "_hf_accel_grouped"  # on an attention module: its `Grouped`


@dataclass(frozen=True, eq=False)
class Grouped:
    """What an attention module needs to know."""

    grouping: Grouping
    rotation: Rotation
    key: Key

    def turn(self, new: int, positions: Tensor | None) -> Turn:
        """The positions of this many new tokens. Where gradients are recorded, a layer may be computed again after
        later calls of the rotary module, so those that it was given count."""
        found = None if torch.compiler.is_compiling() else latest(self.key)
        known = found is not None and found.positions.shape[1] == new
        if found is not None and known and (positions is None or not torch.is_grad_enabled()):
            return found
        if positions is None or positions.ndim != 2:
            raise RuntimeError(f"the positions of {new} queries are unknown: the rotary module was not called for them")
        lengths = self._lengths
        return Turn(positions, lengths.reference.to(positions.device)[None], lengths, past=None)

    def rotated(self, states: Tensor, turn: Turn, part: Literal["queries", "keys"]) -> Tensor:
        """The first queries or keys of a turn, at the positions of their groups. The angles are computed once."""
        count, key = states.shape[2], (part, states.shape[2], self.grouping)
        if key not in turn.angles:
            move = self.grouping.of_queries if part == "queries" else self.grouping.of_keys
            like = torch.empty(0, dtype=torch.float32, device=turn.positions.device)
            given = self.rotation.rotary, turn.frequencies, like, move(turn.positions[:, :count]), self.key[1]
            turn.angles[key] = cos_sin(*given, scaling=1.0)
        cos, sin = turn.angles[key]
        return self.rotation.by(states, cos.to(states.device), sin.to(states.device))

    def sharpened(self, queries: Tensor, turn: Turn) -> Tensor:
        """Queries that are longer by what their scores are to be multiplied with."""
        if self.grouping.attention_factor is not None:
            return queries
        key = ("sharpness", self.grouping)
        if key not in turn.angles:
            positions = turn.positions
            short = positions.device.type == "cpu" and int(positions.max()) < self.grouping.trained
            turn.angles[key] = None if short else self.grouping.sharpness(positions)[:, None, :, None]
        sharpness = turn.angles[key]
        return queries if sharpness is None else (queries * sharpness.to(queries.device)).to(queries.dtype)

    @property
    def _lengths(self) -> Lengths:
        scaled: Scaled = vars(self.rotation.rotary)[SCALED]
        return scaled.lengths[self.key[1]]


@dataclass(frozen=True, eq=False)
class Extending(Rotated):
    """Between the positions of a layer's keys and those of their groups."""

    grouping: Grouping

    def move(self, keys: Tensor, places: Places, *, back: bool = False) -> Tensor:
        """`keys` at `places`, to their groups or back."""
        scaled: Scaled = vars(self.rotation.rotary)[SCALED]
        positions = places.whole()
        frequencies = scaled.lengths[self.key[1]].reference.to(positions.device)[None]
        return self.by(keys, places, self.grouping, frequencies, self.grouping.of_keys(positions), back)


class HeldKeys(Lazy):
    """The keys of a layer that holds the first ones in groups, as they came; attention reads `keys` instead."""

    keys: Keys
    places: Places
    extending: Extending

    @staticmethod
    def __new__(cls, keys: Keys, places: Places, extending: Extending) -> HeldKeys:
        (B, K, _, D), S = keys.near.shape, places.length
        held = Tensor._make_wrapper_subclass(cls, (B, K, S, D), dtype=keys.near.dtype, device=keys.near.device)
        held.keys, held.places, held.extending = keys, places, extending
        return held

    def dense(self) -> Tensor:
        before = self.places.length - self.keys.near.shape[2]
        grouped = torch.cat(tuple(self.keys.far), dim=2)[:, :, :before]
        return torch.cat((self.extending.move(grouped, self.places.first(before), back=True), self.keys.near), dim=2)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"HeldKeys(shape={tuple(self.shape)})"


class ExtendedLayer(PlacedLayer, InPlaceLayer):
    """Full attention, of which the first `settled` keys are held in their groups."""

    turning: Extending
    settled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        T, known = key_states.shape[2], self.places
        turn = self._turn(T)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        S, window = keys.shape[2], self.turning.grouping.window
        self.places = fresh(turn) if known is None else known.append(turn.positions)
        if S == T or window >= S:
            return keys, values
        neighbour = max(0, S - T - window + 1)  # the first of these queries
        if not torch.is_grad_enabled():
            self._settle(neighbour)
            keys = self._held(0).view()
        far = [keys[:, :, : self.settled]] if self.settled else []
        if S - window > self.settled:
            between = self.places.between(self.settled, S - window)
            far.append(self.turning.move(keys[:, :, self.settled : S - window], between))
        return HeldKeys(Keys(far, keys[:, :, neighbour:]), self.places, self.turning), values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        count = self._count()
        self.settled = min(self.settled, count)
        self._settle(min(self.settled, max(0, count - self.turning.grouping.window + 1)))

    def unsettle(self) -> None:
        self._settle(0)

    def forget(self) -> None:
        self.settled = 0

    def _settle(self, count: int) -> None:
        """Hold the first `count` keys in their groups, and the others as they came."""
        first, last = sorted((self.settled, count))
        if first < last and self.places is not None:
            some = self._held(0).writable()[:, :, first:last]
            some.copy_(self.turning.move(some, self.places.between(first, last), back=count < self.settled))
        self.settled = count


EXTENDED: dict[type, type] = {DynamicLayer: ExtendedLayer, InPlaceLayer: ExtendedLayer}


def extended_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of these models; see passes.attention.attention_forward."""
    how: Grouped | None = vars(module).get(GROUPED)
    T, S = query.shape[2], key.shape[2]
    if how is not None and T > 1 and S > T and attention_mask is None and type(key) is Tensor:
        key, value, S = key[:, :, :T], value[:, :, :T], T  # the prefill of a static cache
    if how is not None and how.grouping.attention_factor is not None:
        options["scaling"] = _scale(query, options) * how.grouping.attention_factor**2
    if how is None or how.grouping.window >= S:
        return attention_forward(module, query, key, value, attention_mask, **options)
    if not isinstance(key, HeldKeys) and S != T:
        raise UnsupportedModel(
            f"rope='self-extend': {S} keys of a cache whose layers do not know positions, as those of a static one",
            "use a DynamicCache, which generate makes by default",
        )
    turn, window = how.turn(T, options.get("position_ids")), how.grouping.window
    query = how.sharpened(query, turn)
    far_query = how.rotated(query, turn, "queries")
    keys = key.keys if isinstance(key, HeldKeys) else Keys((how.rotated(key[:, :, : S - window], turn, "keys"),), key)
    mask = mask_of(attention_mask, S, T > 1 and attention_mask is None, query.device)
    given = query, far_query, keys, value, mask, _variant(query, options), window
    if options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        output, weights = scored_grouped(*given)
        return output.transpose(1, 2).contiguous(), weights
    return attend_grouped(*given).transpose(1, 2).contiguous(), None


def register() -> None:
    """Add the function to transformers' registries, under a key that no unpatched model selects."""
    AttentionInterface.register(EXTENDED_KEY, extended_forward)
    AttentionMaskInterface.register(EXTENDED_KEY, describe_mask)


def _scale(query: Tensor, options: dict[str, Any]) -> float:
    given = options.get("scaling")
    return query.shape[-1] ** -0.5 if given is None else float(given)


def _variant(query: Tensor, options: dict[str, Any]) -> Variant:
    sinks = options.get("sinks")
    if options.get("s_aux") is not None:
        sinks = options["s_aux"].reshape(1, -1, 1, 1)
    rest = options.get("softcap"), sinks, options.get("position_bias")
    return Variant(_scale(query, options), options.get("dropout", 0.0), *rest)
