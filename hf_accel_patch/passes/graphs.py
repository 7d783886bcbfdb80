"""Decode steps and verification passes recorded and replayed: whether, and where `generate` comes to them.

A small step is bound by Python, which launches every kernel of a GPU, or calls every operator of a CPU. A step that was
recorded once is launched as a CUDA graph, or run by compiled code, as a whole. transformers' loops, and those of
speculative decoding, call the model through a `Decoding` (passes/replaying.py): where a step fits and pays it is
recorded and from then on replayed, on buffers that stay where they are (passes/rooms.py), over tokens, places and
positions that it reads from the device. All else runs as before.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import WIDENS_MASKS, View
from hf_accel_patch.families.handwritten import handwritten_modules
from hf_accel_patch.journal import Journal
from hf_accel_patch.kernels import cpu_steps
from hf_accel_patch.ops.graphs import recorder_for
from hf_accel_patch.ops.pacing import Pace
from hf_accel_patch.passes.handwritten import KEY
from hf_accel_patch.passes.replaying import Decoding, Graphs

GRAPHS = "_hf_accel_graphs"  # on a model
THEMSELVES, CONTAINERS = frozenset({int, float, str}), (dict, list)
KINDS = {"full_attention", "sliding_attention"}  # of layers, as configurations call them


def asked(view: View) -> Graphs:
    """What a model is to carry. Raises UnsupportedModel where there are no graphs at all."""
    device = view.model.device
    if device.type != "meta" and recorder_for(device) is None:
        reason = cpu_steps.why_not() if device.type == "cpu" else f"the model is on {device.type}"
        raise UnsupportedModel(
            f"cache: graphs=True: steps are replayed on NVIDIA GPUs and, by compiled code, on x86 processors: {reason}",
            "leave graphs out, or move the model before it is patched",
        )
    return Graphs(never(view), asked=True)


def by_default(view: View) -> Graphs | None:
    """The same where nobody has asked: None where there are no graphs."""
    device = view.model.device
    return None if device.type == "meta" or recorder_for(device) is None else Graphs(never(view))


def install(graphs: Graphs, model: PreTrainedModel, journal: Journal) -> None:
    """From here on `generate` comes to what is recorded."""
    journal.set_attribute(model, GRAPHS, graphs)
    journal.bind_method(model, "_valid_auto_compile_criteria", decides)
    journal.bind_method(model, "get_compiled_call", decoding_call)


def counted(model: PreTrainedModel) -> dict[str, Any]:
    """What was recorded and replayed so far, for the report."""
    graphs = vars(model).get(GRAPHS)
    return graphs.facts() if isinstance(graphs, Graphs) else {}


def never(view: View) -> str:
    """Why no step of this model is ever recorded."""
    if not takes_places(view):
        return "its forward takes no positions and no mask of its own for each token"
    layers, known = DynamicCache(config=view.config).layers, (DynamicLayer, DynamicSlidingWindowLayer)
    if other := sorted({type(layer).__name__ for layer in layers if type(layer) not in known}):
        return f"a layer of its cache is a {other[0]}"
    windows = {layer.sliding_window for layer in layers if layer.is_sliding}
    kinds = set(getattr(view.config, "layer_types", None) or ())
    if len(windows) > 1 or not kinds <= KINDS or (windows and getattr(view.config, "attention_chunk_size", None)):
        return "its layers see tokens in other ways than all, or those of one window"
    return ""


def takes_places(view: View) -> bool:
    """Whether a forward can be told where each token stands and what it sees: positions, and a mask [B, 1, T, S]."""
    parameters = inspect.signature(type(view.model).forward).parameters
    takes = {"position_ids", "attention_mask"} <= parameters.keys() and view.config.model_type not in WIDENS_MASKS
    return takes and not handwritten_modules(view)


def begin(model: PreTrainedModel, config: GenerationConfig, pace: Pace | None = None) -> Decoding | None:
    """What one call of `generate` calls in the place of the model, if that is asked for and can be. `pace` is told of
    passes that are no measure."""
    graphs = vars(model).get(GRAPHS)
    if not isinstance(graphs, Graphs):
        return None
    reason = graphs.off or why_not(model, config)
    if not reason:
        with graphs.lock:
            made_of = identity(model)
            if made_of != graphs.made_of:
                graphs.made_of, graphs.rooms, graphs.recorder = made_of, [], recorder_for(model.device)
                graphs.hooked = hooked(model)
            reason = graphs.hooked
            if not reason and graphs.recorder is not None:
                return Decoding(graphs, model, graphs.recorder, config.max_length or 0, pace)
            reason = reason or f"the model is on {model.device.type}"
    graphs.eager[reason] += 1
    return None


def decides(self: PreTrainedModel, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
    """In the place of `_valid_auto_compile_criteria`, which says whether a loop calls the model itself or what
    `get_compiled_call` returns."""
    graphs: Graphs = vars(self)[GRAPHS]
    graphs.pending.pop(threading.get_ident(), None)
    if type(self)._valid_auto_compile_criteria(self, model_kwargs, generation_config):
        return True
    decoding = begin(self, generation_config)
    if decoding is not None:
        graphs.pending[threading.get_ident()] = decoding
    return decoding is not None


def decoding_call(self: PreTrainedModel, compile_config: Any) -> Any:
    """In the place of `get_compiled_call`."""
    graphs: Graphs = vars(self)[GRAPHS]
    decoding = graphs.pending.pop(threading.get_ident(), None)
    return type(self).get_compiled_call(self, compile_config) if decoding is None else decoding


def why_not(model: PreTrainedModel, config: GenerationConfig) -> str:
    """Why a call of `generate` goes the ordinary way."""
    text = model.config.get_text_config(decoder=True)
    if model.training:
        return "the model is in training mode"
    if config.compile_config is not None or config.disable_compile:
        return "the call says itself how the model is compiled"
    if any(
        getattr(each, name, False) for each in (config, text) for name in ("output_attentions", "output_hidden_states")
    ):
        return "attentions or hidden states are asked for"
    if not config.use_cache:
        return "it is without a cache"
    if text._attn_implementation not in (KEY, "sdpa", "eager"):
        return "its attention may not take a mask of its own for each token"
    if getattr(model, "_compiled_call_impl", None) is not None:
        return "the model is compiled"
    return ""


def hooked(model: nn.Module) -> str:
    """Where a hook is that a replay would not call."""
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"accelerate has placed a hook on {name or 'the model'}"
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if any(not _harmless(hook) for hook in hooks):
            return f"there is a hook on {name or 'the model'}, which a replay would not call"
    return ""


def identity(model: nn.Module) -> object:
    """Equal as long as the model is in the same place, with the same modules, attributes and weights, which may have
    other values: a recorded step knows no more."""
    found: list[Any] = []
    configurations: dict[int, Any] = {}  # each once, for most modules hold the same
    for module in model.modules():
        own = vars(module)
        found += (id(module), module.__class__, module.__class__.forward)
        _note(own.values(), found)
        for each in own.values():
            if isinstance(each, CONTAINERS) and each:
                _note(each.values() if isinstance(each, dict) else each, found)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found += (tensor.data_ptr(), tensor.dtype, tensor.device)
        if "config" in own:
            configurations[id(own["config"])] = own["config"]
    for each in configurations.values():
        _note(vars(each).values(), found)
    return found


def _note(values: Iterable[Any], found: list[Any]) -> None:
    """Numbers and names themselves, because another one may come to lie at their address; the address of all else."""
    found += [each if each.__class__ in THEMSELVES else id(each) for each in values]


def _harmless(hook: Any) -> bool:
    """Ours, which converts a cache once; transformers', which waits for hidden states to be asked for."""
    module = getattr(hook, "__module__", "") or ""
    return module.startswith("hf_accel_patch.") or module == "transformers.utils.output_capturing"
