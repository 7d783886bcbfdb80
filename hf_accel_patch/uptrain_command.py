"""`python -m hf_accel_patch uptrain MODEL --gqa N --text FILES`, in one process or under `accelerate launch -m`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hf_accel_patch.cli import add_json, dtype, positive
from hf_accel_patch.uptraining import Parts, uptrain
from hf_accel_patch.uptraining.run import BATCH_SIZE, SAVE_EVERY, STEPS, Settings


def add_uptrain(commands: Any) -> None:
    """Add the command."""
    added = commands.add_parser(
        "uptrain", help="train a checkpoint for some steps, after giving it fewer key/value heads if asked to"
    )
    added.add_argument("model", metavar="PATH_OR_ID")
    added.add_argument("--text", nargs="+", required=True, metavar="FILE", help="what to train on, as plain text")
    added.add_argument("--gqa", type=positive, metavar="N", help="convert to N key/value heads first")
    added.add_argument("--merge", metavar="HOW", help="how heads become one (with --gqa): aligned, mean, first, random")
    added.add_argument("--output", metavar="FOLDER", help="for the trained model (default: its name with -gqaN behind)")
    added.add_argument("--steps", type=positive, default=STEPS, metavar="N", help=f"({STEPS})")
    added.add_argument(
        "--batch-size", type=positive, default=BATCH_SIZE, metavar="N", help=f"windows per step ({BATCH_SIZE})"
    )
    added.add_argument("--window", type=positive, metavar="N", help="tokens (512, or what the model was made for)")
    added.add_argument(
        "--train", choices=get_args(Parts), default="attention", help="which parameters (those of the attention)"
    )
    added.add_argument("--learning-rate", type=float, metavar="X", help="(0.75 / hidden size)")
    added.add_argument(
        "--original",
        metavar="PATH_OR_ID",
        help="the model before it was converted, compared with (--gqa: MODEL)",
    )
    added.add_argument(
        "--distill", type=float, default=0.0, metavar="SHARE", help="share of the original's predictions in the aim (0)"
    )
    added.add_argument(
        "--checkpoints",
        metavar="FOLDER",
        help="from where a killed run goes on (default: OUTPUT.checkpoints, till done)",
    )
    added.add_argument(
        "--save-every", type=positive, default=SAVE_EVERY, metavar="N", help=f"steps between them ({SAVE_EVERY})"
    )
    added.add_argument(
        "--dtype", type=dtype, default="auto", help="of the weights while they are trained (as in the checkpoint)"
    )
    added.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the text (0)")
    add_json(added)
    added.set_defaults(command=_uptrain)


def _uptrain(options: argparse.Namespace) -> None:
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_accel_patch import patch, plan
    from hf_accel_patch.uptraining.folder import clear

    rate = 1.0 if options.learning_rate is None else options.learning_rate
    Settings(options.steps, options.batch_size, rate, options.distill, options.seed)
    original = options.original or (options.model if options.gqa else None)
    if options.distill and original is None:
        raise ValueError("--distill needs --gqa or --original, the model to learn from")
    if options.merge and not options.gqa:
        raise ValueError("--merge needs --gqa")
    name = Path(options.model).resolve().name
    output = Path(options.output or (f"{name}-gqa{options.gqa}" if options.gqa else f"{name}-uptrained"))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"the output folder {output} is not empty; give another --output")
    texts = read_texts(options.text)
    keywords = _keywords(options)
    plan(options.model, **keywords)  # raises for what is no model and for heads that do not fit; reads no weights
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    if options.gqa:
        patch(model, **keywords)
    folder = Path(options.checkpoints or f"{output}.checkpoints")
    done = uptrain(
        model,
        texts,
        options.steps,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        window=options.window,
        train=options.train,
        learning_rate=options.learning_rate,
        original=original,
        distill=options.distill,
        folder=folder,
        save_every=options.save_every,
        seed=options.seed,
    )
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        if not options.checkpoints:
            clear(folder)
        print(
            json.dumps(done.to_dict() | {"output": str(output)}, indent=2)
            if options.json
            else f"{done}\nsaved in {output}"
        )
    state.wait_for_everyone()
    state.destroy_process_group()


def _keywords(options: argparse.Namespace) -> dict[str, Any]:
    """Of `patch`: what generation would be faster with is left out."""
    keywords: dict[str, Any] = {"cache": False, "linear": False}
    if options.gqa:
        from hf_accel_patch import GQA

        how = {"merge": options.merge} if options.merge else {}
        keywords["gqa"] = GQA(options.gqa, originals="discard", **how)
    return keywords


def read_texts(names: Sequence[str]) -> list[str]:
    """The texts of files. Raises ValueError for one that is no text or empty, OSError for one that is not there."""
    texts = []
    for name in names:
        try:
            texts.append(Path(name).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is no text in UTF-8: {error.reason} at byte {error.start}") from error
        if not texts[-1].strip():
            raise ValueError(f"{name} holds no text")
    return texts
