"""Where stock's hand-written attention is wrong, by how much, and how far the patched model is from what is right.

    PYTHONPATH=.:tests python benchmarks/exactness.py  # rows to benchmarks/results/exactness.jsonl

Differences are the largest ones of logits, in standard deviations of the right ones. Tiny random models on a CPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import build, greedy, logits, prompt, relative_error
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, StaticCache

from benchmarks.decode import RESULTS, record, start
from hf_accel_patch import patch

ALIBI = {"alibi": True, "multi_query": False, "num_kv_heads": 4}
ROPE = {"alibi": False, "multi_query": True}
NEW = {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 1}


def pair(model_type: str, **overrides: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    stock = build(model_type, **overrides)
    return stock, patch(copy.deepcopy(stock))


def tried(measure: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> str:
    try:
        found = measure(model)
    except Exception as error:
        return f"raises {type(error).__name__}"
    return f"{found:.1e}" if isinstance(found, float) else str(found)


@torch.no_grad()
def static(model: PreTrainedModel, ids: Tensor) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=64)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([30, *[1] * 20], 1)], 1)


def batched(model: PreTrainedModel) -> str:
    inputs = [prompt(40, seed=seed)[0].tolist() for seed in range(4)]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    found = model.generate_batch(inputs, generation_config=config, continuous_batching_config=small)
    found = [result.generated_tokens for result in found.values()]
    right = [greedy(model, torch.tensor([ids]), 8)[0].tolist() for ids in inputs]
    same = sum(a == b for ours, stock in zip(found, right, strict=True) for a, b in zip(ours, stock, strict=False))
    return f"{same} of 32 tokens right"


def main() -> None:
    ids, run = prompt(50), start("cpu")

    def show(name: str, stock: str, patched: str) -> None:
        row = {"part": "exactness", "what": name, "stock": stock, "patched": patched}
        record(run, [row], RESULTS / "exactness.jsonl")
        print(f"| {name} | {stock} | {patched} |", flush=True)

    rows: list[tuple[str, Callable[[PreTrainedModel], object], tuple[PreTrainedModel, ...]]] = []
    long = logits(build("mpt"), prompt(200))
    rows.append(
        (
            "mpt, 200 tokens, max_seq_len 64",
            lambda m: relative_error(logits(m, prompt(200)), long),
            pair("mpt", max_seq_len=64),
        )
    )
    for name, options in (("ALiBi", ALIBI), ("RoPE", ROPE)):
        models = pair("falcon", **options)
        right = logits(models[0], ids)
        asked: Any = lambda m, right=right: relative_error(logits(m, ids, output_attentions=True), right)  # noqa: E731
        rows.append((f"falcon with {name}, output_attentions", asked, models))
    future: Any = lambda m: f"{max(a.triu(1).sum(-1).max() for a in m(ids, output_attentions=True).attentions):.2f}"  # noqa: E731
    rows.append(("the same: the most weight on later tokens", future, models))
    for name, options in (("gpt_neo", {}), ("falcon", ALIBI)):
        models = pair(name, **options)
        right = logits(models[0], ids)
        rows.append((f"{name}, static cache", lambda m, right=right: relative_error(static(m, ids), right), models))
    for name in ("gptj", "bloom", "falcon"):
        rows.append((f"{name}, generate_batch", batched, pair(name)))
    for name, measure, models in rows:
        show(name, *(tried(measure, model) for model in models))
    for tokens in (1024, 4096):
        stock = build("bloom")
        half = copy.deepcopy(stock).to(torch.bfloat16)
        right = logits(copy.deepcopy(half).float(), prompt(tokens))[:, -256:]
        errors = [
            relative_error(logits(m, prompt(tokens))[:, -256:], right) for m in (half, patch(copy.deepcopy(half)))
        ]
        show(f"bloom in bfloat16, the last 256 of {tokens} tokens", *(f"{error:.2f}" for error in errors))
    seconds = []
    for model in pair("mpt", max_seq_len=1024):
        began = time.perf_counter()
        greedy(model, prompt(256), 128)
        seconds.append(time.perf_counter() - began)
    show("mpt, generate 128 tokens after 256, seconds", *(f"{each:.1f}" for each in seconds))
    sizes = [m(ids, use_cache=True).past_key_values.layers[0].keys.numel() * 4 for m in pair("falcon", **NEW)]
    show("falcon, new decoder, 4 heads, 1 of them cached: bytes of keys of 50 tokens", *map(str, sizes))


if __name__ == "__main__":
    main()
