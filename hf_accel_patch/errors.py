"""The errors of the package. A text says what was asked and what was found; `hint` says what to do about it."""

from __future__ import annotations


class HfAccelError(Exception):
    """What goes wrong with a model, as opposed to a wrong option (`ValueError`, `TypeError`)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n\nhint: {hint}" if hint else message)
        self.hint = hint


class UnsupportedModel(HfAccelError):
    """The object is no causal LM of transformers, or cannot have the pass that was asked for by name."""


class AlreadyPatched(HfAccelError):
    """The model is patched with other options."""


class NotReversible(HfAccelError):
    """What undoing needs was discarded on request."""
