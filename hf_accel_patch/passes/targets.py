"""Which weights a scheme takes, and why it leaves the others."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hf_accel_patch.families import ADAPTERS, View
from hf_accel_patch.families.weights import Role, Weight, linear_weights
from hf_accel_patch.ops.packing import INT8, packed_bytes

GROUP_SIZES = (64, 32, 128)  # in the order of choice: 64 costs half a bit per weight and loses little against 32
HEAD_GROUP_SIZE = 32  # rounding errors of the head go straight into the logits


@dataclass(frozen=True)
class Target:
    """The weights of a module that are quantized together, and every module that uses them: several if tied."""

    modules: tuple[tuple[str, nn.Module], ...]
    role: Role
    weights: tuple[Weight, ...]
    group_size: int  # 0 for 8 bits, which have one scale per row
    head: bool
    packed_bytes: int

    @property
    def size(self) -> int:
        """Weights in all."""
        return sum(weight.shape[0] * weight.shape[1] * max(weight.experts, 1) for weight in self.weights)

    def parameters(self) -> list[nn.Parameter]:
        """One for each of `weights`."""
        held = self.modules[0][1]._parameters
        return [parameter for weight in self.weights if (parameter := held[weight.name]) is not None]


def choose(
    view: View, scheme: str, group_size: int | None, skip: tuple[str, ...], block: int
) -> tuple[list[Target], list[tuple[str, str]]]:
    """The weights that a scheme takes, and the names of the modules that it leaves, with the reason.

    Raises ValueError where `group_size` does not divide.
    """
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in view.model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module, key))
    head = view.model.get_output_embeddings()
    inside = {id(module) for _, module in view.named_modules()}
    targets: list[Target] = []
    skipped: list[tuple[str, str]] = []
    seen: set[int] = set()
    for name, module in view.named_modules():
        found = linear_weights(module)
        if isinstance(found, str):
            skipped += [(name, found)] if found else []
            continue
        role, weights = found
        first = id(module._parameters[weights[0].name])
        if first in seen:
            continue
        seen.add(first)
        uses = [use for weight in weights for use in users[id(module._parameters[weight.name])]]
        modules = {id(each): (each_name, each) for each_name, each, _ in uses}
        is_head = any(each is head for _, each in modules.values())
        reason = _untouchable([*modules.values()], uses, inside, skip, role)
        size, why = (0, "") if reason else _group_size(weights, scheme, group_size, is_head, name)
        if not (reason or why):
            parameters = [module._parameters[weight.name] for weight in weights]
            before = sum(p.numel() * p.element_size() for p in parameters if p is not None)
            after = sum(max(w.experts, 1) * packed_bytes(w.shape, scheme, size, block) for w in weights)
            if after < before:
                targets.append(Target(tuple(modules.values()), role, weights, size, is_head, after))
                continue
            why = "it would not be smaller"
        skipped += [(each_name, reason or why) for each_name, each in modules.values() if not _is_table(each)]
    return targets, skipped


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _untouchable(
    modules: list[tuple[str, nn.Module]],
    uses: list[tuple[str, nn.Module, str]],
    inside: set[int],
    skip: tuple[str, ...],
    role: Role,
) -> str:
    """Why these modules, which share weights, stay as they are, whatever the scheme; "" if they need not."""
    for name, module in modules:
        if any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in skip):
            return "asked for by skip"
        if any(part.startswith(ADAPTERS) for part in name.split(".")):
            return "an adapter that is being trained"
        if id(module) not in inside:
            return f"shared with {name}, which is not of the language model"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "its embedding renormalizes rows"
        if not isinstance(module, nn.Embedding):
            other = linear_weights(module)
            if isinstance(other, str) or other[0] != role:
                return f"shared with {name}, which uses it in another way"
    for name, module, key in uses:
        if isinstance(module, nn.Embedding | nn.Linear) and key != "weight":
            return f"shared with {name}.{key}"
    return ""


def _group_size(
    weights: tuple[Weight, ...], scheme: str, asked: int | None, is_head: bool, name: str
) -> tuple[int, str]:
    """The group size, or why there is none."""
    if scheme in INT8:
        return 0, ""
    K = [weight.shape[1] for weight in weights]
    fitting = [size for size in GROUP_SIZES if all(k % size == 0 for k in K)]
    features = " and ".join(map(str, dict.fromkeys(K)))
    if asked is not None and asked not in fitting:
        raise ValueError(
            f"quantize: group_size={asked} does not divide the {features} input features of {name}; "
            f"sizes that do: {', '.join(map(str, sorted(fitting))) or 'none'}"
        )
    if is_head and asked is None:
        fitting = [size for size in fitting if size == HEAD_GROUP_SIZE]
    return (asked or fitting[0], "") if fitting else (0, f"{features} input features are no multiple of 32")
