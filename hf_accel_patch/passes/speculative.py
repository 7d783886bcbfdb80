"""Speculative decoding: several tokens per pass, the same tokens."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer

from hf_accel_patch.compat import RECORDS_PAST, given_cache
from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View, find_model, first_cached_module, layer_list, weight_bytes
from hf_accel_patch.families.one_by_one import why_one_by_one
from hf_accel_patch.journal import Journal
from hf_accel_patch.logs import get_logger
from hf_accel_patch.ops.ngrams import History
from hf_accel_patch.ops.pacing import Pace
from hf_accel_patch.passes.choosing import Drafter, Tally, given_arguments
from hf_accel_patch.passes.drafts import ModelDrafter, NGramDrafter, OtherModel, OwnCopy
from hf_accel_patch.passes.generating import Loop
from hf_accel_patch.passes.graphs import GRAPHS, takes_places
from hf_accel_patch.passes.own_copy import own_copy
from hf_accel_patch.passes.quantize import Quantize
from hf_accel_patch.passes.replaying import WIDTHS
from hf_accel_patch.passes.streaming import PrefillInChunks
from hf_accel_patch.passes.translating import Translated, Translation, between, why_no_draft
from hf_accel_patch.plan import Skip, Step, size_in_bytes

logger = get_logger(__name__)
Method = Literal["ngram", "self", "model"]
MOST, LARGEST = 16, 31  # drafted tokens of a pass
THEIRS = (  # what asks for a loop of transformers' own, or of the caller's
    "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "custom_generate",
    "penalty_alpha", "constraints", "force_words_ids", "dola_layers", "token_healing",
)  # fmt: skip
BEFORE_LOOP = list(inspect.signature(GenerationMixin.generate).parameters).index("custom_generate") - 1  # the last
SPECULATING = "_hf_accel_speculating"  # on a model: a deep copy of it gets its own
RENEWING = threading.Lock()


@dataclass(frozen=True)
class Speculative:
    """Draft tokens and verify them in one pass of the model. The tokens are those of plain decoding, sampled ones
    too, as far as a pass over several tokens rounds as passes over one do: in bfloat16 a near tie can fall the other
    way. With a quantized cache they are those of another, equally good rounding.

    "ngram": drafts are what followed, in the prompt and the output, or in outputs of earlier calls (`history` bytes),
    the longest n-gram with which the text ends. How many tokens are drafted follows what passes cost on this machine
    and how often drafts of this kind were right; where that does not pay, nothing is drafted, and it is tried anew
    later. "self": besides, a copy of the model with its linear weights in 4 bits drafts, on the model's own cache, for
    models in 16 or 8 bits; it takes a fourth of their memory more, and works where reading the weights is what a token
    costs. `skip_layers` leaves layers out of the copy. `draft`: another model drafts instead; if its tokens are others,
    texts go to it and back as strings, by `tokenizer` and `draft_tokenizer`. What cannot be had (beams, static caches,
    sinks, `output_attentions`) runs as before, with one warning.

    >>> model = patch(model, speculative=Speculative("ngram", most=8, history="64MB"))
    """

    method: Method = "ngram"
    most: int = MOST  # drafted tokens of a pass, up to 31
    history: int | str = 0  # bytes of earlier texts, or like "64MB"
    scheme: Literal["int4", "nf4"] | None = "int4"  # of the copy that "self" makes; None: as the model
    skip_layers: tuple[int, ...] = ()  # that this copy leaves out
    draft: Any = field(default=None, repr=False)  # a causal LM of transformers, for "model"
    tokenizer: Any = field(default=None, repr=False)  # of the model, for a draft with others; None: at its name_or_path
    draft_tokenizer: Any = field(default=None, repr=False)  # of the draft; None: at its name_or_path

    name = "speculative"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            allowed = ", ".join(map(repr, get_args(Method)))
            raise ValueError(f"speculative: unknown method {self.method!r}; allowed: {allowed}")
        if not 1 <= self.most <= LARGEST:
            raise ValueError(f"speculative: at most {self.most} drafted tokens; give 1 to {LARGEST}")
        if self.history:
            size_in_bytes(self.history)
        if self.draft is not None and self.method == "ngram":
            object.__setattr__(self, "method", "model")
        if (self.method == "model") != (self.draft is not None):
            raise ValueError(
                f"speculative: method {self.method!r} {'needs' if self.draft is None else 'takes no'} draft"
            )
        if self.draft is None and (self.tokenizer is not None or self.draft_tokenizer is not None):
            raise ValueError("speculative: tokenizer and draft_tokenizer are for draft=")
        if self.scheme is not None and self.scheme not in ("int4", "nf4"):
            raise ValueError(f"speculative: unknown scheme {self.scheme!r}; allowed: 'int4', 'nf4', None")
        if self.method != "self" and self.skip_layers:
            raise ValueError(f"speculative: skip_layers={self.skip_layers} is for method 'self', not {self.method!r}")
        if self.method == "self" and self.scheme is None and not self.skip_layers:
            raise ValueError(
                "speculative: a copy that is the model itself drafts nothing sooner; give scheme or skip_layers"
            )

    def inspect(self, view: View) -> Step | Skip:
        if reason := self._why_not(view):
            raise UnsupportedModel(f"speculative={self.method!r}: {reason}", "leave the keyword out")
        size = view.weight_bytes()
        facts = {
            "exact": True,
            "bytes_before": size,
            "bytes_after": size + self.copy_bytes(view),
            "method": self.method,
        }
        translation = None
        if self.draft is not None:
            translation = between(view.model, find_model(self.draft), self.tokenizer, self.draft_tokenizer)
        return Step(self, facts, (view, takes_places(view), translation), of_weights=False)

    def apply(self, step: Step, journal: Journal) -> None:
        view, apart, translation = step.work
        history = History(size_in_bytes(self.history)) if self.history else None
        speculating = Speculating(self, history, apart, translation=translation)
        if self.method == "self":
            speculating.renew(view.model)
        journal.set_attribute(view.model, SPECULATING, speculating)
        journal.bind_method(view.model, "generate", _generate)

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """What it has brought so far."""
        speculating = vars(model).get(SPECULATING)
        if not isinstance(speculating, Speculating):
            return {}
        before = weight_bytes(model)
        return {"bytes_before": before, "bytes_after": before + speculating.copy_bytes} | speculating.tally.facts()

    def copy_bytes(self, view: View) -> int:
        """Bytes of the weights of the copy that "self" makes of this model."""
        if self.method != "self" or self.scheme is None:
            return 0
        targets, _ = Quantize(self.scheme, originals="keep").choose(view)
        return sum(target.packed_bytes for target in targets)

    def _why_not(self, view: View) -> str:
        if view.config.is_encoder_decoder:
            return "it is an encoder-decoder"
        if reason := why_one_by_one(view.config) or why_one_by_one(view.model.config):
            return reason
        if getattr(view.model, "_is_stateful", False) or not view.model._supports_default_dynamic_cache():
            return "it has a recurrent state, which cannot be taken back"
        if first_cached_module(view) is None:
            return "no layer of it takes a cache"
        try:
            layers = DynamicCache(config=view.config).layers
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return f"transformers makes no cache from its configuration: {error}"
        if self.draft is not None and (reason := why_no_draft(find_model(self.draft))):
            return reason
        if self.skip_layers:
            count, kinds = len(layer_list(view)), [type(layer) for layer in layers]
            measuring = {kinds.index(kind) for kind in kinds}  # masks are made to the length of the first of each kind
            skippable = [index for index in range(count) if index not in measuring]
            if not set(self.skip_layers) <= set(skippable):
                return f"skip_layers={self.skip_layers}; of its {count} layers, it can go without any of {skippable}"
        if self.method == "self" and any(hasattr(module, "_hf_hook") for module in view.model.modules()):
            return "accelerate has placed hooks on its modules, which a copy would share"
        if other := {type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)}:
            return f"its cache cannot be taken back: {', '.join(sorted(other))}"
        return ""


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    return vars(model)[SPECULATING](model, *args, **kwargs)


@dataclass
class Speculating:
    """A `generate` that decodes with drafts where it can. One object serves all threads that use a model."""

    options: Speculative
    history: History | None = None
    apart: bool = True  # whether the sequences of a batch may go on at their own pace
    tally: Tally = field(default_factory=Tally)
    paces: dict[int, Pace] = field(default_factory=dict)  # by the sequences of a batch
    warned: set[str] = field(default_factory=set)
    copy: Any = field(default=None, repr=False)  # the model in 4 bits, for "self"
    copy_bytes: int = 0
    translation: Translation | None = None  # for a draft model with other tokens
    made_of: list[tuple[Any, ...]] = field(default_factory=list, repr=False)

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        generate = type(model).generate
        given = given_arguments(generate, model, *args, **kwargs)
        configs = (given.get("generation_config"), model.generation_config)
        theirs = any(given.get(name) or any(getattr(config, name, None) for config in configs) for name in THEIRS)
        groups = (given.get("num_beam_groups"), *(getattr(config, "num_beam_groups", None) for config in configs))
        theirs = theirs or any((count or 1) > 1 for count in groups)
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        if theirs or shared or given.get("cache_implementation") == "paged":
            return generate(model, *args, **kwargs)
        # `generate` forgets the streamer and the tokenizer where it is given a loop
        strings, tokenizer = given.get("stop_strings"), given.get("tokenizer")
        if any(getattr(config, "stop_strings", None) for config in configs):
            self.fall_back(model, "stop_strings are in the generation config")
            return generate(model, *args, **kwargs)
        if strings is not None and tokenizer is not None:
            criteria = StoppingCriteriaList(given.get("stopping_criteria") or ())
            kwargs = {name: each for name, each in kwargs.items() if name not in ("stop_strings", "tokenizer")}
            if not any(isinstance(each, StopStringCriteria) for each in criteria):  # whose strings count alone
                criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
            if len(args) > 3:
                args = (*args[:3], criteria, *args[4:])
            else:
                kwargs["stopping_criteria"] = criteria
        loop = Loop(self, given.get("streamer"), handed=given_cache(given) is not None)
        return generate(model, *args[:BEFORE_LOOP], **{**kwargs, "custom_generate": loop})

    def why_not(self, model: PreTrainedModel, config: GenerationConfig, cache: Any) -> str:
        """Why this call runs as before."""
        if model.training:
            return "the model is in training mode, where dropout draws random numbers in each pass"
        if "prepare_inputs_for_generation" in vars(model):
            return "an adapter that puts tokens before the text, or somebody else, prepares its inputs"
        if config.num_beams > 1:
            return "beams go on several texts at once"
        if config.num_return_sequences > 1:
            return "num_return_sequences asks for several texts"
        if not config.use_cache or cache is None:
            return "without a cache nothing can be verified"
        if type(cache) is not DynamicCache or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            return f"a {type(cache).__name__} cannot be taken back"
        if any(cache.is_sliding) and not RECORDS_PAST:
            return "transformers before 5.15 takes back no tokens from a sliding window"
        if isinstance(getattr(vars(model).get("_prefill"), "__func__", None), PrefillInChunks):
            return "a cache with sinks forgets what drafts push out of its window"
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            return "attentions and hidden states of each step are asked for"
        return ""

    def fall_back(self, model: PreTrainedModel, reason: str) -> None:
        """Say so once, and count."""
        self.tally.fallbacks[reason] = self.tally.fallbacks.get(reason, 0) + 1
        if reason not in self.warned:
            self.warned.add(reason)
            logger.warning(f"speculative decoding is off for this call: {reason}")

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """For one call."""
        most = min(self.options.most, WIDTHS[-1] - 1) if GRAPHS in vars(model) else self.options.most
        if self.options.method == "ngram":
            return NGramDrafter(most, self.history)
        if self.options.method == "model":
            draft, size = find_model(self.options.draft), model.config.get_text_config(decoder=True).vocab_size
            if self.translation is not None:
                return ModelDrafter(most, self.history, Translated(draft, self.translation, size))
            return ModelDrafter(most, self.history, OtherModel(draft, size))
        return ModelDrafter(most, self.history, OwnCopy(self.renew(model), whole=not self.options.skip_layers))

    def renew(self, model: PreTrainedModel) -> Any:
        """The copy, made anew if the weights are others since."""
        weights = [*model.parameters(), *model.buffers()]
        state = [(id(w), w.dtype, w.device, 0 if w.is_inference() else w._version) for w in weights]
        with RENEWING:
            if self.copy is None or state != self.made_of:
                self.copy = None
                self.copy = own_copy(model, self.options.scheme, self.options.skip_layers)
                for name in ("generate", SPECULATING):  # of the model, which would keep it alive
                    vars(self.copy).pop(name, None)
                self.made_of, shared = state, {id(each) for each in weights}
                own = [each for each in (*self.copy.parameters(), *self.copy.buffers()) if id(each) not in shared]
                self.copy_bytes = sum(each.nbytes for each in {id(each): each for each in own}.values())
            return self.copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Speculating:
        """A copy of the model makes its own copy."""
        history = None if self.history is None else History(size_in_bytes(self.options.history))
        return Speculating(self.options, history, self.apart, translation=self.translation)
