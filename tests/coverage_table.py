"""Writes docs/coverage.md: what `patch` does with every causal LM type of transformers.

    python tests/coverage_table.py > docs/coverage.md
    python tests/coverage_table.py --write

Each type is built in tiny form from its configuration class, patched and taken back. Nothing is measured in seconds, so
two runs with the same versions give the same page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

for _name in [name for name in os.environ if name.startswith("HF_ACCEL")]:
    del os.environ[_name]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
sys.path.append(str(Path(__file__).parent.parent))  # a checkout that is not installed

import torch
import transformers
from cases import CLASS_NAMES, TYPES, build, entry, logits, prompt
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_accel_patch import HfAccelError, Quantize, patch, report, unpatch

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
LEAST_ELEMENTS = 64 * 64  # smaller parameters outside linear layers are decays, mixing weights, biases per head


@dataclass(frozen=True)
class Row:
    """What is known of one model type. `attention` and `quantized` are "on" and the covered weights, or a reason."""

    model_type: str
    class_name: str
    unbuilt: str = ""  # why there is no model to patch
    attention: str = ""
    refused: str = ""  # why quantize is not possible
    weights: tuple[int, int] = (0, 0)  # quantized, of all linear-like weights
    share: float = 0.0  # of all parameters, in elements
    left: str = ""  # the classes of the linear-like weights that stay

    def line(self) -> str:
        if self.unbuilt:
            cells = (self.model_type, self.class_name, self.unbuilt, "", "", "")
        elif self.refused:
            cells = (self.model_type, self.class_name, self.attention, f"none: {self.refused}", "", self.left)
        else:
            done, total = self.weights
            quantized = f"{done} of {total}"
            cells = (self.model_type, self.class_name, self.attention, quantized, f"{self.share:.0%}", self.left)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def row(model_type: str) -> Row:
    """Build one type, patch it with and without quantization, take the patches off."""
    class_name = CLASS_NAMES[model_type]
    stage = "not built"
    try:
        model = build(model_type)
        stage = "stock fails"
        logits(model, prompt(24))
    except Exception as error:  # whatever a type raises that needs more than a configuration
        return Row(model_type, class_name, unbuilt=f"{stage}: {one_line(error)}")
    try:
        attention = entry(report(patch(model)).to_dict(), "attention").get("reason", "on")
        unpatch(model)
    except HfAccelError as error:
        attention = f"refused: {one_line(error)}"
    matrices, parameters = linear_like(model), {id(p): p.numel() for p in model.parameters()}
    try:
        patch(model, quantize=Quantize("int8", originals="keep"))
    except HfAccelError as error:
        return Row(model_type, class_name, attention=attention, refused=one_line(error), left=kinds(matrices, set()))
    done = parameters.keys() - {id(p) for p in model.parameters()}
    unpatch(model)
    share = sum(parameters[key] for key in done) / sum(parameters.values())
    counts = len(done & matrices.keys()), len(matrices)
    return Row(model_type, class_name, "", attention, "", counts, share, kinds(matrices, done))


def linear_like(model: PreTrainedModel) -> dict[int, str]:
    """The matrices that activations are multiplied by, and stacks of them, each once: identity -> class of the module.
    Outside linear layers these are all large parameters of two or more dimensions, but for tables and convolutions."""
    found: dict[int, str] = {}
    for module in model.modules():
        linear, other = isinstance(module, nn.Linear | Conv1D), isinstance(module, nn.Embedding | _ConvNd)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2 and (linear or (not other and parameter.numel() >= LEAST_ELEMENTS)):
                found.setdefault(id(parameter), type(module).__name__)
    return found


def kinds(matrices: dict[int, str], done: set[int]) -> str:
    names = [name for key, name in matrices.items() if key not in done]
    return ", ".join(f"{name} ({names.count(name)})" for name in sorted(set(names)))


def one_line(error: Exception) -> str:
    text = " ".join(str(error).partition("\n\nhint:")[0].split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def page(rows: list[Row]) -> str:
    built = [each for each in rows if not each.unbuilt]
    on = [each for each in built if each.attention == "on"]
    quantized = [each for each in built if not each.refused]
    whole = [each for each in quantized if each.weights[0] == each.weights[1]]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    return "\n".join(
        [
            "# Coverage",
            "",
            f"What `patch` does with the {len(rows)} causal LM types of {versions}.",
            "Written by `python tests/coverage_table.py --write`; each type is built in tiny form with random weights.",
            "",
            "| | types |",
            "|---|---|",
            f"| known to transformers | {len(rows)} |",
            f"| built here and run by stock | {len(built)} |",
            f"| attention is ours | {len(on)} |",
            f"| attention stays, with its reason | {len(built) - len(on)} |",
            f"| `quantize` finds weights | {len(quantized)} |",
            f"| `quantize` takes every linear-like weight | {len(whole)} |",
            "",
            "* attention: `on`, or why it stays as it is.",
            "* quantized: of all linear-like weights (of `nn.Linear` and `Conv1D`, and matrices and stacks of experts "
            "that are parameters of other modules; tied ones count once), how many int8 takes. int4 takes the same "
            "ones where the input features are a multiple of 32.",
            "* share: of all parameters of the tiny model, embeddings among them, whose vocabulary is 256.",
            "* left: the classes whose linear-like weights stay in floating point.",
            "",
            "| model type | class | attention | quantized | share | left |",
            "|---|---|---|---|---|---|",
            *(each.line() for each in rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md instead of printing it")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for model_type in tqdm(TYPES, desc="types", unit="type", file=sys.stderr):
        with contextlib.redirect_stdout(io.StringIO()):  # Reformer prints
            rows.append(row(model_type))
    text = page(rows)
    if arguments.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
