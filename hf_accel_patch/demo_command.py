"""`python -m hf_accel_patch demo`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hf_accel_patch.cli import add_device, add_json, add_threads, positive


def add_demo(commands: Any) -> None:
    """Add the command."""
    from hf_accel_patch.demo import DTYPE
    from hf_accel_patch.shapes import SHAPES

    added = commands.add_parser("demo", help="measure a model before and after patch(), and take the patch off again")
    which = added.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="PATH_OR_ID", help="any causal LM (default: the bundled code-llama-8m)")
    which.add_argument("--shape", choices=SHAPES, help="speed and memory only, on random weights of a known shape")
    added.add_argument(
        "--quantize", default="int4", metavar="SCHEME", help=f"int4 (default), int8, nf4 or llm.int8; stock is {DTYPE}"
    )
    added.add_argument("--tokens", type=positive, default=48, metavar="N", help="tokens to generate per prompt (48)")
    added.add_argument("--windows", type=positive, default=16, metavar="N", help="windows of held-out text (16)")
    add_threads(added)
    add_device(added)
    add_json(added)
    added.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    from hf_accel_patch.demo import Settings, run, show

    settings = Settings(
        model=options.model,
        shape=options.shape,
        quantize=options.quantize,
        tokens=options.tokens,
        windows=options.windows,
        threads=options.threads,
        device=options.device,
    )
    result = run(settings)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        show(result)
    return 0 if result.taken_back else 1
