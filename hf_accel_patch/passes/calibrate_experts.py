"""Calibration of stacked experts: each is rounded by GPTQ for the tokens that the router sends to it.

Second moments of every expert would be larger than the experts. So a layer's inputs are kept instead, with the choice
of the router, and the moments of one expert at a time are computed from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.ops.gptq import quantize_gptq
from hf_accel_patch.ops.packing import block_on, lay_out, pack_int4
from hf_accel_patch.passes.targets import Target

SHARED = 0.1  # tokens of the layer's average, per input feature, beside those that an expert sees


@dataclass
class Routed:
    """Tokens [T, K] that a layer of experts has seen, and the experts [T, k] that the router chose for each."""

    limit_bytes: int
    tokens: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    kept_bytes: int = 0

    def add(self, tokens: Tensor, chosen: Tensor) -> None:
        """Keep them, as long as there is room."""
        room = (self.limit_bytes - self.kept_bytes) // (tokens.shape[-1] * tokens.element_size())
        tokens, chosen = tokens.reshape(-1, tokens.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        if room <= 0 or not len(tokens):
            return
        self.tokens.append(tokens[:room].detach().clone())
        self.chosen.append(chosen[:room].detach().clone())
        self.kept_bytes += self.tokens[-1].nbytes

    def whole(self) -> tuple[Tensor, Tensor]:
        tokens, chosen = torch.cat(self.tokens), torch.cat(self.chosen)
        self.tokens, self.chosen = [], []
        return tokens, chosen


@torch.no_grad()
def rounded_experts(target: Target, seen: Routed) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of the weights to the hidden features and back. An expert that no token reaches is fitted
    without data.

    What an expert gets is mixed with a share of what its layer gets, or the few tokens of a rarely chosen one would say
    too much about its other features.
    """
    (_, module), (into, out) = target.modules[0], target.weights
    tokens, chosen = seen.whole()
    x = tokens.float()
    shared = x.T @ x * (SHARED * x.shape[1] / len(x))
    packed: dict[str, list[tuple[Tensor, Tensor]]] = {into.name: [], out.name: []}
    for expert in range(into.experts):
        routed = tokens[(chosen == expert).any(-1)]
        dense = {weight.name: _dense(module, weight, expert) for weight in target.weights}
        if not len(routed):
            block = block_on(tokens.device)
            for name, weight in dense.items():
                codes, scales = pack_int4(weight, target.group_size, block)
                packed[name].append((codes, scales.view(torch.int16)))
            continue
        hidden = _hidden(module, routed.to(dense[into.name].dtype), dense[into.name], into.name, expert)
        for name, inputs, prior in ((into.name, routed, shared), (out.name, hidden, None)):
            inputs = inputs.float()
            moments = inputs.T @ inputs
            if prior is not None:
                moments += prior
            rounded = quantize_gptq(dense[name], moments, target.group_size)
            packed[name].append(lay_out(*rounded, block_on(inputs.device)))
    return [_stacked(packed[weight.name]) for weight in target.weights]


def _dense(module: Any, weight: Any, expert: int) -> Tensor:
    """[N, K] of one expert."""
    parameter: Tensor = module._parameters[weight.name].detach()[expert]
    return parameter.T if weight.transposed else parameter


def _hidden(module: Any, x: Tensor, weight: Tensor, name: str, expert: int) -> Tensor:
    """What an expert's second weight multiplies."""
    h = x @ weight.T
    if module.has_bias:
        h = h + getattr(module, f"{name}_bias")[expert]
    found: Tensor = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    return found


def _stacked(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    codes, scales = zip(*parts, strict=True)
    return torch.stack(codes), torch.stack(scales)
