"""Uptraining: some steps of training that heal a model which was converted, in place, on accelerate."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.families import View, bind, check_weights, find_model
from hf_accel_patch.families.classes import takes_cache
from hf_accel_patch.families.offloading import refuse_offloaded
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.uptraining.data import Windows, cut
from hf_accel_patch.uptraining.folder import HINT, Folder
from hf_accel_patch.uptraining.lent import as_before, teacher_of
from hf_accel_patch.uptraining.result import Uptrained
from hf_accel_patch.uptraining.run import BATCH_SIZE, SAVE_EVERY, STEPS, WIDTH_RATE, Run, Settings, device_of, mean_loss
from hf_accel_patch.uptraining.shown import Show, shown

if TYPE_CHECKING:
    from accelerate import Accelerator

Parts = Literal["attention", "all"]
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # of accelerate's distributed types
SAME_LOSS = 0.01  # nats by which the same conversion may differ on another machine


def uptrain(
    model: object,
    texts: Sequence[Any] | str | Tensor,
    steps: int = STEPS,
    *,
    tokenizer: Any = None,
    batch_size: int = BATCH_SIZE,
    window: int | None = None,
    train: Parts = "attention",
    learning_rate: float | None = None,
    original: PreTrainedModel | str | os.PathLike[str] | None = None,
    distill: float = 0.0,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = SAVE_EVERY,
    progress: bool = True,
    seed: int = 0,
) -> Uptrained:
    """Train a causal LM in place for a few steps, to get back what a conversion such as `patch(model, gqa=2)` lost.

    What is trained are the parameters of the attention that require gradients: a conversion of heads leaves the rest as
    good as it was, and to leave it alone recovers more and takes less memory; or `train="all"`. AdamW with a warmup and
    a cosine, at a `learning_rate` of 0.75 / hidden size unless another is given: Adam's best rate falls with the width
    (muP, arXiv 2203.03466). It was measured at 256, on heads that had lost nearly everything; a model that has lost
    little, as by an aligned merge, wants about a tenth.

    With `accelerate launch` every process reads `batch_size` windows per step, and their gradients are averaged. Its
    mixed precision counts, and so do its gradient accumulation steps: in so many parts are the windows of a step read.

    Modes, gradients, devices and random numbers are as before afterwards, also after an exception or Ctrl-C, and the
    weights are then those of the last whole step.

    `texts`: strings, tokenized by `tokenizer` or the one at `model.name_or_path`, or tensors of token ids; cut into
    windows of `window` tokens (512, or what the model was made for). Every twentieth window, at most 16, is taken
    from the end and measured on, not trained on.

    `original`: the model before the conversion, or its path; it is measured, so that the result says which share of the
    loss is recovered. `distill`: the share of the objective that is the divergence from its predictions (KL, at
    temperature 1); the rest is cross-entropy.

    `folder`: for checkpoints, every `save_every` steps and when Ctrl-C comes; the last two are kept. With the same
    arguments a run that was killed goes on from there, and ends in the same weights as if it had not been.

    Costs, per trained parameter, 12 bytes for the gradient and the optimizer, and 4 more where weights are in bfloat16
    or float16 (see `Run`); an `original` stays in memory only for `distill`, and then runs in every step.

    Raises ValueError for impossible options and too little text, UnsupportedModel or HfAccelError for what cannot be
    trained, all before anything is touched; HfAccelError when the loss is not finite any more.

    >>> model = patch(model, gqa=GQA(2, merge="mean"))
    >>> result = uptrain(model, texts, steps=2, window=128, original=path, progress=False)
    >>> result.loss_after < result.loss_before
    True
    """
    settings = Settings(steps, batch_size, 1.0 if learning_rate is None else learning_rate, distill, seed)
    if train not in get_args(Parts):
        raise ValueError(f"train={train!r}; give one of {', '.join(get_args(Parts))}")
    if save_every < 1:
        raise ValueError(f"save_every={save_every}; give a whole number from 1 on")
    if distill and original is None:
        raise ValueError(f"distill={distill} needs the original model: give original=")
    view = bind(model)
    parameters = _trainable(view, train)
    if learning_rate is None:
        settings = replace(settings, learning_rate=WIDTH_RATE / view.model.get_input_embeddings().weight.shape[1])
    if original is not None:
        _check_vocabulary(original, view)
    windows = cut(texts, view.model, tokenizer or view.tokenizer, window)
    accelerator = _accelerator()
    with ExitStack() as stack:
        stack.enter_context(as_before(view.model, parameters, accelerator))
        loss_original, teacher = None, None
        if original is not None:
            with ExitStack() as measured:
                teacher = measured.enter_context(teacher_of(original, view.model))
                loss_original = mean_loss(accelerator, teacher, windows.held_out)
                if distill:
                    stack.push(measured.pop_all())
                else:
                    teacher = None
        run = Run(accelerator, view.model, parameters, settings)
        run.synchronize()
        loss_before = mean_loss(accelerator, view.model, windows.held_out)
        checkpoints = _folder(folder, run, windows) if folder is not None else None
        seconds = 0.0
        if checkpoints is not None and (saved := checkpoints.latest()) is not None:
            if abs(saved.facts["loss_before"] - loss_before) > SAME_LOSS and not run.equals(saved.tensors):
                raise HfAccelError(
                    f"the checkpoints in {folder} are of a model with a loss of {saved.facts['loss_before']:.3f}, "
                    f"that of this one is {loss_before:.3f}",
                    HINT,
                )
            run.restore(saved.tensors, saved.facts)
            seconds, loss_before = saved.facts["seconds"], saved.facts["loss_before"]
        begun = run.done
        with shown(steps, begun, progress and accelerator.is_main_process) as show:
            seconds = _train(run, windows, teacher, checkpoints, save_every, (seconds, loss_before), show)
        loss_after = mean_loss(accelerator, view.model, windows.held_out)
    return Uptrained(
        model=view.subject,
        steps=steps,
        resumed_at=begun,
        tokens=steps * batch_size * accelerator.num_processes * windows.training.shape[1],
        seconds=seconds,
        processes=accelerator.num_processes,
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        held_out_tokens=windows.held_out[:, 1:].numel(),
        loss_before=loss_before,
        loss_after=loss_after,
        loss_original=loss_original,
    )


def _accelerator() -> Accelerator:
    """What accelerate finds: one process, or those of `accelerate launch`. Raises HfAccelError for sharded ones."""
    from accelerate import Accelerator

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # which accelerate overlooks where there is no accelerator
    found = Accelerator(cpu=True) if several and not torch.accelerator.is_available() else Accelerator()
    if found.distributed_type.value in SHARDED:
        raise HfAccelError(
            f"uptrain() trains whole copies of a model, not the shards of {found.distributed_type.value}",
            "run accelerate launch without it",
        )
    return found


def _trainable(view: View, train: Parts) -> dict[str, nn.Parameter]:
    """The parameters to train, by name. Raises UnsupportedModel or HfAccelError where there are none, and for quantized
    weights: nothing of what they lose would be trained back."""
    check_weights(view)
    refuse_offloaded(view, "uptrain")
    ours = any(isinstance(module, QuantizedModule) for module in view.model.modules())
    if ours or getattr(view.model, "is_quantized", False):
        raise HfAccelError(f"the weights of {view.subject} are quantized", "uptrain the float model, then quantize it")
    found = {name: p for name, p in view.model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if not found:
        raise HfAccelError(f"no parameter of {view.subject} requires gradients", "call model.requires_grad_(True)")
    if train == "attention":
        inside = {id(parameter) for module in _caching_modules(view) for parameter in module.parameters()}
        found = {name: parameter for name, parameter in found.items() if id(parameter) in inside}
    if not found:
        raise HfAccelError(f"no parameter of an attention of {view.subject} requires gradients", "give train='all'")
    return found


def _caching_modules(view: View) -> list[nn.Module]:
    """The innermost modules that are handed the cache: the attention of every layer, or what stands in its place."""
    taking = {module for _, module in view.named_modules() if any(map(takes_cache, _classes(module)))}
    return [module for module in taking if not taking & set(module.modules()) - {module}]


def _classes(module: nn.Module) -> list[Any]:
    """Its class and those beneath it, for a patch may have put one on top."""
    return [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module)]


def _check_vocabulary(original: Any, view: View) -> None:
    """Raise ValueError for an original that is another kind of model, or the model itself."""
    if isinstance(original, str | os.PathLike):
        config = AutoConfig.from_pretrained(original)
    elif (found := find_model(original)) is view.model:
        raise ValueError("original= is the very model that is trained; give a copy from before the conversion")
    else:
        config = found.config
    theirs, ours = config.get_text_config(decoder=True).vocab_size, view.config.vocab_size
    if theirs != ours:
        raise ValueError(f"original= has a vocabulary of {theirs} tokens, the model one of {ours}")


def _train(
    run: Run,
    windows: Windows,
    teacher: nn.Module | None,
    checkpoints: Folder | None,
    save_every: int,
    so_far: tuple[float, float],
    show: Show,
) -> float:
    """The steps that are left; returns the seconds of all of them."""
    settings, accelerator, device = run.settings, run.accelerator, device_of(run.model)
    begun, start = run.done, time.monotonic() - so_far[0]

    def save() -> None:
        if checkpoints is not None and accelerator.is_main_process:
            tensors, facts = run.state()
            checkpoints.save(tensors, facts | {"seconds": time.monotonic() - start, "loss_before": so_far[1]})

    run.model.train()
    try:
        for number in range(begun, settings.steps):
            ids = windows.batch(number, settings.batch_size * accelerator.num_processes, settings.seed)
            ids = ids.view(accelerator.num_processes, settings.batch_size, -1)[accelerator.process_index]
            show(number + 1, run.step(number, ids.to(device), teacher))
            if run.done % save_every == 0 or run.done == settings.steps:
                save()
    except KeyboardInterrupt:
        if run.done > begun:
            save()
        raise
    accelerator.wait_for_everyone()
    return time.monotonic() - start


def _folder(path: str | os.PathLike[str], run: Run, windows: Windows) -> Folder:
    settings = run.settings
    same: dict[str, Any] = {name: getattr(settings, name) for name in ("steps", "learning_rate", "distill")}
    same |= {"seed": settings.seed, "windows per step": settings.batch_size * run.accelerator.num_processes}
    same |= {"texts": windows.digest(), "window": windows.training.shape[1]}
    shapes = {name: [str(p.dtype), *p.shape] for name, p in run.parameters.items()}
    return Folder(Path(path), same | {"parameters": shapes})
