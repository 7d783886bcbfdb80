"""`python -m hf_accel_patch run SCRIPT ARGUMENTS`: what the parser says of it. What names a program never comes here:
`cli.main` hands it to running.py, because its arguments are its own."""

from __future__ import annotations

import argparse
from typing import Any

from hf_accel_patch.environment import ALLOWED, PATCH, variable

USAGE = "hf-accel-patch run SCRIPT [ARGUMENT ...]\n       hf-accel-patch run -m MODULE [ARGUMENT ...]"


def add_run(commands: Any) -> None:
    """Add the command."""
    variables = "\n".join(f"  {variable(keyword):<24}{words}" for keyword, (_, words) in ALLOWED.items())
    commands.add_parser(
        "run",
        usage=USAGE,
        help="run a script or a module unchanged, with every causal LM patched as variables say",
        description=f"Runs a program as python does, with {PATCH}=1 unless that is set.",
        epilog=f"variables, in the spelling of the keywords of patch():\n{variables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).set_defaults(command=_nothing)


def _nothing(options: argparse.Namespace) -> None:
    raise ValueError(f"run: no script or module was named; usage: {' '.join(USAGE.split())}")
