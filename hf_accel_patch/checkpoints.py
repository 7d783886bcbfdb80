"""load: a quantized model from a float checkpoint, or from one of GPTQ, AWQ, bitsandbytes or our own."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_accel_patch.api import adopt
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.families import weight_bytes
from hf_accel_patch.foreign_checkpoints import PARTS, read_foreign
from hf_accel_patch.loading import NOT_FOREIGN, HfAccelConfig
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.options import KEYWORDS, parse
from hf_accel_patch.passes import GQA, Quantize
from hf_accel_patch.passes.saving import METHOD
from hf_accel_patch.plan import Pass
from hf_accel_patch.planning.budget import Budget, fitted
from hf_accel_patch.planning.memory import Estimates
from hf_accel_patch.planning.stored import described, opened
from hf_accel_patch.reading import Recording, recording

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")


def load(path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """A causal LM from the checkpoint at `path`, a folder or an id on the hub, patched.

    `options`: the keywords of `patch`; whatever else is handed to `AutoModelForCausalLM.from_pretrained`. With
    `quantize=` weights are quantized one by one while they are read: the float model never exists whole. Without it, a
    checkpoint that GPTQ (4 and 8 bits), AWQ, bitsandbytes (4 and 8 bits) or this package has quantized is read as it
    is, onto our kernels, and its adapter with it, if it lies beside it. `budget=` decides before anything is read.
    With `gqa=` weights are quantized after their heads are merged, so the float model is read whole. Only safetensors
    are read.

    Raises ValueError or TypeError for impossible options, HfAccelError for a checkpoint that is damaged, of an unknown
    method, or quantized already where `quantize=` or `gqa=` asks for more.

    >>> model = load(path, quantize="int4", dtype=torch.bfloat16)
    >>> tokens = model.generate(ids, max_new_tokens=8)
    """
    return read(path, options)


def read(
    path: str | os.PathLike[str],
    options: dict[str, Any],
    reader: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_pretrained,
    *,
    kind: type[PreTrainedModel] | None = None,
    lenient: bool = False,
) -> PreTrainedModel:
    """`load`, with another function that reads the checkpoint: `from_pretrained` of the class `kind`, where there is
    one. `lenient`: passes that the model cannot have are left out, with a warning."""
    options = dict(options)
    asked = parse({key: options.pop(key) for key in KEYWORDS if key in options})
    quantize = next((each for each in asked if isinstance(each, Quantize)), None)
    if quantize is not None and quantize.originals == "keep":
        raise ValueError("load() reads no float weights that it could keep; leave out originals='keep'")
    if quantize is not None and quantize.calibrate is not None:
        raise ValueError("calibration runs the float model; load it with from_pretrained and then patch it")
    if quantize is not None and quantize.foreign:
        raise ValueError(f"load() {NOT_FOREIGN}")
    if options.pop("output_loading_info", False):
        raise ValueError("load() returns the model alone; leave out output_loading_info")
    hub = {key: options[key] for key in HUB if key in options}
    given = options.pop("config", None)
    config, configs = given, getattr(kind, "config_class", None) or AutoConfig
    if not isinstance(config, PreTrainedConfig):  # none, or where to read it
        config = configs.from_pretrained(path if given is None else given, **hub)
    found = described(config)
    method = str((found or {}).get("quant_method", ""))
    if found is None:
        _refuse_undescribed(Path(path, hub.get("subfolder") or ""))
    if quantize is not None and found is not None:
        hint = "leave out quantize=" if found.get("weights") else "load it, and patch the model with quantize="
        raise HfAccelError(f"the checkpoint at {path} is quantized by {method} already", hint)
    gqa = next((each for each in asked if isinstance(each, GQA)), None)
    if gqa is not None and found is not None and not lenient and (method != METHOD or found.get("weights")):
        raise HfAccelError(
            f"gqa={gqa.kv_heads}: the checkpoint at {path} has weights that are quantized by {method}",
            f"load the float model: load(path, gqa={gqa.kv_heads}, quantize=...)",
        )
    passes = _fitted(path, config, asked, options.get("dtype"), lenient=lenient)
    quantize = next((each for each in passes if isinstance(each, Quantize)), None) if gqa is None else None
    if method in PARTS:
        if given is None:
            config, options = configs.from_pretrained(path, return_unused_kwargs=True, **options)
        model = read_foreign(path, copy.deepcopy(config), found or {}, method, options, hub, kind)
        return adopt(model, passes, as_it_is, asked=asked, lenient=lenient)
    if found is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise HfAccelError(
            f"the checkpoint at {path} is quantized by {method or 'an unknown method'}, which is not read"
        )
    options |= {} if given is None else {"config": given}
    options.setdefault("use_safetensors", True)
    kept = Recording()
    if quantize is not None:
        options["quantization_config"] = HfAccelConfig(
            quantize.scheme, quantize.group_size, quantize.skip, quantize.backend
        )
    with _recorded(kept):
        model = reader(path, **options)
    if quantize is not None:
        return adopt(model, passes, lambda _: kept.facts, kept.journal, hub, asked, lenient=lenient)
    quantized = method == METHOD and (found or {}).get("weights")
    return adopt(model, passes, as_it_is if quantized else None, source=hub, asked=asked, lenient=lenient)


def _refuse_undescribed(folder: Path) -> None:
    """Raise HfAccelError for files with quantized layers of which config.json says nothing, as AutoGPTQ wrote them:
    what is read then is random layers."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            name = next((name for name in opened.keys() if name.endswith(".qweight")), None)  # noqa: SIM118
        if name is not None:
            raise HfAccelError(
                f"{file} has the quantized layer {name}, and config.json has no quantization_config",
                "put what quantize_config.json says there, with the quant_method, 'gptq' or 'awq'",
            )


def _fitted(
    path: str | os.PathLike[str], config: Any, asked: tuple[Pass, ...], dtype: Any, *, lenient: bool
) -> tuple[Pass, ...]:
    """What a budget decides, from the configuration alone."""
    if not isinstance(asked[0], Budget):
        return asked
    here = opened(path, config, dtype)
    estimates = Estimates(here.view, asked[0].counted(here.view), asked[0].batch, here.skeleton)
    return fitted(here.view, asked, estimates, quantized=here.comes_quantized, lenient=lenient)


@contextmanager
def _recorded(kept: Recording) -> Iterator[None]:
    token = recording.set(kept)
    try:
        yield
    finally:
        recording.reset(token)


def as_it_is(model: PreTrainedModel) -> dict[str, Any]:
    """What a report says of weights that came quantized."""
    config: HfAccelConfig = model.hf_quantizer.quantization_config
    size = weight_bytes(model)
    weights = sum(len(names) for names in (config.weights or {}).values())
    method = getattr(model, "_hf_accel_source", METHOD)
    exact = method == METHOD or config.scheme in TABLES
    facts = {"exact": exact, "bytes_before": size, "bytes_after": size, "scheme": config.scheme, "weights": weights}
    rounded = {"int8": "rows are quantized anew", "int4": "scales and zeros are rounded to bfloat16"}
    facts |= {} if exact else {"read": rounded.get(config.scheme, "scales are rounded to bfloat16")}
    return facts | {"checkpoint": method}
