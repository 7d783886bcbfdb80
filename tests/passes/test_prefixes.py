"""Prefixes: tokens equal stock's whatever is kept, and what is kept stays within its bytes, model and folder."""

import copy
import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from cases import FAMILIES, build, greedy, left_padded, prompt, randomise, tiny
from fingerprint import changes, fingerprint
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.generation import GenerationMixin

import hf_accel_patch
from hf_accel_patch import KVCache, PrefixCache, Quantize, UnsupportedModel, patch, unpatch
from hf_accel_patch.passes.prefixes import LEAST_TOKENS
from hf_accel_patch.plan import size_in_bytes

MODEL = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"
WITHOUT_MASKS = "_mask_length" in inspect.getsource(GenerationMixin.generate)  # transformers that drop masks of ones
TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # of tiny llama: layers, keys and values, heads, their size, float32
SLOW = pytest.mark.slow
SOON = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "gptj", "bloom", "falcon_new", "mpt", "deepseek_v3")
EVERY = [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in FAMILIES]


def prefixed(model, prefixes=None, kind="exact", **options):
    prefixes = PrefixCache("20MB") if prefixes is None else prefixes
    return patch(model, cache=KVCache(kind, prefixes=prefixes), **options), prefixes


def read(model, call):
    """What the call returns, and how many tokens of each sequence the model has read."""
    counts = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, out: counts.append(args[0].shape[1]))
    try:
        return call(), sum(counts)
    finally:
        handle.remove()


def conversation(base=60):
    """Prompts that go on, branch off, stop earlier and come again."""
    ids = prompt(base)
    longer = torch.cat([ids, prompt(20, seed=3)], 1)
    branch = torch.cat([ids[:, :40], prompt(25, seed=4)], 1)
    return [ids, longer, branch, ids[:, :50], torch.cat([longer, prompt(9, seed=5)], 1), ids, prompt(70, seed=6)]


def files(folder):
    return sorted(path for path in Path(folder).iterdir() if path.suffix == ".safetensors")


# Tokens


@pytest.mark.parametrize("family", EVERY)
def test_tokens_are_those_of_stock_and_less_is_read(family):
    stock, (model, prefixes) = tiny(family), prefixed(tiny(family))
    total = 0
    for ids in conversation():
        found, count = read(model, lambda ids=ids: greedy(model, ids, 6, use_cache=True))
        assert torch.equal(found, greedy(stock, ids, 6, use_cache=True))
        total += count - 5
    if not prefixes.hits and not WITHOUT_MASKS and "_prefill" in vars(model) and not FAMILIES[family].registry:
        pytest.skip("these transformers read chunks from the start")
    plain = sum(ids.shape[1] for ids in conversation())
    assert prefixes.hits and prefixes.reused_tokens == plain - total
    if not any(DynamicCache(config=model.config).is_sliding):
        assert total < plain * 0.55, "all shared beginnings are read once"


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_a_prefix_beyond_a_window_serves_only_what_goes_on_from_its_end(family):
    model, prefixes = prefixed(tiny(family))
    ids = prompt(60)
    greedy(model, ids, 2)
    greedy(model, ids[:, :50], 2)
    assert prefixes.hits == 0 and len(prefixes) == 2
    greedy(model, torch.cat([ids, prompt(9)], 1), 2)
    assert prefixes.reused_tokens == 60


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gemma2", marks=SLOW), pytest.param("falcon_new", marks=SLOW)]
)
def test_other_ways_to_generate(family):
    calls = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "returned beams": {"num_beams": 4, "num_return_sequences": 2},
        "returned samples": {"num_return_sequences": 3},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "in chunks": {"prefill_chunk_size": 16},
        "static": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
    }
    stock, (model, prefixes) = tiny(family), prefixed(tiny(family))
    for _ in range(2):
        for ids in (prompt(60), torch.cat([prompt(60), prompt(8)], 1)):
            for label, options in calls.items():
                sample = label == "returned samples"
                torch.manual_seed(0)
                expected = stock.generate(ids, max_new_tokens=6, **({"do_sample": sample} | options))
                torch.manual_seed(0)
                found = model.generate(ids, max_new_tokens=6, **({"do_sample": sample} | options))
                assert torch.equal(found, expected), label
    assert prefixes.hits or not WITHOUT_MASKS


def test_answers_with_scores_and_caches_that_go_on():
    stock, (model, _) = tiny("llama"), prefixed(tiny("llama"))
    for ids in (prompt(40), prompt(40), torch.cat([prompt(40), prompt(5)], 1)):
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        expected, found = stock.generate(ids, **options), model.generate(ids, **options)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        caches = [each.past_key_values for each in (found, expected)]
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == ids.shape[1] + 5
        more = torch.cat([expected.sequences, prompt(4)], 1)
        answers = [greedy(m, more, 5, past_key_values=c) for m, c in zip((model, stock), caches, strict=True)]
        assert torch.equal(*answers)


def test_a_cache_that_is_handed_over_goes_on_with_new_tokens_alone():
    model, more = tiny("llama"), prompt(9, seed=5)

    def answer():
        cache = DynamicCache(config=model.config)
        first = model.generate(prompt(60), past_key_values=cache, max_new_tokens=4, do_sample=False)
        seen = torch.ones(1, cache.get_seq_length() + more.shape[1], dtype=torch.long)
        return first, model.generate(
            more, attention_mask=seen, past_key_values=cache, max_new_tokens=4, do_sample=False
        )

    expected = answer()
    prefixed(model)
    assert all(torch.equal(one, other) for _ in range(2) for one, other in zip(answer(), expected, strict=True))


def test_what_a_call_does_to_its_cache_leaves_the_prefix_alone():
    stock, (model, prefixes) = tiny("llama"), prefixed(tiny("llama"))
    ids = prompt(40)
    for _ in range(3):
        answer = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(answer.sequences[:, 40:], greedy(stock, ids, 6))
        for layer in answer.past_key_values.layers:
            layer.keys.zero_(), layer.values.zero_()
    assert prefixes.hits == 2


UNUSED = {
    "padded": lambda model: left_padded(40, 23),
    "rows that differ": lambda model: {"input_ids": prompt(40, 2)},
    "a cache that has tokens": lambda model: {"input_ids": prompt(40), "past_key_values": filled(model)},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(prompt(40)).detach()},
    "other positions": lambda model: {"input_ids": prompt(40), "position_ids": torch.arange(40)[None] * 2},
    "a hidden token": lambda model: {"input_ids": prompt(40), "attention_mask": (torch.arange(40)[None] != 0).long()},
    "a short prompt": lambda model: {"input_ids": prompt(LEAST_TOKENS)},
    "hidden states": lambda model: {
        "input_ids": prompt(40), "output_hidden_states": True, "return_dict_in_generate": True,
    },
}  # fmt: skip


def filled(model):
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        return model(prompt(40)[:, :20], use_cache=True, past_key_values=cache).past_key_values


@pytest.mark.parametrize("name", UNUSED)
def test_prompts_that_are_more_than_their_tokens_are_read_whole(name):
    """Neither taken from the prefixes nor kept, although one with these tokens is known."""
    stock, (model, prefixes) = tiny("llama"), prefixed(tiny("llama"))
    options = {"max_new_tokens": 5, "do_sample": False}
    for known in (False, True):
        if known:
            greedy(model, prompt(40), 2)
        before = (len(prefixes), prefixes.hits)
        found, expected = (each.generate(**UNUSED[name](each), **options) for each in (model, stock))
        found, expected = (getattr(each, "sequences", each) for each in (found, expected))
        assert torch.equal(found, expected)
        assert (len(prefixes), prefixes.hits) == before
    assert torch.equal(greedy(model, prompt(40), 5), greedy(stock, prompt(40), 5))


def test_a_mask_of_ones_and_a_batch_of_the_same_prompt_use_them():
    stock, (model, prefixes) = tiny("llama"), prefixed(tiny("llama"))
    ids = prompt(40)
    greedy(model, ids, 2)
    assert torch.equal(greedy(model, ids, 5, attention_mask=torch.ones_like(ids)), greedy(stock, ids, 5))
    assert prefixes.hits == 1
    three = ids.expand(3, -1)
    assert torch.equal(greedy(model, three, 5), greedy(stock, three, 5))
    assert prefixes.hits == 2


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_quantized_caches(family, kind):
    """What is restored is what was kept, bit for bit: two models that read the same give the same."""
    with torch.no_grad():
        ids = prompt(200)
        model, prefixes = prefixed(tiny(family), kind=kind)
        longer = torch.cat([ids, prompt(30, seed=2)], 1)
        greedy(model, ids, 2)
        found = greedy(model, longer, 8)
        assert prefixes.reused_tokens == 200
        other = patch(tiny(family), cache=kind)
        cache = other(ids, use_cache=True).past_key_values
        assert torch.equal(found, greedy(other, longer, 8, past_key_values=cache))
        assert greedy(model, ids[:, :150], 4).shape == (1, 4)


@pytest.mark.parametrize("kinds", [("exact", "int8"), ("int8", "exact"), ("int8", "int4"), ("int4", "int8")])
@pytest.mark.parametrize("where", ["object", "folder"])
def test_caches_of_another_kind_are_not_mixed_up(kinds, where, tmp_path):
    folder = tmp_path if where == "folder" else None
    shared, ids = PrefixCache("20MB", folder=folder), prompt(200)
    model = tiny("llama")
    for kind in kinds:
        expected = greedy(patch(tiny("llama"), cache=kind), ids, 6)
        prefixes = shared if where == "object" else PrefixCache("20MB", folder=folder)
        prefixed(model, prefixes, kind)
        assert torch.equal(greedy(model, ids, 6), expected)
        assert prefixes.hits == 0
        unpatch(model)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_models(scheme, tmp_path):
    """A folder is of the model that was given to `patch`, and its prefixes of what that became."""
    ids, answers = prompt(60), []
    for again in range(2):
        quantize = Quantize(scheme, originals="keep")
        model, prefixes = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path), quantize=quantize)
        answers.append(greedy(model, torch.cat([ids, prompt(4, seed=again)], 1), 4))
        assert prefixes.hits == again
    model, prefixes = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path))
    assert torch.equal(greedy(model, ids, 6), greedy(tiny("llama"), ids, 6)) and prefixes.hits == 0


# Bytes


def test_the_least_recently_used_goes_first():
    prefixes = PrefixCache(int(2.5 * 40 * TOKEN_BYTES))
    model, _ = prefixed(tiny("llama"), prefixes)
    a, b, c = (prompt(40, seed=seed) for seed in (1, 2, 3))
    for ids in (a, b):
        greedy(model, ids, 2)
    assert prefixes.bytes == 2 * 40 * TOKEN_BYTES and len(prefixes) == 2
    greedy(model, a, 2)  # used
    greedy(model, c, 2)
    assert len(prefixes) == 2 and prefixes.bytes <= prefixes.limit
    hits = prefixes.hits
    greedy(model, b, 2)
    assert prefixes.hits == hits, "b has gone, c took its place"
    greedy(model, c, 2)
    assert prefixes.hits == hits + 1


def test_a_prompt_that_extends_another_takes_its_place():
    model, prefixes = prefixed(tiny("llama"))
    ids = prompt(90)
    for length in (30, 60, 90, 45):
        greedy(model, ids[:, :length], 2)
    assert len(prefixes) == 1 and prefixes.bytes == 90 * TOKEN_BYTES
    assert prefixes.reused_tokens == 30 + 60 + 44


def test_a_prompt_beyond_the_limit_is_not_kept():
    model, prefixes = prefixed(tiny("llama"), PrefixCache(50 * TOKEN_BYTES))
    for ids in (prompt(40), prompt(60, seed=1)):
        greedy(model, ids, 2)
    assert len(prefixes) == 1 and prefixes.bytes == 40 * TOKEN_BYTES


def test_limits_hold_in_memory_and_on_the_disk(tmp_path):
    limit = int(3.5 * (40 * TOKEN_BYTES + 4000))
    prefixes = PrefixCache(limit, folder=tmp_path)
    stock, (model, _) = tiny("llama"), prefixed(tiny("llama"), prefixes)
    for seed in (1, 2, 3, 4, 5, 6, 1, 5):
        ids = prompt(40, seed=seed)
        assert torch.equal(greedy(model, ids, 3), greedy(stock, ids, 3))
        assert prefixes.bytes <= limit
        assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert len(files(tmp_path)) == 3


def test_what_left_the_memory_is_read_from_the_disk(tmp_path):
    prefixes = PrefixCache("20MB", folder=tmp_path)
    stock, (model, _) = tiny("llama"), prefixed(tiny("llama"), prefixes)
    for seed in (1, 2):
        greedy(model, prompt(40, seed=seed), 2)
    for entry in prefixes._entries.values():
        entry.state = None
    assert prefixes.bytes == 0 and len(prefixes) == 2
    for seed in (1, 2):
        assert torch.equal(greedy(model, prompt(40, seed=seed), 5), greedy(stock, prompt(40, seed=seed), 5))
    assert prefixes.hits == 2 and prefixes.bytes > 0


def test_clear_forgets_what_others_have_written_too(tmp_path):
    model, prefixes = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path))
    greedy(model, prompt(40), 2)
    assert len(files(tmp_path)) == 1 and "prefixes=1" in repr(prefixes) and str(tmp_path) in repr(prefixes)
    PrefixCache("20MB", folder=tmp_path).clear()
    assert not files(tmp_path)
    prefixes.clear()
    assert len(prefixes) == prefixes.bytes == 0
    greedy(model, prompt(40), 2)
    assert prefixes.hits == 0 and len(prefixes) == 1


# Folders


PROCESS = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
torch.set_num_threads(2)
from cases import greedy, prompt, tiny
from hf_accel_patch import KVCache, PrefixCache, patch
prefixes = PrefixCache("20MB", folder=sys.argv[3])
model = patch(tiny("llama"), cache=KVCache(prefixes=prefixes))
print(greedy(model, torch.cat([prompt(60), prompt(5, seed=9)], 1), 6).tolist(), prefixes.reused_tokens)
"""


def test_the_next_process_finds_them(tmp_path):
    model, _ = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path))
    greedy(model, prompt(60), 2)
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", PROCESS, str(tests), str(tests.parent), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    expected = greedy(tiny("llama"), torch.cat([prompt(60), prompt(5, seed=9)], 1), 6).tolist()
    assert run.stdout.strip() == f"{expected} 60"


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=SLOW) for name in ("gemma2", "bloom", "deepseek_v3"))]
)
def test_several_objects_share_a_folder(family, tmp_path):
    """Each takes files away and writes others, under a limit that all of them keep."""
    stock = tiny(family)
    users = []
    for _ in range(3):
        users.append(prefixed(tiny(family), PrefixCache("150KB", folder=tmp_path)))
        for model, _ in users:
            for ids in conversation(45):
                assert torch.equal(greedy(model, ids, 3), greedy(stock, ids, 3))
                assert sum(path.stat().st_size for path in files(tmp_path)) <= 150_000
    for path in files(tmp_path):
        path.unlink()
    for model, _ in users:
        assert torch.equal(greedy(model, prompt(45), 3), greedy(stock, prompt(45), 3))


def test_threads_share_them(tmp_path):
    model, prefixes = prefixed(tiny("llama"), PrefixCache("100KB", folder=tmp_path))
    inputs = [torch.cat([prompt(30, seed=i % 3), prompt(12, seed=i)], 1) for i in range(6)]
    expected = [greedy(tiny("llama"), ids, 4) for ids in inputs]
    failures = []

    def work(start):
        try:
            for i in range(12):
                number = (start + i) % 6
                assert torch.equal(greedy(model, inputs[number], 4), expected[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert prefixes.bytes <= prefixes.limit


def snapshot(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("other", ["weights", "dtype", "architecture"])
def test_another_model_is_refused_before_anything_is_touched(other, tmp_path):
    model, _ = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path))
    greedy(model, prompt(40), 2)
    before = snapshot(tmp_path)
    stranger = tiny("qwen2") if other == "architecture" else tiny("llama")
    stranger = {"weights": lambda: randomise(stranger, 3), "dtype": stranger.double}.get(other, lambda: stranger)()
    print_before = fingerprint(stranger)
    with pytest.raises(UnsupportedModel, match="of another model"):
        prefixed(stranger, PrefixCache("1KB", folder=tmp_path))
    assert not changes(print_before, fingerprint(stranger)) and snapshot(tmp_path) == before
    _, prefixes = prefixed(tiny("llama"), again := PrefixCache("20MB", folder=tmp_path))
    assert prefixes is again


def test_another_tokenizer_is_refused(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    longer = transformers.AutoTokenizer.from_pretrained(MODEL)
    longer.add_tokens(["<tool>"])
    ids = prompt(40)
    model, _ = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path, tokenizer=tokenizer))
    greedy(model, ids, 2)
    before = snapshot(tmp_path)
    with pytest.raises(UnsupportedModel, match="of another tokenizer"):
        prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path, tokenizer=longer))
    assert snapshot(tmp_path) == before
    for each in (tokenizer, None):
        model, prefixes = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path, tokenizer=each))
        greedy(model, ids, 2)
        assert prefixes.hits == 1


def test_a_model_that_was_moved_is_the_same(tmp_path):
    for name, hits in (("here", 0), ("there", 1)):
        model = tiny("llama")
        model.config._name_or_path = name
        model, prefixes = prefixed(model, PrefixCache("20MB", folder=tmp_path))
        greedy(model, prompt(40), 2)
        assert prefixes.hits == hits


def test_files_of_others_stay(tmp_path):
    """Somebody's weights lie in the folder, and are larger than its limit."""
    save_file({"weight": torch.ones(500_000)}, tmp_path / "model.safetensors")
    save_file({"tokens": prompt(40)[0]}, tmp_path / "model-00001-of-00002.safetensors")
    os.utime(tmp_path / "model.safetensors", (1, 1))
    (tmp_path / "config.json").write_text("{}")
    before = snapshot(tmp_path)
    model, prefixes = prefixed(tiny("llama"), PrefixCache("100KB", folder=tmp_path))
    for seed in range(4):
        greedy(model, prompt(40, seed=seed), 2)
    prefixes.clear()
    assert before.items() <= snapshot(tmp_path).items()


@pytest.mark.parametrize("content", ["", "[1,", "[1]", "null", "{}"])
def test_a_folder_that_does_not_say_whose_it_is_is_refused(content, tmp_path):
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(UnsupportedModel, match="folder"):
        prefixed(tiny("llama"), PrefixCache("1MB", folder=tmp_path))
    assert snapshot(tmp_path) == {"model.json": content.encode()}


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "overwritten": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "removed": lambda path: path.unlink(),
    "without metadata": lambda path: save_file(load_file(path), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("when", ["before", "while it is known"])
def test_a_damaged_file_is_read_as_none(damage, when, tmp_path):
    stock, ids = tiny("llama"), prompt(40)
    model, prefixes = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path))
    greedy(model, ids, 2)
    if when == "while it is known":
        for entry in prefixes._entries.values():
            entry.state = None
    (path,) = files(tmp_path)
    DAMAGE[damage](path)
    if when == "before":
        model, prefixes = prefixed(tiny("llama"), PrefixCache("20MB", folder=tmp_path))
    assert torch.equal(greedy(model, ids, 4), greedy(stock, ids, 4))
    assert prefixes.hits == 0
    if damage != "a folder":
        assert torch.equal(greedy(model, ids, 4), greedy(stock, ids, 4)) and prefixes.hits == 1


# Models that change


def train(model):
    model.train()
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.eval()


@torch.no_grad()
def one_number(model):
    model.get_input_embeddings().weight[int(prompt(40)[0, 3]), 30] += 2.0


@torch.no_grad()
def another_tensor(model):
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight.data = layer.weight.data * 1.5


CHANGES = {
    "trained": train,
    "one number": one_number,
    "another tensor": another_tensor,
    "loaded": lambda m: m.load_state_dict({name: value.flip(0) for name, value in m.state_dict().items()}),
    "dtype": lambda m: m.to(torch.float64),
    "a new parameter": lambda m: setattr(m.model.norm, "weight", torch.nn.Parameter(m.model.norm.weight * 2)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_weights_that_change_start_anew(change, where, tmp_path):
    model, other = tiny("llama"), tiny("llama")
    prefixed(model, prefixes := PrefixCache("20MB", folder=tmp_path if where == "folder" else None))
    ids = prompt(40)
    for _ in range(2):
        greedy(model, ids, 2)
    assert prefixes.hits == 1
    CHANGES[change](model), CHANGES[change](other)
    patch(other)
    assert torch.equal(greedy(model, ids, 12), greedy(other, ids, 12))
    assert prefixes.hits == 1
    assert torch.equal(greedy(model, ids, 12), greedy(other, ids, 12))
    assert prefixes.hits == 2


@pytest.mark.parametrize("related", ["another", "a copy with one other number"])
def test_models_that_share_an_object_keep_their_own(related):
    """Although their weights have been written to equally often."""
    prefixes = PrefixCache("20MB")
    first = tiny("llama")
    if related == "another":
        second = randomise(build("llama"), 5)
        randomise(first, 0)
    else:
        second = copy.deepcopy(first)
        with torch.no_grad():
            second.get_input_embeddings().weight.data[int(prompt(40)[0, 3]), 30] += 2.0
    ids, expected = prompt(40), [greedy(each, prompt(40), 12) for each in (first, second)]
    for each in (first, second):
        prefixed(each, prefixes)
    for turn in range(3):
        for each, truth in zip((first, second), expected, strict=True):
            assert torch.equal(greedy(each, ids, 12), truth)
        assert prefixes.hits == 2 * turn
    assert not torch.equal(*expected)


def test_adapters_are_told_apart():
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(tiny("llama"), config)
        wrapped.add_adapter("other", config)
        return wrapped.eval()

    def ask(each):
        answers = []
        for name in ("default", "other", "default"):
            each.set_adapter(name)
            answers.append(each.generate(input_ids=prompt(), max_new_tokens=8, do_sample=False))
            with each.disable_adapter():
                answers.append(each.generate(input_ids=prompt(), max_new_tokens=8, do_sample=False))
        each.merge_adapter()
        answers.append(each.generate(input_ids=prompt(), max_new_tokens=8, do_sample=False))
        each.unmerge_adapter()
        return answers

    stock, model = adapted(), adapted()
    prefixed(model)
    assert all(torch.equal(a, b) for a, b in zip(ask(model), ask(stock), strict=True))


def test_deep_copies_and_unpatched_models():
    model, prefixes = prefixed(tiny("llama"))
    before = fingerprint(unpatch(model))
    prefixed(model, prefixes)
    ids, expected = prompt(40), greedy(tiny("llama"), prompt(40), 8)
    assert torch.equal(greedy(model, ids, 8), expected)
    clone = copy.deepcopy(model)
    for each in (clone, model, clone):
        assert torch.equal(greedy(each, ids, 8), expected)
    train(clone)
    assert torch.equal(greedy(clone, ids, 8), greedy(unpatch(copy.deepcopy(clone)), ids, 8))
    assert torch.equal(greedy(model, ids, 8), expected)
    unpatch(model)
    assert not changes(before, fingerprint(model))
    hits = prefixes.hits
    assert torch.equal(greedy(model, ids, 8), expected) and prefixes.hits == hits
    prefixed(model, prefixes)
    assert torch.equal(greedy(model, ids, 8), expected) and prefixes.hits == hits + 1, "it is the same model"


def test_nothing_holds_on_to_a_model():
    import gc
    import weakref

    model, prefixes = prefixed(tiny("llama"))
    greedy(model, prompt(40), 2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and len(prefixes) == 1


# Options


@pytest.mark.parametrize(
    "size, size_bytes",
    [(1, 1), ("12", 12), ("500MB", 500 * 10**6), ("2GiB", 2**31), (" 1.5 kB ", 1500), ("3kib", 3072), ("7B", 7)],
)
def test_sizes(size, size_bytes):
    assert size_in_bytes(size) == size_bytes == PrefixCache(size).limit


@pytest.mark.parametrize("size", [0, -1, "0", "many", "", "2XB", "-3MB", "1.2.3GB", "0.2B"])
def test_impossible_sizes(size):
    for make in (size_in_bytes, PrefixCache, lambda each: KVCache(prefixes=each)):
        with pytest.raises(ValueError, match="a size of"):
            make(size)


def test_sinks_have_none():
    with pytest.raises(ValueError, match="prefixes with 'sinks'"):
        KVCache("sinks", window=64, prefixes="1MB")


@pytest.mark.parametrize("model_type", ["jamba", "bamba"])
def test_models_with_recurrent_states_are_refused(model_type):
    model = build(model_type)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match="prefixes of layers of kind"):
        prefixed(model)
    assert not changes(before, fingerprint(model))


def test_a_size_makes_a_cache_of_prefixes():
    stock, model = tiny("llama"), patch(tiny("llama"), cache=KVCache(prefixes="1MiB"))
    for ids in conversation():
        assert torch.equal(greedy(model, ids, 4), greedy(stock, ids, 4))
    prefixes = vars(model)["_prefill"].__func__.prefixes
    assert prefixes.hits and prefixes.limit == 2**20


def test_the_folder_says_whose_it_is(tmp_path):
    model = tiny("llama")
    model.config._name_or_path = "somebody/llama"
    model.name_or_path = "somebody/llama"
    prefixed(model, PrefixCache("1MB", folder=tmp_path / "new" / "one"))
    said = json.loads((tmp_path / "new" / "one" / "model.json").read_text())
    assert said["name"] == "somebody/llama" and len(said["model"]) == 64
