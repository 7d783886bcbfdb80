"""Memory against the context, as a figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from hf_accel_patch.errors import HfAccelError, UnsupportedModel
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.plan import Pass
from hf_accel_patch.planning.memory import Estimates
from hf_accel_patch.planning.overview import Kind, instead

LENGTHS = 7  # at which memory is calculated, from the longest one down by halves
GIB = 2**30


def plot(
    path: str | os.PathLike[str],
    at: Callable[[int], Estimates],
    passes: tuple[Pass, ...],
    tokens: int,
    title: str,
    limit: tuple[str, int] | None,
) -> None:
    """Write peaks of stock, of these passes, and of them with weights in int8 and in int4 and the cache with them.

    `at`: estimates for some number of tokens; `limit`: a line, and what it is called. Raises HfAccelError without
    matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HfAccelError(
            "--plot needs matplotlib, which is not installed", "pip install 'hf_accel_patch[plots]'"
        ) from None
    lengths = sorted({max(1, tokens >> step) for step in range(LENGTHS)})
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, peaks in _lines([at(length) for length in lengths], passes).items():
        style = {"patched": (0, (1, 1)), "stock": "-"}.get(label, "--" if "cache" in label else "-")
        wide = 4 if label == "patched" else 1.5
        axes.plot(lengths, [peak / GIB for peak in peaks], linestyle=style, linewidth=wide, label=label)
    if limit is not None:
        axes.axhline(limit[1] / GIB, color="black", linestyle="--", linewidth=1, label=limit[0])
    axes.set(xlabel="context, tokens", ylabel="peak, GiB", title=title, ylim=(0, None), xlim=(0, None))
    figure.legend(loc="outside right upper")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # an ending that is no format of pictures
        raise ValueError(f"--plot {os.fspath(path)}: {error}") from error


def _lines(estimates: Sequence[Estimates], passes: tuple[Pass, ...]) -> dict[str, list[int]]:
    """Peaks in bytes by label; what the model cannot have is left out."""
    lines = {"stock": [each.stock().peak for each in estimates]}
    lines["patched"] = [each.of(passes).peak for each in estimates]
    quantized = any(isinstance(module, QuantizedModule) for _, module in estimates[0].view.named_modules())
    kinds: tuple[Kind, ...] = ("int8", "int4")
    for kind in kinds:
        ways = ((kind, None), (kind, kind)) if not quantized else ((None, kind),)
        for scheme, cache in ways:
            label = f"{kind} cache" if scheme is None else f"{kind} weights" + (" and cache" if cache else "")
            try:
                lines[label] = [each.of(instead(passes, scheme, cache)).peak for each in estimates]
            except UnsupportedModel:
                continue
    return lines
