"""Keys and values that lie in a quantized cache, as tensors that become dense only when somebody computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.ops.constant import Constant
from hf_accel_patch.ops.kv import BLOCK, Bits, Packed, unpack_keys, unpack_values
from hf_accel_patch.ops.lazy import Lazy

UNPACK_BLOCKS = 16  # blocks that are unpacked at a time: 1024 tokens


@dataclass(frozen=True)
class Content:
    """What a layer of a quantized cache holds: blocks of packed tokens, then the latest ones as they are.

    `packed` has room for more than `blocks`. Of the first block, `skip` tokens have left a sliding window.
    """

    bits: Bits
    packed: Packed | None
    blocks: int
    skip: int
    keys: Tensor  # [B, K, R, D]
    values: Tensor  # [B, K, R, V]
    constant: Constant | None = None  # what was taken off the packed keys
    first: int = 0  # the place of the first packed token

    @property
    def length(self) -> int:
        """Tokens that are seen."""
        return self.blocks * BLOCK - self.skip + self.keys.shape[2]

    @property
    def near(self) -> bool:
        """Whether a kernel can read it: it is quantized, and where the latest tokens are."""
        return self.packed is None or (self.bits < 16 and self.packed.key_codes.device == self.keys.device)

    def unpacked(self, part: int, first: int, last: int) -> Tensor:
        """Keys (part 0) or values (1) of blocks first..last, skipped tokens included."""
        assert self.packed is not None
        like = self.values if part else self.keys
        held = (each[:, :, first:last] for each in self.packed[2 * part : 2 * part + 2])
        codes, scales = (fetched(each, like.device) for each in held)
        dense = (unpack_values if part else unpack_keys)(codes, scales, self.bits)[..., : like.shape[-1]]
        if self.constant is not None and not part:
            dense = dense + self.constant.at(self.first + first * BLOCK, (last - first) * BLOCK)
        return dense.to(like.dtype)

    def parts(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """All that is seen, dense and part by part: the first and last token of each, its keys and values."""
        for block in range(0, self.blocks, UNPACK_BLOCKS):
            last = min(block + UNPACK_BLOCKS, self.blocks)
            keys, values = (self.unpacked(part, block, last) for part in (0, 1))
            hidden = self.skip if block == 0 else 0
            start = block * BLOCK - (0 if block == 0 else self.skip)
            yield start, last * BLOCK - self.skip, keys[:, :, hidden:], values[:, :, hidden:]
        if self.keys.shape[2]:
            yield self.length - self.keys.shape[2], self.length, self.keys, self.values

    def dense(self, part: int) -> Tensor:
        """Keys [B, K, S, D] or values [B, K, S, V]."""
        latest = self.values if part else self.keys
        if not self.blocks:
            return latest
        return torch.cat((self.unpacked(part, 0, self.blocks)[:, :, self.skip :], latest), dim=2)


def fetched(held: Tensor, device: torch.device) -> Tensor:
    """Some blocks [B, K, N, ...] on a device, for which nobody waits if they are pinned. They are copied head by head:
    blocks that lie apart PyTorch would first gather on the host, in memory that is not pinned."""
    if held.device == device or held.is_contiguous():
        return held.to(device, non_blocking=True)
    here = torch.empty(held.shape, dtype=held.dtype, device=device)
    for row in range(held.shape[0]):
        for head in range(held.shape[1]):
            here[row, head].copy_(held[row, head], non_blocking=True)
    return here


class Stored(Lazy):
    """The keys [B, K, S, D] or the values [B, K, S, V] of a `Content`, which attention reads instead."""

    fixed = "what a quantized cache holds cannot be changed in place"
    content: Content
    part: int  # 0 keys, 1 values

    @staticmethod
    def __new__(cls, content: Content, part: int) -> Stored:
        like = content.values if part else content.keys
        shape = (*like.shape[:2], content.length, like.shape[-1])
        stored = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        stored.content, stored.part = content, part
        return stored

    def dense(self) -> Tensor:
        """Contiguous, as this tensor says that it is."""
        return self.content.dense(self.part).contiguous()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Stored(shape={tuple(self.shape)}, bits={self.content.bits})"
