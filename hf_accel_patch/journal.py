"""The only writer to a model. Every write notes what the instance had before, so undo is written once, here.

What is restored is the entry of the instance, never the value that an inherited name resolved to: written back, an
inherited value would shadow its class for ever. A journal lives on the model that it changed and holds nothing but
references to parts of that model, so a deep copy of the model carries a journal of its own.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["attribute", "items", "class", "hook"]
FORWARDS = ("forward", "_old_forward")  # what accelerate's hooks set on a module


class _Absent:
    """Marks an attribute that the instance did not have. A deep copy is the same marker, and so is a pickle."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Absent:
        return self

    def __reduce__(self) -> str:
        return "ABSENT"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


@dataclass(frozen=True)
class Write:
    """One change: what kind, to which object, under which name, and what was there."""

    kind: Kind
    target: Any
    name: str
    before: Any

    def __getstate__(self) -> dict[str, Any]:
        """A class that was made at run time is made again where a pickle is read."""
        recipe = getattr(self.before, "recipe", None) if self.kind == "class" else None
        return vars(self) if recipe is None else vars(self) | {"before": recipe()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        made, before = self.__dict__, state["before"]
        made.update(state)
        if state["kind"] == "class" and isinstance(before, tuple):
            made["before"] = before[0](*before[1])


@dataclass(frozen=True)
class Gone:
    """A parameter that was freed: its name in the model, and where it was."""

    label: str
    module: nn.Module
    name: str
    trained: bool  # whether it was to be trained
    shape: tuple[int, ...] = ()


class Bound:
    """A function bound to an instance. Unlike a method's, its pickle finds the function again; a deep copy is bound to
    the copy of the instance."""

    def __init__(self, function: Callable[..., Any], target: object) -> None:
        self.__func__, self.__self__ = function, target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(self.__func__)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        return Bound(self.__func__, copy.deepcopy(self.__self__, memo))


class Journal:
    """An undo stack over the objects of one model."""

    def __init__(self) -> None:
        self._writes: list[Write] = []
        self.gone: list[Gone] = []  # weights that undo cannot bring back
        self.put_backs = 0  # modules that were given other weights back

    @property
    def discarded(self) -> list[str]:
        """Names of the weights that undo cannot bring back."""
        return [each.label for each in self.gone]

    def __len__(self) -> int:
        return len(self._writes)

    def set_attribute(self, target: object, name: str, value: object) -> None:
        """`target.name = value` in the instance's own dictionary, past any `__setattr__`."""
        self._note("attribute", target, name, vars(target).get(name, ABSENT))
        vars(target)[name] = value

    def delete_attribute(self, target: object, name: str) -> None:
        """Remove the instance's own entry `name`, if it has one."""
        if name in vars(target):
            self._note("attribute", target, name, vars(target)[name])
            del vars(target)[name]

    def bind_method(self, target: object, name: str, function: Callable[..., Any]) -> None:
        """Give the instance a method. A deep copy's is bound to the copy; a closure would go on calling the old
        model."""
        self.set_attribute(target, name, Bound(function, target))

    def change_class(self, target: object, new: Any) -> None:
        """`target.__class__ = new`. accelerate's hook on a module calls the forward that it found there, and puts it
        back into the instance when it goes, so that is changed too."""
        old = type(target)
        self._note("class", target, "__class__", old)
        target.__class__ = new
        for name in _forwards_of(target, old):
            self.set_attribute(target, name, types.MethodType(new.forward, target))

    def add_forward_pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """`hook(module, args, kwargs)` before each forward. Hooks that others add later stay when this one goes."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._note("hook", module, str(handle.id), None)

    def swap_module(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        """Put another module in the place of a child."""
        self._replace(parent, "_modules", parent._modules | {name: new})

    def set_parameter(
        self, module: nn.Module, name: str, value: nn.Parameter, *, keep: bool = True, label: str = ""
    ) -> None:
        """Replace a parameter that the module has. Without `keep` the old one is freed, and undo is refused from here
        on, naming `label`."""
        if keep:
            self._replace(module, "_parameters", module._parameters | {name: value})
        else:
            self._discard(module, name, label)
            module._parameters[name] = value

    def set_buffer(self, module: nn.Module, name: str, value: Any, *, persistent: bool = True) -> None:
        """Replace or add a buffer. A new one goes last; one that exists stays as persistent as it was."""
        if name not in module._buffers and not persistent:
            names = module._non_persistent_buffers_set
            self._note("attribute", module, "_non_persistent_buffers_set", names)
            vars(module)["_non_persistent_buffers_set"] = names | {name}
        self._replace(module, "_buffers", module._buffers | {name: value})

    def remove_parameter(self, module: nn.Module, name: str, *, keep: bool, label: str = "") -> None:
        """Take a parameter out. Without `keep` it is freed, and undo is refused from here on, naming `label`."""
        if keep:
            self._replace(module, "_parameters", {k: v for k, v in module._parameters.items() if k != name})
        else:
            self._discard(module, name, label)
            del module._parameters[name]

    def put_back(
        self, module: nn.Module, kind: Any, parameters: dict[str, nn.Parameter], buffers: list[str], names: list[str]
    ) -> None:
        """Give a module that was changed its class and its parameters back, with other values, and take `buffers` and
        the attributes `names` off. Undo, of what was written before, passes over that: it finds what it would remove
        gone already, and brings back originals where they were kept."""
        for name in buffers:
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        for name in names:
            vars(module).pop(name, None)
        left, module.__class__ = type(module), kind
        others = {name: value for name, value in module._parameters.items() if name not in parameters}
        module._parameters.clear()
        module._parameters.update(parameters | others)
        for name in _forwards_of(module, left):
            vars(module)[name] = types.MethodType(kind.forward, module)
        self.put_backs += 1

    def shared(self) -> Iterator[Any]:
        """What a copy of the model that is made to be taken back can share with it: the tensors that were replaced, and
        the values that undo throws away."""
        written_to = {id(write.target) for write in self._writes}
        for write in self._writes:
            if write.kind == "items":
                yield from (each for each in write.before.values() if isinstance(each, Tensor))
            elif write.kind == "attribute":
                now = vars(write.target).get(write.name)
                if isinstance(write.before, Tensor):
                    yield write.before
                if now is not None and id(now) not in written_to:
                    yield now

    def undo(self) -> None:
        """Take everything back, last write first. A second call does nothing."""
        while self._writes:
            write = self._writes.pop()
            if write.kind == "class":
                left, write.target.__class__ = type(write.target), write.before
                for name in _forwards_of(write.target, left):  # of hooks that came after the patch
                    vars(write.target)[name] = types.MethodType(write.before.forward, write.target)
            elif write.kind == "hook":
                for store in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
                    vars(write.target)[store].pop(int(write.name), None)
            elif write.kind == "items":
                mapping = vars(write.target)[write.name]
                mapping.clear()
                mapping.update(write.before)
            elif write.before is ABSENT:
                vars(write.target).pop(write.name, None)
            elif write.name in FORWARDS and write.name not in vars(write.target):
                pass  # the hook that it belonged to has gone
            else:
                vars(write.target)[write.name] = write.before

    def _replace(self, module: nn.Module, store: str, items: dict[str, Any]) -> None:
        """Change the content of a module's `_parameters`, `_buffers` or `_modules`. The whole mapping is noted, because
        the order of its entries is part of what a state dict and an optimizer see."""
        mapping = vars(module)[store]
        self._note("items", module, store, dict(mapping))
        mapping.clear()
        mapping.update(items)

    def _discard(self, module: nn.Module, name: str, label: str) -> None:
        old = module._parameters[name]
        self.gone.append(Gone(label or name, module, name, old is None or old.requires_grad, _shape(old)))

    def _note(self, kind: Kind, target: object, name: str, before: object) -> None:
        self._writes.append(Write(kind, target, name, before))


def _forwards_of(target: object, kind: Any) -> list[str]:
    """The instance's own entries that are the forward of this class, as accelerate leaves them."""
    found = {name: vars(target).get(name) for name in FORWARDS}
    return [name for name, each in found.items() if getattr(each, "__func__", ABSENT) is getattr(kind, "forward", None)]


def _shape(tensor: Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else tuple(tensor.shape)
