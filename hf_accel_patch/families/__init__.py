"""What differs between architectures, and the view that passes get of a live model.

Structure is found, not listed: an attention module is one whose forward looks its function up in transformers'
registry, a rotary module is one with inverse frequencies, a linear layer is an `nn.Linear`. What cannot be found stands
here in tables; no other room of the package knows a model type or the name of a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families.classes import caches_latents, takes_cache, uses_registry
from hf_accel_patch.families.offloading import is_offloaded

# Where a wrapper keeps the model inside it: torch.compile, pipelines, PEFT
WRAPPERS = ("_orig_mod", "model", "base_model")

# Model types whose attention works on the dense mask itself, or chooses keys by more than the attention function sees
UNSUITABLE_ATTENTION = {"deepseek_v4": "it adds scores of its compressed blocks to the dense additive mask"}

# Parts of the names under which PEFT adds modules of its own
ADAPTERS = ("lora_", "adapter_", "vera_", "modules_to_save", "ia3_", "hada_", "lokr_", "oft_", "boft_", "hra_")

# Model types that widen masks and positions for images, so they take none that are made for each token
WIDENS_MASKS = frozenset({"git"})

# Where a configuration says how many query heads and how many key/value heads there are
HEADS = ("num_attention_heads", "n_head", "n_heads")
SHARED_HEADS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True)
class View:
    """A live causal LM as passes see it. Reads only.

    `model` has `generate`; `config` is the text configuration. In a multimodal model, `named_modules` are those of the
    text decoder and of the head: the other parts are left alone.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    subject: str
    parts: tuple[tuple[str, nn.Module], ...]
    tokenizer: Any = None  # of the pipeline around it
    context: int | None = None  # tokens that it is to be used with, where that was said

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module of the language model once, with its qualified name in `model`."""
        seen: set[nn.Module] = set()
        for prefix, part in self.parts:
            yield from part.named_modules(memo=seen, prefix=prefix)

    def follow(self, config: PreTrainedConfig) -> None:
        """A pass has given the model another configuration: it is what the passes after it see."""
        object.__setattr__(self, "config", config)

    def expect(self, tokens: int) -> None:
        """Texts of so many tokens are what the passes after this one are asked for."""
        object.__setattr__(self, "context", tokens)

    def weight_bytes(self) -> int:
        """Bytes of the model's parameters and buffers; tied and shared ones count once."""
        return weight_bytes(self.model)

    def attention_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules that take their attention function from transformers' registry, under the name in `config`."""
        return [
            (name, module)
            for name, module in self.named_modules()
            if uses_registry(type(module))  # type: ignore[arg-type]
            and vars(module).get("config") is self.config
        ]

    def rotary_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules that hold inverse frequencies of rotary positions, as buffers."""
        return [pair for pair in self.named_modules() if any(n.endswith("inv_freq") for n in pair[1]._buffers)]


def bind(target: object) -> View:
    """The view of the causal LM in `target`: a model, or a PEFT model, compiled module or pipeline around one.

    Raises UnsupportedModel for what is no causal LM of transformers.
    """
    model = find_model(target)
    config = model.config.get_text_config(decoder=True)
    kind, tokenizer = type(model).__name__, getattr(target, "tokenizer", None)
    if config is model.config:
        return View(model, config, kind, (("", model),), tokenizer)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    parts = tuple((names[id(part)], part) for part in (decoder, head) if part is not None and id(part) in names)
    return View(model, config, f"{kind} (its text decoder)", parts, tokenizer)


def find_model(target: object) -> PreTrainedModel:
    """The transformers causal LM in `target`. Raises UnsupportedModel."""
    found: Any = target
    for _ in range(4):
        if isinstance(found, PreTrainedModel):
            break
        inner = [part for name in WRAPPERS if isinstance(part := getattr(found, name, None), nn.Module)]
        found = next((part for part in inner if _is_causal_lm(part)), next(iter(inner), None))
    kind = type(target).__name__
    if not isinstance(found, PreTrainedModel):
        raise UnsupportedModel(
            f"{kind} is no causal LM of transformers", "pass what AutoModelForCausalLM.from_pretrained returns"
        )
    if _is_causal_lm(found):
        return found
    if found.config.is_encoder_decoder or not found.can_generate():
        raise UnsupportedModel(
            f"{type(found).__name__} is no causal LM: it has no head that generates text from left to right",
            "load the checkpoint with AutoModelForCausalLM",
        )
    return found


def _is_causal_lm(module: Any) -> bool:
    return isinstance(module, PreTrainedModel) and type(module).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def makes_causal_lms(kind: type) -> bool:
    """Whether objects of this class are causal LMs: those of transformers, subclasses of theirs, code of others."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    remote = getattr(kind, "_auto_class", None) == "AutoModelForCausalLM"
    return remote or any(base.__name__ in known or base.__name__.endswith("ForCausalLM") for base in kind.__mro__)


def check_weights(view: View) -> None:
    """Raise UnsupportedModel for weights that are not whole in the memory of this process. Those that accelerate
    brings for every forward are."""
    from torch.distributed.tensor import DTensor

    for name, module in view.model.named_modules():
        away = module._parameters.keys() if is_offloaded(module) else ()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if tensor.is_meta and key not in away:
                raise UnsupportedModel(
                    f"{name}.{key} is on the meta device, so it has no values", "load the weights first"
                )
            if isinstance(tensor, DTensor):
                raise UnsupportedModel(
                    f"{name}.{key} is a DTensor, a weight spread over processes", "patch the model before sharding it"
                )


@dataclass(frozen=True)
class CacheRow:
    """What one layer caches of a token: `heads` keys and values of these sizes. Of a window, one token less is kept."""

    heads: int
    key_size: int
    value_size: int
    window: int | None = None
    kind: type = DynamicLayer  # of transformers' cache layers


def first_cached_module(view: View) -> nn.Module | None:
    """The first module below the model itself that is handed the cache in its forward."""
    for _, module in view.named_modules():
        if not isinstance(module, PreTrainedModel) and takes_cache(type(module)):  # type: ignore[arg-type]
            return module
    return None


def layer_list(view: View) -> nn.ModuleList:
    """The list of the decoder's layers. Raises UnsupportedModel."""
    first = first_cached_module(view)
    for _, module in view.named_modules():
        if isinstance(module, nn.ModuleList) and first is not None and first in list(module):
            return module
    raise UnsupportedModel(f"{view.subject} has no list of layers that take a cache")


def cache_rows(view: View) -> list[CacheRow]:
    """The layers that cache keys and values, by the configuration."""
    config = view.config
    latent = any(caches_latents(type(module)) for _, module in view.attention_modules())  # type: ignore[arg-type]
    layers, each_own = DynamicCache(config=config).layers, getattr(config, "per_layer_config", None)
    configs = each_own if isinstance(each_own, Sequence) else [config] * len(layers)  # sizes may differ by layer
    return [
        replace(_cache_row(each, latent), window=getattr(layer, "sliding_window", None), kind=type(layer))
        for layer, each in zip(layers, configs, strict=False)
        if isinstance(layer, DynamicLayer)
    ]


def _cache_row(config: PreTrainedConfig, latent: bool) -> CacheRow:
    if latent:
        return CacheRow(1, config.kv_lora_rank, config.qk_rope_head_dim)
    heads = next((found for name in HEADS if (found := getattr(config, name, None))), 1)
    if getattr(config, "kv_lora_rank", None) and getattr(config, "v_head_dim", None):
        # what latents expand to, as transformers before 5.15 cached it
        return CacheRow(heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = next((found for name in SHARED_HEADS if (found := getattr(config, name, None))), heads)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        shared = 1  # what Falcon's number of them does not say
    return CacheRow(shared, size, size)


def context_tokens(config: PreTrainedConfig) -> int | None:
    """How many tokens the model was made for, where its configuration says so."""
    names = ("max_position_embeddings", "max_seq_len", "n_positions", "max_seq_length")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), None)


def rotary_tokens(config: PreTrainedConfig) -> int | None:
    """Up to which position its rotary frequencies are the same ones."""
    rope = getattr(config, "rope_parameters", None) or {}
    context, original = context_tokens(config), rope.get("original_max_position_embeddings")
    return min(context, original) if context and isinstance(original, int) else context


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module; shared storage counts once."""
    storages: dict[Any, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(storages.values())


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
