"""Which operators of a trace become one kernel, and when it is launched.

An operator that a kernel can compute is put off until somebody needs what it computes in memory: an operator of
PyTorch's, a kernel that goes past its dispatcher, or whoever called the function. Then all that was put off is launched
as one kernel, and what nobody needs in memory never gets there. So a residual and the norm behind it, or the rotation
of queries and keys and their way into a cache, are a kernel each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_accel_patch.logs import get_logger
from hf_accel_patch.ops.fusing.joining import joined
from hf_accel_patch.ops.fusing.operands import Elsewhere
from hf_accel_patch.ops.fusing.operators import value_in_place, value_of
from hf_accel_patch.ops.fusing.stores import Store, store_of
from hf_accel_patch.ops.fusing.sums import norm
from hf_accel_patch.ops.fusing.tracing import Node, Trace, Unfusable
from hf_accel_patch.ops.fusing.values import Memory, Misplaced, Pending, Value, View
from hf_accel_patch.ops.fusing.writing import Launch, Refusal, launches
from hf_accel_patch.ops.refusing import address

logger = get_logger(__name__)
aten = torch.ops.aten
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
NORMS = {aten.native_layer_norm.default, aten._fused_rms_norm.default}
END = 1 << 60  # the place of what reads the result


@dataclass
class Plan:
    """Launches and calls, in order, which do what the trace did."""

    trace: Trace
    steps: list[Launch | Node] = field(default_factory=list)

    @property
    def fused(self) -> int:
        """Operators that no call is left of."""
        return len(self.trace.nodes) - sum(isinstance(each, Node) for each in self.steps)


def planned(trace: Trace, device: torch.device) -> Plan:
    """For kernels on this device. Raises Unfusable for a trace that reads what nothing has written."""
    _check_memory(trace, device)
    return _Planner(trace, device).plan()


def _check_memory(trace: Trace, device: torch.device) -> None:
    """Raise Unfusable where memory has two names, by which nobody sees that they are the same."""
    tensors = [each for node in trace.nodes for each in (*node.given, *node.outputs)]
    sizes = {address(each): each.untyped_storage().nbytes() for each in tensors if each.device == device}
    end = 0
    for start in sorted(sizes):
        if start < end:
            raise Unfusable("tensors share memory without being views of one another")
        end = start + sizes[start]


class _Planner:
    """Goes through a trace, node by node; it is the `Read` of the operators."""

    def __init__(self, trace: Trace, device: torch.device) -> None:
        self.trace, self.device, self.steps = trace, device, list[Launch | Node]()
        self.pending: dict[int, Pending] = {}  # by address
        self.stores: list[Store] = []
        self.put_off: list[Node] = []
        self.reads: set[int] = set()  # memory that what is put off will read
        self.used: dict[int, list[int]] = defaultdict(list)  # where each piece of memory is read or written, in order
        for i, node in enumerate(trace.nodes):
            for each in node.given:
                self.used[address(each)].append(i)
        if trace.output is not None:
            self.used[address(trace.output)].append(END)

    def plan(self) -> Plan:
        unwritten = set[int]()
        for i, node in enumerate(self.trace.nodes):
            written = {address(each) for each in node.written}
            if any(address(each) in unwritten - written for each in node.given):
                raise Unfusable("it reads memory that nothing it does is seen to write")
            unwritten -= written
            if getattr(node.func, "overloadpacket", None) in EMPTY:
                unwritten |= {address(each) for each in node.made}
            self._take(i, node)
        self._flush(END)
        return Plan(self.trace, joined(self.steps))

    def __call__(self, tensor: Tensor) -> Value:
        if tensor.device != self.device:
            raise Elsewhere
        found = self.pending.get(address(tensor))
        if found is None:
            return Memory.of(tensor)
        whole = found.tensor
        same = whole.shape == tensor.shape and whole.stride() == tensor.stride()
        if same and tensor.storage_offset() == 0 and tensor.dtype == whole.dtype:
            return found
        return View(tuple(tensor.shape), tensor.dtype, tensor, found)

    def in_memory(self, tensor: Tensor) -> bool:
        return address(tensor) not in self.pending

    def _take(self, i: int, node: Node) -> None:
        if any(each.dtype != self.pending[address(each)].dtype for each in node.given if not self.in_memory(each)):
            self._flush(i)  # bits of another dtype
        value = self._changed(node)
        if value is None:
            written = {address(each) for each in node.written}
            if written & self.pending.keys() or written & self.reads or self._stored() & self._memory(node):
                self._flush(i)
            value = self._value(i, node)
        if value is not None:
            self._put_off(node)
            output = node.outputs[0].detach()
            self.pending[address(output)] = Pending(tuple(output.shape), output.dtype, output, value)
            return
        here = len(node.written) == 1 and node.written[0].device == self.device
        store = store_of(node, self) if here else None
        if store is not None and address(store.target) not in self._memory(node, but=store.target):
            self._put_off(node, store.target)
            self.stores.append(store)
            return
        if any(not self.in_memory(each) for each in node.given):
            self._flush(i)
        self.steps.append(node)

    def _put_off(self, node: Node, target: Tensor | None = None) -> None:
        self.put_off.append(node)
        self.reads |= self._memory(node, but=target)

    def _changed(self, node: Node) -> Value | None:
        """What a tensor that was put off as a whole becomes in place."""
        if len(node.written) != 1 or self.in_memory(node.written[0]):
            return None
        target = node.written[0]
        if not isinstance(self(target), Pending) or self._stored() & self._memory(node):
            return None
        value = value_in_place(node, self)
        if value is not None:
            self.pending[address(target)].replaced = True
        return value

    def _value(self, i: int, node: Node) -> Value | None:
        if any(each.device != self.device for each in node.made):
            return None
        if node.func in NORMS:
            alone = not any(self._reads_after(i, each) for each in node.outputs[1:])
            return norm(node, self) if alone else None
        return value_of(node, self)

    def _reads_after(self, i: int, tensor: Tensor) -> bool:
        return any(each > i for each in self.used[address(tensor)])

    def _memory(self, node: Node, but: Tensor | None = None) -> set[int]:
        """What a node reads that lies in memory."""
        return {address(each) for each in node.given if each is not but and self.in_memory(each)}

    def _stored(self) -> set[int]:
        """What stores that were put off will write."""
        return {address(store.target) for store in self.stores}

    def _flush(self, i: int) -> None:
        """Launch what was put off before node i; what is not read from there on never gets into memory."""
        needed = [each for at, each in self.pending.items() if any(use >= i for use in self.used[at])]
        stores = [*(Store(each.tensor, each) for each in needed), *self.stores]
        try:
            self.steps += launches(stores)
        except (Refusal, Misplaced, RecursionError) as error:
            logger.debug(f"operators stay as they are: {type(error).__name__}: {error}")
            self.steps += self.put_off
        self.pending, self.stores, self.put_off, self.reads = {}, [], [], set()
