"""What a plan shows of memory: stock, what was asked for, and the alternatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch

from hf_accel_patch.display import Column, Tabular, in_words
from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.passes import KVCache, Quantize
from hf_accel_patch.plan import Pass
from hf_accel_patch.planning.machine import available_bytes, device_of
from hf_accel_patch.planning.memory import Estimates, Size

STOCK, ASKED = "stock", "as asked"
FIGURES = ("weights", "cache", "activations", "peak")
COLUMNS = (Column("memory", wraps=True), *(Column(name, figures=True) for name in FIGURES), Column("fits", wraps=True))
TOO_LARGE = "no"
Kind = Literal["int8", "int4"]
Scheme = Literal["int8", "int4", "nf4"]
ALTERNATIVES: tuple[tuple[Scheme | None, Kind | None], ...] = (
    ("int8", None),
    ("int4", None),
    ("nf4", None),
    (None, "int8"),
    (None, "int4"),
    ("int8", "int8"),
    ("int4", "int4"),
)


@dataclass(frozen=True)
class Memory(Tabular):
    """Sizes by scheme, for `batch` sequences of `tokens`. A reason stands in the place of what cannot be had."""

    tokens: int
    batch: int
    device: str
    available: int | None  # bytes that are free there
    held: int  # bytes of the model that are there already
    budget: int | None  # bytes
    sizes: tuple[tuple[str, Size | str], ...]
    problem: str = ""  # why activations are a rule of thumb

    @property
    def asked(self) -> Size:
        """What the model takes with the options that were asked for."""
        return next(size for label, size in self.sizes if label == ASKED and isinstance(size, Size))

    @property
    def title(self) -> str:
        batch = f" of {self.batch} sequences" if self.batch > 1 else ""
        parts = [f"{self.tokens} tokens{batch}"]
        parts += [f"budget {in_words(self.budget)}"] if self.budget is not None else []
        parts += [f"{in_words(self.available)} free on {self.device}"] if self.available is not None else []
        return ", ".join(parts)

    @property
    def notes(self) -> list[str]:
        return [f"activations by a rule of thumb: {self.problem}"] if self.problem else []

    def fits(self, size: Size) -> bool | None:
        """Whether it is within the budget, or without one, within what is free and what the model holds there already;
        None where nobody knows."""
        room = None if self.available is None else self.available + self.held
        room = room if self.budget is None else self.budget
        return None if room is None else size.peak <= room

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in bytes."""
        described: dict[str, Any] = {"context": self.tokens, "batch": self.batch, "device": self.device}
        described |= {"available": self.available, "held": self.held, "budget": self.budget, **self.asked.to_dict()}
        rows = []
        for label, size in self.sizes:
            known = {"reason": size} if isinstance(size, str) else {**size.to_dict(), "fits": self.fits(size)}
            rows.append({"scheme": label, **known})
        return described | {"schemes": rows} | ({"rule_of_thumb": self.problem} if self.problem else {})

    @property
    def columns(self) -> Sequence[Column]:
        return COLUMNS

    def cells(self) -> Sequence[Sequence[str]]:
        return [self._cells(label, size) for label, size in self.sizes]

    def _cells(self, label: str, size: Size | str) -> tuple[str, ...]:
        if isinstance(size, str):
            return label, "", "", "", "", size
        fits = {True: "yes", False: TOO_LARGE, None: ""}[self.fits(size)]
        return label, *map(in_words, (size.weights, size.cache, size.activations, size.peak)), fits

    def faded(self, row: Sequence[str]) -> bool:
        return row[-1] == TOO_LARGE


def overview(estimates: Estimates, passes: tuple[Pass, ...], budget: int | None = None) -> Memory:
    """Stock, these passes, and what other schemes would make of it."""
    view = estimates.view
    quantized = any(isinstance(module, QuantizedModule) for _, module in view.named_modules())
    sizes: list[tuple[str, Size | str]] = [(STOCK, estimates.stock()), (ASKED, estimates.of(passes))]
    for scheme, kind in ALTERNATIVES:
        if not (scheme and quantized):
            given = scheme is None and any(isinstance(each, Quantize) for each in passes)
            label = f"{ASKED}, {named(None, kind)}" if given else named(scheme, kind)
            sizes.append((label, _size(estimates, instead(passes, scheme, kind))))
    device = device_of(view.model)
    problem = estimates.problem
    return Memory(
        estimates.tokens,
        estimates.batch,
        str(device),
        available_bytes(device),
        _held(view, device),
        budget,
        tuple(sizes),
        problem,
    )


def _held(view: View, device: torch.device) -> int:
    """Bytes of the model that are on a device."""
    tensors = chain(view.model.parameters(), view.model.buffers())
    return sum(
        tensor.nbytes for tensor in tensors if tensor.device.type == device.type and tensor.device.type != "meta"
    )


def named(scheme: str | None, kind: str | None) -> str:
    """The label of an alternative."""
    return " and ".join(part for part in (scheme and f"{scheme} weights", kind and f"{kind} cache") if part)


def instead(passes: tuple[Pass, ...], scheme: Scheme | None, kind: Kind | None) -> tuple[Pass, ...]:
    """The same passes with weights or the cache in other schemes."""
    asked = next((each for each in passes if isinstance(each, Quantize)), None)
    if scheme is not None:
        skip = () if asked is None else asked.skip
        chosen = Quantize(scheme, skip=skip, originals=None if asked is None else asked.originals)
        passes = (*(each for each in passes if each is not asked), chosen)
    if kind is not None:
        held = next((each for each in passes if isinstance(each, KVCache)), KVCache())
        offload = dataclasses.replace(KVCache(kind), offload=held.offload)
        passes = (*(each for each in passes if not isinstance(each, KVCache)), offload)
    return passes


def _size(estimates: Estimates, passes: tuple[Pass, ...]) -> Size | str:
    try:
        return estimates.of(passes)
    except UnsupportedModel as error:
        return str(error).partition("\n")[0]
