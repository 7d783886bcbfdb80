"""How the channels of keys and values may be mixed, tried out on the live model instead of listed.

The projections' outputs are replaced by unit vectors. What arrives in the cache shows what positions and norms do to a
key: nothing, a rotation of pairs of channels in whatever order, or something that nothing may be mixed under. What
arrives at the output projection shows whether values get there as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_accel_patch.compat import CACHE
from hf_accel_patch.families import View
from hf_accel_patch.families.heads import Layout, Role, out_features
from hf_accel_patch.ops.heads import Freedom

LOUD = 1024.0  # a norm or a clamp shows by what it makes of a larger vector
POSITION = 37  # of the first of two tokens, where a model can be told
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # in 16 bits 2e-2

Seen = dict[str, dict[str, Tensor]]  # layer: "keys" and "values" [B, D] as cached, "output" [B, H, V]


@torch.no_grad()
def freedom(view: View, layouts: list[Layout]) -> list[tuple[Freedom, Freedom]]:
    """Of the keys and of the values of each layer. What cannot be tried out has none."""
    none = Freedom.none()
    if not layouts:
        return []
    try:
        quiet, loud = (_tried(view, layouts, size) for size in (1.0, LOUD))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return [(none, none) for _ in layouts]
    found = []
    for layout in layouts:
        one, other = quiet.get(layout.name, {}), loud.get(layout.name, {})
        keys = _keys(one["keys"]) if _linear(one, other, "keys") else none
        straight = _linear(one, other, "values") and _linear(one, other, "output") and _arrives(one, layout)
        found.append((keys, Freedom.full(layout.value_size) if straight else none))
    return found


def _linear(one: dict[str, Tensor], other: dict[str, Tensor], part: str) -> bool:
    return part in one and part in other and _close(one[part] * LOUD, other[part])


def _arrives(seen: dict[str, Tensor], layout: Layout) -> bool:
    """Whether values are cached as they are, and each head hands them on, times one number of its own at most."""
    eye = torch.eye(layout.value_size).to(seen["values"])
    output = seen["output"].transpose(0, 1)  # [H, V, V]
    share = output.diagonal(dim1=1, dim2=2).mean(1)
    return _close(seen["values"], eye) and bool(share.abs().min() > 0) and _close(output, share[:, None, None] * eye)


def _keys(seen: Tensor) -> Freedom:
    """Which channels are rotated together. seen [D, D]: where each unit vector went."""
    places: dict[tuple[int, ...], list[int]] = {}
    for channel, row in enumerate(seen):
        places.setdefault(tuple(row.nonzero().flatten().tolist()), []).append(channel)
    pairs = [channels for where, channels in places.items() if len(where) == len(channels) == 2]
    free = [channels[0] for where, channels in places.items() if len(where) == len(channels) == 1]
    if 2 * len(pairs) + len(free) != len(seen):
        return Freedom.none()
    for channels in pairs:
        part = seen[channels].double()
        size = part.square().sum() / 2
        if not _close(part @ part.T / size, torch.eye(2).to(part), seen.dtype):
            return Freedom.none()
    kept = seen[free].abs().sum(-1)
    if len(free) and not _close(kept, kept.mean().expand_as(kept)):
        return Freedom.none()
    return Freedom(torch.tensor(pairs, dtype=torch.long).view(-1, 2), torch.tensor(free, dtype=torch.long))


def _tried(view: View, layouts: list[Layout], size: float) -> Seen:
    device = next(view.model.parameters()).device
    B = max(max(each.key_size, each.value_size) for each in layouts)
    seen: Seen = {each.name: {} for each in layouts}
    cache = DynamicCache(config=view.config)
    ids = torch.ones(B, 2, dtype=torch.long, device=device)
    options: dict[str, Any] = {}
    accepted = inspect.signature(view.model.forward).parameters
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    if "position_ids" in accepted:
        options["position_ids"] = torch.arange(POSITION, POSITION + 2, device=device).expand(B, 2)
    with ExitStack() as stack:
        for layout in layouts:
            for part in {id(p): p for p in (layout.query, layout.key, layout.value)}.values():
                stack.callback(part.register_forward_hook(_replacing(layout, part, size)).remove)
            if layout.output is not None:
                hook = _noting(seen[layout.name], layout)
                stack.callback(layout.output.register_forward_pre_hook(hook).remove)
        view.model(input_ids=ids, use_cache=True, **{CACHE: cache}, **options)
    for layout in layouts:
        index = layout.index
        layer: Any = cache.layers[index] if index is not None and index < len(cache.layers) else None
        for name, width in (("keys", layout.key_size), ("values", layout.value_size)):
            held = getattr(layer, name, None)
            if isinstance(held, Tensor) and held.ndim == 4 and held.shape[2:] == (2, width):
                seen[layout.name][name] = held[:width, 0, 1]
    return seen


def _replacing(layout: Layout, part: nn.Module, size: float) -> Callable[..., Tensor]:
    """A hook that puts a unit vector for each key and value, another in each row of the batch, and zeros for queries,
    so that every key is seen alike."""
    roles: list[Role] = [role for role in ("key", "value") if getattr(layout, role) is part]
    features = out_features(part)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        flat = output.new_zeros(output.shape[0], output.numel() // output.shape[0] // features, features)
        for role in roles:
            rows = layout.rows(role).to(output.device)
            for channel in range(rows.shape[1]):
                flat[channel, :, rows[:, channel]] = size
        return flat.view(output.shape)

    return hook


def _noting(seen: dict[str, Tensor], layout: Layout) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        H, V = layout.heads, layout.value_size
        seen["output"] = args[0].reshape(-1, 2, H, V)[:V, 0]

    return hook


def _close(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return False
    error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
    return bool(error < TOLERANCE.get(dtype or a.dtype, 2e-2))
