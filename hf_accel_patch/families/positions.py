"""What a configuration says of positions: of which kind they are, how far they go, and their frequencies by the length.

What transformers makes of a configuration is asked of transformers: a rotary module is built from it and looked at.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
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
NO_LIMIT = 1 << 62  # tokens

# What a class raises that is built from something else than a configuration
UNBUILDABLE = (TypeError, KeyError, AttributeError, ValueError, RuntimeError, ArithmeticError)


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
    """A rotary module as transformers builds it from this configuration, on the CPU; None for one that it does not
    build from `rope_parameters`."""
    kind: Any = type(module)
    try:
        with torch.device("cpu"):
            fresh: nn.Module = kind(config)
    except UNBUILDABLE:
        return None
    return fresh if hasattr(fresh, "rope_type") else None


def _has_axes(module: nn.Module) -> bool:
    return hasattr(module, "mrope_section")


def rotated_channels(module: nn.Module, layer_type: str | None) -> int:
    """How many channels of a head it rotates."""
    return 2 * int(module._buffers[f"{buffer_prefix(layer_type)}inv_freq"].numel())  # type: ignore[union-attr]


def length_dependent(module: nn.Module, config: PreTrainedConfig) -> dict[str | None, Lengths]:
    """The frequencies of a module by the length, for each type of layers for which they depend on it. Those of
    transformers are asked: what does not agree with them is left out."""
    fresh, found = built(module, config), {}
    if fresh is None or _has_axes(module) or not hasattr(type(module).forward, "__wrapped__"):
        return {}
    for layer_type, each in entries(config).items():
        kind, reference = each.get("rope_type"), fresh._buffers.get(f"{buffer_prefix(layer_type)}inv_freq")
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
    names = {kind: f"{buffer_prefix(kind)}inv_freq" for kind in kinds}
    buffers = {kind: given.get(name, module._buffers.get(name)) for kind, name in names.items()}
    return {
        kind: Lengths(each.float(), NO_LIMIT, longer=each.float()) for kind, each in buffers.items() if each is not None
    }


def buffer_prefix(layer_type: str | None) -> str:
    """What the names of a rotary module's buffers begin with where types of layers have frequencies of their own."""
    return "" if layer_type is None else f"{layer_type}_"
