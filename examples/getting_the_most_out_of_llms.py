# %% [markdown]
# # Getting the most out of LLMs, on one CPU
#
# Hugging Face's article "Getting the most out of LLMs" (in transformers' documentation: "Optimizing LLMs for Speed and
# Memory", https://huggingface.co/docs/transformers/llm_tutorial_optimization) goes through lower precision, better
# attention, positions, and the key/value cache, on OctoCoder and an A100 with 40 GB of memory. This goes through the
# same steps, in the same order, with the same calls, on the small model that comes with hf_accel_patch. What the
# article does is followed by what `patch` does instead.
#
# Run it as a script, `python examples/getting_the_most_out_of_llms.py`, or cell by cell in an editor that knows `# %%`.
# It needs no GPU and no network, and takes less than a minute.

# %%
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTBigCodeConfig, pipeline
from transformers.utils import logging

import hf_accel_patch
from hf_accel_patch import load, patch, patched, plan, report, unpatch
from hf_accel_patch.families import weight_bytes
from hf_accel_patch.measure import PeakMemory, perplexity, spread_windows
from hf_accel_patch.texts import held_out_text

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
CHECKPOINT = str(Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m")  # the article: bigcode/octocoder

# %% [markdown]
# ## 1. Lower precision
#
# The article's rule: X billion parameters take 4 * X GB in float32 and 2 * X GB in bfloat16, so OctoCoder, with 15.5
# billion, takes 31 GB. The model here has 8 million, so a few hundredths of a GB; the rule is the same.

# %%
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16, device_map="cpu", pad_token_id=0)
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)

# %% [markdown]
# The article asks for a function that turns bytes into gigabytes, and goes on to use it. A model of 8 million
# parameters answers in Python only, and not as well; the function itself is no secret.

# %%
prompt = 'def bytes_to_giga_bytes(size):\n    """Transforms bytes to gigabytes."""\n'
result = pipe(prompt, max_new_tokens=60, do_sample=False)[0]["generated_text"][len(prompt) :]
print("bfloat16:", repr(result))


def bytes_to_giga_bytes(bytes):
    return bytes / 1024 / 1024 / 1024


# %% [markdown]
# On a GPU, `torch.cuda.max_memory_allocated()` is the peak. Without one it is 0. On Linux the peak of the process is
# known to the system, and can be reset; `PeakMemory` reads it, above what was in use when it was made.

# %%
print("peak on a GPU that is not there:", bytes_to_giga_bytes(torch.cuda.max_memory_allocated()), "GB")
parameters = sum(parameter.numel() for parameter in model.parameters())
print(f"{parameters / 1e6:.1f} million parameters, weights of {bytes_to_giga_bytes(weight_bytes(model)):.4f} GB")

# %% [markdown]
# `flush` frees what is not used any more and starts a new measurement. Here it is a new `PeakMemory`, which collects
# garbage and hands freed blocks back to the system first. A model as small as this one is lost in what PyTorch itself
# takes, so for weights their bytes are counted, and the peak is measured in part 2, where it is large.

# %%
del pipe
del model


def flush():
    global peak
    peak = PeakMemory(torch.device("cpu"))


flush()

# %% [markdown]
# ### 8 bits
#
# The article loads with `load_in_8bit=True`. That call is gone: today it is
# `quantization_config=BitsAndBytesConfig(load_in_8bit=True)`, and needs bitsandbytes.

# %%
try:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, load_in_8bit=True, pad_token_id=0)
    print("load_in_8bit=True was understood")
    del model
except Exception as error:
    print(f"load_in_8bit=True: {type(error).__name__}: {str(error).splitlines()[0][:100]}")

# %% [markdown]
# Here it is a keyword of `load`. Weights are quantized one by one while they are read, so that the float model never
# exists whole, and no other package is needed.

# %%
model = load(CHECKPOINT, quantize="int8", dtype=torch.bfloat16, pad_token_id=0)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
result = pipe(prompt, max_new_tokens=60, do_sample=False)[0]["generated_text"][len(prompt) :]
print(f"int8, weights of {bytes_to_giga_bytes(weight_bytes(model)):.4f} GB:", repr(result))
int8_bytes = weight_bytes(model)
del model
del pipe
flush()

# %% [markdown]
# ### 4 bits
#
# `load_in_4bit=True` is gone as well. The article finds that quantized inference is slower, for weights are turned into
# bfloat16 at every step. These weights are read as they are: the compiled kernel multiplies 4-bit codes, and a step
# that waits for memory, as decoding does, has a quarter to wait for. See the README's table for how much that gives.

# %%
model = load(CHECKPOINT, quantize="int4", dtype=torch.bfloat16, pad_token_id=0)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
result = pipe(prompt, max_new_tokens=60, do_sample=False)[0]["generated_text"][len(prompt) :]
print(f"int4, weights of {bytes_to_giga_bytes(weight_bytes(model)):.4f} GB:", repr(result))
int4_bytes = weight_bytes(model)
del model
del pipe

# %% [markdown]
# What the article leaves to the user, "try it out", has a number: perplexity on text that the model never saw. And a
# model that is loaded already is quantized in place. `patched` takes the patch off again after the block.

# %%
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
bfloat16_bytes = weight_bytes(model)
windows = spread_windows(tokenizer, held_out_text(), count=4, length=256)
losses = {"bfloat16": perplexity(model, windows)}
for scheme in ("int8", "int4", "nf4"):
    with patched(model, quantize=scheme):
        losses[scheme] = perplexity(model, windows)
print("perplexity:", {name: round(value, 3) for name, value in losses.items()})
assert bfloat16_bytes > int8_bytes > int4_bytes

# %% [markdown]
# ## 2. Flash attention
#
# Attention as it is written down keeps a matrix of N x N scores for each head. The article's figures, for 40 heads in
# bfloat16, are 50 MB at 1,000 tokens, 19 GB at 16,000, 1 TB at 100,000. Two bytes for each of 40 * N * N scores are
# 80 MB, 20 GB and 800 GB, so the first and the last are only of that order.

# %%
for tokens in (1_000, 16_000, 100_000):
    print(f"{tokens} tokens, 40 heads: {40 * 2 * tokens**2 / 1e9:,.2f} GB of scores")

# %% [markdown]
# The article makes the prompt long by a system prompt, repeated ten times. Ours is code, and repeated less often: the
# script should end within a minute.

# %%
system_prompt = '''"""Conversations between programmers and an assistant.

The assistant answers with working code and short comments, says so where it is not sure, and tests what it writes.
"""


def interleave(first, second):
    """The elements of two lists in turn; what is left of the longer one comes last."""
    result = []
    for left, right in zip(first, second):
        result.append(left)
        result.append(right)
    shorter = min(len(first), len(second))
    return result + first[shorter:] + second[shorter:]


def test_interleave():
    assert interleave([1, 2], [3, 4]) == [1, 3, 2, 4]
    assert interleave([1, 2, 3], [4]) == [1, 4, 2, 3]
    assert interleave([], [5, 6]) == [5, 6]
    assert interleave([], []) == []


'''
long_prompt = 6 * system_prompt + prompt
inputs = tokenizer([long_prompt, prompt], return_tensors="pt", padding=True, padding_side="left")
length = inputs["input_ids"].shape[1]
print(f"a batch of two prompts, the longer one of {length} tokens, the shorter one padded")


def timed(name, model):
    """Generates after the batch of prompts; the peak is that of the long prompt's attention."""
    model.generate(inputs["input_ids"][1:, -16:], max_new_tokens=2, do_sample=False)  # a first call sets things up
    flush()
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    seconds, used = time.perf_counter() - start, peak.read()
    print(f"{name}: {seconds:.2f} s, peak", "unknown" if used is None else f"{bytes_to_giga_bytes(used):.4f} GB")
    return tokens, used


# %% [markdown]
# Without flash attention, as the article begins: every score of every head is in memory.

# %%
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager")
eager_tokens, eager_peak = timed("eager", model)
del model

# %% [markdown]
# Then the article calls `model.to_bettertransformer()`. That is history: PyTorch's scaled dot product attention is
# what transformers takes by default.

# %%
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
print("has to_bettertransformer:", hasattr(model, "to_bettertransformer"))
print("attention:", model.config._attn_implementation)
sdpa_tokens, sdpa_peak = timed("sdpa", model)

# %% [markdown]
# With padding, that default still gets a mask of N x N for each sequence. `patch` needs none: what is padding is said
# by one number per sequence, and attention takes memory in proportion to N. Without options it changes no result.

# %%
patch(model)
patched_tokens, patched_peak = timed("patched", model)
assert torch.equal(patched_tokens, eager_tokens) and torch.equal(patched_tokens, sdpa_tokens)
print(report(model))
unpatch(model)

# %% [markdown]
# ## 3. Architecture
#
# ### 3.1 Positions
#
# The article: rotary positions reach further than a model was trained for only with tricks. They are a keyword
# here. This model was trained on 512 tokens; of texts of 2,048 it makes

# %%
long_windows = spread_windows(tokenizer, held_out_text(), count=1, length=2048)
reached = {"as it is": perplexity(model, long_windows)}
for method in ("yarn:4", "self-extend:4"):
    with patched(model, rope=method):
        reached[method] = perplexity(model, long_windows)
print("perplexity at 4 times the trained length:", {name: round(value, 2) for name, value in reached.items()})
assert reached["yarn:4"] < reached["as it is"] and reached["self-extend:4"] < reached["as it is"]

# %% [markdown]
# ### 3.2 The key/value cache
#
# First without one, as the article does: everything is read again for every token.

# %%
patch(model)
input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
for _ in range(5):
    next_logits = model(input_ids)["logits"][:, -1:]
    next_token_id = torch.argmax(next_logits, dim=-1)
    input_ids = torch.cat([input_ids, next_token_id], dim=-1)
    print("shape of input_ids", input_ids.shape)
generated_text = tokenizer.batch_decode(input_ids[:, -5:])
print(generated_text)
without_cache = input_ids[0, -5:].tolist()

# %% [markdown]
# Then with it. The article's `past_key_values[0][0]` was the keys of the first layer; caches are objects today, and
# their layers have `keys` and `values`. With a patched model they are written in place: stock copies all of them at
# every step.

# %%
past_key_values = None  # past_key_values is the key-value cache
generated_tokens = []
next_token_id = tokenizer(prompt, return_tensors="pt")["input_ids"]
for _ in range(5):
    next_logits, past_key_values = model(next_token_id, past_key_values=past_key_values, use_cache=True).to_tuple()
    next_logits = next_logits[:, -1:]
    next_token_id = torch.argmax(next_logits, dim=-1)
    print("shape of input_ids", next_token_id.shape)
    print("length of key-value cache", past_key_values.get_seq_length(), past_key_values.layers[0].keys.shape)
    generated_tokens.append(next_token_id.item())
generated_text = tokenizer.batch_decode(generated_tokens)
print(generated_text)
assert generated_tokens == without_cache

# %% [markdown]
# ### 3.2.1 Conversations of several rounds
#
# `generate` returns the cache, and the next round goes on with it: only the new question is read.

# %%
model_inputs = tokenizer(system_prompt + prompt, return_tensors="pt")
generation_output = model.generate(**model_inputs, max_new_tokens=60, do_sample=False, return_dict_in_generate=True)
decoded_output = tokenizer.batch_decode(generation_output.sequences)[0]

question = '\n\ndef bytes_to_mega_bytes(size):\n    """Transforms bytes to megabytes."""\n'
added = tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
second_round = torch.cat([generation_output.sequences, added], dim=-1)
read = []
handle = model.get_input_embeddings().register_forward_hook(lambda module, given, out: read.append(given[0].shape[1]))
generation_output = model.generate(
    second_round,
    past_key_values=generation_output.past_key_values,
    max_new_tokens=60,
    do_sample=False,
    return_dict_in_generate=True,
)
handle.remove()
answer = generation_output.sequences[0, second_round.shape[1] :]
print(f"the second round has {second_round.shape[1]} tokens, of which {read[0]} are read")
print(repr(tokenizer.decode(answer)))
again = model.generate(second_round, max_new_tokens=60, do_sample=False)[0, second_round.shape[1] :]
assert read[0] == added.shape[1] + 1 and torch.equal(again, answer)
unpatch(model)

# %% [markdown]
# What the cache costs: two times the tokens, times layers, heads and head size. For OctoCoder at 16,000 tokens, if each
# of its heads had its own keys and values, the article counts 7,864,320,000 values, 15 GB in float16.

# %%
octocoder = GPTBigCodeConfig(n_layer=40, n_head=48, n_embd=6144)
values = 2 * 16_000 * octocoder.n_layer * octocoder.n_head * octocoder.n_embd // octocoder.n_head
print(f"{values} values, {2 * values / 1e9:.1f} GB; with one head for all, as it has, {2 * values / 48 / 1e6:.0f} MB")

# %% [markdown]
# ### 3.2.2 and 3.2.3 Fewer heads
#
# The article: multi-query and grouped-query attention make the cache smaller, and a model must be trained for them, or
# uptrained. `gqa=` converts one that is loaded, by merging heads that are alike, and `uptrain` trains back what is lost
# (see docs/gqa.md). And a cache can be smaller without touching the heads: in 8 or 4 bits.


# %%
def cache_row(model):
    """What the report says of the cache: its bytes at `context` tokens, of stock and as it is now."""
    return next(row for row in report(model).to_dict()["passes"] if row["pass"] == "cache")


sizes = {}
ways = {"exact": {}, "int8": {"cache": "int8"}, "int4": {"cache": "int4"}, "2 of 8 heads": {"gqa": 2}}
for name, keywords in ways.items():
    with patched(model, **keywords):
        row = cache_row(model)
        sizes[name] = row["bytes_after"]
print(f"cache of {row['context']} tokens, in GB:", {name: bytes_to_giga_bytes(size) for name, size in sizes.items()})
assert sizes["exact"] == 4 * sizes["2 of 8 heads"] and sizes["exact"] > 1.8 * sizes["int8"] > 1.8 * sizes["int4"]

# %% [markdown]
# ## Conclusion
#
# The article ends with speculative decoding, where a small model drafts and the large one verifies. With
# `speculative="ngram"` the text itself drafts: what followed before. It is exact, and gives up where it does not pay.

# %%
text = tokenizer(2 * system_prompt, return_tensors="pt")
expected = model.generate(**text, max_new_tokens=64, do_sample=False)
with patched(model, speculative="ngram"):
    assert torch.equal(model.generate(**text, max_new_tokens=64, do_sample=False), expected)

# %% [markdown]
# All of it in one call, and what it would do, known before anything is touched:

# %%
print(plan(CHECKPOINT, quantize="int4", cache="int8", rope="yarn:4", speculative="ngram"))
patch(model, quantize="int4", cache="int8", rope="yarn:4", speculative="ngram")
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(pipe(prompt, max_new_tokens=24, do_sample=False)[0]["generated_text"])
print(report(model))
