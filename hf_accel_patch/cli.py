"""The command line: `python -m hf_accel_patch COMMAND`, or `hf-accel-patch COMMAND` where it is installed."""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from hf_accel_patch import running
from hf_accel_patch.errors import HfAccelError

BAD_INPUT = 2  # the exit code of argparse for bad arguments, and ours for what the package refuses


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {_one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What the package refuses becomes one line on stderr and code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if running.names_program(arguments):
        return running.run(arguments[1:])
    with uncollected():
        options = parser().parse_args(arguments)
    try:
        with quiet():
            return options.command(options) or 0
    except (HfAccelError, ValueError, TypeError, OSError) as error:
        print(f"hf-accel-patch: {_one_line(str(error) or type(error).__name__)}", file=sys.stderr)
        return BAD_INPUT


def parser() -> argparse.ArgumentParser:
    """The parser with every command: each adds itself and sets `command`, a function of the parsed options."""
    from hf_accel_patch.bench_command import add_bench
    from hf_accel_patch.demo_command import add_demo
    from hf_accel_patch.hook_command import add_hook
    from hf_accel_patch.plan_command import add_plan
    from hf_accel_patch.run_command import add_run
    from hf_accel_patch.uptrain_command import add_uptrain
    from hf_accel_patch.verify_command import add_verify

    found = Parser(prog="hf-accel-patch", description="Makes Hugging Face causal LMs faster and smaller in place.")
    commands = found.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_demo, add_plan, add_verify, add_bench, add_run, add_uptrain, add_hook):
        add(commands)
    return found


def add_passes(added: argparse.ArgumentParser) -> None:
    """The options that become keywords of `patch`, in its spellings."""
    asked = added.add_argument_group("passes", "the keywords of patch()")
    for name, metavar, what in (
        ("gqa", "N", "key/value heads"),
        ("rope", "TYPE:FACTOR", "positions: linear, dynamic, yarn, llama3 or self-extend"),
        ("quantize", "SCHEME", "weights in int8, int4, nf4 or llm.int8"),
        ("cache", "KIND", "keys and values in int8 or int4, or sinks:WINDOW"),
        ("speculative", "METHOD", "drafts: ngram or self"),
        ("context", "TOKENS", "positions for texts of so many tokens"),
    ):
        asked.add_argument(f"--{name}", metavar=metavar, help=f"{what} (default: as they are)")
    for name in ("attention", "linear", "cache"):
        asked.add_argument(f"--no-{name}", dest=f"no_{name}", action="store_true", help=f"leave this pass out: {name}")


def keywords(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `patch` that were asked for. Raises ValueError."""
    from hf_accel_patch.options import KEYWORDS, from_text

    given = {name: getattr(options, name, None) for name in KEYWORDS}
    asked = {name: from_text(name, text) for name, text in given.items() if text is not None}
    off = {name for name in KEYWORDS if getattr(options, f"no_{name}", False)}
    if both := sorted(off & asked.keys()):
        raise ValueError(f"--{both[0]} and --no-{both[0]} exclude each other")
    return asked | {name: False for name in off}


def add_device(added: argparse.ArgumentParser) -> None:
    """The option that says where a model runs."""
    added.add_argument("--device", type=device, default="cpu", help="where models are loaded (cpu)")


def add_threads(added: argparse.ArgumentParser) -> None:
    """The option that says how many cores a measurement takes."""
    added.add_argument("--threads", type=positive, metavar="N", help="threads of PyTorch (default: its own choice)")


def add_json(added: argparse.ArgumentParser) -> None:
    """The option of what programs read."""
    added.add_argument("--json", action="store_true", help="print JSON, for programs")


def device(text: str) -> str:
    """A device of this machine, as an argument."""
    import torch

    try:
        kind = torch.device(text).type
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: {str(error).splitlines()[0]}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r}: PyTorch finds no CUDA device here")
    return text


def dtype(text: str) -> str:
    """A floating-point dtype by its name in PyTorch, or "auto", as an argument."""
    import torch

    found = getattr(torch, text, None)
    if text != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype; give bfloat16, float16, float32 or auto")
    return text


def positive(text: str) -> int:
    """A whole number from 1 on, as an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which takes a sixth of the time of many imports."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars of transformers, which are as they were afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _one_line(text: str) -> str:
    return " ".join(text.split())
