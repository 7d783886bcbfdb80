"""Where the rows of each head stand in the projections of an attention module, and how many heads there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_accel_patch.families import HEADS, SHARED_HEADS, View
from hf_accel_patch.families.classes import uses_registry
from hf_accel_patch.families.handwritten import WITHOUT_SHARED, handwritten
from hf_accel_patch.families.positions import has_alibi

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
FUSED = {"query_key_value": "side by side", "c_attn": "blocks", "Wqkv": "blocks", "qkv_proj": "blocks"}
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
UNKNOWN = frozenset({"CodeGenAttention"})  # rows in an order of their own
SIDE_BY_SIDE = frozenset({"GPTBigCodeAttention"})  # where the name of the projection says otherwise
SINKS = ("sinks",)  # one number per query head
NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"), ("q_layernorm", "k_layernorm"))

Role = Literal["query", "key", "value"]


@dataclass(frozen=True)
class Layout:
    """The projections of an attention module. Query, key and value may be one module, with rows `side by side` (for
    each key/value head: the queries that read it, the key, the value) or in three `blocks`."""

    name: str
    module: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module | None  # None: not known, so outputs stay as they are
    order: str  # "separate", "side by side" or "blocks"
    heads: int
    shared: int  # key/value heads
    key_size: int
    value_size: int

    @property
    def fused(self) -> bool:
        return self.order != "separate"

    @property
    def index(self) -> int | None:
        """The number of its layer, by which it finds its part of the cache."""
        return vars(self.module).get("layer_idx", vars(self.module).get("layer_id"))

    def with_heads(self, shared: int) -> Layout:
        """The same with so many key/value heads."""
        return replace(self, shared=shared)

    def rows(self, role: Role) -> Tensor:
        """The output features of the projection that are of each head [heads, size]."""
        H, K, D, V = self.heads, self.shared, self.key_size, self.value_size
        if self.order == "side by side":
            G = H // K
            block = torch.arange(K * (G + 2) * D).view(K, G + 2, D)
            parts = {"query": block[:, :G].reshape(H, D), "key": block[:, G], "value": block[:, G + 1]}
            return parts[role]
        count, size = {"query": (H, D), "key": (K, D), "value": (K, V)}[role]
        start = {"query": 0, "key": H * D, "value": H * D + K * D}[role] if self.fused else 0
        return start + torch.arange(count * size).view(count, size)

    def replaced_bytes(self) -> int:
        """Of the parameters in whose place others come when heads are merged."""
        parts = [self.key, self.value] if self.output is None else [self.query, self.key, self.value, self.output]
        held = {id(p): p.nbytes for part in parts for p in part._parameters.values() if p is not None}
        return sum(held.values())

    def features(self, role: Role) -> int:
        """Output features of the projection of this role."""
        H, K, D, V = self.heads, self.shared, self.key_size, self.value_size
        if self.fused:
            return H * D + K * (D + V)
        return {"query": H * D, "key": K * D, "value": K * V}[role]

    def saved_bytes(self, shared: int) -> int:
        """Bytes of weights that go with the other key/value heads."""
        rows = (self.shared - shared) * torch.tensor([self.key_size, self.value_size])
        parts = zip(rows.tolist(), (self.key, self.value), strict=True)
        return sum(
            count * sum(p[:1].nbytes // p[:1].numel() * _per_row(part, p) for p in part.parameters())
            for count, part in parts
        )

    def token_bytes(self, shared: int) -> int:
        """Bytes that one token takes in the cache with this many key/value heads."""
        weight: Any = self.key._parameters["weight"]
        return int(shared * (self.key_size + self.value_size) * weight.element_size())

    def norms(self) -> tuple[nn.Module, nn.Module] | None:
        """The norms of queries and keys, if it has them."""
        found = self.module._modules
        for query, key in NORMS:
            first, second = found.get(query), found.get(key)
            if first is not None and second is not None:
                return first, second
        return None

    def sinks(self) -> str | None:
        """The name of a parameter with one number per query head."""
        held = self.module._parameters
        return next((name for name in SINKS if (p := held.get(name)) is not None and p.shape == (self.heads,)), None)

    def movable(self) -> bool:
        """Whether everything in it that belongs to a query head is known, so that heads may change places."""
        if self.output is None:
            return False
        known = {id(p) for part in (self.query, self.key, self.value, self.output) for p in part.parameters()}
        known |= {id(p) for norm in self.norms() or () for p in norm.parameters()}
        known |= {id(self.module._parameters[name]) for name in SINKS if name in self.module._parameters}
        return all(id(p) in known for p in self.module.parameters())


def _per_row(module: Any, parameter: Tensor) -> int:
    if parameter.ndim == 1:
        return 1
    return int(parameter.shape[0 if isinstance(module, Conv1D) else 1])


def heads_move(view: View) -> bool:
    """Whether query heads may change places: not where their place means something, as ALiBi's slope, and not where
    layers use the keys of others."""
    config = view.config
    if has_alibi(config):
        return False
    return not getattr(config, "num_kv_shared_layers", 0)


def linear(module: Any) -> bool:
    """Whether its weight can be taken apart by rows (of a Conv1D: columns)."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear | Conv1D) else None
    return weight is not None and weight.ndim == 2 and weight.is_floating_point()


def features_axis(module: Any, parameter: Tensor) -> int:
    """Along which axis a parameter of a projection has its output features."""
    return 1 if isinstance(module, Conv1D) and parameter.ndim == 2 else 0


def out_features(module: Any) -> int:
    """Output features of a projection."""
    return int(module._parameters["weight"].shape[1 if isinstance(module, Conv1D) else 0])


def query_heads(config: PreTrainedConfig) -> int:
    """Query heads; 0 where the configuration does not say."""
    return next((int(found) for name in (*HEADS, "num_heads") if (found := getattr(config, name, None))), 0)


def shared_heads(config: PreTrainedConfig) -> int:
    """Key/value heads; those of the queries where the configuration knows no others."""
    inner = getattr(config, "attn_config", None)
    if isinstance(found := getattr(inner, "kv_n_heads", None), int):
        return found
    newer = getattr(config, "new_decoder_architecture", False)
    if getattr(config, "multi_query", False) and not newer:
        return 1
    return next((int(f) for name in SHARED_HEADS if (f := getattr(config, name, None))), query_heads(config))


def layouts(view: View, shared: int) -> list[Layout]:
    """The attention modules whose projections are known."""
    found = [_layout(name, module, view.config, shared) for name, module in view.named_modules()]
    return [each for each in found if each is not None]


def _layout(name: str, module: nn.Module, config: PreTrainedConfig, K: int) -> Layout | None:
    kind: Any = type(module)
    if kind.__name__ in UNKNOWN or not (uses_registry(kind) or handwritten(kind) or kind.__name__ in WITHOUT_SHARED):
        return None
    parts: dict[str, Any] = {key: part for key, part in module._modules.items() if part is not None and linear(part)}
    H = query_heads(config)
    output = next((parts[key] for key in OUTPUT if key in parts), None)
    for names in SEPARATE:
        if all(each in parts for each in names):
            query, key, value = (parts[each] for each in names)
            rows = [out_features(each) for each in (query, key, value)]
            if rows[1] % K or rows[2] % K or not H:
                return None
            D, V = rows[1] // K, rows[2] // K
            if rows[0] % D == 0 and rows[0] // D != H and _heads(module) == rows[0] // D:
                H = rows[0] // D  # layers may differ
            plain = rows[0] == H * D and output is not None and _inputs(output) == H * V
            return Layout(name, module, query, key, value, output if plain else None, "separate", H, K, D, V)
    for each, order in FUSED.items():
        if each in parts and H:
            fused, features = parts[each], out_features(parts[each])
            if features % (H + 2 * K):
                return None
            D = features // (H + 2 * K)
            plain = output is not None and _inputs(output) == H * D
            order = "side by side" if kind.__name__ in SIDE_BY_SIDE else order
            return Layout(name, module, fused, fused, fused, output if plain else None, order, H, K, D, D)
    return None


def _inputs(module: Any) -> int:
    return int(module._parameters["weight"].shape[0 if isinstance(module, Conv1D) else 1])


def _heads(module: nn.Module) -> int | None:
    return next((found for name in (*HEADS, "num_heads") if isinstance(found := vars(module).get(name), int)), None)
