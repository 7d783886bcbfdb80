"""`python -m hf_accel_patch bench MODEL --quantize int4`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_accel_patch.cli import add_device, add_json, add_passes, add_threads, dtype, keywords, positive


def add_bench(commands: Any) -> None:
    """Add the command."""
    from hf_accel_patch.shapes import SHAPES

    added = commands.add_parser("bench", help="time a model with and without a patch, in turn; and their memory")
    which = added.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", metavar="PATH_OR_ID")
    which.add_argument("--shape", choices=SHAPES, help="random weights of a known shape")
    add_passes(added)
    added.add_argument("--prompt", type=positive, default=128, metavar="N", help="tokens of the prompt (128)")
    added.add_argument("--tokens", type=positive, default=32, metavar="N", help="tokens to generate (32)")
    added.add_argument("--batch", dest="rows", type=positive, default=1, metavar="N", help="prompts at once (1)")
    added.add_argument("--rounds", type=positive, default=7, metavar="N", help="times to repeat it, at least 3 (7)")
    add_threads(added)
    added.add_argument("--dtype", type=dtype, default="auto", help="of the stock weights (as in the checkpoint)")
    add_device(added)
    add_json(added)
    added.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> None:
    from hf_accel_patch.benching import Settings, run

    found = run(
        Settings(
            model=options.model,
            shape=options.shape,
            asked=keywords(options),
            prompt=options.prompt,
            tokens=options.tokens,
            batch=options.rows,
            rounds=options.rounds,
            threads=options.threads,
            dtype=options.dtype,
            device=options.device,
        )
    )
    print(found.to_json() if options.json else f"{found}\n\n{found.report}")
