"""patch, unpatch, patched, plan, report: the whole flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from os import PathLike
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_accel_patch.errors import AlreadyPatched, NotReversible
from hf_accel_patch.families import View, bind, check_weights, dtype_of, find_model, weight_bytes
from hf_accel_patch.journal import Journal
from hf_accel_patch.logs import get_logger
from hf_accel_patch.options import context_of, count, parse
from hf_accel_patch.passes import attention, self_extend_cache
from hf_accel_patch.plan import Pass, Plan, Step, build, described, inspected, on_already
from hf_accel_patch.planning.budget import Budget, fitted
from hf_accel_patch.planning.memory import Estimates, tokens_of
from hf_accel_patch.planning.overview import overview
from hf_accel_patch.planning.stored import Opened, opened
from hf_accel_patch.report import Report

logger = get_logger(__name__)
T = TypeVar("T")
attention.register()  # here, because a pickled model that is read brings this module along, and the functions are its
self_extend_cache.register()
STATE = "_hf_accel_patch"  # the attribute under which a patched model keeps what undo needs


@dataclass(frozen=True)
class Sample:
    """Where a parameter was, and in which dtype: tells whether the model has been moved or cast since."""

    module: torch.nn.Module
    name: str
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def of(model: PreTrainedModel) -> Sample | None:
        """None where weights are on several devices, or none is left."""
        if len({tensor.device for tensor in chain(model.parameters(), model.buffers())}) != 1:
            return None
        for module in model.modules():
            for name, held in module._parameters.items():
                if held is not None and held.is_floating_point():
                    return Sample(module, name, held.device, held.dtype)
        return None

    def moved(self) -> tuple[torch.device, torch.dtype] | None:
        """Where it is now, if that is elsewhere."""
        held = self.module._parameters.get(self.name)
        same = held is None or (held.device, held.dtype) == (self.device, self.dtype)
        return None if held is None or same else (held.device, held.dtype)


@dataclass
class State:
    """What a patched model carries. It refers to parts of the model only, so a deep copy carries its own."""

    passes: tuple[Pass, ...]
    journal: Journal
    report: Report
    source: dict[str, Any] = field(default_factory=dict)  # keywords with which its checkpoint was read
    asked: tuple[Pass, ...] = ()  # `passes`, or the budget that has chosen them
    lenient: bool = False  # whether HF_ACCEL_PATCH asked for it
    sample: Sample | None = None  # of its parameters as they were when it had been patched


def patch(model: T, **options: Any) -> T:
    """Make a loaded causal LM faster and smaller, in place; returns the object that it was given.

    `model`: a transformers causal LM, or a PEFT model, a compiled module or a pipeline around one. With no options only
    exact passes run. `quantize="int8"` or `"int4"` or a `Quantize`; `attention=False` or `linear=False` switches a pass
    off. `context=16384` scales positions as texts of so many tokens need it. `budget="6GiB"` chooses, of what is not
    given, the least lossy schemes of weights and cache with which these and the activations of a text of `context`
    tokens fit, for `batch` sequences, where `generate` may read it in pieces; HfAccelError names the smallest size
    where none does.

    Raises ValueError or TypeError for impossible options, UnsupportedModel for what is no causal LM or cannot have a
    pass that was asked for, AlreadyPatched if it is patched with other options: all before anything is touched.
    """
    _patch(model, parse(options))
    return model


def unpatch(model: T, *, reload: bool = False) -> T:
    """Take the patch off, bit for bit; a model that is not patched is returned as it is.

    Raises NotReversible, before anything is undone, where the originals of weights were discarded. With
    `reload`, they are read again from the checkpoint at `model.name_or_path`.
    """
    found = find_model(model)
    state: State | None = vars(found).get(STATE)
    if state is None:
        return model
    lost = state.journal.discarded
    if lost and not reload:
        raise NotReversible(
            f"the originals of {len(lost)} weights were discarded ({lost[0]}, ...)",
            "patch with originals='keep' in Quantize or GQA to keep them in memory, or unpatch(model, reload=True) to "
            "read them from the checkpoint again",
        )
    restored = _read_again(found, state) if lost else []
    moved = state.sample.moved() if state.sample is not None else None
    state.journal.undo()
    for gone, parameter in zip(state.journal.gone, restored, strict=True) if lost else ():
        held = gone.module._parameters
        others = {key: value for key, value in held.items() if key != gone.name}
        held.clear()  # a weight comes before its bias
        held.update({gone.name: parameter} | others)
    del vars(found)[STATE]
    if moved is not None:
        torch.nn.Module.to(found, *moved)  # and so is what came back
    return model


@contextmanager
def patched(model: T, **options: Any) -> Iterator[T]:
    """Patched inside the `with` block, as before after it, also when the block raises. Originals are kept, so a budget
    is met by the cache alone."""
    already = STATE in vars(find_model(model))
    _patch(model, parse(options, keep_originals=True))
    try:
        yield model
    finally:
        if not already:
            unpatch(model)


def plan(model: object, *, batch: int | None = None, **options: Any) -> Plan:
    """What `patch` would do, without doing it, and the memory that it would take for `batch` sequences (1) of `context`
    tokens (as many as the model was made for).

    `model`: as for `patch`, or the path or id of a checkpoint, of which only the configuration is read, and the names
    in its files where it is quantized. Of a patched model, without options or with those that it has: what is on.

    Raises what `patch` raises: AlreadyPatched for a patched model with other options.
    """
    count("batch", batch)
    asked = parse(options | ({} if batch is None or options.get("budget") is None else {"batch": batch}))
    here = (
        opened(model, AutoConfig.from_pretrained(model)) if isinstance(model, str | PathLike) else Opened(bind(model))
    )
    here.check(asked)
    state: State | None = vars(here.view.model).get(STATE)
    if state is not None:
        _check_same(here.view.model, state, asked if options else state.asked)
        asked = state.asked
    budget = asked[0] if isinstance(asked[0], Budget) else None
    tokens = tokens_of(here.view, context_of(asked)) if budget is None else budget.counted(here.view)
    estimates = Estimates(here.view, tokens, batch or (budget.batch if budget else 1), here.skeleton)
    if state is not None:
        passes, decided = state.passes, on_already(here.view, state.passes, state.report.rows)
    else:
        passes = fitted(here.view, asked, estimates, quantized=here.comes_quantized)
        decided = here.told(build(here.view, passes))
    memory = overview(estimates, passes, None if budget is None else budget.limit)
    return dataclasses.replace(decided, memory=memory)


def report(model: object) -> Report:
    """What was done to a model. Prints as a table; `to_dict()` for programs."""
    found = find_model(model)
    state: State | None = vars(found).get(STATE)
    if state is None:
        return Report(type(found).__name__, ())
    measures = {each.name: each.measure for each in state.passes if hasattr(each, "measure")}
    rows = [row | (measures[row["pass"]](found) if row["pass"] in measures else {}) for row in state.report.rows]
    if state.journal.put_backs:
        now = {"bytes_after": weight_bytes(found), "now": "dequantized"}
        rows = [row | (now if row["pass"] == "quantize" else {}) for row in rows]
    return dataclasses.replace(state.report, rows=tuple(rows))


def adopt(
    model: PreTrainedModel,
    passes: tuple[Pass, ...],
    quantized: Callable[[PreTrainedModel], dict[str, Any]] | None,
    journal: Journal | None = None,
    source: dict[str, Any] | None = None,
    asked: tuple[Pass, ...] | None = None,
    *,
    lenient: bool = False,
) -> PreTrainedModel:
    """Patch a model that came from its checkpoint quantized: `quantized` says what the report says of that, and
    `journal` has it, where there were float weights. `asked`: the budget that has chosen the passes, before them.
    `lenient`: what the model cannot have is left out, with a warning."""
    others = tuple(each for each in passes if quantized is None or each.name != "quantize")
    view = bind(model)
    check_weights(view)
    facts = None if quantized is None else {"pass": "quantize", **quantized(model)}
    new = State(passes, journal or Journal(), Report(view.subject, ()), source or {}, asked or passes, lenient)
    _apply(view, new, build(view, others, lenient=lenient))
    if facts is not None:
        rows = list(new.report.rows)
        rows.insert(next(i for i, each in enumerate(passes) if each.name == "quantize"), facts)
        new.report = dataclasses.replace(new.report, rows=tuple(rows))
    new.sample = Sample.of(model)
    vars(model)[STATE] = new
    _log(model)
    return model


def _patch(target: object, asked: tuple[Pass, ...]) -> None:
    model = find_model(target)
    state: State | None = vars(model).get(STATE)
    if state is not None:
        _check_same(model, state, asked)
        return
    view = bind(target)
    check_weights(view)
    passes = fitted(view, asked)
    new = State(passes, Journal(), Report(view.subject, ()), asked=asked)
    _apply(view, new, build(view, passes))
    new.sample = Sample.of(model)
    vars(model)[STATE] = new
    _log(model)


def _check_same(model: PreTrainedModel, state: State, asked: tuple[Pass, ...]) -> None:
    """Raise AlreadyPatched unless a patched model is as these options ask."""
    if state.report.incomplete:
        raise AlreadyPatched(
            f"a patch of {type(model).__name__} has failed half way: {state.report.incomplete}",
            "unpatch(model, reload=True), or use it as it is",
        )
    if state.asked != asked or state.journal.put_backs:
        hint = "it was patched when it was made, as HF_ACCEL_PATCH asks; " if state.lenient else ""
        raise AlreadyPatched(
            f"{type(model).__name__} is patched with other options", f"{hint}call unpatch(model) first"
        )


def _log(model: PreTrainedModel) -> None:
    for line in report(model).lines():
        logger.info(f"{type(model).__name__}: {line}")


def _apply(view: View, state: State, decided: Plan) -> None:
    """Carry out a plan, and report it in `state`. An exception leaves the model as it was; where originals are
    discarded already, it leaves what is done so far, whole and usable, under a report that says so."""
    journal, rows, left = state.journal, list(state.report.rows), list(decided.decisions)
    try:
        while left:
            decision = left.pop(0)
            row = described(decision)
            if isinstance(decision, Step):
                before = view.weight_bytes()
                decision.by.apply(decision, journal)
                if decision.reshapes:
                    left = [inspected(each.by, view, lenient=state.lenient) for each in left]
                if decision.of_weights:
                    row |= {"bytes_before": before, "bytes_after": view.weight_bytes()}
            elif decision.refused:
                logger.warning(f"{view.subject} is patched without {decision.by.name}: {decision.reason}")
            rows.append(row)
        journal.delete_attribute(view.model, "_compiled_call")  # compiled from the model as it was
    except BaseException as error:
        if not journal.discarded:
            journal.undo()
            raise
        done = f"{error}: {len(journal.discarded)} weights are quantized or converted, the others are as they were"
        state.report = Report(view.subject, tuple(rows), done)
        vars(view.model)[STATE] = state
        raise
    state.report = Report(view.subject, tuple(rows))


def _read_again(model: PreTrainedModel, state: State) -> list[torch.nn.Parameter]:
    """The parameters that are gone, from the model's checkpoint, where the modules are now. Tied ones stay one."""
    path, source, names = model.name_or_path, state.source, state.journal.discarded
    if not path:
        raise NotReversible("the model does not know the checkpoint that it came from", "load it anew")
    try:
        fresh = type(model).from_pretrained(path, **source | {"dtype": dtype_of(model)})
    except (OSError, ValueError) as error:
        raise NotReversible(f"the checkpoint at {path} cannot be read: {error}") from error
    parameters = dict(fresh.named_parameters(remove_duplicate=False))
    missing = [name for name in names if name not in parameters]
    if missing:
        raise NotReversible(f"the checkpoint at {path} has no {missing[0]}")
    made: dict[int, torch.nn.Parameter] = {}
    here = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
    for gone in state.journal.gone:
        found = parameters[gone.label]
        held = gone.module._buffers.get("like", gone.module._parameters.get(gone.name))
        device = here if held is None or held.is_meta else held.device
        if id(found) not in made:
            made[id(found)] = torch.nn.Parameter(found.detach().to(device), requires_grad=gone.trained)
    return [made[id(parameters[gone.label])] for gone in state.journal.gone]
