"""Running a model without leaving a trace in it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_accel_patch.journal import Bound
from hf_accel_patch.passes.choosing import Tally
from hf_accel_patch.passes.graphs import GRAPHS
from hf_accel_patch.passes.prefixes import PrefillWithPrefixes
from hf_accel_patch.passes.replaying import Graphs
from hf_accel_patch.passes.speculative import SPECULATING, Speculating

ABSENT = object()


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in eval mode without gradients; behind it, attributes, buffers, modes and the state of
    random numbers are as before. What passes learn from calls, such as prefixes and how well drafts go, learns nothing
    from those inside."""
    before = [(module, dict(vars(module)), _stores(module)) for module in model.modules()]
    generation_config = getattr(model, "generation_config", None)
    settings = dict(vars(generation_config)) if generation_config is not None else {}
    devices = list({each.device.index for each in model.parameters() if each.is_cuda and each.device.index is not None})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for module in model.modules():
                module.training = False
            _unlearning(model)
            yield
    finally:
        for module, attributes, stores in before:
            _restore(vars(module), attributes)
            for name, items in stores.items():
                _restore(getattr(module, name), items)
        if generation_config is not None:
            _restore(vars(generation_config), settings)


def _stores(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(getattr(module, name)) for name in ("_parameters", "_buffers", "_modules")}


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Writes only what differs; where the order differs, all."""
    for name in [name for name in now if name not in before]:
        del now[name]
    if list(now) != list(before):
        now.clear()
    for name, value in before.items():
        if now.get(name, ABSENT) is not value:
            now[name] = value


def _unlearning(model: PreTrainedModel) -> None:
    """Put stand-ins for what learns."""
    own = vars(model)
    speculating = own.get(SPECULATING)
    if isinstance(speculating, Speculating):
        paces = copy.deepcopy(speculating.paces)
        own[SPECULATING] = dataclasses.replace(
            speculating, history=None, tally=Tally(), paces=paces, warned=set(speculating.warned)
        )
    if isinstance(graphs := own.get(GRAPHS), Graphs):
        own[GRAPHS] = Graphs(graphs.off, graphs.asked)
    prefill = own.get("_prefill")
    if isinstance(prefill, Bound) and isinstance(prefill.__func__, PrefillWithPrefixes):
        inner = prefill.__func__.inner
        if inner is None:
            del own["_prefill"]
        else:
            own["_prefill"] = Bound(inner, model)
