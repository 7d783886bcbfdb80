"""patch, unpatch, patched, plan, report: the whole flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_accel_patch.errors import AlreadyPatched, NotReversible
from hf_accel_patch.families import View, bind, check_weights, find_model, weight_bytes
from hf_accel_patch.journal import Journal
from hf_accel_patch.logs import get_logger
from hf_accel_patch.options import context_of, count, parse
from hf_accel_patch.passes import attention, self_extend_cache
from hf_accel_patch.plan import Pass, Plan, Step, build, described, inspected, on_already
from hf_accel_patch.planning.budget import Budget, fitted
from hf_accel_patch.planning.memory import Estimates, kept_bytes, tokens_of
from hf_accel_patch.planning.overview import overview
from hf_accel_patch.planning.stored import Opened, opened
from hf_accel_patch.report import Report
from hf_accel_patch.undoing import Sample, read_again

logger = get_logger(__name__)
T = TypeVar("T")
attention.register()  # here, because a pickled model that is read brings this module along, and the functions are its
self_extend_cache.register()
STATE = "_hf_accel_patch"  # the attribute under which a patched model keeps what undo needs


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
    exact passes run.

    * `attention`, `linear`: on by default, and exact; False switches one off. An `Attention` names a backend.
    * `cache`: True, exact and on by default; False, "int8", "int4", "sinks:WINDOW" in tokens, or a `KVCache`.
    * `quantize`: "int8", "int4", "nf4", "llm.int8", or a `Quantize`.
    * `rope`: "linear:F", "dynamic:F", "yarn:F", "llama3:F", "self-extend:F" for texts of F times the length, or a
      `RopeScaling`.
    * `gqa`: a number of key/value heads, or a `GQA`.
    * `speculative`: "ngram", "self", or a `Speculative`.

    `context=16384` scales positions as texts of so many tokens need it. `budget="6GiB"` chooses, of what is not
    given, the least lossy schemes of weights and cache with which these and the activations of a text of `context`
    tokens fit, for `batch` sequences, where `generate` may read it in pieces; HfAccelError names the smallest size
    where none does.

    Raises ValueError or TypeError for impossible options, UnsupportedModel for what is no causal LM or cannot have a
    pass that was asked for, AlreadyPatched if it is patched with other options: all before anything is touched.

    >>> model = patch(model, quantize="int4", cache="int8")
    >>> {row["pass"]: row["exact"] for row in report(model).to_dict()["passes"]}["quantize"]
    False
    """
    _patch(model, parse(options))
    return model


def unpatch(model: T, *, reload: bool = False) -> T:
    """Take the patch off, bit for bit; a model that is not patched is returned as it is.

    Raises NotReversible, before anything is undone, where the originals of weights were discarded. With
    `reload`, they are read again from the checkpoint at `model.name_or_path`.

    >>> model = patch(model)
    >>> model = unpatch(model)
    >>> report(model).to_dict()["patched"]
    False
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
    restored = read_again(found, state.journal, state.source) if lost else []
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
    is met by the cache alone. A model that has this patch already keeps it. Options and errors are those of `patch`.

    >>> with patched(model, quantize="int4") as quantized:
    ...     tokens = quantized.generate(ids, max_new_tokens=8)
    >>> report(model).to_dict()["patched"]
    False
    """
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
    Prints as a table; `to_dict()` has it for programs, `memory.asked` the sizes in bytes.

    Raises what `patch` raises: AlreadyPatched for a patched model with other options.

    >>> planned = plan(path, quantize="int4", context=512)
    >>> stock, asked, *alternatives = planned.to_dict()["memory"]["schemes"]
    >>> asked["weights"] < stock["weights"]
    True
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
        estimates.patched, estimates.beside = True, kept_bytes(here.view.model, state.journal)
        passes, decided = state.passes, on_already(here.view, state.passes, state.report.rows)
    else:
        passes = fitted(here.view, asked, estimates, quantized=here.comes_quantized)
        decided = here.told(build(here.view, passes))
    memory = overview(estimates, passes, None if budget is None else budget.limit)
    return dataclasses.replace(decided, memory=memory)


def report(model: object) -> Report:
    """What was done to a model, pass by pass: bytes before and after, exact or not, why skipped. Prints as a table;
    `to_dict()` for programs. Raises UnsupportedModel for what is no causal LM.

    >>> print(report(model))
    LlamaForCausalLM is not patched
    >>> rows = report(patch(model, quantize="int8")).to_dict()["passes"]
    >>> [(row["exact"], row["scheme"]) for row in rows if row["pass"] == "quantize"]
    [(False, 'int8')]
    """
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
    hint = "it was patched when it was made, as HF_ACCEL_PATCH asks; " if state.lenient else ""
    if state.asked != asked:
        raise AlreadyPatched(
            f"{type(model).__name__} is patched with other options", f"{hint}call unpatch(model) first"
        )
    if state.journal.put_backs:
        raise AlreadyPatched(
            f"{type(model).__name__} has been dequantized since it was patched", f"{hint}call unpatch(model) first"
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
        state.report = Report(view.subject, tuple(rows), done, tuple(dict.fromkeys(journal.discarded)))
        vars(view.model)[STATE] = state
        raise
    state.report = Report(view.subject, tuple(rows))
