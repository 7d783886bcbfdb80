"""The options of rope scaling: what a configuration says of a method, for a model that was trained on less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_accel_patch.ops.grouped import Grouping
from hf_accel_patch.ops.rope import stretched_base

Method = Literal["linear", "dynamic", "yarn", "llama3", "longrope", "self-extend"]
OWN = {  # the options that only some methods have
    "yarn": {"attention_factor", "beta_fast", "beta_slow"},
    "longrope": {"attention_factor", "short_factor", "long_factor"},
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "dynamic": {"length"},
    "self-extend": {"attention_factor", "window", "group"},
}
WINDOW_SHARE = 8  # of the trained length, neighbours of "self-extend"; see docs/positions.md
ALLOWED = (
    "'linear:F', 'dynamic:F', 'yarn:F', 'llama3:F' or 'self-extend:F' with a factor of at least 1, a RopeScaling, or "
    "None"
)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions for texts of `factor` times the length that a model was trained on, without training.

    "linear": positions are divided by the factor (arXiv 2306.15595). "dynamic": the base grows with the length of the
    text beyond the trained one (NTK-aware scaling); with `length`, it is fixed at the base for so many tokens. "yarn"
    (arXiv 2309.00071), "llama3" (as in Llama 3.1) and "longrope" (arXiv 2402.13753, with its two lists of factors, of
    the model's half rotated channels) treat slow and fast frequencies differently. "self-extend" (arXiv 2401.01325)
    leaves frequencies alone and groups the positions beyond a window of neighbours; see ops/grouped.py.

    All but "dynamic" and "longrope" are the same at every length, and so at any depth the same with and without the
    cache. With those two, cached keys are rotated anew when the frequencies change.

    >>> model = patch(model, rope=RopeScaling("yarn", factor=4.0))
    """

    type: Method
    factor: float = 1.0  # times the trained length
    original: int | None = None  # tokens that the model was trained on; None: as its configuration says
    length: int | None = None  # tokens, for "dynamic"
    attention_factor: float | None = None  # of cos and sin (of queries and keys); None: by the method's formula
    beta_fast: float | None = None  # rotations within the trained length, above which "yarn" leaves a channel alone
    beta_slow: float | None = None  # and below which it divides it by the factor
    low_freq_factor: float = 1.0  # the same for "llama3"
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()  # of "longrope", up to the trained length
    long_factor: tuple[float, ...] = ()  # and beyond it
    window: int | None = None  # neighbours that "self-extend" leaves where they are, in tokens; None: an eighth
    group: int | None = None  # tokens that share a position beyond them; None: as few as the longest text allows

    def __post_init__(self) -> None:
        known = get_args(Method)
        if self.type not in known:
            raise ValueError(f"rope: unknown type {self.type!r}; allowed: {', '.join(map(repr, known))}")
        if not (isinstance(self.factor, int | float) and math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(f"rope: factor {self.factor!r}; allowed: a number of at least 1")
        for name in ("original", "length", "window", "group"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"rope: {name}={value!r}; allowed: a number of tokens")
        defaults = {each: type(self).__dataclass_fields__[each].default for names in OWN.values() for each in names}
        for name, default in defaults.items():
            if getattr(self, name) != default and name not in OWN.get(self.type, ()):
                methods = ", ".join(repr(method) for method, names in OWN.items() if name in names)
                raise ValueError(f"rope: {name} with {self.type!r}; it belongs to {methods}")
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if self.type == "longrope" and not getattr(self, name):
                raise ValueError(
                    "rope: 'longrope' needs its lists: RopeScaling('longrope', factor, short_factor=..., ...)"
                )
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope: high_freq_factor={self.high_freq_factor} is not above low_freq_factor={self.low_freq_factor}"
            )

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """'yarn:4' -> RopeScaling("yarn", 4.0). Raises ValueError."""
        kind, _, factor = text.partition(":")
        try:
            number = float(factor)
        except ValueError:
            raise ValueError(f"rope={text!r}; allowed: {ALLOWED}") from None
        return cls(kind, number)  # type: ignore[arg-type]

    @property
    def varies(self) -> bool:
        """Whether frequencies depend on the length of the text."""
        return self.type == "longrope" or (self.type == "dynamic" and self.length is None)

    def context(self, trained: int) -> int:
        """Tokens that it is made for, with a model that was trained on so many."""
        return self.length or math.floor(trained * self.factor)

    def grouping(self, trained: int) -> Grouping:
        """Of "self-extend". Raises ValueError for a window that leaves no room."""
        window = self.window or max(1, trained // WINDOW_SHARE)
        if window >= trained:
            raise ValueError(f"rope: window={window} of a model that was trained on {trained} tokens; allowed: fewer")
        group = self.group or max(1, math.ceil((self.context(trained) - window) / (trained - window)))
        return Grouping(window, group, trained, self.attention_factor)

    def parameters(self, before: dict[str, Any], trained: int, channels: int) -> dict[str, Any]:
        """The `rope_parameters` of the default type `before`, scaled. `channels`: that are rotated."""
        if self.type == "dynamic" and self.length is not None:
            if self.length <= trained:
                return dict(before)
            base = stretched_base(before["rope_theta"], self.factor, self.length, trained, channels)
            return before | {"rope_theta": base}
        scaled = before | {"rope_type": self.type, "factor": float(self.factor)}
        if self.type in ("yarn", "llama3", "longrope"):
            scaled["original_max_position_embeddings"] = trained
        names = OWN.get(self.type, set()) - {"length"}
        given = {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}
        return scaled | {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
