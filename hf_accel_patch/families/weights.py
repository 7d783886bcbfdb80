"""Which parameters are the weights of linear layers, found by what a module does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

Role = Literal["linear", "transposed", "embedding", "experts"]

# The weights of experts under transformers' `use_experts_implementation`: to the hidden features, and back
EXPERTS_INTO, EXPERTS_OUT = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Weight:
    """One parameter: its name in the module, [N, K] as it multiplies (of each expert), whether it lies as [K, N], and
    how many experts it is of, 0 for a plain weight."""

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    experts: int = 0


def linear_weights(module: nn.Module) -> tuple[Role, tuple[Weight, ...]] | str:
    """The role of a module and its weights; or why those that it has cannot be taken, "" if it has none."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None and p.ndim in (2, 3)}
    if not parameters or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return ""
    if not all(parameter.is_floating_point() for parameter in parameters.values()):
        return f"its weight is {next(iter(parameters.values())).dtype} already"
    kind: Any = type(module)
    if isinstance(module, nn.Linear | Conv1D) and "weight" not in parameters:
        return "its weight is computed from other parameters"
    if isinstance(module, Conv1D):
        K, N = parameters["weight"].shape
        return "transposed", (Weight("weight", (N, K), transposed=True),)
    if isinstance(module, nn.Linear) and (kind is nn.Linear or multiplies_plainly(module)):
        N, K = parameters["weight"].shape
        return "linear", (Weight("weight", (N, K)),)
    if is_experts(module):
        into = next(name for name in EXPERTS_INTO if name in parameters)
        return "experts", tuple(_of_experts(module, name, parameters[name]) for name in (into, EXPERTS_OUT))
    return f"{kind.__name__} may use its weight in its own way"


def is_experts(module: Any) -> bool:
    """Whether the module is under transformers' contract for experts, whole in this process."""
    names = module._parameters
    described = all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed"))
    into = EXPERTS_INTO[0] if described and module.has_gate else EXPERTS_INTO[1]
    held = all(names.get(name) is not None and names[name].ndim == 3 for name in (into, EXPERTS_OUT))
    return described and held and not getattr(module, "_is_expert_parallel", False)


def _of_experts(module: Any, name: str, parameter: torch.Tensor) -> Weight:
    E, *sides = parameter.shape
    N, K = sides[::-1] if module.is_transposed else sides
    return Weight(name, (N, K), bool(module.is_transposed), E)


def multiplies_plainly(module: nn.Linear) -> bool:
    """Whether the forward of a subclass of `nn.Linear` is x W^T + b, tried out on a small one with its attributes."""
    kind: Any = type(module)
    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.device("cpu"), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            weight, bias, x = (torch.randn(*shape, generator=generator).float() for shape in ((3, 4), (3,), (4, 4)))
            x *= torch.tensor([1e-3, 1.0, 1e3, 1e6])[:, None]
            small: Any = kind.__new__(kind)
            nn.Module.__init__(small)
            vars(small).update({name: value for name, value in vars(module).items() if name[0] != "_"})
            small.in_features, small.out_features, small.training = 4, 3, False
            small._parameters.update(weight=nn.Parameter(weight), bias=nn.Parameter(bias))
            y, expected = kind.forward(small, x), F.linear(x, weight, bias)
            return (
                isinstance(y, torch.Tensor) and y.shape == (4, 3) and torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
            )
    except Exception:  # whatever it wants beside what nn.Linear has
        return False
