"""The layers of a quantized cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel_patch.compat import to_remove
from hf_accel_patch.ops.constant import Constant, Rotate, constant_of
from hf_accel_patch.ops.decode import pack_blocks
from hf_accel_patch.ops.growing import Growing
from hf_accel_patch.ops.kv import BLOCK, Bits, Packed
from hf_accel_patch.ops.stored import Content, Stored
from hf_accel_patch.passes.layers import Windowed, all_stay

PACK_BLOCKS = 16  # packed at a time: more would hold more of a prompt in float32
SLACK = 1 / 64  # of the packed blocks: what is empty counts, and a block is copied 64 times for 64 tokens


class QuantizedLayer(DynamicLayer):
    """Tokens in blocks of 8 or 4 bits, the latest of them in full precision.

    `recent` tokens stay as they are; when a whole block beyond them is there, the oldest block is packed, before the
    next tokens come. A prompt attends to itself in full precision. After that `update` returns `Stored` tensors, which
    attention reads block by block. `keys` and `values` unpack everything.
    """

    restores = True  # whether `state` is all that it holds
    bits: Bits = 8
    recent = 0
    _packed: list[Growing] | None = None  # as in `Packed`
    _latest: tuple[Growing, Growing] | None = None  # keys and values
    _first = 0  # the place of the first token held
    rotate: Rotate | None = None  # how a key moves, where its constant part is to be held apart
    _constant: Constant | None = None
    _views: tuple[Tensor, tuple[int, ...], Packed] | None = None  # of `_packed`, as they were seen last

    @property
    def keys(self) -> Tensor | None:
        return None if self._latest is None else self._content(self._held()).dense(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._clear(value)

    @property
    def values(self) -> Tensor | None:
        return None if self._latest is None else self._content(self._held()).dense(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._clear(value)

    def tell(self, options: Any, rotate: Rotate | None) -> None:
        """The options of the pass."""
        self.bits, self.recent, self.rotate = options.bits, options.latest, rotate

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Start with what another layer has held."""
        self._start(keys.detach(), values.detach())

    def state(self) -> dict[str, Tensor]:
        """All that it holds, as tensors of their own."""
        assert self._latest is not None
        held = [*self._latest, *(self._packed or ())]
        names = ("keys", "values", *Packed._fields)[: len(held)]
        state = {name: each.view().contiguous().clone() for name, each in zip(names, held, strict=True)}
        constant = {} if self._constant is None else {"constant": self._constant.base}
        return state | constant | {"first": torch.tensor(self._first)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Hold what `state` said. Its tensors are read, and never written."""
        self.lazy_initialization(state["keys"], state["values"])
        self._latest = (self._room(state["keys"]), self._room(state["values"]))
        packed = [self._placed(state[name]) for name in Packed._fields if name in state]
        self._packed = [Growing(each, SLACK, 1) for each in packed] or None
        self._first, base = int(state["first"]), state.get("constant")
        self._constant = Constant(base, self.rotate) if base is not None and self.rotate is not None else None

    def whole(self) -> bool:
        """Whether it holds all tokens that it has seen."""
        return True

    def get_seq_length(self) -> int:
        return self._held()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states.detach(), value_states.detach())
        if self._latest is None:
            self._start(*new)
            return key_states, value_states
        self._pack_oldest()
        for latest, each in zip(self._latest, new, strict=True):
            latest.append(each)
        content = self._content(self._visible(key_states.shape[2]))
        return Stored(content, 0), Stored(content, 1)

    def crop(self, tokens_to_remove: int) -> None:
        count = to_remove(tokens_to_remove, self.get_seq_length())
        if self._latest is not None:
            self._drop_last(count)

    def reset(self) -> None:
        self._clear(None)
        self.is_initialized = False
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._latest is not None and not all_stay(beam_idx, self._latest[0].buffer.shape[0]):
            self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def __copy__(self) -> QuantizedLayer:
        other: Any = object.__new__(type(self))
        packed, latest = ([copy.copy(each) for each in held or ()] for held in (self._packed, self._latest))
        vars(other).update(vars(self), _packed=packed or None, _latest=tuple(latest) or None, _views=None)
        return other

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices.to(tensor.device), ...])

    def offload(self) -> None:
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._each(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _visible(self, new: int) -> int:
        """How many of the tokens held, the `new` ones included, are seen by the new ones."""
        return self._held()

    def _held(self) -> int:
        return 0 if self._latest is None else self._blocks() * BLOCK + len(self._latest[0])

    def _blocks(self) -> int:
        return 0 if self._packed is None else len(self._packed[0])

    def _start(self, keys: Tensor, values: Tensor) -> None:
        """Take the first tokens: whole blocks are packed, but for the latest `recent` tokens."""
        blocks = max(0, keys.shape[2] - self.recent) // BLOCK
        self._pack(keys[:, :, : blocks * BLOCK], values[:, :, : blocks * BLOCK])
        self._latest = (self._room(keys[:, :, blocks * BLOCK :]), self._room(values[:, :, blocks * BLOCK :]))

    def _room(self, latest: Tensor) -> Growing:
        """A buffer for the latest tokens, as long as one new token at a time needs."""
        return Growing.with_room(latest, self.recent + BLOCK, 0.0, 16)

    def _pack_oldest(self) -> None:
        assert self._latest is not None
        blocks = max(0, len(self._latest[0]) - self.recent) // BLOCK
        if blocks:
            keys, values = (latest.view() for latest in self._latest)
            self._pack(keys[:, :, : blocks * BLOCK], values[:, :, : blocks * BLOCK])
            self._latest = (self._room(keys[:, :, blocks * BLOCK :]), self._room(values[:, :, blocks * BLOCK :]))

    @torch.no_grad()
    def _pack(self, keys: Tensor, values: Tensor) -> None:
        if self._packed is None and self.rotate is not None and keys.shape[2]:
            self._constant = constant_of(keys, self._first, self.rotate)
        for start in range(0, keys.shape[2], PACK_BLOCKS * BLOCK):
            span = slice(start, start + PACK_BLOCKS * BLOCK)
            rest = keys[:, :, span]
            if self._constant is not None:
                rest = rest - self._constant.at(self._first + self._blocks() * BLOCK, rest.shape[2])
            with torch.autocast(keys.device.type, enabled=False):  # which joins no float16
                packed = pack_blocks(rest, values[:, :, span].to(rest.dtype), self.bits)
            packed = Packed(*map(self._placed, packed))
            if self._packed is None:
                whole = keys.shape[2] // BLOCK
                self._packed = [Growing.with_room(each, whole + int(whole * SLACK), SLACK, 1) for each in packed]
            else:
                for held, each in zip(self._packed, packed, strict=True):
                    held.append(each)

    def _placed(self, packed: Tensor) -> Tensor:
        """Where it is to lie."""
        return packed

    def _content(self, visible: int) -> Content:
        """The last `visible` tokens."""
        assert self._latest is not None
        keys, values = (latest.view() for latest in self._latest)
        old = visible - keys.shape[2]
        if old <= 0:
            start = -old
            return Content(self.bits, None, 0, 0, keys[:, :, start:], values[:, :, start:])
        blocks = -(-old // BLOCK)
        assert self._packed is not None
        first = self._blocks() - blocks
        buffer, places = self._packed[0].buffer, (self._packed[0].start, first, blocks)
        if self._views is None or self._views[0] is not buffer or self._views[1] != places:
            self._views = buffer, places, Packed(*(held.view()[:, :, first:] for held in self._packed))
        packed = self._views[2]  # made anew for every block, not for every token
        place = self._first + first * BLOCK
        return Content(self.bits, packed, blocks, blocks * BLOCK - old, keys, values, self._constant, place)

    def _drop_last(self, count: int) -> None:
        """Forget the last tokens. A block that loses a part of its tokens is unpacked."""
        assert self._latest is not None
        latest = len(self._latest[0])
        if count > latest and self._packed is not None:
            gone = min(-(-(count - latest) // BLOCK), self._blocks())
            content = self._content(gone * BLOCK + latest)
            keys, values = (content.dense(part)[:, :, : max(0, content.length - count)] for part in (0, 1))
            for held in self._packed:
                held.drop(back=gone)
            self._latest = (self._room(keys), self._room(values))
        else:
            for each in self._latest:
                each.drop(back=count)

    def _drop_first(self, count: int) -> None:
        """Forget the first tokens, as far as they fill blocks."""
        assert self._latest is not None
        blocks = min(count // BLOCK, self._blocks())
        for held in self._packed or ():
            held.drop(front=blocks)
        self._first += blocks * BLOCK
        if not self._blocks():
            for each in self._latest:
                each.drop(front=count - blocks * BLOCK)
            self._first += count - blocks * BLOCK

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for held in (*(self._packed or ()), *(self._latest or ())):
            held.adopt(change(held.view()))
        self._views = None
        if self._constant is not None:
            self._constant = self._constant.changed(change)

    def _clear(self, value: Tensor | None) -> None:
        if value is not None and value.numel():
            raise AttributeError("keys and values of a quantized cache come through update()")
        self._packed = self._latest = self._constant = self._views = None
        self._first = 0


class QuantizedSlidingWindowLayer(Windowed, QuantizedLayer, DynamicSlidingWindowLayer):
    """Blocks that have left the window are dropped; tokens of the first block that have left it are not seen."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._latest is not None and not self.record_past:
            self._drop_first(max(0, self._held() - self.sliding_window + 1))
        self.cumulative_length += key_states.shape[2]
        return super().update(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            DynamicSlidingWindowLayer.crop(self, tokens_to_remove)  # says why not
        count = to_remove(tokens_to_remove, self.cumulative_length)
        super().crop(tokens_to_remove)
        self.cumulative_length -= count
        if self._latest is not None:
            self._drop_first(max(0, self._held() - self.sliding_window + 1))

    def _visible(self, new: int) -> int:
        return min(self._held(), self.sliding_window - 1 + new)

    def _start(self, keys: Tensor, values: Tensor) -> None:
        kept = slice(None) if self.record_past else slice(max(0, keys.shape[2] - self.sliding_window + 1), None)
        super()._start(keys[:, :, kept], values[:, :, kept])
