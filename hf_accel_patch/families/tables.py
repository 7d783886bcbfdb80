"""Rotary positions that are read from a table of sines, which ends at the trained length.

The class of such a module is changed to one that reads a longer table where a text needs it: what the model's own code
gives for more positions. Nothing is written into the model, so a saved checkpoint and other threads see no difference.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_accel_patch.compat import CACHE, CACHE_NAMES, given_cache
from hf_accel_patch.families import View

MAKES = "create_sinusoidal_positions"  # function(positions, channels) in the files of models whose attention reads it
TABLE = "embed_positions"  # the buffer [positions, channels] there
KEPT = 8  # tables

THETA = 10000.0  # of all of them
SCALED_TABLE = "_hf_accel_table"  # on a module: its `ScaledTable`

_needed: ContextVar[int] = ContextVar("hf_accel_positions_needed", default=0)


class _Traced:
    """The same under torch.compile, which can read no ContextVar; its graphs read longer tables as attributes."""

    needed = 0


_traced, _numbers = _Traced(), dict[Any, int]()


@dataclass(frozen=True)
class ScaledTable:
    """Other frequencies than those of the model's own code, and what sines and cosines are multiplied with."""

    frequencies: tuple[float, ...]
    attention_factor: float

    @classmethod
    def of(cls, module: nn.Module, scale: Callable[[dict[str, Any], int], dict[str, Any]], trained: int) -> ScaledTable:
        """`scale(parameters, channels)` makes the `rope_parameters`, from which transformers' own functions compute."""
        channels = _held(module).shape[1]
        rope = scale({"rope_type": "default", "rope_theta": THETA}, channels)
        theta = rope["rope_theta"]
        if rope["rope_type"] == "default":
            return cls(tuple((theta ** -(torch.arange(0, channels, 2).double() / channels)).tolist()), 1.0)
        sizes = {"hidden_size": channels, "num_attention_heads": 1, "head_dim": channels}
        config = LlamaConfig(**sizes, max_position_embeddings=trained, rope_parameters=rope)
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return cls(tuple(frequencies.double().tolist()), float(factor))

    def __call__(self, positions: int, channels: int) -> Tensor:
        angles = torch.arange(positions).float()[:, None] * torch.tensor(self.frequencies)
        return torch.cat((angles.sin(), angles.cos()), dim=1) * self.attention_factor


def table_modules(view: View) -> list[nn.Module]:
    """The modules that read a table."""
    return [module for _, module in view.named_modules() if _is_made(module)]


@functools.cache
def growing(kind: Any) -> Any:
    """The class that a module of this class is changed to."""
    stock = kind.forward
    names = tuple(inspect.signature(stock).parameters)[1:]
    counts = bool(set(CACHE_NAMES) & set(names))  # since 5.24 the table has a module of its own, which knows no cache

    @functools.wraps(stock)
    def with_buffer(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if torch.compiler.is_compiling():
            _traced.needed = _traced_positions(given, getattr(self, "layer_idx", 0))
            output = stock(self, *args, **kwargs)
            _traced.needed = 0
            return output
        token = _needed.set(_positions(given, vars(self).get("layer_idx"), counts))
        try:
            return stock(self, *args, **kwargs)
        finally:
            _needed.reset(token)

    @functools.wraps(stock)
    @torch.no_grad()
    def with_rows(self: Any, input_ids_shape: Any, first: int = 0, position_ids: Any = None) -> Any:
        last = first + input_ids_shape[1]
        held: Tensor = self.weight
        scaled = vars(self).get(SCALED_TABLE)
        if scaled is None and (position_ids is not None or last <= len(held)):
            return stock(self, input_ids_shape, first, position_ids)
        made = _with_room(held, scaled or _makes(kind), last)
        return made[first:last] if position_ids is None else made[position_ids]

    def table(self: Any) -> Tensor:
        held: Tensor = self._buffers[TABLE]
        needed = _traced.needed if torch.compiler.is_compiling() else _needed.get()
        scaled = vars(self).get(SCALED_TABLE)
        return held if scaled is None and needed <= len(held) else _with_room(held, scaled or _makes(kind), needed)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Classes made at run time are made again where a pickle is read."""
        return _remake, made.recipe()[1], self.__getstate__()

    def recipe(cls: Any) -> tuple[Any, tuple[Any, ...]]:
        """A function and its arguments that make this class."""
        return _class, (kind.recipe() if hasattr(kind, "recipe") else kind,)

    own: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    own |= {"__reduce_ex__": __reduce_ex__, "grown_from": kind, "recipe": classmethod(recipe)}
    own |= (
        {"forward": with_rows} if issubclass(kind, nn.Embedding) else {"forward": with_buffer, TABLE: property(table)}
    )
    made: Any = type(kind)(kind.__name__, (kind,), own)
    return made


def _class(kind: Any) -> Any:
    return growing(kind[0](*kind[1]) if isinstance(kind, tuple) else kind)


def _remake(kind: Any) -> Any:
    made = _class(kind)
    return made.__new__(made)


def _makes(kind: Any) -> Any:
    """function(positions, channels) in the file of this class, or the method of an embedding that computes its rows."""
    if not issubclass(kind, nn.Embedding):
        return vars(sys.modules[kind.__module__]).get(MAKES)
    takes_shape = {"input_ids_shape", f"{CACHE}_length"} <= set(inspect.signature(kind.forward).parameters)
    return _rows(getattr(kind, "grown_from", kind)) if takes_shape and hasattr(kind, "create_weight") else None


@functools.cache
def _rows(kind: Any) -> Any:
    return lambda positions, channels: kind.create_weight(SimpleNamespace(weight=torch.empty(positions, channels)))


def _held(module: nn.Module) -> Any:
    return module._buffers.get(TABLE, getattr(module, "weight", None) if isinstance(module, nn.Embedding) else None)


def _is_made(module: nn.Module) -> bool:
    """Whether its table is the one that the model's own code makes."""
    held = _held(module)
    make: Any = None if held is None else _makes(type(module))
    if make is None:
        return False
    return held.is_meta or torch.equal(held, _longer(make, len(held), held.shape[1], held.dtype, held.device))


def _positions(given: dict[str, Any], layer: int | None, counts: bool) -> int:
    """How many positions a call reaches. Nobody waits for a GPU where they can be counted."""
    positions: Any = given.get("position_ids")
    if positions is None or torch.compiler.is_compiling():
        return 0
    if positions.device.type == "cpu" or not counts:
        return int(positions.max()) + 1 if positions.numel() else 0
    past = given_cache(given)
    return positions.shape[-1] + (past.get_seq_length(layer) if isinstance(past, Cache) else 0)


def _traced_positions(given: dict[str, Any], layer: int) -> int:
    """How many positions a call reaches if none is left out, as a size that torch.compile knows."""
    positions, past = given.get("position_ids"), given_cache(given)
    if positions is None:
        return 0
    held = past.get_seq_length(layer) if isinstance(past, Cache) else 0
    if isinstance(held, Tensor):  # of a static cache, which has an end
        return past.layers[layer].max_cache_len
    return positions.shape[-1] + held


def _with_room(held: Tensor, make: Any, needed: int) -> Tensor:
    """A table for so many positions and no fewer than in this one; up to twice as many, so that it is made seldom."""
    rows = len(held)
    while rows < needed:  # in a graph, each comparison is a length up to which it serves
        rows *= 2
    longer = make, rows, held.shape[1], held.dtype, held.device
    return cast(Tensor, getattr(_traced, _traced_table(*longer))) if torch.compiler.is_compiling() else _longer(*longer)


@functools.lru_cache(KEPT)
def _longer(make: Any, positions: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.device("cpu"):
        table: Tensor = make(positions, channels)
    return table.to(device=device, dtype=dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _traced_table(*given: Any) -> str:
    """The attribute where a table is: as a constant itself, it would be one of unknown sizes in a graph for any."""
    name = f"table{_numbers.setdefault(given, len(_numbers))}"
    setattr(_traced, name, _longer(*given))
    return name
