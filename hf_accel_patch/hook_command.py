"""`python -m hf_accel_patch hook install | remove | status`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hf_accel_patch import hook
from hf_accel_patch.cli import add_json
from hf_accel_patch.environment import PATCH


def add_hook(commands: Any) -> None:
    """Add the command."""
    added = commands.add_parser(
        "hook",
        help=f"have every program of this environment find {PATCH}",
        description=f"A .pth file in site-packages: with {PATCH}=1, programs are patched that never import this "
        "package. Without it, it does nothing.",
    )
    added.add_argument("action", choices=("install", "remove", "status"))
    add_json(added)
    added.set_defaults(command=_hook)


def _hook(options: argparse.Namespace) -> None:
    if options.action == "remove":
        was, now = hook.remove(), hook.status()
        said = "there was no hook" if was.installed == "no" else f"removed {was.path}"
    else:
        now = hook.install() if options.action == "install" else hook.status()
        said = {
            "yes": f"the hook is installed: {now.path}",
            "no": "the hook is not installed",
            "other": f"the hook is of another version: {now.path}; install it again",
        }[now.installed]
    print(json.dumps(now.to_dict()) if options.json else said)
