"""The loop that `generate` is given in the place of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING

from hf_accel_patch.compat import CACHE
from hf_accel_patch.families.one_by_one import bounds
from hf_accel_patch.ops.pacing import Pace
from hf_accel_patch.passes.choosing import Chooser
from hf_accel_patch.passes.drafting import decode


@dataclass(frozen=True)
class Loop:
    """What `generate` calls in the place of its own loop."""

    speculating: Any  # a `Speculating`
    streamer: Any
    handed: bool  # whether the caller has the cache

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        ours, cache = self.speculating, model_kwargs.get(CACHE)
        reason = ours.why_not(model, generation_config, cache)
        if not reason and not generation_config.is_assistant:
            pace = ours.paces.setdefault(len(input_ids), Pace(batch=len(input_ids)))
            given = input_ids, logits_processor, stopping_criteria, generation_config, self.streamer
            chooser = Chooser(*given, bounds(model))
            what = model, chooser, generation_config, model_kwargs, ours.drafter(model), pace, ours.tally
            apart = ours.apart and ours.options.method == "ngram" and not self.handed  # a model drafts for all
            return decode(*what, apart=apart)
        if reason:
            ours.fall_back(model, reason)
        mode = GenerationMode(generation_config.get_generation_mode())
        plain = GENERATION_MODES_MAPPING[mode]
        options = {} if self.streamer is None else {"streamer": self.streamer}
        model._validate_generation_mode(mode, generation_config, options)
        return getattr(type(model), plain)(
            model, input_ids, logits_processor, stopping_criteria, generation_config, **options, **model_kwargs
        )
