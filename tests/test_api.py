"""patch and its kin on what they are given: wrappers, bad input, failures half way, threads."""

import copy
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
import transformers
from cases import entry, greedy, logits, prompt, randomise, tiny
from fingerprint import fingerprint
from torch import nn

import hf_accel_patch
from hf_accel_patch import (
    AlreadyPatched,
    HfAccelError,
    KVCache,
    NotReversible,
    Quantize,
    UnsupportedModel,
    patch,
    patched,
    plan,
    report,
    unpatch,
)
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.passes import quantize

MODEL = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def bundled():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)


REFUSED = {
    "keyword": (
        TypeError,
        {"quantise": "int4"},
        "patch() has no keyword 'quantise'; its keywords are gqa, rope, quantize",
    ),
    "scheme": (ValueError, {"quantize": "int5"}, "unknown scheme 'int5'; the schemes are int8, int4, nf4, llm.int8"),
    "no scheme": (ValueError, {"quantize": 4}, "quantize=4; allowed: a scheme such as 'int4'"),
    "rope": (ValueError, {"rope": "ntk:4"}, "rope: unknown type 'ntk'; allowed: 'linear', 'dynamic'"),
    "gqa": (ValueError, {"gqa": 3}, "gqa=3: LlamaForCausalLM has 2 key/value heads; allowed are its divisors: 1, 2"),
    "gqa as text": (ValueError, {"gqa": "2"}, "gqa='2'; allowed: a number of key/value heads, a GQA, or None"),
    "cache": (ValueError, {"cache": "int2"}, "cache: unknown kind 'int2'; allowed: 'exact', 'int8', 'int4', 'sinks'"),
    "window": (ValueError, {"cache": "sinks"}, "cache='sinks'; allowed: True, False, 'int8', 'int4', 'sinks:WINDOW'"),
    "small window": (ValueError, {"cache": "sinks:6"}, "4 sinks in a window of 6; allowed: 1 to half of it"),
    "speculative": (ValueError, {"speculative": "magic"}, "unknown method 'magic'; allowed: 'ngram', 'self', 'model'"),
    "attention": (ValueError, {"attention": "fast"}, "attention='fast'; allowed: True, False, or an Attention"),
}


@pytest.mark.parametrize("kind, options, text", REFUSED.values(), ids=REFUSED)
def test_bad_options_are_refused_before_anything_is_touched(model, kind, options, text):
    before = fingerprint(model)
    with pytest.raises(kind, match=re.escape(text)):
        patch(model, **options)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"scheme": "int8", "group_size": 65}, ValueError, "group_size=65; allowed: 32, 64, 128"),
        ({"scheme": "int4", "group_size": 64.0}, TypeError, "group_size=64.0 is not an int"),
        ({"scheme": "nf4", "calibrate": ["text"]}, ValueError, "calibrate= applies to int4; nf4 rounds to nearest"),
        ({"scheme": "int4", "calibrate": "text"}, TypeError, "takes a list of texts"),
        (
            {"scheme": "int4", "calibrate": [3.5]},
            TypeError,
            "takes texts, or tensors of token ids [T] or [B, T], not fl",
        ),
        ({"scheme": "int4", "calibrate": [""]}, ValueError, "calibrate= holds no text"),
        ({"scheme": "int4", "group_size": 48}, ValueError, "group_size=48; allowed: 32, 64, 128"),
        ({"scheme": "int4", "backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"scheme": "int4", "originals": "lose"}, ValueError, "originals='lose'; allowed: 'keep', 'discard'"),
        ({"scheme": "int4", "skip": "lm_head"}, TypeError, "skip='lm_head' is not a tuple"),
    ],
)
def test_bad_options_of_quantize(options, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        Quantize(**options)


def test_a_group_size_that_does_not_divide_names_those_that_do(model):
    with pytest.raises(ValueError, match=re.escape("does not divide the 64 input features")):
        patch(model, quantize=Quantize("int4", group_size=128))


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "path", None], ids=["module", "string", "none"])
def test_what_is_no_model_is_refused(thing):
    for function in (patch, unpatch, report):
        with pytest.raises(UnsupportedModel, match=f"{type(thing).__name__} is no causal LM"):
            function(thing)


def test_models_without_a_text_head_are_refused(model):
    with pytest.raises(UnsupportedModel, match="LlamaModel is no causal LM"):
        patch(model.model)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(tiny("llama").config)
    with pytest.raises(UnsupportedModel, match="meta device"):
        patch(empty)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(model, value):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        patch(model, quantize="int4")
    assert fingerprint(model) == before


def test_distributed_weights_are_refused(model, tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh))
        with pytest.raises(UnsupportedModel, match=r"lm_head\.weight is a DTensor"):
            patch(model)
    finally:
        destroy_process_group()


@pytest.mark.parametrize("options", ({"quantize": "int4"}, {"gqa": 1}), ids=lambda each: next(iter(each)))
def test_offloaded_weights_are_not_changed(model, tmp_path, options):
    from accelerate import disk_offload

    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    before, classes = logits(model, prompt()), [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModel, match=f"{next(iter(options))}=.* are offloaded by accelerate"):
        patch(model, **options)
    assert torch.equal(logits(model, prompt()), before)
    assert [type(module) for module in model.modules()] == classes and not report(model).to_dict()["patched"]


def test_unpatched_models_have_an_empty_report_and_nothing_to_undo(model):
    before = fingerprint(model)
    assert unpatch(model) is model
    assert "is not patched" in str(report(model))
    assert report(model).to_dict() == {"model": "LlamaForCausalLM", "patched": False, "passes": []}
    assert fingerprint(model) == before


def test_discarded_originals_are_read_again_from_the_checkpoint(bundled):
    stock = logits(bundled, prompt())
    patch(bundled, quantize="int4")
    before = fingerprint(bundled)
    with pytest.raises(NotReversible, match="originals='keep'"):
        unpatch(bundled)
    assert fingerprint(bundled) == before
    unpatch(bundled, reload=True)
    assert torch.equal(logits(bundled, prompt()), stock)
    assert bundled.lm_head.weight is bundled.model.embed_tokens.weight


def test_reloading_needs_a_checkpoint(model):
    patch(model, quantize="int8")
    with pytest.raises(NotReversible, match="does not know the checkpoint"):
        unpatch(model, reload=True)


def _resize(model):
    model.resize_token_embeddings(264, mean_resizing=False)


def _train(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)


@pytest.mark.parametrize("quantize", ("int8", "int4"))
@pytest.mark.parametrize("change, text", (
    (_resize, r"weight was \(264, 256\), and in the checkpoint at .* it is \(4096, 256\)"),
    (_train, "layers.1.mlp.up_proj.weight in the checkpoint at .* is far from what was quantized"),
))  # fmt: skip
def test_reloading_refuses_other_weights_than_were_quantized(change, text, quantize, bundled):
    change(bundled)
    patch(bundled, quantize=quantize)
    before = fingerprint(bundled)
    with pytest.raises(NotReversible, match=text):
        unpatch(bundled, reload=True)
    assert fingerprint(bundled) == before


def test_reloading_does_not_take_the_root_for_a_subfolder(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path)
    randomise(tiny("mixtral"), seed=1).save_pretrained(tmp_path / "sub")
    model = patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="sub"), quantize="nf4")
    with pytest.raises(NotReversible, match="came from another folder"):
        unpatch(model, reload=True)


def test_a_failure_half_way_leaves_whole_weights_and_says_so(model, monkeypatch, tmp_path):
    stock, calls, real = logits(model, prompt()), [], Quantize.packed

    def failing(self, target):
        calls.append(target)
        if len(calls) == 5:
            raise MemoryError("no more")
        return real(self, target)

    monkeypatch.setattr(Quantize, "packed", failing)
    with pytest.raises(MemoryError):
        patch(model, quantize="int8")
    said = report(model).to_dict()
    assert "4 weights are quantized" in said["incomplete"]
    changed = [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]
    assert sorted(said["discarded"]) == sorted(f"{name}.weight" for name in changed) and len(changed) == 4
    ours = logits(model, prompt())
    assert not torch.equal(ours, stock) and (ours - stock).std() < 0.1 * stock.std()
    with pytest.raises(NotReversible):
        unpatch(model)
    with pytest.raises(AlreadyPatched, match="failed half way"):
        patch(model, quantize="int8")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(again, prompt()) - ours).std() < 0.01 * stock.std()


def test_patched_keeps_the_originals_and_comes_off_after_an_exception(model):
    before = fingerprint(model)
    with pytest.raises(RuntimeError), patched(model, quantize="int4") as same:
        assert same is model and entry(report(model).to_dict(), "quantize")["originals"] == "keep"
        raise RuntimeError
    assert fingerprint(model) == before
    with (
        pytest.raises(ValueError, match="cannot discard"),
        patched(model, quantize=Quantize("int4", originals="discard")),
    ):
        pass


def test_a_pipeline_is_patched_and_returned(bundled):
    pipe = transformers.pipeline("text-generation", model=bundled, tokenizer=str(MODEL))
    stock = pipe("def f(", max_new_tokens=8, do_sample=False)
    assert patch(pipe) is pipe
    assert report(pipe).to_dict()["patched"]
    assert pipe("def f(", max_new_tokens=8, do_sample=False) == stock
    assert not report(unpatch(pipe)).to_dict()["patched"]


def test_a_peft_model_is_patched_inside(model):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    stock = wrapped(prompt()).logits.detach()
    assert patch(wrapped, quantize=Quantize("int8", originals="keep")) is wrapped
    row = entry(report(wrapped).to_dict(), "quantize")
    assert {skip["reason"] for skip in row["skipped"]} == {"an adapter that is being trained"}
    ours = wrapped(prompt()).logits
    assert not torch.equal(ours, stock) and (ours - stock).std() < 0.1 * stock.std()
    ours.square().mean().backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_" in n)
    unpatch(wrapped)
    assert torch.equal(wrapped(prompt()).logits, stock)


def test_a_compiled_module_is_patched_inside(model):
    compiled = torch.compile(model, backend="eager")
    stock = compiled(prompt()).logits.detach()
    assert patch(compiled, quantize=Quantize("int8", originals="keep")) is compiled
    ours = compiled(prompt()).logits.detach()
    assert torch.allclose(ours, model(prompt()).logits, atol=1e-4) and not torch.equal(ours, stock)
    unpatch(compiled)
    assert torch.equal(compiled(prompt()).logits.detach(), stock)


def test_a_compiled_call_of_generate_is_dropped(model):
    model._compiled_call = stale = object()
    patch(model)
    assert "_compiled_call" not in vars(model)
    unpatch(model)
    assert model._compiled_call is stale


def test_accelerate_hooks_go_on_working(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layer = model.model.layers[0].mlp.up_proj
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    stock = logits(model, prompt())
    patch(model, quantize=Quantize("int4", originals="keep"))
    assert layer._old_forward.__func__ is type(layer).forward
    assert not torch.equal(logits(model, prompt()), stock)
    unpatch(model)
    assert torch.equal(logits(model, prompt()), stock)


def test_gradient_checkpointing_stays_on(model):
    patch(model)
    model.train()
    model.gradient_checkpointing_enable()
    calls, layer = [], model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    model(prompt(), labels=prompt(), use_cache=False).loss.backward()
    assert len(calls) == 2 and model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_threads_do_not_meet():
    models = [tiny("llama"), tiny("gemma2"), tiny("gpt_oss")] * 2
    models = [copy.deepcopy(model) for model in models]
    expected, found = [greedy(model, prompt(), 8) for model in models], [None] * len(models)

    def work(index):
        patch(models[index])
        found[index] = greedy(models[index], prompt(), 8)
        unpatch(models[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_text_decoder_of_a_multimodal_model(monkeypatch):
    config = transformers.Gemma3Config(
        text_config={**tiny("gemma2").config.to_dict(), "model_type": "gemma3_text", "rope_parameters": None},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    vision, stock = fingerprint_of(model.model.vision_tower), logits(model, prompt())
    patch(model, quantize=Quantize("int8", originals="keep"))
    assert fingerprint_of(model.model.vision_tower) == vision
    rows = {row["pass"]: row for row in report(model).to_dict()["passes"]}
    assert "reason" not in rows["attention"]
    ours = logits(model, prompt())
    assert not torch.equal(ours, stock) and (ours - stock).std() < 0.1 * stock.std()
    unpatch(model)
    assert torch.equal(logits(model, prompt()), stock)


def fingerprint_of(module):
    return [(name, type(part), id(part), sorted(vars(part))) for name, part in module.named_modules()]


def test_plan_reads_a_configuration_alone(bundled):
    described = {row["pass"]: row for row in plan(MODEL, quantize="int4").to_dict()["passes"]}
    patch(bundled, quantize="int4")
    done = {row["pass"]: row for row in report(bundled).to_dict()["passes"]}
    assert abs(described["quantize"]["bytes_after"] / done["quantize"]["bytes_after"] - 1) < 0.02
    assert described["attention"]["modules"] == done["attention"]["modules"] == 8
    assert "quantize" in str(plan(MODEL)) and "not asked for" in str(plan(MODEL))


def test_errors_have_one_root():
    assert all(issubclass(kind, HfAccelError) for kind in (AlreadyPatched, NotReversible, UnsupportedModel))
    assert "hint: do" in str(HfAccelError("what", "do"))


def test_nothing_to_quantize_is_refused():
    model = tiny("gpt2")
    with pytest.raises(UnsupportedModel, match="asked for by skip"):
        patch(model, quantize=Quantize("int4", skip=("*",)))


def test_progress_is_shown_for_large_models(model, monkeypatch, capsys):
    monkeypatch.setattr(quantize, "PROGRESS_WEIGHTS", 0)
    transformers.utils.logging.enable_progress_bar()
    patch(model, quantize="int8")
    transformers.utils.logging.disable_progress_bar()
    assert "quantize to int8" in capsys.readouterr().err


PICKLED = {
    "llama": {"cache": "int8", "speculative": "ngram"},
    "gemma2": {"rope": "dynamic:4"},
    "mistral": {"quantize": Quantize("int4", originals="keep")},
    "bloom": {},
    "gptj": {"gqa": 2},
    "gpt2": {"gqa": 2},
    "qwen2": {"cache": KVCache(prefixes="1MB")},
}


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickle_is_a_patched_model_of_its_own(name):
    model = tiny(name)
    stock = logits(model, prompt())
    patch(model, **PICKLED[name])
    expected, tokens = logits(model, prompt()), greedy(model, prompt(), 8)
    again = pickle.loads(pickle.dumps(model))
    assert patched_by(again) == patched_by(model) != {}
    assert torch.equal(logits(again, prompt()), expected) and torch.equal(greedy(again, prompt(), 8), tokens)
    assert torch.equal(logits(unpatch(again), prompt()), stock)
    attributes = [
        [set(vars(module)) for module in each.modules()] for each in (again, pickle.loads(pickle.dumps(tiny(name))))
    ]
    assert attributes[0] == attributes[1] and "init_continuous_batching" not in vars(again)
    assert torch.equal(logits(model, prompt()), expected)


def patched_by(model):
    """The methods that the model has of its own: the functions, and whether they are bound to it."""
    bound = {name: value for name, value in vars(model).items() if hasattr(value, "__func__")}
    assert all(value.__self__ is model for value in bound.values())
    return {name: getattr(value.__func__, "__qualname__", type(value.__func__)) for name, value in bound.items()}


@pytest.mark.parametrize("options", [{}, {"quantize": Quantize("int8", originals="keep")}, {"gqa": 1}])
def test_what_comes_back_follows_a_cast(model, options):
    """As if the model had not been patched when it was cast."""
    expected = copy.deepcopy(model).to(torch.bfloat16)
    patch(model, **options).to(torch.bfloat16)
    unpatch(model)
    theirs = expected.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, prompt()), logits(expected, prompt()))


def test_weights_that_are_read_again_find_their_place_in_wrappers(bundled):
    from peft import LoraConfig, get_peft_model

    frozen = bundled.model.layers[0].mlp.up_proj.weight.requires_grad_(False).clone()
    patch(bundled, quantize="int8")
    wrapped = get_peft_model(bundled, LoraConfig(target_modules=["up_proj"], r=4))
    unpatch(bundled, reload=True)
    inner = bundled.model.layers[0].mlp.up_proj
    assert list(inner._parameters) == [] or "weight" not in inner._parameters
    assert torch.equal(inner.base_layer.weight, frozen) and not inner.base_layer.weight.requires_grad
    assert wrapped(input_ids=prompt()).logits.isfinite().all()


def test_the_same_options_after_dequantizing_are_refused(model):
    patch(model, quantize="int8").dequantize()
    with pytest.raises(AlreadyPatched):
        patch(model, quantize="int8")
