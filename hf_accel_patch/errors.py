"""The errors of the package. A text says what was asked and what was found; `hint` says what to do about it."""

from __future__ import annotations


class HfAccelError(Exception):
    """What goes wrong with a model, as opposed to a wrong option (`ValueError`, `TypeError`). Those below are such.

    `hint`: what can be done about it. It is the end of the error's text, too.

    >>> try:
    ...     patch(model, budget="1MB", context=512)
    ... except HfAccelError as error:
    ...     print(error.hint)
    give a larger budget...
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n\nhint: {hint}" if hint else message)
        self.hint = hint


class UnsupportedModel(HfAccelError):
    """The object is no causal LM of transformers, or cannot have the pass that was asked for by name. It is untouched.

    >>> patch(torch.nn.Linear(2, 2))
    Traceback (most recent call last):
    hf_accel_patch.errors.UnsupportedModel: Linear is no causal LM of transformers...
    """


class AlreadyPatched(HfAccelError):
    """The model is patched with other options. It stays so.

    >>> model = patch(model)
    >>> patch(model, cache="int8")
    Traceback (most recent call last):
    hf_accel_patch.errors.AlreadyPatched: LlamaForCausalLM is patched with other options...
    >>> model = patch(unpatch(model), cache="int8")
    """


class NotReversible(HfAccelError):
    """What undoing needs was discarded on request. The model stays patched.

    >>> model = patch(model, quantize=Quantize("int8", originals="discard"))
    >>> unpatch(model)
    Traceback (most recent call last):
    hf_accel_patch.errors.NotReversible: the originals of ... weights were discarded ...
    >>> model = unpatch(model, reload=True)
    """
