"""Imports point one way, and only families/ knows the name of a model or of a module."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parent.parent / "hf_accel_patch"
ROOMS = (
    "errors",
    "environment",
    "logs",
    "display",
    "comparison",
    "compat",
    "journal",
    "kernels",
    "ops",
    "families",
    "plan",
    "report",
    "passes",
    "as_stored",
    "reading",
    "loading",
    "foreign_layers",
    "planning",
    "foreign_checkpoints",
    "options",
    "undoing",
    "api",
    "checkpoints",
    "uptraining",
)
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[1] for name in names if name.startswith("hf_accel_patch.")}


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) in ROOMS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_one_way(path):
    allowed = ROOMS[: ROOMS.index(room(path)) + 1]
    assert imported(path) <= set(allowed)


@pytest.mark.parametrize("path", [path for path in FILES if room(path) in ("kernels", "ops")], ids=lambda p: p.name)
def test_ops_import_torch_only(path):
    assert "transformers" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_families_name_models_and_modules(path):
    if room(path) == "families":
        return
    text = path.read_text()
    strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert not strings & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not re.findall(r"\w+_proj\b", text)


def test_importing_patches_nothing_and_brings_no_optional_package():
    code = (
        "import sys, transformers.modeling_utils as m, transformers.masking_utils;"
        "before, loaded = dict(vars(m.PreTrainedModel)), set(sys.modules); import hf_accel_patch;"
        "assert before == dict(vars(m.PreTrainedModel));"
        "optional = {'triton', 'bitsandbytes', 'flash_attn', 'optimum', 'matplotlib', 'peft', 'rich'};"
        "assert not optional & (set(sys.modules) - loaded), optional & (set(sys.modules) - loaded)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_an_import_before_transformers_waits_and_leaves():
    code = (
        "import sys, hf_accel_patch;"
        "waiting = lambda: [each for each in sys.meta_path if type(each).__module__.startswith('hf_accel_patch')];"
        "assert len(waiting()) == 1 and 'torch' not in sys.modules;"
        "import transformers.quantizers.auto as auto;"
        "assert not waiting() and 'hf_accel_patch' in auto.AUTO_QUANTIZER_MAPPING;"
        "assert 'hf_accel_patch.loading' not in sys.modules;"
        "import hf_accel_patch.loading;"
        "hf_accel_patch.patch;"
        "assert auto.AUTO_QUANTIZER_MAPPING['hf_accel_patch'] is hf_accel_patch.loading.HfAccelQuantizer"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
