"""The tables of `benchmarks.long_context` and of `benchmarks.exactness`, made from their rows."""

from __future__ import annotations

from statistics import median

from benchmarks.table import Row, line, origin

NAMES = {
    "stock": "dynamic, transformers",
    "unscaled": "unscaled",
    "linear": "linear",
    "llama3": "llama3",
    "dynamic": "dynamic",
    "dynamic-fixed": "dynamic, `length=` each context",
    "yarn": "yarn",
    "self-extend": "self-extend",
}
WRONG = {  # what stock answers wrongly, in whole words
    "mpt, 200 tokens, max_seq_len 64": "MPT, 200 tokens, `max_seq_len` 64, against the same model made for 512",
    "falcon with ALiBi, output_attentions": "Falcon with ALiBi, `output_attentions`, against the same call without",
    "falcon with RoPE, output_attentions": "Falcon with RoPE, `output_attentions`, against the same call without",
    "the same: the most weight on later tokens": "the same call: the most weight that a token gives to later ones",
    "gpt_neo, static cache": "GPT-Neo with a static cache, against the prompt at once",
    "falcon, static cache": "Falcon with ALiBi and a static cache, against the prompt at once",
    "gptj, generate_batch": "GPT-J, `generate_batch`",
    "bloom, generate_batch": "BLOOM, `generate_batch`",
    "falcon, generate_batch": "Falcon, `generate_batch`",
    "bloom in bfloat16, the last 256 of 1024 tokens": "BLOOM in bfloat16, the last 256 of 1024 tokens, against float32",
    "bloom in bfloat16, the last 256 of 4096 tokens": "BLOOM in bfloat16, the last 256 of 4096 tokens, against float32",
    "mpt, generate 128 tokens after 256, seconds": "MPT, `generate`, 128 tokens after 256, in seconds",
    "falcon, new decoder, 4 heads, 1 of them cached: bytes of keys of 50 tokens": (
        "Falcon's new decoder, 4 heads of which 1 is cached, bytes of the keys of 50 tokens"
    ),
}


def positions_markdown(rows: list[Row]) -> str:
    """Perplexity by context, times by context, and what the cache costs where frequencies change."""
    found: dict[str, dict[tuple[str, int], Row]] = {}
    for row in sorted((row for row in rows if "reason" not in row), key=lambda row: str(row["run"])):
        found.setdefault(row["part"].removeprefix("long-context-"), {})[row["system"], row["context"]] = row
    made = (("perplexity", _perplexity), ("speed", _speed), ("cache", _cache))
    return "\n\n".join(table(found[part]) for part, table in made if part in found)


def exactness_markdown(rows: list[Row]) -> str:
    """What stock and the patched model answer where stock is wrong."""
    latest = {row["what"]: row for row in sorted(rows, key=lambda row: str(row["run"]))}
    if not latest:
        return ""
    cpu = next(iter(latest.values()))["hardware"]["cpu"]
    lines = [f"{cpu}; {origin(list(latest.values()))}.", "", *_head("", "stock", "patched")]
    return "\n".join(
        lines + [line(WRONG.get(what, what), row["stock"], row["patched"]) for what, row in latest.items()]
    )


def _perplexity(found: dict[tuple[str, int], Row]) -> str:
    first, contexts = next(iter(found.values())), sorted({context for _, context in found})
    unscaled = found["unscaled", contexts[0]]["perplexity"]
    caption = (
        f"**{first['model']}**, trained on {first['trained']} tokens; perplexity of the same tokens with more and "
    )
    caption += f"more context; factor {first['factor']:g}; {first['windows']} windows; {first['dtype']}; "
    columns = [*(f"{context} tokens" for context in contexts), f"at {contexts[-1]} over {contexts[0]} unscaled"]
    lines = [caption + f"{origin(list(found.values()))}.", "", *_head("", *columns)]
    for name in (name for name in NAMES if (name, contexts[-1]) in found):
        values = [found[name, context]["perplexity"] for context in contexts]
        lines.append(line(NAMES[name], *(f"{value:.2f}" for value in values), f"{values[-1] / unscaled:.2f}"))
    return "\n".join(lines)


def _speed(found: dict[tuple[str, int], Row]) -> str:
    first, contexts = next(iter(found.values())), sorted({context for _, context in found})
    hardware = first["hardware"]
    caption = f"**{first['model']}**: a prompt of so many tokens, and a step after it; {first['dtype']}; "
    caption += f"{first['threads']} thread{'s' if first['threads'] > 1 else ''} of {hardware['cpu']}; "
    columns = [text for context in contexts for text in (f"{context}, prompt, ms", "a step, ms")]
    lines = [caption + f"{origin(list(found.values()))}.", "", *_head("", *columns)]
    for name in (name for name in NAMES if (name, contexts[-1]) in found):
        rows = [found[name, context] for context in contexts]
        cells = [text for row in rows for text in (f"{median(row['prefill_ms']):.0f}", f"{row['decode_ms']:.1f}")]
        lines.append(line(NAMES[name], *cells))
    return "\n".join(lines)


def _cache(found: dict[tuple[str, int], Row]) -> str:
    first = next(iter(found.values()))
    caption = f"**{first['model']}** read to {first['trained']} tokens and then token by token to {first['context']}, "
    caption += f"against the forward over the whole text; {first['dtype']}; "
    columns = ("perplexity", "mean KL, nats", "largest", "the same best token")
    lines = [caption + f"{origin(list(found.values()))}.", "", *_head("", *columns)]
    for (name, _), row in found.items():
        cells = (f"{row['perplexity']:.2f}", f"{row['mean_kl']:.2g}", f"{row['max_kl']:.2g}")
        lines.append(line(NAMES[name], *cells, f"{row['top1_agreement']:.0%}"))
    return "\n".join(lines)


def _head(*columns: str) -> list[str]:
    return [line(*columns), line("---", *(["---:"] * (len(columns) - 1)))]
