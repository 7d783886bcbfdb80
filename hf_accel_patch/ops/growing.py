"""A tensor that grows along its third dimension without being copied at every step."""

from __future__ import annotations

import torch
from torch import Tensor


class Growing:
    """[B, K, n, ...], the part start..stop of a longer buffer.

    `append` writes in place where there is room behind `stop`; where there is none, the content moves to the front of
    the buffer, if what was dropped there left enough room, or to a new one with room for `slack` of its length, or for
    `least` entries: so an entry is copied about 1 / slack times, however long the tensor gets. What `append` and `view`
    return stays valid until entries are dropped and others written in their place.

    A buffer that came from elsewhere, or that a copy shares, is read, and left for a new one before a write. Where
    gradients may be recorded nothing is written in place: what a step has saved for its backward must stay.
    """

    shared: bool  # others may hold the buffer
    lent = False  # whether somebody was given a view of it, and may have it still

    def __init__(self, content: Tensor, slack: float, least: int) -> None:
        self.slack, self.least = slack, least
        self.adopt(content)

    @classmethod
    def with_room(cls, content: Tensor, capacity: int, slack: float, least: int) -> Growing:
        """A copy of the content, with room for `capacity` entries."""
        length = content.shape[2]
        buffer = _empty(content, (*content.shape[:2], max(length, capacity), *content.shape[3:]))
        held = cls(buffer, slack, least)
        held.shared, held.stop = False, length
        held.view().copy_(content)
        return held

    @classmethod
    def within(cls, buffer: Tensor, content: Tensor, start: int, slack: float, least: int) -> Growing:
        """A copy of the content in a buffer that is nobody else's, from `start` on; the rest of it becomes zero."""
        held, stop = cls(buffer, slack, least), start + content.shape[2]
        held.shared, held.start, held.stop = False, start, stop
        held.view().copy_(content)
        buffer.narrow(2, 0, start).zero_()
        buffer.narrow(2, stop, buffer.shape[2] - stop).zero_()
        return held

    def __copy__(self) -> Growing:
        self.shared = True
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __len__(self) -> int:
        return self.stop - self.start

    def view(self) -> Tensor:
        """The content; its strides are those of the buffer."""
        return self.buffer.narrow(2, self.start, self.stop - self.start)

    def adopt(self, content: Tensor) -> None:
        """Become this content: a slice of `view()` stays where it is, anything else becomes the buffer."""
        buffer: Tensor | None = vars(self).get("buffer")
        start = None if buffer is None or torch.compiler.is_compiling() else _start(content, buffer)
        if start is None:
            self.buffer, self.start, self.shared = content, 0, True
        else:
            self.start = start
        self.stop = self.start + content.shape[2]

    def append(self, new: Tensor) -> Tensor:
        """The content with `new` [B, K, m, ...] behind it."""
        if not self._takes(new):  # what stock does; it also refuses what does not fit
            self.adopt(torch.cat((self.view(), new), dim=2))
            return self.view()
        added = new.shape[2]
        if self.stop + added > self.buffer.shape[2] or self._read_only():
            self._make_room(added)
        self.buffer.narrow(2, self.stop, added).copy_(new)
        self.stop += added
        return self.view()

    def write(self, new: Tensor, places: Tensor, stop: int) -> Tensor:
        """The entries up to `stop`, with `new` [B, K, m, ...] at `places` [B, m] of each sequence. Entries that were
        never written are zero."""
        more = max(0, stop - len(self))
        if self.stop + more > self.buffer.shape[2] or self._read_only():
            self._make_room(more)
        self.buffer.narrow(2, self.stop, more).zero_()
        self.stop = self.start + stop
        rows = torch.arange(len(new), device=new.device)[:, None]
        self.view()[rows, :, places] = new.transpose(1, 2)
        return self.view()

    def put(self, new: Tensor, rows: Tensor, places: Tensor, stop: int) -> Tensor:
        """The first `stop` entries of the buffer, with `new` [B, K, m, ...] at `places` [B, m] of its `rows` [B, 1].
        How many entries there are stays what it was: nothing depends on it, nor on where the places are."""
        self.buffer[rows, :, places] = new.transpose(1, 2)
        return self.buffer.narrow(2, 0, stop)

    def settle(self, start: int, stop: int) -> None:
        """These are the entries, whoever has written them."""
        self.start, self.stop = start, stop

    def writable(self) -> Tensor:
        """The content, to be changed in place."""
        if self._read_only():
            self._make_room(0)
        return self.view()

    def drop(self, *, front: int = 0, back: int = 0) -> None:
        """Forget entries."""
        self.start = min(self.start + front, self.stop)
        self.stop = max(self.stop - back, self.start)

    def _takes(self, new: Tensor) -> bool:
        """Whether `new` can be written into the buffer as it is, with nothing that records or replaces the write."""
        mine = self.buffer
        alike = new.dtype == mine.dtype and new.device == mine.device and new.ndim == mine.ndim
        sizes = alike and new.shape[:2] == mine.shape[:2] and new.shape[3:] == mine.shape[3:]
        plain = type(new) is Tensor and type(mine) is Tensor and not torch.compiler.is_compiling()
        return sizes and plain and not (mine.requires_grad or torch.is_grad_enabled())

    def _read_only(self) -> bool:
        return self.shared or (self.buffer.is_inference() and not torch.is_inference_mode_enabled())

    def _make_room(self, added: int) -> None:
        content, length = self.view(), len(self)
        spare = max(self.least, int(length * self.slack))
        fits = length + added <= self.buffer.shape[2] and self.start >= min(spare, length) // 2
        if fits and not self._read_only():
            self.buffer.narrow(2, 0, length).copy_(content.clone() if self.start < length else content)
        else:
            room = (*content.shape[:2], length + added + spare, *content.shape[3:])
            self.buffer, self.shared = _empty(content, room), False
            self.buffer.narrow(2, 0, length).copy_(content)
        self.start, self.stop = 0, length


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pinned if the other is, so that a GPU still fetches it without waiting."""
    pinned = like.is_cpu and like.is_pinned()
    return (
        torch.empty(shape, dtype=like.dtype, device=like.device, pin_memory=True) if pinned else like.new_empty(shape)
    )


def _start(content: Tensor, buffer: Tensor) -> int | None:
    """Where `content` starts, if it is `buffer` narrowed along the third dimension."""
    if type(content) is not Tensor or type(buffer) is not Tensor or content.device != buffer.device:
        return None
    same = content.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    alike = content.dtype == buffer.dtype and content.stride() == buffer.stride() and buffer.stride(2) > 0
    if not (same and alike and content.shape[:2] == buffer.shape[:2] and content.shape[3:] == buffer.shape[3:]):
        return None
    start, rest = divmod(int(content.storage_offset()) - int(buffer.storage_offset()), buffer.stride(2))
    return start if rest == 0 and 0 <= start <= buffer.shape[2] - content.shape[2] else None
