"""One run: the weights, their optimizer and the steps, on accelerate."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_accel_patch.errors import HfAccelError

if TYPE_CHECKING:
    from accelerate import Accelerator

STEPS, BATCH_SIZE, WIDTH_RATE, SAVE_EVERY = 150, 2, 0.75, 50  # where nothing else is asked for
WARMUP = 15  # one of so many steps
BETAS, LARGEST_NORM = (0.9, 0.95), 1.0  # of AdamW; of the gradient


@dataclass(frozen=True)
class Settings:
    """The numbers of a run. Raises ValueError for impossible ones."""

    steps: int
    batch_size: int  # windows per process and step
    learning_rate: float
    distill: float  # share of the objective
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give a whole number from 1 on")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}; give a positive number")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill={self.distill}; give a share between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step: up in a line, then down along a cosine."""
        warmup = self.steps // WARMUP
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / (self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Run:
    """What changes in the course of a run.

    Weights in bfloat16 or float16 are too coarse for small updates: they are rounded from float32 masters, which the
    optimizer moves. It takes 8 bytes per trained parameter, the masters of such weights 4 more, and gradients 4.
    """

    def __init__(
        self, accelerator: Accelerator, model: PreTrainedModel, parameters: dict[str, nn.Parameter], settings: Settings
    ) -> None:
        self.accelerator, self.model, self.parameters, self.settings = accelerator, model, parameters, settings
        self.masters = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in parameters.items()
        }
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=0.0, betas=BETAS, weight_decay=0.0)
        half = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        own = torch.amp.GradScaler(accelerator.device.type, init_scale=1024.0, enabled=half)
        self.scaler = accelerator.scaler or own  # one that is not enabled does nothing
        self.done = 0  # whole steps

    def step(self, number: int, ids: Tensor, teacher: nn.Module | None) -> float:
        """One update from windows [B, W] of this process; returns the mean objective of all processes.

        The gradients of the processes are averaged here, not by a wrapper around the model: the model stays as it is,
        and experts that a step does not reach are no special case.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(number)
        torch.manual_seed((self.settings.seed * 1_000_003 + number) * 1024 + self.accelerator.process_index)
        mean = torch.zeros((), device=ids.device)
        for part in ids.chunk(self.accelerator.gradient_accumulation_steps):
            with self.accelerator.autocast():
                objective = self._objective(part, teacher) * (len(part) / len(ids))
            self.scaler.scale(objective).backward()
            mean += objective.detach()
        for name, parameter in self.parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            self.masters[name].grad = self._mean(gradient.float())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.masters.values(), LARGEST_NORM)
        value = self._mean(mean).item()
        if not self.scaler.is_enabled() and not math.isfinite(norm.item() + value):
            raise HfAccelError(
                f"the loss is {value} and its gradient {norm.item()} after {number} steps",
                f"take a learning_rate below {self.settings.learning_rate}",
            )
        with _uninterrupted(), torch.no_grad():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._write()
            self.optimizer.zero_grad()
            self.done = number + 1
        return value

    def _objective(self, ids: Tensor, teacher: nn.Module | None) -> Tensor:
        scores = logits(self.model, ids)
        loss = cross_entropy(scores, ids).mean()
        share = self.settings.distill
        if teacher is None or not share:
            return loss
        with torch.no_grad():
            target = logits(teacher, ids).log_softmax(-1)
        ours = scores.log_softmax(-1)
        divergence = F.kl_div(ours.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)
        return (1 - share) * loss + share * divergence

    def _mean(self, tensor: Tensor) -> Tensor:
        """Of all processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor, reduction="mean")

    def _write(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a run needs to go on, as tensors on the CPU and as plain data."""
        tensors = {f"weight.{name}": master.detach().cpu() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state[master].items():
                tensors[f"{key}.{name}"] = value.cpu()
        return tensors, {"step": self.done, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from such a state."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"weight.{name}"])
        kept: dict[int, dict[str, Tensor]] = {}
        for place, name in enumerate(self.masters):
            kept[place] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": kept})
        self.scaler.load_state_dict(facts["scaler"])
        self.done = facts["step"]
        self._write()

    def equals(self, tensors: dict[str, Tensor]) -> bool:
        """Whether the model has the weights of such a state, as far as its dtype tells them apart."""
        return all(
            torch.equal(parameter.detach().cpu(), tensors[f"weight.{name}"].to(parameter.dtype))
            for name, parameter in self.parameters.items()
        )

    def synchronize(self) -> None:
        """Give every process the weights of the first one."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for parameter in self.model.parameters():
                broadcast(parameter.detach())


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 [B, W, V]."""
    return model(input_ids=ids, use_cache=False, return_dict=True).logits.float()


def cross_entropy(scores: Tensor, ids: Tensor) -> Tensor:
    """Nats of each token but the first of each window, [B * (W - 1)]."""
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def mean_loss(accelerator: Accelerator, model: PreTrainedModel, windows: Tensor) -> float:
    """Nats per token of windows [windows, W], spread over the processes. The model is in eval mode meanwhile."""
    device = device_of(model)
    total = torch.zeros(2, device=device)
    with modes_kept(model):
        model.eval()
        for row in windows[accelerator.process_index :: accelerator.num_processes]:
            ids = row[None].to(device)
            with accelerator.autocast():
                losses = cross_entropy(logits(model, ids), ids)
            total += torch.stack([losses.sum(), losses.new_tensor(losses.numel())])
    loss, count = accelerator.reduce(total, reduction="sum").tolist()
    return loss / count


def device_of(model: PreTrainedModel) -> torch.device:
    """Where it takes token ids."""
    return model.get_input_embeddings().weight.device


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Behind the block every module trains or evaluates as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect behind the block: weights are never left between two steps. Only the main thread gets it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])
