"""Estimates and measured bytes of one model after another, as JSON lines: run in a process of its own, whose malloc
gives back what is freed. `python planned_sizes.py FAMILY ...`; with `--pieces` of prompts that are read in pieces, with
`--pieces=WAY` in one way."""

import gc
import json
import sys
from dataclasses import replace
from itertools import chain
from statistics import median

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import hf_accel_patch
from hf_accel_patch.api import parse
from hf_accel_patch.families import bind
from hf_accel_patch.measure import PeakMemory
from hf_accel_patch.ops.growing import Growing
from hf_accel_patch.passes import Prefill
from hf_accel_patch.planning.memory import Estimates

TOKENS = 768
LONG, PIECE = 2048, 256  # tokens of a prompt that is read in pieces, and of a piece
BASE = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, vocab_size=512)
BASE |= dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = BASE | dict(num_key_value_heads=2, head_dim=64)
LATENT = dict(q_lora_rank=96, kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
GPT = dict(n_embd=256, n_inner=1024, n_layer=3, n_head=4, n_positions=2048, vocab_size=512)
FAMILIES = {
    "llama": LLAMA,
    "gpt2": GPT,
    "qwen2": {name: size for name, size in LLAMA.items() if name != "head_dim"},
    "gemma2": LLAMA | dict(query_pre_attn_scalar=64, sliding_window=128),
    "mixtral": LLAMA | dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=512),
    "deepseek_v3": BASE | LATENT | ROUTED | dict(num_key_value_heads=4, moe_intermediate_size=256),
    "falcon": BASE | dict(alibi=False, multi_query=True),
    "bloom": dict(hidden_size=256, n_layer=3, n_head=4, vocab_size=512),
}
IN_PIECES = {"exact": {}, "stock's cache": {"cache": False}, "int4": {"quantize": "int4"}}
IN_PIECES |= {"int8 cache": {"cache": "int8"}, "int4, int4 cache": {"quantize": "int4", "cache": "int4"}}
WAYS = {"stock": None, "exact": {}, "int8": {"quantize": "int8"}, "cache": {"quantize": "int4", "cache": "int8"}}


def build(family, **overrides):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(FAMILIES[family] | overrides))
    return AutoModelForCausalLM.from_config(config).eval()


def held(cache):
    """Bytes of all that the layers of a cache hold, buffers with their room."""
    storages = {}

    def walk(thing):
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, Growing):
            walk(thing.buffer)
        elif isinstance(thing, list | tuple):
            for each in thing:
                walk(each)

    for value in chain.from_iterable(vars(layer).values() for layer in cache.layers):
        walk(value)
    return sum(storages.values())


def peak(run):
    """Bytes above what was in use, and what the last run returned: the median of three runs after one in which things
    are loaded and compiled, for the system counts pages of code that it has to read again."""
    output, found = run(), []
    for _ in range(3):
        del output
        watch = PeakMemory(torch.device("cpu"))
        output = run()
        found.append(watch.read())
    return median(found), output


@torch.no_grad()
def measured(family, way):
    """What the plan says, and bytes of weights, of the cache, and of the peak."""
    model, options = build(family), WAYS[way]
    memory = hf_accel_patch.plan(model, context=TOKENS, **(options or {})).to_dict()["memory"]
    said = next(row for row in memory["schemes"] if row["scheme"] == ("stock" if options is None else "as asked"))
    if options is not None:
        hf_accel_patch.patch(model, **options)
    ids = torch.randint(3, 500, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    most, output = peak(lambda: model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1))
    weights = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    again = model(
        ids[:, :1], past_key_values=output.past_key_values
    )  # of a window, stock keeps the whole prompt till now
    cache = held(again.past_key_values)
    found = {"weights": weights, "cache": cache, "peak": weights + most}
    return {"family": family, "way": way, "said": said, "measured": found, "problem": memory.get("rule_of_thumb", "")}


def in_pieces(options):
    """The passes of these options, with prompts in pieces."""
    return tuple(replace(one, chunk_tokens=PIECE) if isinstance(one, Prefill) else one for one in parse(options))


@torch.no_grad()
def measured_in_pieces(family, way):
    """The same of a budget for which a long prompt has to be read in pieces; `whole`: the peak without them."""
    lengths = {name: 2 * LONG for name in ("max_position_embeddings", "n_positions") if name in FAMILIES[family]}
    model, options = build(family, **lengths), IN_PIECES[way]
    estimates = Estimates(bind(model), LONG)
    said, whole = estimates.of(in_pieces(options)), estimates.of(parse(options))
    hf_accel_patch.patch(model, budget=said.peak, context=LONG, **options)
    row = hf_accel_patch.report(model).to_dict()["passes"][0]
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 500, (1, LONG), generator=torch.Generator().manual_seed(1))
    most, output = peak(lambda: model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True))
    weights = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    found = {"weights": weights, "cache": held(output.past_key_values), "peak": weights + most}
    facts = {"family": family, "way": way, "said": said.to_dict(), "measured": found, "whole": whole.peak}
    return facts | {"chunk_tokens": row["chunk_tokens"], "problem": estimates.problem}


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = [name for name in sys.argv[1:] if not name.startswith("--pieces")]
    asked = [name for name in sys.argv[1:] if name not in names]
    ways, measure = (IN_PIECES, measured_in_pieces) if asked else (WAYS, measured)
    ways = [way for way in ways if not asked or asked[0] in ("--pieces", f"--pieces={way}")]
    for name in names:
        for how in ways:
            print(json.dumps(measure(name, how)), flush=True)
            gc.collect()
