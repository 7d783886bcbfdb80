"""The command `plan`: what `patch` would do to a model, and the memory that it would take."""

from __future__ import annotations

import argparse
from typing import Any

from hf_accel_patch.cli import add_json, add_passes, keywords, uncollected


def add_plan(commands: Any) -> None:
    """Add the command."""
    added = commands.add_parser("plan", help="print what patch() would do to a model; its weights are not read")
    added.add_argument("model", metavar="PATH_OR_ID")
    add_passes(added)
    memory = added.add_argument_group("memory")
    memory.add_argument("--budget", metavar="SIZE", help="choose what fits into it: 6GiB, 500MB, or a number of bytes")
    memory.add_argument("--batch", metavar="N", help="sequences at a time (1)")
    memory.add_argument("--plot", metavar="FILE", help="write memory against context as a figure: FILE.png, FILE.svg")
    add_json(added)
    added.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> None:
    from hf_accel_patch import plan

    asked = keywords(options)
    with uncollected():
        planned = plan(options.model, **asked)
    if options.plot:
        _plot(options, asked, planned.memory)
    print(planned.to_json() if options.json else planned)


def _plot(options: argparse.Namespace, asked: dict[str, Any], memory: Any) -> None:
    from pathlib import Path

    from transformers import AutoConfig

    from hf_accel_patch.options import parse
    from hf_accel_patch.planning.budget import fitted
    from hf_accel_patch.planning.memory import Estimates
    from hf_accel_patch.planning.plot import plot
    from hf_accel_patch.planning.stored import opened

    here = opened(options.model, AutoConfig.from_pretrained(options.model))
    chosen = {name: value for name, value in asked.items() if name != "batch" or "budget" in asked}
    estimates = Estimates(here.view, memory.tokens, memory.batch, here.skeleton)
    passes = fitted(here.view, parse(chosen), estimates, quantized=here.comes_quantized)
    limit = None
    if memory.budget is not None:
        limit = "budget", memory.budget
    elif memory.available is not None:
        limit = f"free on {memory.device}", memory.available
    plot(
        options.plot,
        lambda tokens: Estimates(here.view, tokens, memory.batch, here.skeleton),
        passes,
        memory.tokens,
        Path(options.model).resolve().name if Path(options.model).exists() else options.model,
        limit,
    )
