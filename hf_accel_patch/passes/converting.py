"""Converting attention layers to fewer key/value heads, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_accel_patch.families import View
from hf_accel_patch.families.freedom import freedom
from hf_accel_patch.families.heads import Layout, Role, heads_move
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.heads import Aligned, Freedom, Heads, partition, pooled
from hf_accel_patch.passes.calibrate import Enough, evaluating
from hf_accel_patch.passes.correcting import Fit, correct, twin
from hf_accel_patch.passes.rope import undisturbed

RANDOM = (16, 256)  # without texts: as many rows of so many random tokens
MOMENTS_BYTES = 1 << 29  # held at a time; the texts are read once for each such part of the layers
RIDGE = 1e-5  # of the mean of the inputs' second moments, added to all
PROGRESS_WEIGHTS = 100_000_000  # smaller models are done before a bar is seen


@dataclass(frozen=True)
class Conversion:
    """What is to be done."""

    view: View
    layouts: list[Layout]
    shared: int  # key/value heads afterwards
    merge: str
    windows: list[Tensor]  # token ids [1, T]; empty: random ones
    config: PreTrainedConfig
    attributes: list[tuple[nn.Module, str, Any]]
    own: bool  # by our attention, because the class has no key/value heads


@torch.no_grad()
def converted(work: Conversion, journal: Journal, keep: bool) -> Iterator[Layout]:
    """Layers, as each of them has been written with fewer heads."""
    view, aligned = work.view, work.merge == "aligned"
    rotary = [module for _, module in view.rotary_modules()]
    with undisturbed(rotary), evaluating(view.model):
        free = freedom(view, work.layouts) if aligned else [(Freedom.none(), Freedom.none())] * len(work.layouts)
    movable = aligned and heads_move(view)
    size = sum(p.numel() for layout in work.layouts for p in layout.module.parameters())
    bar = partial(logging.tqdm, desc=f"convert to {work.shared} key/value heads", unit="layer")
    with bar(total=len(work.layouts), disable=size < PROGRESS_WEIGHTS) as progress:
        room = MOMENTS_BYTES if keep else min(MOMENTS_BYTES, view.weight_bytes() // len(work.layouts))
        for part in _parts(work.layouts, 0 if work.windows and not keep else room):
            fits: list[Fit] = []
            moments = _moments(work, [work.layouts[i] for i in part], rotary) if aligned else {}
            for index in part:
                layout = work.layouts[index]
                if not aligned:
                    layout = replace(layout, output=None)  # queries and outputs stay as they are
                heads = _read(layout)
                summed = moments.pop(layout.name, None)
                found = None if summed is None else summed.moments(_biased(layout))
                merged, groups = _merge(work, layout, heads, found, free[index], movable, index)
                fits += _fit(work, layout)
                _write(layout, layout.with_heads(work.shared), merged, groups, journal, keep)
                _follow(work, layout.module, journal)
                progress.update(1)
                yield layout
            if fits:
                with undisturbed(rotary), evaluating(view.model):
                    correct(view.model, fits, work.windows)
    for module, name, value in work.attributes:
        if vars(module).get(name) != value:
            journal.set_attribute(module, name, value)


def _merge(
    work: Conversion,
    layout: Layout,
    heads: Heads,
    moments: Tensor | None,
    free: tuple[Freedom, Freedom],
    movable: bool,
    index: int,
) -> tuple[Heads, list[list[int]]]:
    """The merged heads, and which of the old ones are in each group."""
    K, m = layout.shared, layout.shared // work.shared
    consecutive = [list(range(start, start + m)) for start in range(0, K, m)]
    if work.merge != "aligned" or layout.output is None:
        kind = "mean" if work.merge == "aligned" else work.merge
        return pooled(heads, work.shared, kind, torch.Generator().manual_seed(index)), consecutive
    if moments is None:
        moments = torch.eye(heads.key.shape[-1]).to(heads.key)
    keys, values = (each.to(heads.key.device) for each in free)
    before = Aligned.of(heads, moments, keys, values)
    groups = consecutive
    if movable and layout.movable() and work.shared > 1:
        groups = partition(before.cost(), work.shared)
    return before.merged(groups), groups


def _read(layout: Layout) -> Heads:
    """The four projections. Queries and outputs are empty where they are not to be touched."""
    biased = _biased(layout)

    def rows(role: Role) -> Tensor:
        part: Any = getattr(layout, role)
        index = layout.rows(role).to(part.weight.device)
        weight = part.weight.T if isinstance(part, Conv1D) else part.weight
        found = weight[index]
        if biased:
            bias = part._parameters.get("bias")
            last = weight.new_zeros(*index.shape, 1) if bias is None else bias[index, None]
            found = torch.cat((found, last), dim=-1)
        return found

    key, value = rows("key").double(), rows("value").double()
    if layout.output is None:
        empty = key.new_zeros(layout.heads, 0, 0)
        return Heads(empty, key, value, empty)
    output: Any = layout.output
    columns = output.weight if isinstance(output, Conv1D) else output.weight.T
    return Heads(rows("query"), key, value, columns.reshape(layout.heads, layout.value_size, -1))


def _biased(layout: Layout) -> bool:
    return any(part._parameters.get("bias") is not None for part in (layout.query, layout.key, layout.value))


def _write(before: Layout, after: Layout, heads: Heads, groups: list[list[int]], journal: Journal, keep: bool) -> None:
    """The merged heads in the place of the projections."""
    order = [head for group in groups for head in group]
    moved = order != sorted(order)
    shares = {"query": heads.query, "key": heads.key, "value": heads.value}
    written: list[tuple[nn.Module, str, Tensor]] = []
    touched = before.output is not None
    for part in {id(p): p for p in (before.query, before.key, before.value)}.values():
        roles: list[Role] = [role for role in ("query", "key", "value") if getattr(before, role) is part]
        if roles == ["query"] and not touched:
            continue
        old: Any = part
        transposed, features = isinstance(part, Conv1D), after.features(roles[-1])
        weight = old.weight.T if transposed else old.weight
        bias = old._parameters.get("bias")
        new = weight.new_empty(features, weight.shape[1])
        new_bias = None if bias is None else bias.new_empty(features)
        for role in roles:
            rows = after.rows(role).to(new.device)
            if role == "query" and not touched:
                was = before.rows(role).to(new.device)
                new[rows] = weight[was]
                if new_bias is not None:
                    new_bias[rows] = bias[was]
                continue
            new[rows] = shares[role][..., : new.shape[1]].to(new.dtype)
            if new_bias is not None:
                new_bias[rows] = shares[role][..., -1].to(new.dtype)
        written.append((part, "weight", new.T.contiguous() if transposed else new))
        if new_bias is not None:
            written.append((part, "bias", new_bias))
        for name in ("out_features", "nf"):
            if name in vars(part):
                journal.set_attribute(part, name, features)
    if before.output is not None:
        output: Any = before.output
        flat = heads.output.flatten(0, 1).to(output.weight.dtype)
        written.append((output, "weight", flat if isinstance(output, Conv1D) else flat.T.contiguous()))
    for norm, heads_of in zip(before.norms() or (), (before.heads, before.shared), strict=False):
        scale: Any = norm._parameters.get("weight")
        if scale is None or scale.numel() != heads_of * before.key_size:
            continue
        by_head = scale.view(before.shared, -1, before.key_size)[order]
        if heads_of == before.shared and norm is (before.norms() or (None, None))[1]:
            new = by_head.view(after.shared, -1, before.key_size).mean(1)
            written.append((norm, "weight", new.reshape(-1, *scale.shape[1:])))
        elif moved:
            written.append((norm, "weight", by_head.reshape(scale.shape)))
    sinks = before.sinks()
    if sinks is not None and moved:
        old_sinks: Any = before.module._parameters[sinks]
        written.append((before.module, sinks, old_sinks.view(before.shared, -1)[order].flatten()))
    names = {id(module): name for name, module in before.module.named_modules(prefix=before.name)}
    for module, name, value in written:
        old_parameter: Any = module._parameters[name]
        new_parameter = nn.Parameter(value.detach().clone(), requires_grad=old_parameter.requires_grad)
        journal.set_parameter(module, name, new_parameter, keep=keep, label=f"{names[id(module)]}.{name}")


def _follow(work: Conversion, module: nn.Module, journal: Journal) -> None:
    """What this module knows of the number of heads, and its configuration."""
    inside = set(module.modules())
    for each in inside:
        if vars(each).get("config") is work.view.config:
            journal.set_attribute(each, "config", work.config)
    for each, name, value in work.attributes:
        if each in inside and vars(each).get(name) != value:
            journal.set_attribute(each, name, value)


def _fit(work: Conversion, layout: Layout) -> list[Fit]:
    """What a layer is now, to fit it to that; where texts say what it is fitted for."""
    if not work.windows or layout.output is None or "forward" in vars(layout.module):
        return []
    return [Fit(layout, twin(layout.module))]


def _parts(layouts: list[Layout], room: int) -> Iterator[list[int]]:
    """Consecutive layers whose moments fit into so many bytes, at least one. Where originals are discarded that is the
    size of a layer; where they are needed for a fit as well, it is one at a time."""
    part: list[int] = []
    held = 0
    for index, layout in enumerate(layouts):
        size = 4 * _features(layout) ** 2
        if part and held + size > room:
            yield part
            part, held = [], 0
        part.append(index)
        held += size
    if part:
        yield part


def _features(layout: Layout) -> int:
    weight: Any = layout.key._parameters["weight"]
    return int(weight.shape[0 if isinstance(layout.key, Conv1D) else 1])


@dataclass
class _Sum:
    """Of x x^T over inputs x, with a one appended for the bias."""

    total: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        x = torch.cat((x, x.new_ones(len(x), 1)), dim=-1)
        self.total.addmm_(x.T, x)
        self.count += len(x)

    def moments(self, biased: bool) -> Tensor:
        mean = (self.total if biased else self.total[:-1, :-1]).double() / self.count
        features = self.total.shape[0] - 1
        ridge = RIDGE * self.total.diagonal()[:-1].double().mean() / self.count
        mean.diagonal()[:features] += ridge
        return mean


def _moments(work: Conversion, layouts: list[Layout], rotary: list[nn.Module]) -> dict[str, _Sum]:
    """Second moments of the inputs of these layers, by their names."""
    model = work.view.model
    sums: dict[str, _Sum] = {}
    missing = {layout.name for layout in layouts}

    def watch(layout: Layout) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if layout.name not in sums:
                F = args[0].shape[-1] + 1
                sums[layout.name] = _Sum(args[0].new_zeros(F, F, dtype=torch.float32))
            sums[layout.name].add(args[0].detach())
            missing.discard(layout.name)
            if not missing and layout is layouts[-1]:
                raise Enough

        return note

    device = next(model.parameters()).device
    windows = work.windows or _random(model.get_input_embeddings().weight.shape[0])
    with ExitStack() as stack:
        stack.enter_context(undisturbed(rotary))
        stack.enter_context(evaluating(model))
        for layout in layouts:
            stack.callback(layout.key.register_forward_pre_hook(watch(layout)).remove)
        for window in windows:
            with suppress(Enough):
                model(input_ids=window.to(device), use_cache=False)
    return {name: each for name, each in sums.items() if each.total.isfinite().all()}


def _random(vocabulary: int) -> list[Tensor]:
    rows, length = RANDOM
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (1, length), generator=generator) for _ in range(rows)]
