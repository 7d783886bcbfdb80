"""What tests of whole programs share: the bundled model as programs load it, training, and processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_accel_patch

ROOT = Path(hf_accel_patch.__file__).parent.parent
BUNDLED = ROOT / "hf_accel_patch" / "models" / "code-llama-8m"
LAYERS = 8  # of the bundled model
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '# ' + message.content + '\\n' }}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'def ' }}{% endif %}"
)


def bundled(dtype: torch.dtype = torch.float32) -> Any:
    """The trained model that comes with the package. In float32 its greedy tokens have no near ties."""
    return transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=dtype)


def chat_checkpoint(folder: Path) -> Path:
    """A copy of the bundled checkpoint with a chat template, which says that its weights are float32."""
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def trained(model: Any, windows: list[dict[str, Any]], folder: Path, **arguments: Any) -> tuple[Any, list[float]]:
    """The trainer after some steps on the CPU, and the losses that it logged. `arguments`: of TrainingArguments."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        lr_scheduler_type="constant",
    )
    settings |= arguments
    trainer = transformers.Trainer(model, transformers.TrainingArguments(**settings), train_dataset=windows)
    trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def environment(**variables: str) -> dict[str, str]:
    """Variables of a process that can import the package, whatever the variables of this process ask of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_ACCEL")}
    return kept | {"PYTHONPATH": str(ROOT)} | variables


def program(*arguments: object, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run python with these arguments and variables."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(**variables))
