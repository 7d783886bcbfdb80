"""Weights [N, K] of linear layers in the formats of GPTQ, AWQ and bitsandbytes, read from their tensors.

Codes and scales are taken over as they are and nothing is quantized anew, so what comes back says the same weights.
Every function takes the tensors of one layer by their names in its checkpoint. Raises ValueError, saying what was
expected and what was found, where they are not such a layer: a truncated file, or a format not supported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZES = (128, 64, 32)  # input features per scale that our kernels know, the cheapest first
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ's GEMM: which of eight output features each half-byte of a word holds
BNB_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of which bitsandbytes makes blocks, nested ones too
QUANT_STATE = "quant_state.bitsandbytes__"  # and the type: a tensor with the bytes of a JSON object
QUANT_STATE_BYTES = 4096  # bitsandbytes writes about 150; what is much longer is nothing to parse
DENSE_ROWS = 256  # rows made dense at a time: temporaries of a few MB
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Grouped:
    """w[n, order[j]] = (codes[n, j] - 8) * scale[n, j // G] + zero[n, j // G], exact in float32 for 16-bit scales."""

    codes: Tensor  # uint8 [N, K] in 0..15
    scale: Tensor  # float32 [N, K / G]
    zero: Tensor  # float32 [N, K / G], the weight that code 8 stands for
    order: Tensor | None  # int64 [K], the input feature of each column of codes; None: in their order


@dataclass(frozen=True, eq=False)
class Table:
    """w[n, k] = table[codes[n, k]] * absmax[n, k // G]."""

    codes: Tensor  # uint8 [N, K] in 0..15
    absmax: Tensor  # float32 [N, K / G]
    table: Tensor  # float32 [16]


@dataclass(frozen=True, eq=False)
class Rows:
    """w[n, k] = codes[n, k] * scale[n]."""

    codes: Tensor  # int8 [N, K]
    scale: Tensor  # float32 [N]


def gptq(tensors: Mapping[str, Tensor], bits: int, group_size: int, *, v1: bool) -> Grouped:
    """A GPTQ layer of 4 bits: qweight int32 [K / 8, N], qzeros int32 [K / G, N / 8], scales [K / G, N], g_idx [K].

    group_size -1 is one group of all K. v1 is checkpoint_format "gptq", which stores zeros less one; "gptq_v2" stores
    them as they are. Columns that act-order spread over the groups come back sorted by group.
    """
    if bits != 4:
        raise ValueError(
            f"GPTQ weights keep their codes with 4 bits only, not {bits}; 8 bits are read as dense weights"
        )
    codes, zeros, scale, groups = _gptq(tensors, bits, group_size, v1)
    K = len(groups)
    group = K if group_size == -1 else group_size
    columns = torch.bincount(groups, minlength=scale.shape[1])
    if (columns != group).any():
        worst = int((columns - group).abs().argmax())
        found = int(columns[worst])
        raise ValueError(f"every GPTQ group should have {group} of the {K} input features; group {worst} has {found}")
    order = torch.argsort(groups, stable=True) if (groups.diff() < 0).any() else None
    return _grouped(codes if order is None else codes.index_select(1, order), zeros, scale, group, order)


def dense_gptq(tensors: Mapping[str, Tensor], bits: int, group_size: int, *, v1: bool) -> Tensor:
    """The weights float32 [N, K] of a GPTQ layer of 4 or 8 bits: for 8 bits, and for groups that `gptq` refuses.

    Names and options are those of `gptq`, with four codes in a word of 8 bits. Takes 4 bytes per weight.
    """
    if bits not in (4, 8):
        raise ValueError(f"GPTQ weights are supported with 4 or 8 bits, not {bits}")
    codes, zeros, scale, groups = _gptq(tensors, bits, group_size, v1)
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for start in range(0, len(codes), DENSE_ROWS):
        rows = slice(start, start + DENSE_ROWS)
        weight[rows] = (codes[rows].float() - zeros[rows].float()[:, groups]) * scale[rows].float()[:, groups]
    return weight


def awq(tensors: Mapping[str, Tensor], bits: int, group_size: int, version: str) -> Grouped:
    """An AWQ layer of 4 bits, in the layout of version "gemm" or "gemv".

    gemm: qweight int32 [K, N / 8], qzeros int32 [K / G, N / 8], scales [K / G, N], words in the order of AWQ_ORDER.
    gemv: qweight int32 [N, K / 8], qzeros int32 [N, Z], scales [N, 8 Z], words in order, Z >= K / G / 8 being padded.
    """
    if bits != 4:
        raise ValueError(f"AWQ weights are supported with 4 bits, not {bits}")
    if (layout := version.lower()) not in ("gemm", "gemv"):
        raise ValueError(f"AWQ weights are supported in versions gemm and gemv, not {version!r}")
    qweight = _tensor(tensors, "qweight", (torch.int32,), None, None)
    K = len(qweight) if layout == "gemm" else qweight.shape[1] * 8
    group = _whole_group("AWQ", K, group_size)
    if layout == "gemm":
        qzeros = _tensor(tensors, "qzeros", (torch.int32,), K // group, qweight.shape[1])
        scale = _tensor(tensors, "scales", FLOATS, K // group, qweight.shape[1] * 8).T
        codes, zeros = (_unpack(words, bits, AWQ_ORDER).T.contiguous() for words in (qweight, qzeros))
        return _grouped(codes, zeros, scale, group, None)
    qzeros = _tensor(tensors, "qzeros", (torch.int32,), len(qweight), None)
    scale = _tensor(tensors, "scales", FLOATS, len(qweight), qzeros.shape[1] * 8)
    if scale.shape[1] < K // group:
        raise ValueError(f"scales should have at least {K // group} columns, found {scale.shape[1]}")
    scale, zeros = scale[:, : K // group], _unpack(qzeros, bits)[:, : K // group]
    return _grouped(_unpack(qweight, bits), zeros, scale, group, None)


def bitsandbytes_4bit(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Table:
    """An NF4 or FP4 layer of [N, K]: weight uint8 of N * K / 2 bytes, absmax, quant_map float32 [16] and quant_state.

    The first of two weights is the high half-byte. Blocks of the flattened weight have one absmax each, float32 or, if
    double-quantized, uint8 with nested_absmax float32 and nested_quant_map float32 [256]. Names may keep the prefix
    "weight." of a checkpoint. Blocks need not end where rows do, as long as K is a multiple of 32.
    """
    tensors = {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
    N, K = shape
    state = _quant_state(tensors)
    if state.get("shape") != [N, K]:
        raise ValueError(f"quant_state should be of a weight of shape {[N, K]}, found {state.get('shape')}")
    block = _block_size(state, "blocksize")
    G = _kernel_group(math.gcd(K, block), f"bitsandbytes blocks of {block} weights in rows of {K}")
    weight = _tensor(tensors, "weight", (torch.uint8, *FLOATS))  # bnb_4bit_quant_storage: the same bytes as floats
    if (found := weight.numel() * weight.element_size()) != N * K // 2:
        raise ValueError(f"weight should have {N * K // 2} bytes for a shape of {[N, K]}, found {found}")
    bytes_ = weight.contiguous().flatten().view(torch.uint8).view(N, K // 2)
    codes = torch.stack((bytes_ >> 4, bytes_ & 15), dim=-1).view(N, K)
    absmax = _tensor(tensors, "absmax", (torch.uint8, *FLOATS), -(-N * K // block))
    if absmax.dtype == torch.uint8:
        absmax = _nested(tensors, state, absmax)
    absmax = absmax.float().repeat_interleave(block // G)[: N * K // G].view(N, K // G)
    return Table(codes, absmax, _tensor(tensors, "quant_map", (torch.float32,), 16))


def bitsandbytes_8bit(tensors: Mapping[str, Tensor]) -> Rows:
    """An LLM.int8 layer: weight int8 [N, K] in rows, SCB float32 [N], the largest absolute weight of each row.

    The product of bitsandbytes also quantizes the activations, which is not part of the weights.
    """
    layout = tensors.get("weight_format")
    if layout is not None and (layout.numel() != 1 or layout.item() != 0):
        raise ValueError(
            f"weight_format should be 0 (rows), found {layout.tolist()}; save it anew with a current bitsandbytes"
        )
    codes = _tensor(tensors, "weight", (torch.int8,), None, None)
    return Rows(codes, _tensor(tensors, "SCB", (torch.float32,), len(codes)) / 127)


def _gptq(tensors: Mapping[str, Tensor], bits: int, group_size: int, v1: bool) -> tuple[Tensor, ...]:
    """Codes uint8 [N, K], zeros uint8 [N, K / G], scales [N, K / G] as stored, and the group int64 [K] of columns."""
    qweight = _tensor(tensors, "qweight", (torch.int32,), None, None)
    K, N = len(qweight) * 32 // bits, qweight.shape[1]
    group = _whole_group("GPTQ", K, group_size)
    count = K // group
    words = _tensor(tensors, "qzeros", (torch.int32,), count, -(-N * bits // 32)).long()
    if v1:
        # GPTQModel and AutoRound subtract one from every field by subtracting from the word, so zero 0 borrows from the
        # next field; only adding to the word gets both back. Kernels that add per field and mask are off by one there;
        # AutoGPTQ itself overwrote all fields above a zero 0 with 15, and there no reading is right.
        words += (2**32 - 1) // (2**bits - 1)
    zeros = _unpack(words, bits)[:, :N].T
    scale = _tensor(tensors, "scales", FLOATS, count, N).T
    groups = torch.arange(K, device=qweight.device) // group
    if "g_idx" in tensors:
        g_idx = _tensor(tensors, "g_idx", (torch.int32, torch.int64), K).long()
        if g_idx.min() < 0 or g_idx.max() >= count:
            found = f"{int(g_idx.min())} to {int(g_idx.max())}"
            raise ValueError(f"g_idx should be in 0..{count - 1} for {count} groups, found {found}")
        if g_idx.any():  # early writers left it all zero without act-order, which AutoGPTQ and exllama read as absent
            groups = g_idx
    return _unpack(qweight.T.contiguous(), bits), zeros, scale, groups


def _grouped(codes: Tensor, zeros: Tensor, scale: Tensor, group: int, order: Tensor | None) -> Grouped:
    """With (code - zero) * scale written about code 8, and the scales repeated where groups are split for kernels."""
    repeats = group // _kernel_group(group, f"groups of {group} input features")
    scale = scale.float()
    zero = (8 - zeros.float()) * scale
    return Grouped(codes, scale.repeat_interleave(repeats, 1), zero.repeat_interleave(repeats, 1), order)


def _kernel_group(multiple: int, what: str) -> int:
    for size in GROUP_SIZES:
        if multiple % size == 0:
            return size
    raise ValueError(f"{what} cannot be split into groups of 128, 64 or 32 input features with one scale each")


def _whole_group(method: str, K: int, group_size: int) -> int:
    group = K if group_size == -1 else group_size
    if group < 1 or K % group:
        raise ValueError(f"{method} group_size should be -1 or divide the {K} input features, found {group_size}")
    return group


def _unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """uint8 [R, C * 32 / bits] from words [R, C] of 32 bits; field i of a word, from its low bits, goes to order[i]."""
    codes = torch.empty(*words.shape, 32 // bits, dtype=torch.uint8, device=words.device)
    for field, column in enumerate(order or range(32 // bits)):
        codes[..., column] = (words >> field * bits) & 2**bits - 1
    return codes.flatten(1)


def _nested(tensors: Mapping[str, Tensor], state: Mapping[str, object], codes: Tensor) -> Tensor:
    """The absmax of blocks from their uint8 codes, in the operations and so the rounding of bitsandbytes."""
    block = _block_size(state, "nested_blocksize")
    offset = state.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset of quant_state should be a finite number, found {offset!r}")
    table = _tensor(tensors, "nested_quant_map", (torch.float32,), 256)
    scale = _tensor(tensors, "nested_absmax", (torch.float32,), -(-len(codes) // block))
    return table[codes.long()] * scale.repeat_interleave(block)[: len(codes)] + offset


def _quant_state(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    names = [name for name in tensors if name.startswith(QUANT_STATE)]
    if names not in ([QUANT_STATE + "nf4"], [QUANT_STATE + "fp4"]):
        raise ValueError(f"expected one tensor {QUANT_STATE}nf4 or {QUANT_STATE}fp4, found {names or sorted(tensors)}")
    data = _tensor(tensors, names[0], (torch.uint8,), None)
    if len(data) > QUANT_STATE_BYTES:
        raise ValueError(f"{names[0]} should be a short JSON object, found {len(data)} bytes")
    try:
        state = json.loads(bytes(data.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{names[0]} should be the bytes of a JSON object: {error}") from error
    if not isinstance(state, dict) or state.get("quant_type") != names[0].removeprefix(QUANT_STATE):
        raise ValueError(f"{names[0]} should be a JSON object of that quant_type, found {state!r}")
    return state


def _block_size(state: Mapping[str, object], name: str) -> int:
    size = state.get(name)
    if not isinstance(size, int) or size not in BNB_BLOCK_SIZES:
        raise ValueError(f"{name} of quant_state should be one of {BNB_BLOCK_SIZES}, found {size!r}")
    return size


def _tensor(tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor:
    """The tensor, of one of the dtypes and of this shape: None is any size but 0, no shape at all any shape."""
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing; found {', '.join(sorted(tensors)) or 'none'}")
    tensor = tensors[name]
    sizes = list(tensor.shape)
    fits = len(sizes) == len(shape) and all(n and size in (None, n) for size, n in zip(shape, sizes, strict=True))
    if tensor.dtype not in dtypes or (shape and not fits):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = f" [{', '.join(str(size or 'any') for size in shape)}]" if shape else ""
        found_kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"tensor {name} should be {kinds}{wanted}, found {found_kind} {sizes}")
    return tensor
