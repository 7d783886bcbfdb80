"""Calibration: the inputs that layers see while a model reads texts, for rounding their weights by GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.logs import get_logger
from hf_accel_patch.ops.gptq import quantize_gptq
from hf_accel_patch.ops.packing import block_on, lay_out
from hf_accel_patch.passes.calibrate_experts import Routed, rounded_experts
from hf_accel_patch.passes.targets import Target

WINDOW = 2048  # tokens read at a time, or what the model was trained on if that is less
MOMENTS_BYTES = 1 << 30  # held at a time; the texts are read once for each such part of the model


logger = get_logger(__name__)


class Enough(Exception):
    """Raised inside the model when the last layer of interest has its input."""


@dataclass
class Group:
    """Layers that multiply the same input, and its second moments [K, K]; or experts, and their inputs."""

    targets: list[Target] = field(default_factory=list)
    moments: Tensor | None = None
    routed: Routed | None = None

    @property
    def features(self) -> int:
        return self.targets[0].weights[0].shape[1]

    @property
    def of_experts(self) -> bool:
        return self.targets[0].role == "experts"

    def bytes(self, tokens: int) -> int:
        """What is kept while so many tokens are read, at most."""
        return 2 * tokens * self.features if self.of_experts else 4 * self.features**2

    def note(self, args: tuple[Any, ...]) -> None:
        """Take in what a layer is given."""
        if self.of_experts:
            self.routed = self.routed or Routed(MOMENTS_BYTES)
            self.routed.add(args[0], args[1])
            return
        x = args[0].detach().reshape(-1, self.features).float()
        if self.moments is None:
            self.moments = x.new_zeros(self.features, self.features)
        self.moments.addmm_(x.T, x)

    def rounded(self) -> Iterator[tuple[Target, list[tuple[Tensor, Tensor]]]]:
        """Its targets with codes and scales. What it has noted is let go."""
        moments, routed = self.moments, self.routed
        self.moments = self.routed = None
        for target in self.targets:
            if routed is not None and routed.tokens:
                yield target, rounded_experts(target, routed)
            elif moments is not None:
                yield target, [_rounded(target, moments)]


def token_ids(texts: Sequence[Any], model: PreTrainedModel, tokenizer: Any) -> list[Tensor]:
    """Token ids [1, T] of texts, cut into windows."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or WINDOW
    ids = tokenized(texts, model, tokenizer, "calibrate", "give tokenizer= beside calibrate=")
    size = min(limit, WINDOW)
    windows = [torch.tensor([row[i : i + size]]) for row in ids for i in range(0, len(row), size)]
    if not windows:
        raise ValueError("calibrate= holds no text")
    return windows


def tokenized(texts: Sequence[Any], model: PreTrainedModel, tokenizer: Any, keyword: str, hint: str) -> list[list[int]]:
    """Token ids of texts: strings, tensors [T] or [B, T], or lists of ids. `keyword` and `hint` are for the errors."""
    if any(isinstance(text, str) for text in texts):
        source = tokenizer or model.name_or_path
        if not source:
            raise HfAccelError("the model does not know its tokenizer", hint)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source) if isinstance(source, str) else source
        except (OSError, ValueError) as error:
            raise HfAccelError(f"there is no tokenizer at {source}: {error}", hint) from error
    rows: list[list[int]] = []
    for text in texts:
        if isinstance(text, Tensor):
            rows += text.reshape(-1, text.shape[-1]).tolist()
        else:
            rows.append(list(tokenizer(text, verbose=False)["input_ids"] if isinstance(text, str) else text))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if any(not 0 <= token < vocabulary for row in rows for token in row):
        raise ValueError(f"{keyword}= holds token ids that are not in 0..{vocabulary - 1}")
    return rows


def calibrated(
    model: PreTrainedModel, targets: list[Target], windows: list[Tensor], plain: Callable[[Target], Any]
) -> Iterator[tuple[Target, list[tuple[Tensor, Tensor]]]]:
    """Targets with their codes and scales, in the order in which the model uses them. Each is to be installed before
    the next is asked for. Layers that the texts do not reach are packed by `plain`, last."""
    device = model.get_input_embeddings().weight.device
    windows = [window.to(device) for window in windows]
    groups = _in_order(model, targets, windows)
    done: set[int] = set()
    for part in _parts(groups, sum(window.numel() for window in windows)):
        _observe(model, part, windows)
        for group in part:
            for target, packed in group.rounded():
                done.add(id(target))
                yield target, packed
    missed = [target.modules[0][0] for target in targets if id(target) not in done]
    if missed:
        logger.warning(
            f"the texts reach {len(missed)} layers not once ({missed[0]}, ...): these are rounded without them"
        )
    for target in targets:
        if id(target) not in done:
            yield target, plain(target)


@torch.no_grad()
def _rounded(target: Target, moments: Tensor) -> tuple[Tensor, Tensor]:
    """A table that is tied to the head is rounded for the head's inputs: what lookups lose by that is less than what
    the logits gain."""
    parameter, weight = target.parameters()[0].detach(), target.weights[0]
    dense = parameter.T if weight.transposed else parameter
    return lay_out(*quantize_gptq(dense, moments, target.group_size), block_on(dense.device))


def _multiplier(target: Target) -> nn.Module:
    """The module that multiplies; a table that is tied to it only looks up."""
    return next(module for _, module in target.modules if not isinstance(module, nn.Embedding))


def _in_order(model: PreTrainedModel, targets: list[Target], windows: list[Tensor]) -> list[Group]:
    """Targets by the tensor that they multiply, in the order of use. Texts are read until all have been used."""
    groups: list[Group] = []
    last: list[Any] = [None]
    seen: set[int] = set()

    def watch(target: Target) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if id(target) in seen:
                return
            seen.add(id(target))
            if args[0] is not last[0] or groups[-1].of_experts or target.role == "experts":
                groups.append(Group())
            last[0] = args[0]
            groups[-1].targets.append(target)

        return note

    _run(model, {_multiplier(target): watch(target) for target in targets}, windows, lambda: len(seen) == len(targets))
    return groups


def _parts(groups: list[Group], tokens: int) -> Iterator[list[Group]]:
    """Consecutive groups whose moments and inputs fit. Layers of a later part see what the quantized ones before it
    give."""
    part: list[Group] = []
    for group in groups:
        if part and sum(each.bytes(tokens) for each in (*part, group)) > MOMENTS_BYTES:
            yield part
            part = []
        part.append(group)
    if part:
        yield part


def _observe(model: PreTrainedModel, groups: list[Group], windows: list[Tensor]) -> None:
    """Let each group note its inputs."""

    def watch(group: Group, stop: bool) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            group.note(args)
            if stop:
                raise Enough

        return note

    hooks = {_multiplier(group.targets[0]): watch(group, group is groups[-1]) for group in groups}
    _run(model, hooks, windows)


@torch.no_grad()
def _run(
    model: PreTrainedModel,
    hooks: dict[nn.Module, Callable[..., None]],
    windows: list[Tensor],
    enough: Callable[[], bool] = lambda: False,
) -> None:
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for module, hook in hooks.items():
            stack.callback(module.register_forward_pre_hook(hook).remove)
        for window in logging.tqdm(windows, desc="calibrate", leave=False):
            with suppress(Enough):
                model(input_ids=window, use_cache=False)
            if enough():
                break


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout. Every module is in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
