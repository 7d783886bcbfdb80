"""Tiny models whose frequencies depend on the length of the text, read in parts and at once."""

import torch
from cases import FAMILIES, Family, build, prompt, relative_error

from hf_accel_patch import patch

EXACT = 5e-5  # of the logits' standard deviation
TRAINED = 48
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i / 2 for i in range(8)],
}
ONE_LAYER = {
    "llama": {},
    "qwen3": {},
    "gpt_neox": {"rope_parameters": HALF},
    "phi": {},
    "cohere": {},  # interleaved channels
    "glm": {},
    "mistral": {"sliding_window": 40},
    "gemma2": {"layer_types": ["full_attention"]},
    "gemma3_text": {"layer_types": ["full_attention"]},
    "deepseek_v3": {},  # latents: what is rotated is the second tensor
    "mixtral": {"sliding_window": None},
    "falcon_new": {},
}


def short(name="llama", layers=1, **overrides):
    row, own = FAMILIES.get(name, Family(name)), ONE_LAYER.get(name, {})
    sizes = {"max_position_embeddings": TRAINED, "num_hidden_layers": layers}
    return build(row.model_type, **{**sizes, **row.overrides, **own, **overrides})


def dynamic(name="llama", layers=1, **overrides):
    return patch(short(name, layers, **overrides), rope="dynamic:4")


def longrope(**overrides):
    """As from a checkpoint."""
    return patch(short(max_position_embeddings=4 * TRAINED, rope_parameters=LONGROPE, **overrides))


@torch.no_grad()
def read(model, ids, cache=None, **kwargs):
    output = model(ids, past_key_values=cache, use_cache=True, **kwargs)
    return output.logits, output.past_key_values


@torch.no_grad()
def uncached(model, ids, **kwargs):
    """The last logits of a text as new."""
    return model(ids, use_cache=False, **kwargs).logits[:, -1]


def check(model, parts, cache=None, ids=None):
    """Read the parts one after another; each ends as the whole text so far does without a cache."""
    ids = parts[0][:, :0] if ids is None else ids
    for part in parts:
        found, cache = read(model, part, cache)
        ids = torch.cat([ids, part], 1)
        assert relative_error(found[:, -1], uncached(model, ids)) < EXACT, ids.shape
    return cache, ids


def ones(start, count, batch=1):
    return list(prompt(count, batch, seed=start).split(1, dim=1))
