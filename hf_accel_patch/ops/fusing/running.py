"""Plans carried out, on memory of their own, with the kernels of kernels/triton_fused.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hf_accel_patch.ops.agreeing import agree
from hf_accel_patch.ops.fusing.planning import Plan, planned
from hf_accel_patch.ops.fusing.tracing import Node, Unfusable, traced
from hf_accel_patch.ops.fusing.writing import Launch
from hf_accel_patch.ops.refusing import address, tensors_in


def runner(function: Callable[[], Tensor], device: torch.device) -> Runner:
    """What does the same in fewer kernels, for a function that gives logits and may run twice. They have run once, so
    that they are compiled, with the same result: what nobody was seen to write would show in it. Raises Refused for a
    function that would wait for the device, and Unfusable, or what Triton raises, where kernels cannot do it."""
    trace = traced(function, device)
    assert trace.output is not None
    expected = trace.output.clone()
    made = Runner(planned(trace, device))
    if not agree(made(), expected, expected.dtype):
        raise Unfusable("it computes something else")
    return made


class Runner:
    """Carries out a plan. What it makes in between is freed as soon as nobody needs it any more."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.made = plan, plan.trace.made
        assert plan.trace.output is not None
        self.output = plan.trace.output
        last = dict[int, int]()
        for i, step in enumerate(plan.steps):
            last |= {address(each): i for each in _touched(step)}
        self.over: dict[int, list[int]] = defaultdict(list)
        for at, i in last.items():
            if at in self.made and at != address(self.output):
                self.over[i].append(at)

    def __call__(self) -> Tensor:
        """The result, in new memory. Raises Unfusable where an operator gives another layout than in the trace, before
        anybody reads it."""
        from hf_accel_patch.kernels import triton_fused

        now: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for i, step in enumerate(self.plan.steps):
                if isinstance(step, Launch):
                    for each in step.stored:
                        at = address(each)
                        if at in self.made and at not in now:
                            now[at] = torch.empty_strided(
                                each.shape, each.stride(), dtype=each.dtype, device=each.device
                            )
                    tensors = [self._present(each, now) for each in step.tensors]
                    triton_fused.launch(step.source, tensors, step.strides, step.sizes, step.programs, step.warps)
                else:
                    self._call(step, now)
                for at in self.over[i]:
                    now.pop(at, None)
            return self._present(self.output, now)

    def _call(self, node: Node, now: dict[int, Tensor]) -> None:
        def present(tensor: Tensor) -> Tensor:
            return self._present(tensor, now)

        args, kwargs = tree_map_only(Tensor, present, (list(node.args), node.kwargs))
        found = tensors_in(node.func(*args, **kwargs))
        mine = {id(each) for each in node.made}
        for old, new in zip(node.outputs, found, strict=True):
            if id(old) in mine:
                if old.stride() != new.stride() or old.storage_offset() != new.storage_offset():
                    raise Unfusable(f"{node.func} gives another layout than before")
                now.setdefault(address(old), new)

    def _present(self, tensor: Tensor, now: dict[int, Tensor]) -> Tensor:
        """A tensor of the trace, as it is now."""
        at = address(tensor)
        if at not in self.made:
            return tensor
        base = now.get(at)
        if base is None:
            raise Unfusable(f"a tensor of shape {tuple(tensor.shape)} is read before it is computed")
        if base.dtype != tensor.dtype:
            base = base.view(tensor.dtype)
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _touched(step: Any) -> list[Tensor]:
    if isinstance(step, Launch):
        return [*step.tensors, *step.stored]
    return [*step.given, *step.made]
