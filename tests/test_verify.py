"""verify: figures against a slow independent reference; damage of each kind is seen in its row; nothing is touched."""

import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from cases import FAMILIES, build, left_padded, prompt, tiny
from fingerprint import changes, fingerprint
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface

import hf_accel_patch
from hf_accel_patch import GQA, HfAccelConfig, HfAccelError, KVCache, Quantize, load, patch, report, verify
from hf_accel_patch.cli import main
from hf_accel_patch.families import weight_bytes
from hf_accel_patch.passes.layers import InPlaceLayer
from hf_accel_patch.trials import BUNDLED
from hf_accel_patch.verifying.agreement import Agreement
from hf_accel_patch.verifying.original import original_of

KEPT = Quantize("int8", originals="keep")
DISCARDED = Quantize("int8", originals="discard")
TEXTS = [prompt(96, seed=1)[0], prompt(80, batch=2, seed=2)]
TOKENS = 96 + 2 * 80


def verified(model, texts=TEXTS, **options):
    return verify(model, texts, speed=False, progress=False, **options)


def patched_llama(**options):
    return patch(tiny("llama"), **{"quantize": KEPT} | options)


@torch.no_grad()
def reference(stock, model, rows):
    """Top-1, mean and worst KL, and both perplexities, straight from the definitions."""
    same, kl, losses = [], [], ([], [])
    for row in rows:
        p, q = (each(row[None], use_cache=False).logits[0].double().softmax(-1) for each in (stock, model))
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        kl += (p * (p / q).log()).sum(-1).tolist()
        for found, each in zip(losses, (stock, model), strict=True):
            found.append((each(row[None], labels=row[None]).loss.item(), len(row) - 1))
    perplexities = [math.exp(sum(x * n for x, n in each) / sum(n for _, n in each)) for each in losses]
    return sum(same) / len(same), sum(kl) / len(kl), max(kl), *perplexities


def test_figures_are_those_of_the_definitions():
    model = patched_llama()
    rows = [TEXTS[0], *TEXTS[1]]
    found = verified(model)
    top1, mean, worst, before, after = reference(tiny("llama"), model, rows)
    assert found.tokens == TOKENS and found.windows == 3
    assert found.top1_agreement == pytest.approx(top1) and top1 > 0.5
    assert found.mean_kl == pytest.approx(mean, rel=1e-4) and found.max_kl == pytest.approx(worst, rel=1e-4)
    assert 0 < mean < worst
    assert found.perplexity_before == pytest.approx(before, rel=1e-6)
    assert found.perplexity_after == pytest.approx(after, rel=1e-6)
    assert before != after and found.perplexity_increase == pytest.approx(after / before - 1, rel=1e-3)


def test_exact_passes_agree():
    found = verified(patch(tiny("llama")))
    assert found.top1_agreement == 1 and found.max_kl < 1e-9
    assert found.greedy_common == found.greedy_tokens == 4 * 16 - 16  # three prompts
    for row in (found.padded_before, found.padded_after, found.cached_before, found.cached_after):
        assert row["top1"] == 1 and row["max_kl"] < 1e-9 and row["tokens"] > 90


def test_windows_and_a_limit_of_tokens():
    model = patched_llama()
    found = verified(model, window=32)
    assert (found.tokens, found.windows) == (TOKENS, 3 + 2 * 3)
    rows = [piece for row in (TEXTS[0], *TEXTS[1]) for piece in row.split(32)]
    assert found.perplexity_after == pytest.approx(reference(tiny("llama"), model, rows)[4], rel=1e-6)
    assert verified(model, tokens=100).tokens == 96 + 4


# ------------------------------------------------------------------------------------------------------ damage


def zero_codes(model):
    model.model.layers[0].mlp.up_proj._buffers["weight"].zero_()


def swap_two_heads(model):
    attention = model.model.layers[1].self_attn
    codes, scales, spec = attention.q_proj.held("weight")
    D = attention.head_dim
    order = [*range(D, 2 * D), *range(D), *range(2 * D, spec.shape[0])]
    codes.copy_(codes.view(spec.shape)[order].view(codes.shape))
    scales.copy_(scales[order])


def corrupt_scales(model):
    scales = model.model.layers[1].mlp.down_proj._buffers["weight_scales"]
    scales.copy_(scales.flip(0))


@pytest.mark.parametrize("damage", [zero_codes, swap_two_heads, corrupt_scales])
def test_damage_to_weights_shows_in_the_agreement(damage):
    model = patched_llama()
    sound = verified(model)
    damage(model)
    broken = verified(model)
    assert sound.top1_agreement > 0.9 and broken.top1_agreement < 0.8
    assert broken.mean_kl > 10 * sound.mean_kl and broken.greedy_common < broken.greedy_tokens
    assert broken.perplexity_before == sound.perplexity_before
    for row in ("padded_after", "cached_after"):
        assert getattr(broken, row)["mean_kl"] < 0.05 * broken.mean_kl


def test_weights_of_nan():
    model = patched_llama(quantize=None)
    model.lm_head.weight.data = torch.full_like(model.lm_head.weight, math.nan)
    found = verified(model, original=tiny("llama"))
    assert found.top1_agreement == 0 and math.isnan(found.mean_kl) and math.isnan(found.max_kl)
    assert math.isnan(found.perplexity_after) and math.isnan(found.perplexity_increase)
    assert json.loads(found.to_json())["perplexity_after"] is None


def test_a_broken_cache_shows_in_its_row(monkeypatch):
    model, update = patch(tiny("llama")), InPlaceLayer.update

    def forgetful(self, keys, values, *args, **kwargs):
        held = 0 if self.values is None else self.values.shape[2]
        keys, values = update(self, keys, values, *args, **kwargs)
        values = values.clone()
        values[:, :, :held] = 0
        return keys, values

    monkeypatch.setattr(InPlaceLayer, "update", forgetful)
    found = verified(model)
    assert found.cached_after["top1"] < 0.8 and found.cached_before["top1"] == 1
    assert found.greedy_common < found.greedy_tokens
    assert found.top1_agreement == 1 == found.padded_after["top1"] and found.max_kl < 1e-9


def test_broken_padding_shows_in_its_row(monkeypatch):
    model = patch(tiny("llama"))
    ours = AttentionInterface._global_mapping["hf_accel_patch"]

    def careless(module, query, key, value, attention_mask, **kwargs):
        return ours(module, query, key, value, None if len(query) > 1 else attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "hf_accel_patch", careless)
    found = verified(model)
    assert found.padded_after["top1"] < 0.9 and found.padded_before["top1"] == 1
    assert found.top1_agreement == 1 == found.cached_after["top1"]
    assert found.greedy_common == found.greedy_tokens


def test_a_lossy_cache_shows_where_it_is_used():
    found = verified(patch(tiny("llama"), cache="int4"), [prompt(400)])
    assert found.max_kl < 1e-9 < 1e-7 < found.cached_after["max_kl"]
    assert found.cached_before["max_kl"] < 1e-9


# ------------------------------------------------------------------------------------------------ where originals are


def test_other_models_and_passes():
    for family, options in (
        ("gpt2", {"gqa": 2}),
        ("falcon_mqa", {"quantize": KEPT}),
        ("llama", {"rope": "yarn:4", "speculative": "self", "quantize": KEPT}),
        ("llama", {"cache": "sinks:32"}),
    ):
        model = patch(tiny(family), **options)
        found = verified(model)
        top1, mean, *_ = reference(tiny(family), model, [TEXTS[0], *TEXTS[1]])
        assert found.top1_agreement == pytest.approx(top1) and found.mean_kl == pytest.approx(mean, rel=1e-3, abs=1e-9)
        assert found.padded_before["top1"] == 1, family


def test_a_model_without_a_cache_of_keys_says_so():
    found = verified(patch(build("mamba"), quantize=KEPT))
    assert found.cached_after is None and "no cache" in found.remarks[0]
    assert found.max_kl > 0 and found.top1_agreement > 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize("how", ["patch", "load", "gqa", "config"])
@pytest.mark.parametrize("stream", [None, True])
def test_originals_that_are_gone_come_from_the_checkpoint(folder, how, stream):
    if how == "load":
        model = load(folder, quantize="int8")
    elif how == "config":
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfAccelConfig("int8"))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        patch(model, **({"quantize": DISCARDED} if how == "patch" else {"gqa": GQA(1, originals="discard")}))
    found = verified(model, stream=stream)
    top1, mean, _, before, after = reference(tiny("llama"), model, [TEXTS[0], *TEXTS[1]])
    assert found.streamed is bool(stream) and str(folder) in found.original
    assert found.top1_agreement == pytest.approx(top1) and found.mean_kl == pytest.approx(mean, rel=1e-4)
    assert found.perplexity_before == pytest.approx(before, rel=1e-6)
    assert found.perplexity_after == pytest.approx(after, rel=1e-6)
    assert found.weight_bytes_before == weight_bytes(tiny("llama"))
    assert (found.cached_before is None) is bool(stream)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_streamed_as_it_is(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    model = patch(AutoModelForCausalLM.from_pretrained(tmp_path), quantize=DISCARDED)
    whole, streamed = (verified(model, [prompt(48)], stream=stream) for stream in (False, True))
    assert streamed.streamed and not whole.streamed
    assert streamed.perplexity_before == pytest.approx(whole.perplexity_before, rel=1e-9)
    assert streamed.mean_kl == pytest.approx(whole.mean_kl, rel=1e-6) and whole.mean_kl > 0
    assert whole.padded_before["top1"] == whole.cached_before["top1"] == 1
    assert whole.padded_before["max_kl"] < 1e-10 > whole.cached_before["max_kl"]


def test_a_streamed_original_holds_no_weights(folder):
    model = load(folder, quantize="int8")
    with original_of(model, None, True) as original, torch.no_grad():
        assert all(parameter.is_meta for parameter in original.model.parameters())
        scores = original.model(TEXTS[1]).logits
        assert all(parameter.is_meta for parameter in original.model.parameters())
    assert torch.equal(scores, tiny("llama")(TEXTS[1]).logits)


def test_kept_originals_are_not_copied():
    model = patched_llama()
    with original_of(model, None, None) as original:
        stock = tiny("llama")
        assert not hasattr(original.model, "_hf_accel_patch") and type(original.model.lm_head) is type(stock.lm_head)
        mine = {id(each) for each in model.parameters()}
        shared = [parameter for parameter in original.model.parameters() if id(parameter) in mine]
        assert shared
        kept = {id(each) for each in model._hf_accel_patch.journal.shared()}
        assert all(id(parameter) in mine | kept for parameter in original.model.parameters())
        for (name, ours), theirs in zip(original.model.named_parameters(), stock.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


def test_errors(folder, tmp_path):
    with pytest.raises(HfAccelError, match="not patched"):
        verified(tiny("llama"))
    model = patch(tiny("llama"), quantize=DISCARDED)
    with pytest.raises(HfAccelError, match=r"(?s)does not know its checkpoint.*original="):
        verified(model)
    with pytest.raises(HfAccelError, match="/no/such"):
        verified(model, original="/no/such/place")
    with pytest.raises(ValueError, match="very model"):
        verified(model, original=model)
    model.save_pretrained(tmp_path)
    with pytest.raises(HfAccelError, match="quantized itself"):
        verified(load(tmp_path, attention=False), original=str(tmp_path))
    assert "quantized before the patch" in verified(load(tmp_path)).remarks[0]
    assert verified(load(tmp_path), original=folder).top1_agreement > 0.8
    with pytest.raises(HfAccelError, match="tokenizer"):
        verify(model, ["text"], original=folder)
    for texts, error, words in (
        ([], ValueError, "no text of two tokens"),
        ([torch.tensor([5])], ValueError, "no text of two tokens"),
        ([torch.ones(3)], TypeError, "float32"),
        (7, TypeError, "int"),
        ([torch.tensor([5, 10**6])], ValueError, "texts="),
    ):
        with pytest.raises(error, match=words):
            verified(model, texts, original=folder)
    for options in ({"window": 1}, {"window": 10**6}, {"tokens": 0}, {"window": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            verified(model, original=folder, **options)


# ------------------------------------------------------------------------------------------------------ no trace


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_touched(training):
    cache = KVCache(prefixes="64MB")
    model = patch(tiny("llama"), cache=cache, speculative="ngram", quantize=KEPT).train(training)
    model.generate(prompt(40), max_new_tokens=4)  # now it has learned something
    before, told = fingerprint(model), report(model).to_dict()
    random = torch.get_rng_state()
    verify(model, TEXTS, speed=training, progress=False)
    assert changes(before, fingerprint(model)) == []
    assert report(model).to_dict() == told
    assert torch.equal(random, torch.get_rng_state()) and torch.is_grad_enabled()
    given = tiny("llama").train()
    before = fingerprint(given)
    verified(model, original=given)
    assert changes(before, fingerprint(given)) == []


def test_an_exception_leaves_no_trace(monkeypatch):
    model = patched_llama().train()
    before = fingerprint(model)
    monkeypatch.setattr(Agreement, "add", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verified(model)
    assert changes(before, fingerprint(model)) == []
    model(**left_padded())


# ------------------------------------------------------------------------------------------------------ what is said


def test_what_the_page_shows(monkeypatch, tmp_path, capsys):
    root = Path(hf_accel_patch.__file__).parent.parent
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "verification.md").read_text(), re.S)
    (tmp_path / "hf_accel_patch").symlink_to(root / "hf_accel_patch")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "verification.md", "exec"), names)
    found = names["found"]
    assert str(found) in capsys.readouterr().out and found.tokens == 1024
    assert found.speed_before > 0 and found.speed_after > 0 and found.prefill_speed_after > 0
    assert found.weight_bytes_after < 0.6 * found.weight_bytes_before
    described = json.loads(found.to_json())
    assert described == json.loads(json.dumps(found.to_dict()))
    text = str(found)
    assert "agreement" in text and f"{100 * found.top1_agreement:.2f} %" in text
    assert "<td>top-1 agreement</td>" in found._repr_html_()
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(found)
    assert "KL divergence, worst" in console.export_text()
    assert "verify" in hf_accel_patch.__all__


def run(capsys, *arguments):
    try:
        code = main([str(each) for each in arguments])
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr()


def test_command(capsys, tmp_path):
    text = tmp_path / "text.py"
    text.write_text((BUNDLED.parent.parent / "api.py").read_text()[:1500])
    asked = ("verify", BUNDLED, "--text", text, "--no-speed", "--quantize")
    code, said = run(capsys, *asked, "int4", "--max-perplexity-increase", "0.5")
    assert code == 0 and "agreement" in said.out, said.err
    code, said = run(capsys, *asked, "int4", "--max-perplexity-increase", "0.0001", "--json")
    found = json.loads(said.out)
    assert code == 1 and found["perplexity_increase"] > 0.0001 and 0.5 < found["top1_agreement"] < 1
    for wrong, words in (
        (("--quantize", "int3"), "int3"),
        (("--text", tmp_path / "none.txt"), "none.txt"),
        (("--max-perplexity-increase", "-1"), "share"),
        (("--window", "1"), "window"),
    ):
        code, said = run(capsys, "verify", BUNDLED, "--quantize", "int8", "--no-speed", *wrong)
        assert code == 2 and words in said.err and len(said.err.splitlines()) == 1 and not said.out
    code, said = run(capsys, "verify", "/no/such/model")
    assert code == 2 and "/no/such/model" in said.err


def test_adapters_are_in_both():
    peft = pytest.importorskip("peft")
    model = patched_llama(quantize=KEPT)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    found = verified(adapted)
    assert found.top1_agreement > 0.9 and found.perplexity_before != pytest.approx(reference_loss(), rel=1e-3)
    dropped = patch(tiny("llama"), quantize=DISCARDED)
    peft.get_peft_model(dropped, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(HfAccelError, match="adapters"):
        verified(dropped)


def reference_loss():
    return reference(tiny("llama"), tiny("llama"), [TEXTS[0], *TEXTS[1]])[3]


def test_the_command_loads_what_has_to_be_merged_first(capsys):
    asked = ("verify", BUNDLED, "--no-speed", "--tokens", "256", "--quantize", "int8", "--gqa", "1", "--json")
    code, said = run(capsys, *asked, "--max-perplexity-increase", "0.1")
    found = json.loads(said.out)
    assert code == 1 and found["perplexity_after"] > found["perplexity_before"] > 1
