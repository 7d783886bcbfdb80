"""The environment of every test: no network, no chatter, two threads, none of the package's own variables."""

from __future__ import annotations

import logging
import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in jobs of the background; tests interrupt what they run
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in [name for name in os.environ if name.startswith("HF_ACCEL")]:
    del os.environ[_name]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for others, of which some run elsewhere, sleep

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from cases import greedy, left_padded, logits, prompt, tiny
from torch import Tensor
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging as verbosity
from versions import skip_what_is_lacking

torch.set_num_threads(2)  # bit-equal results need the same split of the work in every run
warnings.filterwarnings("ignore", module="transformers")

KEY = "hf_accel_patch"  # the name of our attention in transformers' registry
LONG = (300, 180, 64)  # prompts whose dense mask would be larger than what the attention pass stores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_what_is_lacking(items)


@pytest.fixture(autouse=True)
def _no_layer_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models take the path of large ones."""
    import hf_accel_patch.passes.linear

    monkeypatch.setattr(hf_accel_patch.passes.linear, "LEAST_WEIGHTS", 0)


@dataclass(frozen=True)
class Outputs:
    """What a model answers: logits alone, left-padded, and left-padded at a length where masks are no longer stored;
    greedy tokens alone and left-padded."""

    alone: Tensor
    padded: Tensor
    long: Tensor
    tokens: Tensor
    padded_tokens: Tensor


def outputs(model: torch.nn.Module) -> Outputs:
    return Outputs(
        logits(model, prompt()),
        logits(model, **left_padded()),
        logits(model, **left_padded(*LONG)),
        greedy(model, prompt()),
        greedy(model, **left_padded()),
    )


@cache
def _stock(family: str) -> Outputs:
    return outputs(tiny(family))


@pytest.fixture(scope="session")
def stock() -> Callable[[str], Outputs]:
    """What the unpatched model of a family answers; computed once."""
    return _stock


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type]]:
    """The classes of the attention modules that called our function, in the order of their calls."""
    import hf_accel_patch.api  # noqa: F401  (registers the function)

    calls: list[type] = []
    ours = AttentionInterface._global_mapping[KEY]

    def counted(module, *args, **kwargs):
        calls.append(type(module))
        return ours(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, KEY, counted)
    yield calls


class Lines(logging.Handler):
    """Keeps what loggers of the package say: once, whether or not transformers hands it on to the root logger, which it
    does where the variable CI is set. `caplog` would then have it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("transformers.hf_accel_patch"):
            self.said.append((record.name, record.getMessage()))


@pytest.fixture
def logged() -> Iterator[Callable[[int], list[tuple[str, str]]]]:
    """From a call on, the list of what the package logs at a level or above: names of loggers, and messages."""
    handler, level, root = Lines(), verbosity.get_verbosity(), logging.getLogger("transformers")

    def listen(at: int) -> list[tuple[str, str]]:
        verbosity.set_verbosity(at)
        root.addHandler(handler)
        return handler.said

    yield listen
    root.removeHandler(handler)
    verbosity.set_verbosity(level)


@pytest.fixture
def warned(logged: Callable[[int], list[tuple[str, str]]]) -> Callable[[], list[str]]:
    """What the package has warned of so far."""
    said = logged(logging.WARNING)
    return lambda: [message for _, message in said]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables, and patches what is made from then on."""
    from transformers import PreTrainedModel

    from hf_accel_patch import starting

    for name in starting.METHODS:  # put back afterwards as they are now
        monkeypatch.setattr(PreTrainedModel, name, vars(PreTrainedModel)[name])

    def switch(**variables: object) -> None:
        for name, text in ({"PATCH": "1"} | variables).items():
            monkeypatch.setenv(f"HF_ACCEL_{name}", str(text))
        starting.start()

    return switch
