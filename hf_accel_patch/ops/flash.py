"""Attention by the package flash-attn (FlashAttention-2), where it is installed: sequences of their own lengths in one
call, windows, soft caps and ALiBi, without copies of grouped heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.ops.case import Variant
from hf_accel_patch.ops.seen import Run, Seen


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Seen, variant: Variant) -> Tensor | str:
    """Attention [B, T, H, V], or why flash-attn cannot compute it. Queries that see nothing give zeros."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

    B, _, T, _ = query.shape
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    options: dict[str, Any] = {"dropout_p": 0.0, "softmax_scale": variant.scale, "softcap": variant.softcap or 0.0}
    if T > 1 and seen.everything:
        if variant.bias is not None:
            return "a bias without a causal mask"
        return flash_attn_func(query, key[:, : seen.last], value[:, : seen.last], causal=False, **options)
    if seen.runs is None:
        return "what queries see is not causal within a window"
    runs, window = seen.runs
    if len(seen.intervals) == 1:
        runs = [run._replace(sequence=sequence) for sequence in range(B) for run in runs]
    if variant.bias is not None:
        found = slopes(variant.bias, runs, query.shape[2])
        if found is None:
            return "the bias is not a slope times the position"
        options["alibi_slopes"] = found
    longest = max((run.last - run.first for run in runs), default=0)
    options |= {"causal": True, "window_size": (window - 1, 0) if window < longest else (-1, -1)}
    if len(runs) == B and all(run[1:] == (0, T, *runs[0][3:]) for run in runs):
        keys = slice(runs[0].first, runs[0].last)
        return flash_attn_func(query, key[:, keys], value[:, keys], **options)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    if not runs:
        return output
    at, there, *ends = _places(seen, runs, T, key.shape[1], query.device)
    packed = flash_attn_varlen_func(
        query.flatten(0, 1)[at], key.flatten(0, 1)[there], value.flatten(0, 1)[there],
        cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=max(run.stop - run.start for run in runs),
        max_seqlen_k=longest, **options,
    )  # fmt: skip
    return output.flatten(0, 1).index_copy(0, at, packed).view_as(output)


def _places(seen: Seen, runs: list[Run], T: int, S: int, device: torch.device) -> tuple[Tensor, ...]:
    """Where the queries and the keys of all runs are in a batch, and where each run ends among them. Once for all
    layers, for on the way to a GPU the host waits."""
    if (known := seen.places.get((len(runs), device))) is None:
        rows = [torch.arange(run.start, run.stop) + run.sequence * T for run in runs]
        columns = [torch.arange(run.first, run.last) + run.sequence * S for run in runs]
        known = (*(torch.cat(each).to(device) for each in (rows, columns)), _ends(rows, device), _ends(columns, device))
        seen.places[len(runs), device] = known
    return known


def slopes(bias: Tensor, runs: list[Run], heads: int) -> Tensor | None:
    """The slopes, float32 [runs, H], of a bias [B or 1, H or 1, 1, S] that is one times the position but for what is
    the same for all keys of a run, which no softmax sees; None if it is something else by more than its rounding."""
    found = []
    for run in runs:
        line = bias[run.sequence if len(bias) > 1 else 0, :, 0, run.first : run.last].double()
        steps = torch.arange(line.shape[-1], device=line.device)
        slope = (line[:, -1:] - line[:, :1]) / max(1, line.shape[-1] - 1)
        error = (line - (line[:, :1] + slope * steps)).abs().max()
        if bool(error > 4 * torch.finfo(bias.dtype).eps * line.abs().max()):
            return None
        found.append(slope[:, 0].expand(heads).float())
    return torch.stack(found)


def _ends(parts: list[Tensor], device: torch.device) -> Tensor:
    lengths = torch.tensor([0, *map(len, parts)])
    return lengths.cumsum(0).to(device, torch.int32)
