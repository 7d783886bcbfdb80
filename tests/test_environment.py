"""HF_ACCEL_PATCH and the variables of the passes: what they say, and what becomes of models while it is on."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from cases import build, greedy, logits, prompt, tiny
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from test_checkpoints import write
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    dynamic_module_utils,
    pipeline,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_accel_patch import (
    AlreadyPatched,
    HfAccelConfig,
    automatic,
    environment,
    load,
    options,
    patch,
    report,
    starting,
    unpatch,
)
from hf_accel_patch.families import weight_bytes
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.passes import cache, context, quantize, scaling, speculative

BUNDLED = Path(environment.__file__).parent / "models" / "code-llama-8m"
LATER = ("budget", "batch")  # keywords that a planner brings
ROUNDED = 0.1  # of the logits' standard deviation: int8 and bfloat16, of weights that are random
LOSSY = {"quantize", "rope", "gqa", "speculative"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a tiny llama with 2 key/value heads."""
    path = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(path)
    return path


def rows(model):
    return {row["pass"]: row for row in report(model).to_dict()["passes"]}


def applied(model):
    return {name for name, row in rows(model).items() if "reason" not in row}


# ---------------------------------------------------------------------------------------------------- the texts


@pytest.mark.parametrize("text", ["1", "on", "Yes", "TRUE", " true "])
def test_true(text):
    assert environment.is_on({"HF_ACCEL_PATCH": text})


@pytest.mark.parametrize("text", ["0", "off", "No", "FALSE", "", " "])
def test_false(text):
    assert not environment.is_on({"HF_ACCEL_PATCH": text}) and not environment.is_on({})


def test_neither_true_nor_false():
    with pytest.raises(ValueError, match="HF_ACCEL_PATCH='maybe'; allowed: 1, ON, YES, TRUE, or 0, OFF, NO, FALSE"):
        environment.is_on({"HF_ACCEL_PATCH": "maybe"})


def test_every_keyword_has_its_variable():
    assert set(environment.ALLOWED) == {*options.KEYWORDS, *LATER}


ALLOWED = {
    "quantize": quantize.SCHEMES,
    "cache": ("exact", *cache.BITS, "sinks:64", "1", "Yes"),
    "rope": tuple(f"{method}:4" for method in scaling.get_args(scaling.Method) if method != "longrope"),
    "speculative": tuple(each for each in speculative.get_args(speculative.Method) if each != "model"),
    "gqa": ("1", "8"),
    "context": ("1", "16384"),
    "attention": ("1", "on"),
    "linear": ("true",),
}


@pytest.mark.parametrize(("keyword", "text"), [(key, text) for key, texts in ALLOWED.items() for text in texts])
def test_what_is_allowed_is_what_the_passes_take(keyword, text):
    assert environment.given({environment.variable(keyword): text}) == {keyword: text}
    options.parse({keyword: options.from_text(keyword, text)})


@pytest.mark.parametrize(
    ("keyword", "text", "said"),
    [
        ("quantize", "int5", "int8, int4, nf4 or llm.int8"),
        ("quantize", "1", "int8, int4, nf4 or llm.int8"),
        ("cache", "int3", "int8, int4 or sinks:WINDOW"),
        ("rope", "yarm:4", "linear:F, dynamic:F, yarn:F, llama3:F or self-extend:F"),
        ("rope", "yarn:0.5", "at least 1"),
        ("rope", "yarn", "at least 1"),
        ("gqa", "two", "a number of key/value heads"),
        ("context", "-1", "a number of tokens"),
        ("speculative", "draft", "ngram or self"),
        ("speculative", "model", "ngram or self"),
        ("attention", "maybe", "allowed: 1; 0 switches it off"),
        ("budget", "6XB", "GiB"),
    ],
)
def test_what_is_not_allowed_is_named(keyword, text, said):
    with pytest.raises(ValueError) as raised:
        environment.given({environment.variable(keyword): text})
    start, found = f"{environment.variable(keyword)}={text!r}; allowed: ", str(raised.value)
    assert found.startswith(start) and said in found


def test_unknown_names_are_named_with_the_closest():
    with pytest.raises(ValueError, match=r"HF_ACCEL_QUANTISE is no variable.*did you mean HF_ACCEL_QUANTIZE\?"):
        environment.given({"HF_ACCEL_QUANTISE": "int4"})
    assert environment.given({"HF_ACCELERATE": "1", "HF_ACCEL_PATCH": "1", "HF_ACCEL_GQA": ""}) == {}


def test_what_is_false_is_as_if_it_was_not_set_but_for_switches():
    texts = environment.given({"HF_ACCEL_GQA": "0", "HF_ACCEL_CONTEXT": "off", "HF_ACCEL_ATTENTION": "No"})
    assert environment.asked(texts) == {"attention": "No"}


def test_values_that_exclude_each_other(on):
    with pytest.raises(ValueError, match=r"HF_ACCEL_CACHE=int8, HF_ACCEL_ROPE=dynamic:2: rope='dynamic' with cache"):
        on(ROPE="dynamic:2", CACHE="int8")
    with pytest.raises(ValueError, match=r"HF_ACCEL_CACHE=sinks:4: cache: 4 sinks in a window of 4"):
        on(ROPE="0", CACHE="sinks:4")


# ---------------------------------------------------------------------------------------------------- models


def test_off_nothing_is_changed(on, folder):
    before = {name: vars(PreTrainedModel)[name] for name in starting.METHODS}
    on(PATCH="0", QUANTIZE="nonsense", ANYTHING="x")
    assert before == {name: vars(PreTrainedModel)[name] for name in starting.METHODS}
    assert not rows(AutoModelForCausalLM.from_pretrained(folder))


def test_exact_passes(on, folder):
    ids = prompt()
    stock = logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    on()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {"attention", "cache"} <= applied(model) and not applied(model) & LOSSY
    assert type(model) is LlamaForCausalLM and torch.allclose(logits(model, ids), stock, atol=1e-5)
    assert patch(model) is model
    with pytest.raises(AlreadyPatched, match="as HF_ACCEL_PATCH asks"):
        patch(model, quantize="int8")
    unpatch(model)
    assert not rows(model) and torch.equal(logits(model, ids), stock)


def test_every_way_to_make_a_model(on, folder):
    on(ATTENTION="0")
    config = AutoConfig.from_pretrained(folder)
    generate = pipeline("text-generation", model=str(BUNDLED))
    info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    made = [LlamaForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_config(config), generate.model, info[0]]
    assert all("cache" in applied(each) and "attention" not in applied(each) for each in made)
    assert "missing_keys" in info[1]


def test_quantized_while_it_is_read(on, folder, monkeypatch):
    ids = prompt()
    expected = logits(load(folder, quantize="int4", cache="int8"), ids)
    on(QUANTIZE="int4", CACHE="int8")
    monkeypatch.setattr(quantize.Quantize, "apply", None)  # the float model must not be there to be quantized
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert rows(model)["quantize"]["scheme"] == "int4" and "cache" in applied(model)
    assert torch.equal(logits(model, ids), expected)
    patch(model, quantize="int4", cache="int8")
    direct = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert "quantize" in applied(direct) and direct.dtype == torch.bfloat16


def test_everything_at_once(on, folder):
    on(QUANTIZE="int8", ROPE="yarn:4", GQA="1", SPECULATIVE="ngram", LINEAR="0")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert applied(model) >= LOSSY and model.config.num_key_value_heads == 1
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert greedy(model, prompt()).shape == (1, 12)


@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_what_a_model_cannot_have_is_left_out(family, on, tmp_path, warned):
    stock = tiny(family)
    stock.save_pretrained(tmp_path)
    on(ROPE="yarn:4", QUANTIZE="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "yarn" in rows(model)["rope"]["reason"] and "quantize" in applied(model)
    assert any("is patched without rope" in line for line in warned())
    assert greedy(model, prompt()).shape == greedy(stock, prompt()).shape


def test_a_number_that_does_not_fit_this_model(on, folder, warned):
    on(GQA="3")
    assert "divisors" in rows(AutoModelForCausalLM.from_pretrained(folder))["gqa"]["reason"]
    assert len(warned()) == 1


def test_a_pass_that_fails_leaves_the_model_as_it_was(on, folder, warned, monkeypatch):
    stock = AutoModelForCausalLM.from_pretrained(folder)

    def fail(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(cache.KVCache, "apply", fail)
    on()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not rows(model) and torch.equal(logits(model, prompt()), logits(stock, prompt()))
    assert any("LlamaForCausalLM is left as it is: no kernel" in line for line in warned())


def test_what_cannot_be_quantized_while_reading_is_quantized_after_it(on, folder, tmp_path, warned):
    torch.save(tiny("llama").state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    on(QUANTIZE="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantize" in applied(model)


def test_models_that_are_no_causal_lms(on, folder, warned):
    on(QUANTIZE="int8")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    body = transformers.AutoModel.from_pretrained(folder)
    assert not rows_of_any(classifier) and not rows_of_any(body) and not warned()


def rows_of_any(model):
    return "_hf_accel_patch" in vars(model) or any(isinstance(module, QuantizedModule) for module in model.modules())


def test_parts_of_other_models_are_left_alone(on, folder):
    on(QUANTIZE="int8")
    whole = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained
    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    path = folder / "bert"
    transformers.BertModel(bert).save_pretrained(path)
    assert not rows_of_any(whole(path, path).decoder)


def test_models_without_weights(on, folder, warned):
    on(QUANTIZE="int8")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        first = AutoModelForCausalLM.from_config(config)
    with init_empty_weights():
        second = AutoModelForCausalLM.from_config(config)
    assert not rows(first) and not rows(second) and not warned()


def test_offloaded_models_have_exact_passes_only(on, folder, tmp_path, warned):
    on(QUANTIZE="int8")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path, dtype=torch.float32
    )
    assert "offloaded" in rows(model)["quantize"]["reason"] and "attention" in applied(model)
    assert any("offloaded" in line for line in warned())
    assert greedy(model, prompt()).shape == (1, 12)


def test_what_the_package_makes_itself_is_left_alone(on, folder):
    on(GQA="1")
    model = load(folder, quantize="int8", attention=False)
    assert applied(model) == {"quantize", "cache"}
    unpatch(model, reload=True)
    assert not rows(model) and model.config.num_key_value_heads == 2


def test_a_checkpoint_that_is_quantized_already(on, folder, tmp_path, warned):
    load(folder, quantize="int4").save_pretrained(tmp_path)
    on(QUANTIZE="int8")
    found = rows(AutoModelForCausalLM.from_pretrained(tmp_path))["quantize"]
    assert found["scheme"] == "int4" and any("HF_ACCEL_QUANTIZE=int8 is left out" in line for line in warned())


def test_a_checkpoint_of_another_quantizer(on, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    write(tmp_path, "nf4")
    expected = logits(load(tmp_path, linear=False), prompt())
    on(LINEAR="0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert rows(model)["quantize"]["checkpoint"] == "bitsandbytes" and "cache" in applied(model)
    assert torch.equal(logits(model, prompt()), expected)


def test_quantization_that_the_program_asks_for(on, folder, warned):
    on(QUANTIZE="int8")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfAccelConfig("nf4"))
    assert rows(model)["quantize"]["scheme"] == "nf4" and "cache" in applied(model)
    assert any("HF_ACCEL_QUANTIZE=int8 is left out" in line for line in warned())


def test_adapters(on, folder, tmp_path):
    torch.manual_seed(0)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, init_lora_weights=False))
    trained.save_pretrained(tmp_path)
    expected = logits(trained, prompt())
    on()
    for model in (AutoPeftModelForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert "attention" in applied(model) and torch.allclose(logits(model, prompt()), expected, atol=1e-5)
    on(QUANTIZE="int8")
    for model in (AutoPeftModelForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert "quantize" in applied(model)
        assert (logits(model, prompt()) - expected).std() < ROUNDED * expected.std()


def beside(folder, stock):
    """An adapter of this model, saved in the folder of its checkpoint; returns what the two give."""
    torch.manual_seed(0)
    trained = get_peft_model(stock, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"]))
    trained.save_pretrained(folder)
    return logits(trained, prompt())


@pytest.mark.parametrize("name", ["gptq", "nf4"])
def test_an_adapter_beside_a_quantized_checkpoint(name, on, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    stock = write(tmp_path, name)
    plain = logits(stock, prompt())
    expected = beside(tmp_path, stock)
    assert (plain - expected).std() > 0.5 * expected.std()
    for found in (logits(each, prompt()) for each in made_of(tmp_path, on)):
        assert (found - expected).std() < ROUNDED * expected.std()


@pytest.mark.parametrize("own", [False, True])
def test_an_adapter_beside_what_this_package_quantizes(own, on, tmp_path, warned):
    """While a float checkpoint is read, and in one of our own."""
    stock = tiny("llama")
    plain = logits(stock, prompt())
    base = patch(tiny("llama"), quantize="int8", attention=False, linear=False) if own else stock
    base.save_pretrained(tmp_path)
    expected = beside(tmp_path, stock)
    assert (plain - expected).std() > 0.5 * expected.std()
    first = load(tmp_path, **{} if own else {"quantize": "int8"})
    on(QUANTIZE="0" if own else "int8")
    for model in (first, AutoModelForCausalLM.from_pretrained(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path)):
        assert rows(model)["quantize"]["scheme"] == "int8" and "attention" in applied(model)
        assert (logits(model, prompt()) - expected).std() < ROUNDED * expected.std()
    assert not warned()


def made_of(folder, on):
    """By load, and by transformers while the variable is on."""
    yield load(folder, dtype=torch.float32)
    on()
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        model = kind.from_pretrained(folder, dtype=torch.float32)
        assert "attention" in applied(model) and rows(model)["quantize"]["checkpoint"]
        yield model


def test_an_adapter_elsewhere_on_a_quantized_checkpoint(on, tmp_path):
    (tmp_path / "base").mkdir()
    stock = write(tmp_path / "base", "gptq")
    stock.name_or_path = str(tmp_path / "base")
    expected = beside(tmp_path / "adapter", stock)
    on()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32, adapter_name="mine")
    assert list(model.peft_config) == ["mine"] and rows(model)["quantize"]["checkpoint"] == "gptq"
    assert (logits(model, prompt()) - expected).std() < ROUNDED * expected.std()


def test_an_assistant_is_a_model_like_any_other(on, folder):
    stock = AutoModelForCausalLM.from_pretrained(folder)
    on(SPECULATIVE="ngram")
    model, assistant = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    assert "speculative" in applied(assistant)
    assert torch.equal(greedy(model, prompt(), assistant_model=assistant), greedy(stock, prompt()))


@pytest.mark.skipif("budget" not in options.KEYWORDS, reason="there is no planner")
def test_a_budget(on, folder, warned):
    floats = weight_bytes(AutoModelForCausalLM.from_pretrained(folder))
    on(BUDGET=str(floats), CONTEXT="64")  # weights, cache and activations: these weights must become smaller
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "quantize" in applied(model) and weight_bytes(model) < floats and not warned()
    on(BUDGET="1kB")
    assert not rows(AutoModelForCausalLM.from_pretrained(folder))
    assert any("LlamaForCausalLM is left as it is" in line and "too small" in line for line in warned())


def test_a_budget_and_heads_that_this_model_cannot_have(on, folder, warned):
    floats = weight_bytes(AutoModelForCausalLM.from_pretrained(folder))
    on(BUDGET=str(floats), CONTEXT="64", GQA="3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "divisors" in rows(model)["gqa"]["reason"] and {"budget", "quantize", "attention"} <= applied(model)
    assert weight_bytes(model) < floats and len(warned()) == 1 and "is patched without gqa" in warned()[0]


@pytest.mark.parametrize(
    ("family", "variables", "refused"),
    [("gpt2", {"CONTEXT": "100000"}, "rope"), ("mamba", {"CACHE": "int8", "CONTEXT": "64"}, "cache")],
)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_budget_and_what_this_model_cannot_have(family, variables, refused, quantized, on, tmp_path, warned):
    build(family).save_pretrained(tmp_path)
    on(BUDGET="100GB", QUANTIZE="int8" if quantized else "0", **variables)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "reason" in rows(model)[refused] and "budget" in applied(model)
    assert ("quantize" in applied(model)) is quantized
    assert len(warned()) == 1 and f"is patched without {refused}" in warned()[0]


def test_a_length_that_this_model_cannot_have_is_said_once(on, tmp_path, warned):
    tiny("gpt2").save_pretrained(tmp_path)
    on(CONTEXT="100000")
    found = rows(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert "learned a vector" in found["rope"]["reason"] and "learned" not in found["frequencies"]["reason"]
    assert len(warned()) == 1


def test_repairs_where_the_length_cannot_be_had(on, folder, warned, monkeypatch):
    """Frequencies that were rounded are put right though no scaling was possible."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    stock = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.bfloat16()
    on(CONTEXT="100000")

    def refuse(self, view, trained):
        raise self._unsupported("no way")

    monkeypatch.setattr(context.Context, "_scaled", refuse)
    automatic._patch(model, automatic.passes(), {})
    assert "no way" in rows(model)["rope"]["reason"] and "frequencies" in applied(model)
    assert stock and all(torch.equal(model.get_buffer(name), exact) for name, exact in stock.items())
    assert len(warned()) == 1


class Nothing(HfQuantizer):
    """Another package's method, which leaves weights as they are."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self):
        return False


class NothingConfig(QuantizationConfigMixin):
    def __init__(self, **_):
        self.quant_method = "nothing"


@pytest.mark.parametrize("quantize", ["0", "int8"])
def test_a_budget_for_a_model_that_others_have_quantized(quantize, on, folder, warned, monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "nothing", Nothing)
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "nothing", NothingConfig)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    floats = weight_bytes(stock)
    on(BUDGET=str(4 * floats), CONTEXT="64", QUANTIZE=quantize)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NothingConfig())
    found = rows(model)
    assert "quantized by nothing" in found["quantize"]["reason"] and weight_bytes(model) == floats
    assert found["budget"]["weight_bytes"] == floats and "weights" not in found["budget"]["chosen"]
    on(BUDGET=str(floats))  # which only smaller weights could meet
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NothingConfig())
    assert not rows(model) and any("too small" in line and "weights in" not in line for line in warned())


def test_threads(on, folder, monkeypatch):
    for place, name in ((PreTrainedModel, "tie_weights"), (torch, "linspace")):
        monkeypatch.setattr(place, name, getattr(place, name))  # transformers, in two threads, may not put them back
    on(QUANTIZE="int4")
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda _: AutoModelForCausalLM.from_pretrained(folder), range(4)))
    assert all("quantize" in applied(each) for each in made)
    assert all(torch.equal(logits(each, prompt()), logits(made[0], prompt())) for each in made)


def test_a_model_of_ones_own_class(on, folder):
    class Mine(LlamaForCausalLM):
        pass

    on()
    model = Mine.from_pretrained(folder)
    assert type(model) is Mine and "attention" in applied(model)
    assert "attention" in applied(copy.deepcopy(model))


def test_a_class_of_ones_own_for_a_quantized_checkpoint(on, tmp_path):
    class Mine(LlamaForCausalLM):
        def doubled(self):
            return 2

    write(tmp_path, "gptq")
    on()
    model = Mine.from_pretrained(tmp_path)
    assert type(model) is Mine and model.doubled() == 2 and rows(model)["quantize"]["checkpoint"] == "gptq"


REMOTE = """
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config, method="none", kind="none"):
        super().__init__(config)
        self.said = method, kind
"""


def test_remote_code_for_a_quantized_checkpoint(on, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    write(tmp_path, "gptq")
    (tmp_path / "own_code.py").write_text(REMOTE)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    on()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, method="x", kind="y")
    assert type(model).__name__ == "OwnForCausalLM" and model.said == ("x", "y")
    assert rows(model)["quantize"]["checkpoint"] == "gptq" and greedy(model, prompt()).shape == (1, 12)


def test_keywords_of_a_class_of_ones_own(on, folder):
    """Whatever they are called."""

    class Named(LlamaForCausalLM):
        def __init__(self, config, method="none", kind="none"):
            super().__init__(config)
            self.said = method, kind

    on()
    model = Named.from_pretrained(folder, method="x", kind="y")
    assert model.said == ("x", "y") and "attention" in applied(model)


def test_a_path_that_is_not_there(on):
    on(QUANTIZE="int4")
    with pytest.raises(OSError, match="nowhere"):
        LlamaForCausalLM.from_pretrained("./nowhere")


IMPORTS = """
import json, sys
import hf_accel_patch
light = "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
again = hf_accel_patch.patch(model, quantize="int8") is model
print(json.dumps([light, again, hf_accel_patch.report(model).to_dict()["patched"]]))
"""


def python(code, *arguments, **variables):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)


def test_an_import_before_transformers(folder):
    done = python(IMPORTS, folder, HF_ACCEL_PATCH="on", HF_ACCEL_QUANTIZE="int8")
    assert json.loads(done.stdout) == [True, True, True], done.stderr


def test_a_bad_value_stops_the_import():
    done = python("import hf_accel_patch", HF_ACCEL_PATCH="1", HF_ACCEL_QUANTIZE="int5")
    assert done.returncode == 1 and "ValueError: HF_ACCEL_QUANTIZE='int5'; allowed: int8" in done.stderr
