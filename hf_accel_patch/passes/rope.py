"""Rotary positions: scaled for longer texts where that was asked for, and as the method means them in any case."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View
from hf_accel_patch.families.positions import (
    built,
    length_dependent,
    rotated_channels,
    scaled_config,
    unlimited,
    why_not_scaled,
)
from hf_accel_patch.families.rotary import SCALED, Scaled, stateless
from hf_accel_patch.families.rotation import moves
from hf_accel_patch.families.tables import SCALED_TABLE, ScaledTable, growing, table_modules
from hf_accel_patch.journal import Journal
from hf_accel_patch.passes.placed import Rotated
from hf_accel_patch.passes.placing import ConvertingToPlaced, Found, follow
from hf_accel_patch.passes.scaling import RopeScaling
from hf_accel_patch.passes.scaling_cache import Turning
from hf_accel_patch.passes.static_cache import TURNING
from hf_accel_patch.plan import Skip, Step


@dataclass(eq=False)
class Changes:
    """What will be written."""

    view: View
    config: PreTrainedConfig
    buffers: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    scaled: list[tuple[nn.Module, Scaled]] = field(default_factory=list)
    turned: Found = ()  # of each layer that holds keys, how they are rotated
    rotated: Callable[..., Rotated] = Turning  # what is made of that
    classes: Mapping[type, type] = field(default_factory=lambda: TURNING)  # what layers of a cache become
    context: int | None = None
    tables: list[nn.Module] = field(default_factory=list)  # that grow as needed


@dataclass(frozen=True)
class Frequencies:
    """The frequencies of rotary positions. On by default for what it repairs:

    Float32 frequencies that `.to(bfloat16)` or `.half()` on a loaded model has rounded: in bfloat16 their relative
    error of 0.4 % becomes a phase error of radians after some thousand tokens. `from_pretrained(dtype=...)` keeps them
    in float32, so what stock itself means is restored. Only frequencies that are exactly the rounding of what the
    configuration gives are touched.

    Tables of sines (GPT-J) that end at the trained length: longer ones are read where a text needs them.

    Dynamic NTK and longrope: frequencies are those of each call's own length, where stock's depend on earlier calls and
    on other threads, and cached keys follow them (see passes/scaling_cache.py).

    With `scaling` the model is as if built with it: configuration, frequencies and attention scaling.
    """

    scaling: RopeScaling | None = None
    packed: str = ""  # the kind of a cache whose keys cannot be turned

    @property
    def name(self) -> str:
        """What is exact has a row of its own."""
        return "rope" if self.scaling is not None else "frequencies"

    def inspect(self, view: View) -> Step | Skip:
        size, rotary, tables = view.weight_bytes(), view.rotary_modules(), table_modules(view)
        if tables and (self.scaling is None or not self.scaling.varies):
            return self._tables(view, tables)
        if self.scaling is not None:
            changes = self._scaled(view, self.scaling)
        elif not rotary:
            return Skip(self, "no rotary positions with frequencies of their own", size)
        else:
            changes = Changes(view, view.config)
            changes.buffers = [(module, name, exact) for _, module in rotary for name, exact in rounded(module)]
        for index, (_, module) in enumerate(rotary):
            own = changes.config if self.scaling is not None else vars(module).get("config")
            lengths = length_dependent(module, own) if own is not None else {}
            if lengths:
                changes.scaled.append((module, Scaled(index, lengths)))
        if changes.scaled and not self.packed:
            changes.turned = turned(view, [module for _, module in rotary], changes.scaled)
            if self.scaling is not None and not any(changes.turned) and not is_meta(view):
                raise UnsupportedModel(
                    f"rope={self.scaling.type!r}: how it rotates cached keys was not found, so they could not follow "
                    "frequencies that change with the length",
                    "RopeScaling('dynamic', factor, length=TOKENS) fixes them, as 'yarn' and 'linear' do",
                )
        if not (changes.buffers or changes.scaled or self.scaling):
            return Skip(self, "they are in full precision", size)
        grown = sum(_bytes(new) - _bytes(module._buffers.get(name)) for module, name, new in changes.buffers)
        facts = {"exact": self.scaling is None, "bytes_before": size, "bytes_after": size + grown}
        return Step(self, facts | self._facts(changes), (changes,))

    def apply(self, step: Step, journal: Journal) -> None:
        write(step.work[0], journal)

    def _tables(self, view: View, tables: list[nn.Module]) -> Step:
        """Tables grow as needed. No configuration can say that they are scaled, so it stays as it is."""
        size, changes = view.weight_bytes(), Changes(view, view.config, tables=tables)
        facts: dict[str, Any] = {"exact": self.scaling is None, "bytes_before": size, "bytes_after": size}
        if (scaling := self.scaling) is not None:
            trained = scaling.original or view.config.max_position_embeddings
            changes.context = scaling.context(trained)

            def scale(before: dict[str, Any], channels: int) -> dict[str, Any]:
                return scaling.parameters(before, trained, channels)

            changes.attributes = [(module, SCALED_TABLE, ScaledTable.of(module, scale, trained)) for module in tables]
        return Step(self, facts | self._facts(changes) | {"tables": len(tables)}, (changes,))

    def _scaled(self, view: View, scaling: RopeScaling) -> Changes:
        """Raises UnsupportedModel, for what was asked for by name."""
        asked = f"rope={scaling.type!r}"
        if reason := why_not_scaled(view):
            raise UnsupportedModel(f"{asked}: {reason}", "leave rope out")
        rotary = view.rotary_modules()
        kinds = unlimited(view)
        if not kinds:
            raise UnsupportedModel(f"{asked}: every layer sees a window only, at any length", "leave rope out")
        trained = scaling.original or view.config.max_position_embeddings
        context = scaling.context(trained)
        module = rotary[0][1]

        def scale(layer_type: str | None, before: dict[str, Any]) -> dict[str, Any]:
            return scaling.parameters(before, trained, rotated_channels(module, layer_type))

        dynamic = scaling.type == "dynamic" and scaling.varies  # its formula divides by the context
        config = scaled_config(view.config, trained, None if dynamic else context, kinds, scale)
        if dynamic and scaling.original:
            config.max_position_embeddings = scaling.original
        changes = Changes(view, config, context=context)
        for name, module in rotary:
            fresh = built(module, config)
            if fresh is None:
                raise UnsupportedModel(f"{asked}: {name} cannot be built with it", "leave rope out")
            _compare(module, fresh, changes)
        return changes

    def _facts(self, changes: Changes) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self.scaling is not None:
            facts |= {"type": self.scaling.type, "factor": float(self.scaling.factor), "context": changes.context}
        elif changes.buffers:
            facts["repaired"] = len(changes.buffers)
        if changes.scaled:
            lengths = [each for _, scaled in changes.scaled for each in scaled.lengths.values()]
            methods = {"dynamic" if each.longer is None else "longrope" for each in lengths}
            facts["by_length"] = ", ".join(sorted(methods))
            turned = sum(each is not None for each in changes.turned)
            why = f"cache={self.packed!r}" if self.packed else "their rotation was not found"
            facts["cached_keys"] = f"{turned} layers follow" if turned else f"as first rotated: {why}"
        return facts


def write(changes: Changes, journal: Journal) -> None:
    """Carry them out."""
    view = changes.view
    if changes.config is not view.config:
        configure(view, changes.config, journal)
    for module, name, exact in changes.buffers:
        journal.set_buffer(module, name, exact, persistent=False)
    for module, name, value in changes.attributes:
        if value is _GONE:
            journal.delete_attribute(module, name)
        else:
            journal.set_attribute(module, name, value)
    for module in changes.tables:
        kind: Any = type(module)
        journal.change_class(module, growing(kind))
    for module, scaled in changes.scaled:
        journal.set_attribute(module, SCALED, scaled)
        kind = type(module)
        journal.change_class(module, stateless(kind))
    if any(changes.turned):
        follow(view, ConvertingToPlaced(changes.classes, changes.turned, changes.rotated), journal)
    tokenizer, context = view.tokenizer, changes.context
    if context is not None and tokenizer is not None and tokenizer.model_max_length < context:
        journal.set_attribute(tokenizer, "model_max_length", context)


class _Gone:
    """Marks an attribute that goes."""


_GONE = _Gone()


def _compare(module: nn.Module, fresh: nn.Module, changes: Changes) -> None:
    """Note what differs between a rotary module and one that is newly built."""
    for name, new in fresh._buffers.items():
        old = module._buffers.get(name)
        if new is not None:
            changes.buffers.append((module, name, new if old is None else new.to(old.device)))
    skipped = vars(nn.Module()).keys() | {"config"}
    mine, theirs = ({k: v for k, v in vars(each).items() if k not in skipped} for each in (module, fresh))
    for name, new in theirs.items():
        old = mine.get(name, _GONE)
        if isinstance(new, Tensor):
            new = new.to(old.device) if isinstance(old, Tensor) else new
        elif type(old) is type(new) and old == new:
            continue
        changes.attributes.append((module, name, new))
    gone = [name for name in mine if name not in theirs and name.endswith("long_inv_freq")]
    changes.attributes += [(module, name, _GONE) for name in gone]


def configure(view: View, config: PreTrainedConfig, journal: Journal) -> None:
    """Give this model, and no other that shares its configuration, another one."""
    replaced = [(view.config, config)]
    whole = view.model.config
    if whole is not view.config:  # the text is a part of a multimodal model
        new = copy.copy(whole)
        vars(new).update({name: config for name, part in vars(whole).items() if part is view.config})
        replaced.append((whole, new))
    for module in view.model.modules():
        for old, new in replaced:
            if vars(module).get("config") is old:
                journal.set_attribute(module, "config", new)
    view.follow(config)


def is_meta(view: View) -> bool:
    """Whether it is only planned for."""
    return next(view.model.parameters()).is_meta


def turned(view: View, rotary: list[nn.Module], scaled: list[tuple[nn.Module, Scaled]]) -> Found:
    """How each layer's keys are rotated whose frequencies depend on the length."""
    if is_meta(view):  # only planned
        return ()
    with undisturbed(rotary):
        found = moves(view)
    known = {id(module): each for module, each in scaled}

    def each(move: Any) -> tuple[Any, ...] | None:
        rotation = move.rotation
        mine = known.get(id(rotation.rotary)) if rotation is not None else None
        if mine is None or rotation.layer_type not in mine.lengths:
            return None
        return rotation, move.part, (mine.index, rotation.layer_type)

    return tuple(map(each, found or ()))


@contextmanager
def undisturbed(modules: list[nn.Module]) -> Iterator[None]:
    """What stock's rotary modules keep of a call inside is forgotten."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def rounded(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers of a rotary module that are roundings of float32 frequencies, with the exact ones."""
    low = {n: b for n, b in module._buffers.items() if n.endswith("inv_freq") and b is not None and _is_half(b)}
    if not low or not hasattr(module, "config"):
        return []
    try:
        fresh = type(module)(module.config)
    except (TypeError, KeyError, AttributeError, ValueError):  # a rotary module that is built from something else
        return []
    exact = {name: fresh._buffers.get(name) for name in low}
    return [
        (name, value.to(low[name].device))
        for name, value in exact.items()
        if value is not None
        and value.shape == low[name].shape
        and torch.equal(value.to(low[name].dtype), low[name].cpu())
    ]


def _is_half(buffer: Tensor) -> bool:
    return buffer.dtype in (torch.bfloat16, torch.float16) and not buffer.is_meta


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
