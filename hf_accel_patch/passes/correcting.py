"""The output projection of a converted layer, fitted to what the layer gave before.

Merged heads lose a part of every query head's output that is correlated with what is left of the others, so the output
projection can make up for some of it: by least squares against the original layer's output on the same inputs. Each
layer is fitted to itself, on the inputs that the layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_accel_patch.families.heads import Layout
from hf_accel_patch.passes.calibrate import Enough

RIDGE = 1e-2  # of the mean of the inputs' second moments, toward the projection as it was merged


def twin(module: nn.Module) -> nn.Module:
    """A module of its own on the same parameters, without hooks: it goes on as it was when these are replaced."""
    kind: Any = type(module)
    made: nn.Module = kind.__new__(kind)
    vars(made).update(vars(module))
    for store in ("_parameters", "_buffers"):
        vars(made)[store] = dict(vars(module)[store])
    for name, value in vars(nn.Module()).items():
        if "hooks" in name:
            vars(made)[name] = value
    vars(made)["_modules"] = {name: None if part is None else twin(part) for name, part in module._modules.items()}
    return made


class Fit:
    """One converted layer beside what it was: moments of the inputs of its output projection, with what this gave."""

    def __init__(self, layout: Layout, before: nn.Module) -> None:
        assert layout.output is not None
        self.layout, self.before = layout, before
        self.given: Tensor | None = None
        self.wanted: Tensor | None = None
        self.inputs: Tensor | None = None
        self.answers: Tensor | None = None

    def install(self, stack: ExitStack, last: bool) -> None:
        """Hooks that sum while the model reads; the layer hands on what it gave before."""
        output: Any = self.layout.output
        name = next(key for key, part in self.layout.module._modules.items() if part is output)
        stack.callback(output.register_forward_pre_hook(self._take("given")).remove)
        stack.callback(self.before.get_submodule(name).register_forward_hook(self._want).remove)
        hook = self.layout.module.register_forward_hook(self._compare(last), with_kwargs=True)
        stack.callback(hook.remove)

    def _take(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            setattr(self, name, args[0].detach())

        return note

    def _want(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.wanted = output.detach()

    def _compare(self, last: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = self.before(*args, **kwargs)
            assert self.given is not None and self.wanted is not None
            x, y = (each.reshape(-1, each.shape[-1]).float() for each in (self.given, self.wanted))
            bias = getattr(self.layout.output, "bias", None)
            y = y if bias is None else y - bias.detach().float()
            if self.inputs is None or self.answers is None:
                self.inputs, self.answers = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])
            self.inputs.addmm_(x.T, x)
            self.answers.addmm_(x.T, y)
            if last:
                raise Enough
            return before

        return hook

    def finish(self) -> None:
        """Put the fitted projection into the parameter that the conversion has made."""
        if self.inputs is None or self.answers is None:
            return
        weight: Any = self.layout.output._parameters["weight"]  # type: ignore[union-attr]
        transposed = isinstance(self.layout.output, Conv1D)
        merged = (weight if transposed else weight.T).detach().double()
        inputs, answers = self.inputs.double(), self.answers.double()
        ridge = RIDGE * inputs.diagonal().mean() * torch.eye(len(inputs)).to(inputs)
        fitted = torch.linalg.solve(inputs + ridge, answers + ridge @ merged)
        if fitted.isfinite().all():
            weight.data.copy_(fitted if transposed else fitted.T)


def correct(model: Any, fits: list[Fit], windows: list[Tensor]) -> None:
    """Let the model read, and fit these layers."""
    with ExitStack() as stack:
        for fit in fits:
            fit.install(stack, fit is fits[-1])
        device = next(model.parameters()).device
        for window in windows:
            with suppress(Enough):
                model(input_ids=window.to(device), use_cache=False)
    for fit in fits:
        fit.finish()
