"""Experts that take a long prompt in pieces.

A module of experts gets hidden_states [T, H], top_k_index [T, k] and top_k_weights [T, k], and repeats each token for
each of its k experts: T x k rows of hidden features, several times over.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PIECE_BYTES = 32 << 20  # what a piece takes beside inputs and outputs, about
GPU_PIECE_BYTES = 256 << 20  # the same elsewhere: short pieces leave a GPU idle
COPIES = 4  # of a row's inputs and hidden features that exist at a time, about
LEAST_ROWS = 256  # of a piece, for an expert, on the average: with fewer, reading the weights again would take longer


class Routed(NamedTuple):
    """What the size of a piece depends on."""

    experts: int
    row_features: int  # inputs of an expert and its hidden features


class InPieces(nn.Module):
    """To be put before a class of experts, whose forward it calls for some tokens at a time.

    A token's output depends on that token only, so nothing changes but the rounding of products over fewer rows.
    Training, which keeps everything anyway, and graphs get the whole.
    """

    made: type  # the module's own class
    routed: Routed

    def forward(self, *inputs: Any, **named: Any) -> Any:
        forward = super().forward
        if named or torch.is_grad_enabled() or torch.compiler.is_compiling() or not _by_token(inputs):
            return forward(*inputs, **named)
        tokens = len(inputs[0])
        pieces = tokens // piece_tokens(inputs[0], inputs[1].shape[1], self.routed)
        if pieces < 2:
            return forward(*inputs)
        length = math.ceil(tokens / pieces)
        return torch.cat([forward(*piece) for piece in zip(*(each.split(length) for each in inputs), strict=True)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made at run time are made again where a pickle is read."""
        return _remake, (type(self).made,), self.__getstate__()  # type: ignore[no-untyped-call]


def piece_tokens(hidden: Tensor, chosen: int, routed: Routed) -> int:
    """How many tokens a piece has at least, of which each goes to `chosen` of the experts."""
    room = PIECE_BYTES if hidden.is_cpu else GPU_PIECE_BYTES
    row_bytes = COPIES * routed.row_features * hidden.element_size()
    return max(1, room // (chosen * row_bytes), LEAST_ROWS * routed.experts // chosen)


@cache
def in_pieces(kind: Any) -> Any:
    """The class that experts of this class are changed to. It keeps the name, for those who look for it."""
    entries = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (InPieces, kind), {**entries, "made": kind})


def _by_token(inputs: tuple[Any, ...]) -> bool:
    tensors = len(inputs) == 3 and all(isinstance(each, Tensor) and each.ndim == 2 for each in inputs)
    return tensors and len({len(each) for each in inputs}) == 1


def _remake(kind: type) -> nn.Module:
    made: Any = in_pieces(kind)
    module: nn.Module = made.__new__(made)
    return module
