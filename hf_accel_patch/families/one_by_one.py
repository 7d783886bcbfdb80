"""Models in which a pass over several tokens is not the same as passes over one."""

from __future__ import annotations

from transformers import PreTrainedConfig

ONE_BY_ONE = {  # what is different, by type of model
    "cpmant": "its positions are relative to the whole pass",
    "git": "it pads otherwise where a pass has several tokens",
    "moshi": "beyond its window it sees other tokens where a pass has several",
    "paligemma": "tokens of a prompt see those behind them",
    "prophetnet": "it takes one token at a time with a cache",
}


def why_one_by_one(config: PreTrainedConfig) -> str:
    """Why drafts would change the tokens of such a model."""
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "tokens of a pass see those behind them"
    return ONE_BY_ONE.get(config.model_type, "")
