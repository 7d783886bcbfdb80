"""Steps of a model on a CPU, noted once and run again by compiled code: what CUDA graphs are on a GPU.

A decode step of a small model is bound by Python: hundreds of operators on a few thousand numbers each. Here they are
noted, with the memory that they read and write, beside the calls of compiled kernels. A replay runs them in C, one
after another (kernels/steps.c); what that does not know runs as the operator of PyTorch that it is. What is computed in
between shares one piece of memory, small enough to stay in the cache.

What a function reads from the host is noted as it was: so it has to read what changes between its calls from tensors
that stay where they are. It is refused where it asks a tensor for numbers.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from hf_accel_patch.kernels import cpu_steps
from hf_accel_patch.kernels.noting import Call, Unnoted, noting
from hf_accel_patch.ops.operator import Operand, Operator
from hf_accel_patch.ops.operators import called, translated
from hf_accel_patch.ops.refusing import OWN, Refused, address, check, tensors_in

ALIGNED = 64  # bytes
CPU = torch.device("cpu")
READS = frozenset(  # of the host, past PyTorch's dispatcher
    {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tensor_split, torch.tensor_split}
)
MOST_KEPT, MOST_MADE = 32 << 20, 1 << 30  # bytes of what PyTorch's operators give, and of all while it is noted


@dataclass
class Plain:
    """An operator of PyTorch, and the tensors that get what it returns."""

    func: Any
    args: Any
    kwargs: Any
    outputs: list[Tensor]

    def run(self) -> None:
        found = self.func(*self.args, **self.kwargs)
        for new, old in zip(tensors_in(found), self.outputs, strict=bool(self.outputs)):
            old.copy_(new)

    def tensors(self) -> list[Tensor]:
        return [*tensors_in(self.args, self.kwargs), *self.outputs]


@dataclass
class Notes:
    """What a function did, and the memory that it made on the way, by address."""

    entries: list[Operator | Plain] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)  # kept, so that no address comes twice
    given: list[weakref.ref[Tensor]] = field(default_factory=list)  # what the function has got of it
    constants: dict[int, Tensor] = field(default_factory=dict)  # made from numbers of the host; kept for the same
    made_bytes: int = 0
    kept_bytes: int = 0  # of them, what operators of PyTorch give

    def check_nothing_kept(self, output: Tensor) -> None:
        """Raise Refused where a tensor other than the output is left: no replay would renew it."""
        for collect in (False, True):
            if collect:
                gc.collect()
            alive = [each for ref in self.given if (each := ref()) is not None and each is not output]
            left = [tuple(each.shape) for each in alive if address(each) != address(output)]
            if not left:
                return
        raise Refused(f"tensors of shapes {left} are kept outside of it")


class Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators. Raises Refused for those that give the host a number."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, notes, tags = kwargs or {}, self.notes, set(func.tags)
        check(func, args, kwargs, CPU)
        attends = "scaled_dot_product" in func.name()  # without dropout, as a model is that generates
        if torch.Tag.nondeterministic_seeded in tags and not attends:
            raise Refused(f"{func} draws random numbers")
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and address(args[0]) in notes.constants:
            raise Refused(f"{func} changes a constant")
        known = {address(each) for each in tensors_in(args, kwargs)}
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        fresh = [each for each in outputs if address(each) not in known and each.numel()]
        for each in fresh:
            notes.made[address(each)] = each.detach()
            notes.made_bytes += each.untyped_storage().nbytes()
        notes.given += [weakref.ref(each) for each in outputs if address(each) in notes.made]
        if func is torch.ops.aten.lift_fresh.default:
            notes.constants[address(outputs[0])] = outputs[0].detach()
        if torch.Tag.inplace_view in tags:
            return result  # what it says of a tensor is noted where that is used
        if not fresh and not func._schema.is_mutable:
            if func.namespace not in OWN:
                raise Refused(f"{func} does not say what it does")
            return result  # views, or nothing
        found = translated(func, args, kwargs, outputs)
        if found is None:
            mine = tree_map_only(Tensor, Tensor.detach, args), tree_map_only(Tensor, Tensor.detach, kwargs)
            notes.entries.append(Plain(func, *mine, [each.detach() for each in outputs] if fresh else []))
            notes.kept_bytes += sum(each.untyped_storage().nbytes() for each in fresh)
        else:
            notes.entries += found
        if notes.kept_bytes > MOST_KEPT or notes.made_bytes > MOST_MADE:
            raise Refused(f"it would keep more than {MOST_KEPT >> 20} MiB of what it computes in between")
        return result


class NoReading(TorchFunctionMode):
    """Raises Refused where Python reads numbers from a tensor past the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise Refused(f"{func.__name__} waits for numbers")
        return func(*args, **(kwargs or {}))


class TapeRecorder:
    """Notes what functions do on the CPU. Its tapes are run by one thread at a time."""

    passes = 12  # to come, for a recording to pay
    most_bytes: int | None = 256 << 20  # of a cache that is moved for it

    def __init__(self, kernels: ctypes.CDLL, device: torch.device = CPU) -> None:
        self.device, self.kernels = device, kernels

    def __call__(self, function: Callable[[], Tensor]) -> Tape:
        notes = Notes()

        def tell(call: Call) -> None:
            with _disable_current_modes():
                notes.entries.append(called(call))

        try:
            # outside of inference mode, inside of which operators are not taken apart, and some wait for numbers
            with torch.inference_mode(False), torch.no_grad(), NoReading(), Noting(notes), noting(tell):
                output = function()
        except Unnoted as error:
            raise Refused(str(error)) from error
        notes.check_nothing_kept(output)
        return Tape(self.kernels, notes, output)


class Tape:
    """Pieces to run: of compiled code, or an operator of PyTorch."""

    fused = 0  # each operator is run for itself

    def __init__(self, kernels: ctypes.CDLL, notes: Notes, output: Tensor) -> None:
        self.kernels, self.output, self.lock = kernels, output.detach(), threading.Lock()
        places, self.arena = _arranged(notes, output)
        self.held: dict[int, Tensor] = {}  # what is read and written elsewhere
        self.arguments: list[Any] = []
        self.pieces: list[tuple[Any, int] | Plain] = []
        some: list[bytes] = []

        def pointer(operand: Operand) -> int:
            at = address(operand.tensor)
            inside = places.get(at)
            if inside is None:
                self.held[at] = operand.tensor.detach()
                return int(operand.tensor.data_ptr()) + operand.skip
            return inside + int(operand.tensor.data_ptr()) - at + operand.skip

        for entry in notes.entries:
            if isinstance(entry, Operator):
                some.append(entry.packed(pointer))
                self.arguments.append(entry.argument)
                self.held |= {address(each): each for each in entry.fixed}
                continue
            self._close(some)
            self.pieces.append(entry)
        self._close(some)

    def replay(self) -> Tensor:
        """Run it again. Returns a copy of what it computed."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            for piece in self.pieces:
                if isinstance(piece, Plain):
                    piece.run()
                else:
                    cpu_steps.run(self.kernels, *piece)
            return self.output.clone()

    def _close(self, some: list[bytes]) -> None:
        if some:
            joined = b"".join(some)
            self.pieces.append((ctypes.create_string_buffer(joined, len(joined)), len(some)))
            some.clear()


def _arranged(notes: Notes, output: Tensor) -> tuple[dict[int, int], Tensor]:
    """Where in one piece of memory each storage lies that only compiled code touches, by its address, and that memory:
    storages that are not needed at the same time share it."""
    first, last, apart = dict[int, int](), dict[int, int](), {address(output)}
    unwritten = {address(each) for entry in notes.entries if isinstance(entry, Operator) for each in entry.unwritten}
    for index, entry in enumerate(notes.entries):
        movable = [each.tensor for each in entry.operands] if isinstance(entry, Operator) else []
        fixed: Iterable[Tensor] = entry.fixed if isinstance(entry, Operator) else entry.tensors()
        apart |= {address(each) for each in fixed}
        for tensor in (*movable, *fixed):
            first.setdefault(address(tensor), index)
            last[address(tensor)] = index
    if unwritten & last.keys():
        raise Refused("it reads what is not computed: the mean or the deviation of a layer norm")
    places, taken, size = dict[int, int](), list[tuple[int, int, int]](), 0  # start, stop, last
    for at in sorted((each for each in first if each in notes.made and each not in apart), key=first.__getitem__):
        bytes_ = -(-notes.made[at].untyped_storage().nbytes() // ALIGNED) * ALIGNED
        taken = sorted(each for each in taken if each[2] >= first[at])
        start = 0
        for begin, stop, _ in taken:
            if begin - start >= bytes_:
                break
            start = max(start, stop)
        taken.append((start, start + bytes_, last[at]))
        places[at], size = start, max(size, start + bytes_)
    with torch.inference_mode(False):
        arena = torch.empty(size + ALIGNED, dtype=torch.uint8, device="cpu")
    base = -(-arena.data_ptr() // ALIGNED) * ALIGNED
    return {at: base + start for at, start in places.items()}, arena
