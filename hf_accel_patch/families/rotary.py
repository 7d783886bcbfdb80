"""Rotary modules: what their configuration says, why some models have none, and one that keeps no state.

Transformers' modules of dynamic NTK and of longrope write the frequencies of the latest call into the module. Every
later call and every other thread sees them. The class made here computes those of its own call, from its positions.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View, context_tokens
from hf_accel_patch.ops.rope import Lengths

ALIBI = frozenset({"bloom", "mpt"})  # and what says `alibi` in its configuration
ALIBI_LIMITS = ("max_seq_len",)
PADDING_ROWS = 4  # at most, in a table of learned positions
TABLES = frozenset({"codegen", "gptj", "roformer"})
WINDOWED = ("sliding", "chunked")  # in the name of a type of layers that see no distance beyond their window
SCALED = "_hf_accel_rope"  # on a rotary module: its `Scaled`
NO_LIMIT = 1 << 62  # tokens
Key = tuple[int, str | None]  # which rotary module of a model, for which type of layers


def has_alibi(config: PreTrainedConfig) -> bool:
    """Whether its positions are biases of the scores."""
    return config.model_type in ALIBI or bool(getattr(config, "alibi", False))


def length_limit(config: PreTrainedConfig) -> str | None:
    """The field of the configuration up to which biases of the scores are made, where they end."""
    return next((name for name in ALIBI_LIMITS if isinstance(getattr(config, name, None), int)), None)


def uses_learned_positions(view: View) -> bool:
    """Whether it has a table of trained vectors, one for each position and a few for padding."""
    positions, words = context_tokens(view.config), view.model.get_input_embeddings()
    if positions is None or view.config.model_type in TABLES:
        return False
    tables = [each for _, each in view.named_modules() if isinstance(each, nn.Embedding) and each is not words]
    return any(0 <= table.num_embeddings - positions <= PADDING_ROWS for table in tables)


def why_not_scaled(view: View) -> str:
    """Why its positions cannot be scaled, or nothing."""
    config, rotary = view.config, view.rotary_modules()
    if has_alibi(config):
        return (
            "its positions are biases of the scores (ALiBi), which go on past the trained length: no scaling is needed"
        )
    if config.model_type in TABLES:
        return "its rotary positions are a table of sines, for methods with fixed frequencies only"
    if not rotary:
        return "it has no rotary positions"
    found = entries(config)
    if not found:
        return "its configuration has no rope_parameters for its rotary positions"
    if any("mrope_section" in each for each in found.values()) or any(map(_has_axes, (module for _, module in rotary))):
        return "its rotary positions have several axes"
    for each in found.values():
        if each.get("rope_type", "default") != "default":
            factor = f" with factor {each['factor']}" if each.get("factor") else ""
            return f"its rotary positions are scaled already, by {each['rope_type']!r}{factor}"
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        return "its configuration does not say how many tokens it was trained on"
    for name, module in rotary:
        if vars(module).get("config") is not config or built(module, config) is None:
            return f"its rotary module {name} is not built from rope_parameters"
    return ""


def entries(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """The `rope_parameters` of each type of layers that has its own; under None if all share them."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested: dict[str | None, dict[str, Any]] = {key: each for key, each in rope.items() if isinstance(each, dict)}
    return nested or ({None: rope} if rope else {})


def unlimited(view: View) -> list[str | None]:
    """The types of layers that have rotary positions and no window of their own; None if all share theirs."""
    buffers = {name for _, module in view.rotary_modules() for name in module._buffers}
    return [
        key
        for key in entries(view.config)
        if key is None or (f"{key}_inv_freq" in buffers and not any(word in key for word in WINDOWED))
    ]


def scaled_config(
    config: PreTrainedConfig,
    trained: int,
    context: int | None,
    kinds: list[str | None],
    scale: Callable[[str | None, dict[str, Any]], Any],
) -> PreTrainedConfig:
    """A copy in which `rope_parameters` of these types of layers are what `scale(type, parameters)` makes of them, for
    another context. Raises UnsupportedModel if transformers refuses it."""
    new, found = copy.deepcopy(config), entries(config)
    scaled = {key: scale(key, dict(found[key])) for key in kinds}
    rope = scaled.get(None, {**new.rope_parameters, **scaled})
    try:
        new.rope_parameters = rope
        if hasattr(new, "original_max_position_embeddings"):
            new.original_max_position_embeddings = trained
        new.standardize_rope_params()
        if context is not None:
            new.max_position_embeddings = context
        new.validate_rope()
    except (ValueError, TypeError, KeyError) as error:  # KeyError: entries by type of layer, before transformers 5.15
        reason = " ".join(str(error).split())
        raise UnsupportedModel(f"rope: {config.model_type} does not take it: {reason}", "leave rope out") from error
    return new


def built(module: nn.Module, config: PreTrainedConfig) -> nn.Module | None:
    """A rotary module as transformers builds it from this configuration, on the CPU."""
    kind: Any = type(module)
    try:
        with torch.device("cpu"):
            fresh: nn.Module = kind(config)
    except (
        TypeError,
        KeyError,
        AttributeError,
        ValueError,
        RuntimeError,
        ArithmeticError,
    ):  # it is built from something else
        return None
    return fresh if hasattr(fresh, "rope_type") else None


def _has_axes(module: nn.Module) -> bool:
    return hasattr(module, "mrope_section")


def rotated_channels(module: nn.Module, layer_type: str | None) -> int:
    """How many channels of a head it rotates."""
    return 2 * int(module._buffers[f"{_prefix(layer_type)}inv_freq"].numel())  # type: ignore[union-attr]


def length_dependent(module: nn.Module, config: PreTrainedConfig) -> dict[str | None, Lengths]:
    """The frequencies of a module by the length, for each type of layers for which they depend on it. Those of
    transformers are asked: what does not agree with them is left out."""
    fresh, found = built(module, config), {}
    if fresh is None or _has_axes(module) or not hasattr(type(module).forward, "__wrapped__"):
        return {}
    for layer_type, each in entries(config).items():
        kind, reference = each.get("rope_type"), fresh._buffers.get(f"{_prefix(layer_type)}inv_freq")
        if kind not in ("dynamic", "longrope") or reference is None:
            continue
        start: Any = functools.partial(ROPE_INIT_FUNCTIONS[kind], config, torch.device("cpu"), layer_type=layer_type)
        if kind == "longrope":
            limit = each["original_max_position_embeddings"]
            lengths = Lengths(reference, limit, longer=start(seq_len=limit + 1)[0])
        else:
            limit = config.max_position_embeddings
            lengths = Lengths(reference, limit, base=each["rope_theta"], factor=each["factor"])
        probes = [limit, limit + 1, 3 * limit]
        theirs = torch.stack([start(seq_len=length)[0] for length in probes])
        if torch.allclose(lengths.at(torch.tensor(probes)), theirs, rtol=1e-5, atol=0):
            found[layer_type] = lengths
    return found


def unchanging(module: nn.Module, kinds: list[str | None], given: dict[str, Tensor]) -> dict[str | None, Lengths]:
    """The same of a module whose frequencies are those of every length, for these types of layers. `given`: exact
    ones, where its own are rounded."""
    if not hasattr(type(module).forward, "__wrapped__"):
        return {}
    names = {kind: f"{_prefix(kind)}inv_freq" for kind in kinds}
    buffers = {kind: given.get(name, module._buffers.get(name)) for kind, name in names.items()}
    return {
        kind: Lengths(each.float(), NO_LIMIT, longer=each.float()) for kind, each in buffers.items() if each is not None
    }


# ------------------------------------------------------------------------------------------- a module without a state


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
    prefix = _prefix(layer_type)
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


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"
