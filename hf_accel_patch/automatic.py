"""What `from_pretrained` and `from_config` do while HF_ACCEL_PATCH is true: they return a patched model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_accel_patch import environment
from hf_accel_patch.api import STATE, adopt
from hf_accel_patch.checkpoints import HUB, as_it_is, read
from hf_accel_patch.environment import PATCH
from hf_accel_patch.families import bind, makes_causal_lms, weight_bytes
from hf_accel_patch.foreign_checkpoints import PARTS
from hf_accel_patch.loading import HfAccelQuantizer
from hf_accel_patch.logs import get_logger
from hf_accel_patch.options import from_text, parse
from hf_accel_patch.plan import Pass
from hf_accel_patch.planning.budget import fitted

logger = get_logger(__name__)
making: ContextVar[bool] = ContextVar("making", default=False)  # whether a model is being made in this thread

# Modules whose functions hand a request for a model on: who asks for it is the first caller that is none of them
ON_THE_WAY = ("transformers.models.auto.", "transformers.modeling_utils", "functools", "contextlib", "torch.")
PACKAGE = __name__.partition(".")[0]
OWN = (__name__, f"{PACKAGE}.starting")

# Keywords of from_pretrained with which weights are read as they are, and patched afterwards
AS_THEY_ARE = ("quantization_config", "state_dict", "gguf_file", "output_loading_info")
SPREAD = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


def passes() -> tuple[Pass, ...]:
    """What the variables ask for. Raises ValueError for values that exclude each other."""
    texts = environment.asked(environment.given())
    try:
        return parse(_keywords(texts))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{environment.spelled(texts)}: {error}") from None


def make(kind: type[PreTrainedModel], method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What `method`, a bound `from_pretrained` or `_from_config` of the class `kind`, returns, patched."""
    if making.get() or not environment.is_on() or not makes_causal_lms(kind) or not _asked_for_itself():
        return method(*args, **kwargs)
    token = making.set(True)
    try:
        return _make(kind, method, *args, **kwargs)
    finally:
        making.reset(token)


def _make(kind: type[PreTrainedModel], method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    asked = passes()
    if is_deepspeed_zero3_enabled():
        logger.warning(f"{PATCH}: DeepSpeed ZeRO-3 spreads weights over processes, so models are left as they are")
        return method(*args, **kwargs)
    packed = _read_packed(kind, method, *args, **kwargs)
    if packed is not None:
        return packed
    made = method(*args, **kwargs)
    _patch(made[0] if isinstance(made, tuple) else made, asked, _hub(kwargs))
    return made


def _read_packed(
    kind: type[PreTrainedModel], method: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> PreTrainedModel | None:
    """A model whose weights are quantized while they are read, or laid out for our kernels; None where that is not
    asked for, or cannot be. Then the weights are read as they are."""
    path = kwargs.get("pretrained_model_name_or_path", args[0] if args else None)
    if not isinstance(path, str | os.PathLike) or len(args) > 1:
        return None
    if any(kwargs.get(name) not in (None, False) for name in (*AS_THEY_ARE, *SPREAD)):
        return None
    texts, stored = environment.asked(environment.given()), _stored(path, kwargs)
    if stored is None and ("gqa" in texts or not {"quantize", "budget"} & texts.keys()):  # heads are merged in floats
        return None
    if stored is not None and stored not in PARTS:
        return None
    keywords = _keywords(texts)
    if stored is not None and keywords.pop("quantize", None):
        logger.warning(f"the checkpoint at {path} is quantized by {stored} already: {_named('quantize', texts)} is out")
    options = {
        key: value for key, value in kwargs.items() if key not in ("pretrained_model_name_or_path", *AS_THEY_ARE)
    }
    try:
        return read(path, keywords | options, method, kind=kind, lenient=True)
    except OSError:  # stock says it better
        return None
    except Exception as error:  # whatever it is, stock may read the checkpoint
        logger.warning(f"the weights of {path} cannot be quantized while they are read: {_sentence(error)}")
        return None


def _stored(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> str | None:
    """The method by which a checkpoint is quantized, None if it is not."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        found = getattr(config, "quantization_config", None)
    else:
        try:
            found = PreTrainedConfig.get_config_dict(config or path, **_hub(kwargs))[0].get("quantization_config")
        except (OSError, ValueError):
            return None  # an adapter, or nothing that can be read
    if found is None:
        return None
    method = (found if isinstance(found, dict) else found.to_dict()).get("quant_method", "an unknown method")
    return str(getattr(method, "value", method))


def _patch(model: Any, asked: tuple[Pass, ...], source: dict[str, Any]) -> None:
    """In place, as far as the model can be: making one must not fail because of us."""
    if not isinstance(model, PreTrainedModel) or STATE in vars(model):
        return
    if any(tensor.is_meta for tensor in model.parameters()) and not getattr(model, "hf_device_map", None):
        logger.info(f"{type(model).__name__} is made without weights, and is not patched")
        return
    quantized: Callable[[PreTrainedModel], dict[str, Any]] | None = None
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, HfAccelQuantizer):
        quantized = as_it_is
    elif quantizer is not None:
        quantized = _by_others
    texts = environment.asked(environment.given())
    if quantized is not None and "quantize" in texts:
        named = _named("quantize", texts)
        logger.warning(f"the weights of {type(model).__name__} are quantized already: {named} is left out")
    try:
        chosen = fitted(bind(model), asked, quantized=quantized is not None, lenient=True)
        adopt(model, chosen, quantized, source=source, asked=asked, lenient=True)
    except Exception as error:  # remote code may do anything
        state = vars(model).get(STATE)
        left = "is patched in part" if state is not None else "is left as it is"
        logger.warning(f"{PATCH}: {type(model).__name__} {left}: {_sentence(error)}")


def _by_others(model: PreTrainedModel) -> dict[str, Any]:
    """What a report says of weights that another package has quantized."""
    method = getattr(model.hf_quantizer.quantization_config, "quant_method", "another method")
    size = weight_bytes(model)
    reason = f"its weights are quantized by {getattr(method, 'value', method)}"
    return {"exact": True, "bytes_before": size, "bytes_after": size, "reason": reason}


def _asked_for_itself() -> bool:
    """Whether somebody wants this model: not another model that it is a part of, and not this package, whose `load`
    and `verify` make what they need."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame).startswith((*ON_THE_WAY, *OWN)):
        frame = frame.f_back
    part_of_another = _module(frame).startswith(("transformers.models.", "transformers_modules."))
    return not part_of_another and not _module(frame).startswith(f"{PACKAGE}.")


def _module(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _keywords(texts: dict[str, str]) -> dict[str, Any]:
    return {keyword: from_text(keyword, text) for keyword, text in texts.items()}


def _hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in HUB if kwargs.get(key) is not None}


def _named(keyword: str, texts: dict[str, str]) -> str:
    return environment.spelled({keyword: texts[keyword]})


def _sentence(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).partition("\n\nhint: ")[0].split())
