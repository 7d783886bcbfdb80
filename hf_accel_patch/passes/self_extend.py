"""SelfExtend: positions in groups beyond a window of neighbours, for rotary models, without training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View
from hf_accel_patch.families.classes import changes_cached_keys
from hf_accel_patch.families.handwritten import handwritten_modules
from hf_accel_patch.families.positions import unchanging, unlimited, why_not_scaled
from hf_accel_patch.families.rotary import Scaled
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.grouped import Grouping
from hf_accel_patch.passes.attention import SELECTED, Attention
from hf_accel_patch.passes.handwritten import EXTENDED_KEY
from hf_accel_patch.passes.placing import Found
from hf_accel_patch.passes.rope import Changes, is_meta, rounded, turned, write
from hf_accel_patch.passes.scaling import RopeScaling
from hf_accel_patch.passes.self_extend_cache import EXTENDED, GROUPED, Extending, Grouped
from hf_accel_patch.plan import Skip, Step


@dataclass(frozen=True)
class SelfExtend:
    """Grouped attention (SelfExtend, arXiv 2401.01325): see ops/grouped.py. Up to the window, it is what it was.

    No configuration of transformers can say this: a checkpoint that is saved is the model as it came.
    """

    scaling: RopeScaling

    name = "rope"

    def inspect(self, view: View) -> Step | Skip:
        """Raises UnsupportedModel, for what was asked for by name, and ValueError for a window that does not fit."""
        reason = why_not_scaled(view) or self._why_not(view)
        rotary, size = view.rotary_modules(), view.weight_bytes()
        changes = Changes(view, copy.copy(view.config))
        if not reason:
            kinds = unlimited(view)
            reason = "" if kinds else "every layer sees a window only, at any length"
            changes.buffers = [(module, name, exact) for _, module in rotary for name, exact in rounded(module)]
            for index, (_, module) in enumerate(rotary):
                given = {name: exact for each, name, exact in changes.buffers if each is module}
                if lengths := unchanging(module, kinds, given):
                    changes.scaled.append((module, Scaled(index, lengths)))
            if kinds and len(changes.scaled) != len(rotary):
                reason = "its rotary modules are not of transformers' usual kind"
        if reason:
            raise UnsupportedModel(f"rope='self-extend': {reason}", "leave rope out")
        trained = self.scaling.original or view.config.max_position_embeddings
        grouping, changes.context = self.scaling.grouping(trained), self.scaling.context(trained)
        vars(changes.config)[SELECTED] = EXTENDED_KEY
        found = turned(view, [module for _, module in rotary], changes.scaled)
        if not is_meta(view):
            changes.turned, extended = self._layers(view, found, grouping, trained)
            changes.attributes = [(module, GROUPED, how) for module, how in extended]
            changes.rotated, changes.classes = partial(Extending, grouping=grouping), EXTENDED
        facts: dict[str, Any] = {"exact": False, "bytes_before": size, "bytes_after": size, "type": self.scaling.type}
        facts |= {"factor": float(self.scaling.factor), "context": changes.context}
        facts |= {"window": grouping.window, "group": grouping.group, "layers": len(changes.attributes)}
        return Step(self, facts, (changes,))

    def apply(self, step: Step, journal: Journal) -> None:
        write(step.work[0], journal)

    def _why_not(self, view: View) -> str:
        if handwritten_modules(view):
            return "its attention is hand-written"
        attention = Attention().inspect(view)
        return attention.reason if isinstance(attention, Skip) else ""

    def _layers(
        self, view: View, found: Found, grouping: Grouping, trained: int
    ) -> tuple[Found, list[tuple[nn.Module, Grouped]]]:
        """How the keys of each layer that caches them are rotated, and the attention modules. Layers that see no
        distance beyond the trained ones, by a window of their own, are left alone."""
        modules = {vars(module).get("layer_idx"): module for _, module in view.attention_modules()}
        layers = [(at, each) for at, each in enumerate(DynamicCache(config=view.config).layers)]
        holding = [(at, each) for at, each in layers if isinstance(each, DynamicLayer)]
        kept: list[Any] = [None] * len(holding)
        extended = []
        for place, ((at, layer), how) in enumerate(zip(holding, found, strict=False)):
            window = getattr(layer, "sliding_window", None)
            if how is None or (window is not None and window <= trained):
                continue
            rotation, part, key = how
            if reason := self._why_not_layer(layer, window, part, modules.get(at)):
                raise UnsupportedModel(f"rope='self-extend': layer {at} {reason}", "leave rope out, or take 'yarn'")
            kept[place] = how
            extended.append((modules[at], Grouped(grouping, rotation, key)))
        if not extended:
            windows = "every layer sees a window only, at any length"
            reason = windows if any(found) else "how it rotates cached keys was not found"
            raise UnsupportedModel(f"rope='self-extend': {reason}", "leave rope out, or take 'yarn'")
        return tuple(kept), extended

    @staticmethod
    def _why_not_layer(layer: DynamicLayer, window: int | None, part: int, module: nn.Module | None) -> str:
        if window:
            return f"has a window of {window}, longer than what it was trained on"
        if type(layer) is not DynamicLayer:
            return f"has a cache of kind {type(layer).__name__}"
        if part:
            return "caches latents"
        if module is None:
            return "has no attention module of its own"
        kind: Any = type(module)
        return "computes with cached keys before it attends to them" if changes_cached_keys(kind) else ""
