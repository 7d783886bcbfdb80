"""`python -m hf_accel_patch verify MODEL --quantize int4`."""

from __future__ import annotations

import argparse
import math
from typing import Any

from hf_accel_patch.cli import add_device, add_json, add_passes, dtype, keywords, positive

BEYOND = 1  # the exit code where the perplexity has grown by more than was allowed


def add_verify(commands: Any) -> None:
    """Add the command."""
    added = commands.add_parser(
        "verify",
        help="patch a checkpoint and compare it with the unpatched model: agreement, perplexity, speed, memory",
    )
    added.add_argument("model", metavar="PATH_OR_ID")
    add_passes(added)
    added.add_argument("--text", nargs="+", metavar="FILE", help="what to read (default: source of this Python)")
    added.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens to read at most (8192)")
    added.add_argument("--window", type=positive, metavar="N", help="tokens of a text that are read as one")
    added.add_argument("--original", metavar="PATH_OR_ID", help="the unpatched model (default: PATH_OR_ID itself)")
    added.add_argument(
        "--max-perplexity-increase",
        type=_share,
        metavar="SHARE",
        help=f"exit with code {BEYOND} if the perplexity grows by more: 0.01 is one percent",
    )
    added.add_argument("--no-speed", action="store_true", help="leave the timing out")
    added.add_argument("--dtype", type=dtype, default="auto", help="of the unquantized weights (as in the checkpoint)")
    add_device(added)
    add_json(added)
    added.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from hf_accel_patch import verify
    from hf_accel_patch.uptrain_command import read_texts

    texts = read_texts(options.text) if options.text else None
    model = patched_model(options.model, keywords(options), options.dtype, options.device)
    found = verify(
        model,
        texts,
        original=options.original,
        window=options.window,
        tokens=options.tokens,
        speed=not options.no_speed,
    )
    print(found.to_json() if options.json else found)
    allowed, increase = options.max_perplexity_increase, found.perplexity_increase
    return 0 if allowed is None or increase <= allowed else BEYOND  # NaN is beyond


def patched_model(path: str, asked: dict[str, Any], dtype: str = "auto", device: str = "cpu") -> Any:
    """A patched model from a checkpoint. Weights are quantized while they are read, unless another pass has to change
    them first."""
    from transformers import AutoModelForCausalLM

    from hf_accel_patch import load, patch, plan

    options = {"dtype": dtype} | ({} if device == "cpu" else {"device_map": device})
    if not (asked.get("quantize") and asked.get("gqa")):
        return load(path, **options, **asked)
    plan(path, **asked)
    return patch(AutoModelForCausalLM.from_pretrained(path, **options), **asked)


def _share(text: str) -> float:
    """A relative increase, as an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 on, such as 0.01")
    return value
