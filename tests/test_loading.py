"""Quantized checkpoints: written and read through stock calls, quantized while reading, damaged."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from cases import build, greedy, logits, prompt, randomise, tiny
from fingerprint import fingerprint
from safetensors.torch import load_file, save_file
from torch import nn

from hf_accel_patch import (
    HfAccelConfig,
    HfAccelError,
    NotReversible,
    Quantize,
    UnsupportedModel,
    load,
    patch,
    report,
    unpatch,
)
from hf_accel_patch.ops.modules import QuantizedModule, reblock
from hf_accel_patch.reading import OnTheFly

OFF = {"attention": False, "linear": False}
SCHEMES = ("int8", "int4", "nf4", "llm.int8")
FAMILIES = ("llama", "gpt2", "falcon_mqa", "mixtral", "gpt_oss", "gemma2", "bloom")


def quantize_row(model):
    return next(row for row in report(model).to_dict()["passes"] if row["pass"] == "quantize")


def read(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def saved(tmp_path):
    """A float checkpoint, and what patching it gives."""

    def save(family, scheme="int4"):
        tiny(family).save_pretrained(tmp_path / "float")
        return tmp_path / "float", logits(patch(read(tmp_path / "float"), quantize=scheme, **OFF), prompt())

    return save


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_read_back_bit_for_bit(family, scheme, tmp_path):
    model = patch(tiny(family), quantize=scheme, **OFF)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert "hf_quantizer" not in vars(model) and "quantization_config" not in vars(model.config), "saving left a trace"
    how = {"attn_implementation": model.config._attn_implementation}
    again, info = read(tmp_path, output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(again, prompt()), logits(model, prompt()))
    assert torch.equal(greedy(again, input_ids=prompt(), tokens=4), greedy(model, input_ids=prompt(), tokens=4))
    names = {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    assert names == {name for name, module in again.named_modules() if isinstance(module, QuantizedModule)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_while_reading_is_patching(family, scheme, saved):
    folder, expected = saved(family, scheme)
    ours = load(folder, quantize=scheme, **OFF)
    assert torch.equal(logits(ours, prompt()), expected)
    stock_way = read(folder, quantization_config=HfAccelConfig(scheme))
    assert torch.equal(logits(stock_way, prompt()), expected)
    assert not any(p.is_meta for model in (ours, stock_way) for p in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("tied", (False, True))
def test_what_was_read_can_be_saved_again(tied, tmp_path):
    config = tiny("llama").config
    config.tie_word_embeddings = tied
    model = patch(randomise(transformers.AutoModelForCausalLM.from_config(config)).eval(), quantize="int4", **OFF)
    model.save_pretrained(tmp_path / "one")
    read(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = read(tmp_path / "two")
    assert torch.equal(logits(again, prompt()), logits(model, prompt()))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert (getattr(embedding, "_buffers", {}).get("weight") is head._buffers["weight"]) == tied
    assert ("lm_head.weight" in one) != tied


@pytest.mark.parametrize("model_type", ("camembert", "modernbert-decoder", "prophetnet"))
def test_ties_in_any_order_are_read_back(model_type, tmp_path):
    """The head first, a head that a module above it initializes, and two tables."""
    model = patch(build(model_type), quantize="int4", **OFF, cache=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, prompt()), logits(model, prompt()))
    tables = (again.get_input_embeddings(), again.get_output_embeddings())
    assert tables[0]._buffers["weight"] is tables[1]._buffers["weight"]


def test_the_names_and_options_are_in_the_configuration(tmp_path):
    patch(tiny("llama"), quantize=Quantize("int4", group_size=32, skip=("lm_head",))).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "hf_accel_patch" and found["scheme"] == "int4" and found["version"] == 1
    assert "model.layers.0.mlp.up_proj" in found["weights"]["32"] and "lm_head" not in found["weights"]["32"]


def test_load_reports_and_comes_off_by_reading_again(saved, tmp_path):
    folder, _ = saved("llama")
    model = load(folder, quantize="int4")
    row = quantize_row(model)
    assert row["scheme"] == "int4" and not row["exact"] and row["bytes_after"] < row["bytes_before"]
    assert row["bytes_before"] == quantize_row(patch(tiny("llama"), quantize="int4"))["bytes_before"]
    with pytest.raises(NotReversible):
        unpatch(model)
    unpatch(model, reload=True)
    assert torch.equal(logits(model, prompt()), logits(tiny("llama"), prompt()))
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())
    assert not {"hf_quantizer", "is_quantized", "save_pretrained"} & vars(model).keys()
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(logits(read(tmp_path / "again"), prompt()), logits(model, prompt()))


def test_a_subfolder_is_read_again_from_where_it_was(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "sub")
    model = unpatch(load(tmp_path, subfolder="sub", quantize="int8"), reload=True)
    assert torch.equal(logits(model, prompt()), logits(other, prompt()))


def test_keywords_of_from_pretrained(saved):
    folder, _ = saved("llama")
    model = load(folder, quantize="int4", use_cache=False, use_safetensors=True, device_map="cpu")
    assert model.config.use_cache is False
    with pytest.raises(ValueError, match="leave out output_loading_info"):
        load(folder, output_loading_info=True)


def test_options_are_kept_and_a_state_dict_is_saved(saved, tmp_path):
    folder, _ = saved("llama")
    model = load(folder, quantize=Quantize("int4", backend="torch", skip=("lm_head",)))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["model.norm.weight"] *= 7
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    again = read(tmp_path / "saved")
    assert torch.equal(again.model.norm.weight, 7 * model.model.norm.weight)
    assert not again.model.layers[0].mlp.up_proj.specs["weight"].backend.compiled
    assert again.hf_quantizer.quantization_config.skip == ("lm_head",)


@pytest.mark.parametrize("move", (
    lambda m: m._apply(lambda t: t.clone()), lambda m: m.load_state_dict(m.state_dict(), assign=True),
))  # fmt: skip
def test_tied_codes_stay_tied_when_they_are_moved(move, tmp_path):
    model = patch(tiny("gemma2"), quantize="int4", **OFF)
    expected, size = logits(model, prompt()), bytes_of(model)
    move(model)
    assert bytes_of(model) == size
    model.save_pretrained(tmp_path)
    how = {"attn_implementation": model.config._attn_implementation}
    assert torch.equal(logits(read(tmp_path, **how), prompt()), expected)


def bytes_of(model):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.buffers()}
    return sum(storages.values())


def test_a_whole_model_goes_through_pickle(tmp_path):
    for family in ("llama", "gpt2", "mixtral"):
        model = patch(tiny(family), quantize="int4", **OFF)
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(logits(again, prompt()), logits(model, prompt()))
        again.save_pretrained(tmp_path / family)
        assert torch.equal(logits(read(tmp_path / family), prompt()), logits(model, prompt()))


def test_nothing_to_quantize_and_what_is_only_read(saved):
    folder, _ = saved("llama")
    with pytest.raises(UnsupportedModel, match="asked for by skip"):
        read(folder, quantization_config=HfAccelConfig("int4", skip=("*",)))
    with pytest.raises(ValueError, match="fp4 is only read"):
        read(folder, quantization_config=HfAccelConfig("fp4"))


def test_a_float_weight_of_another_shape_is_named(saved):
    folder, _ = saved("llama")
    rewritten(folder, lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}))
    with pytest.raises(HfAccelError, match=rf"{UP} is \(127, 64\) in the checkpoint where \(128, 64\) belongs"):
        load(folder, quantize="int4")


@pytest.mark.parametrize("scheme", ("int8", "int4"))
@pytest.mark.parametrize("model_type", ("zamba", "zamba2"))  # one block of attention, shared by several layers
def test_weights_that_layers_share_are_read_once(model_type, scheme, tmp_path):
    build(model_type).save_pretrained(tmp_path / "float")
    patched = patch(read(tmp_path / "float"), quantize=scheme, **OFF)
    model = read(tmp_path / "float", quantization_config=HfAccelConfig(scheme))
    assert not [name for name, held in model.state_dict(keep_vars=True).items() if held.is_meta]
    codes = [each._buffers["weight"] for name, each in model.named_modules() if name.endswith("o_proj")]
    assert len(codes) == 2 and codes[0] is codes[1]
    assert torch.equal(logits(model, prompt()), logits(patched, prompt()))
    model.save_pretrained(tmp_path / "codes")
    assert torch.equal(logits(read(tmp_path / "codes"), prompt()), logits(patched, prompt()))


def _quantizing(folder):
    return read(folder, quantization_config=HfAccelConfig("int4"))


@pytest.mark.parametrize("reader", (_quantizing, lambda folder: load(folder, quantize="int4")), ids=("stock", "load"))
@pytest.mark.parametrize(
    "family, part, name",
    (
        ("mixtral", "1.block_sparse_moe.experts.3.w2", "model.layers.1.mlp.experts.down_proj is"),
        ("llama", "2.self_attn.q_proj", "model.layers.2.self_attn.q_proj.weight is"),
        ("llama", "mlp.up_proj", r"4 weights \(model.layers.0.mlp.up_proj.weight, .*\) are"),
    ),
)
def test_weights_that_the_checkpoint_lacks_are_named(reader, family, part, name, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    whole = len(tensors)
    tensors = {key: value for key, value in tensors.items() if part.split(".experts")[0] not in key or "gate" in key
               or part.rsplit(".", 1)[-1] not in key}  # fmt: skip
    assert len(tensors) < whole
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(HfAccelError, match=f"{name} not in the checkpoint"):
        reader(tmp_path)


def test_load_without_quantization_patches(saved, tmp_path):
    folder, _ = saved("llama")
    model = load(folder)
    assert "not asked for" in quantize_row(model)["reason"]
    assert torch.equal(logits(unpatch(model), prompt()), logits(read(folder), prompt()))
    patch(tiny("llama"), quantize="int4", **OFF).save_pretrained(tmp_path / "int4")
    quantized = load(tmp_path / "int4")
    assert quantize_row(quantized)["exact"] and quantize_row(quantized)["scheme"] == "int4"
    assert torch.equal(logits(unpatch(quantized), prompt()), logits(read(tmp_path / "int4"), prompt()))


def test_a_model_read_quantized_can_be_patched_and_comes_off(saved):
    folder, expected = saved("llama")
    model = read(folder, quantization_config=HfAccelConfig("int4"))
    before = fingerprint(model)
    patch(model, quantize="int4")
    assert "quantized already" in quantize_row(model)["reason"]
    assert (logits(model, prompt()) - expected).std() < 0.01 * expected.std()
    unpatch(model)
    assert fingerprint(model) == before and torch.equal(logits(model, prompt()), expected)


def test_a_copy_of_a_model_read_quantized_is_a_model_of_its_own(saved, tmp_path):
    folder, expected = saved("llama")
    model = read(folder, quantization_config=HfAccelConfig("int4"))
    clone = copy.deepcopy(model)
    for module in model.modules():
        for buffer in module._buffers.values():
            if buffer is not None:
                buffer.zero_()
    clone.save_pretrained(tmp_path / "clone")
    assert torch.equal(logits(read(tmp_path / "clone"), prompt()), expected)


def test_one_configuration_serves_two_models(saved):
    folder, expected = saved("llama")
    config = HfAccelConfig("int4")
    models = [read(folder, quantization_config=config) for _ in range(2)]
    assert all(torch.equal(logits(model, prompt()), expected) for model in models) and not config.weights


@pytest.fixture
def taken(monkeypatch):
    """The dtypes in which weights are handed on to be quantized, by name."""
    found, take = {}, OnTheFly.take

    def noted(self, name, value):
        found[name] = value.dtype
        take(self, name, value)

    monkeypatch.setattr(OnTheFly, "take", noted)
    return found


@pytest.mark.parametrize("asked", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family", ("llama", "gemma2", "mixtral", "gpt2"))  # two of them with a tied table
def test_weights_are_quantized_in_the_dtype_that_was_asked_for(family, stored, asked, taken, tmp_path):
    """In float32, which holds them all, they are read as they are stored, the table too."""
    tiny(family).to(stored).save_pretrained(tmp_path)
    expected = patch(read(tmp_path, dtype=asked), quantize="int4", **OFF)
    model = load(tmp_path, quantize="int4", dtype=asked, **OFF)
    assert model.dtype == asked and torch.equal(logits(model, prompt()), logits(expected, prompt()))
    assert not {p.dtype for p in model.parameters()} ^ {p.dtype for p in expected.parameters()}
    assert set(taken.values()) == {stored if asked is torch.float32 else asked}
    held = [module for _, module in quantized(model) if not isinstance(module, nn.Embedding)]
    assert len(taken) == sum(len(module.specs) for module in held)
    assert "_get_dtype_plan" not in vars(model)


def test_what_stays_has_the_dtype_that_was_asked_for(taken, tmp_path):
    """Beside weights of the same name that do not."""
    build("llama").bfloat16().save_pretrained(tmp_path)
    options = Quantize("int4", skip=("model.layers.0.*", "*.1.mlp.up_proj"))
    model = load(tmp_path, quantize=options, dtype=torch.float32, **OFF)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and set(taken.values()) == {torch.bfloat16}
    expected = patch(read(tmp_path, dtype=torch.float32), quantize=options, **OFF)
    assert torch.equal(logits(model, prompt()), logits(expected, prompt()))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("has", ("embedding", "head", "both", "two"))
def test_tables_that_are_tied_or_should_be(has, dtype, taken, tmp_path):
    """A checkpoint has one of them under either name, the same twice, or two that differ and are not tied then."""
    tiny("gemma2").bfloat16().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tensors[head] = tensors[embedding].clone() if has != "two" else tensors[embedding].flip(0).contiguous()
    if has in ("embedding", "head"):
        del tensors[head if has == "embedding" else embedding]
    save_file(tensors, file, {"format": "pt"})
    expected = patch(read(tmp_path, dtype=dtype), quantize="int4", **OFF)
    model = load(tmp_path, quantize="int4", dtype=dtype, **OFF)
    assert torch.equal(logits(model, prompt()), logits(expected, prompt()))
    assert isinstance(model.get_input_embeddings(), QuantizedModule) == (has != "two")
    alone = {"embedding": {embedding}, "head": {head}}
    assert {head, embedding} & set(taken) == alone.get(has, set())


@pytest.mark.parametrize("found, wanted", ((64, 32), (32, 64), (2, 64), (32, 2)))
@pytest.mark.parametrize("family", ("llama", "mixtral"))
def test_the_layout_of_another_processor_is_laid_out_anew(found, wanted, family, monkeypatch):
    monkeypatch.setattr("hf_accel_patch.passes.quantize.block_on", lambda _: found)
    model = patch(tiny(family), quantize="int4", **OFF)
    dense = {name: dense_of(module) for name, module in quantized(model)}
    assert dense
    for _, module in quantized(model):
        reblock(module, wanted)
    for name, module in quantized(model):
        codes, _, spec = module.held(next(iter(module.specs)))
        assert codes.shape[-1] * 2 == wanted and codes.shape[-3] == -(-spec.shape[0] // wanted)
        assert torch.equal(dense_of(module), dense[name])


def clone(tensor):
    return tensor.clone()


@pytest.mark.parametrize("scheme", ("int4", "nf4"))
@pytest.mark.parametrize("name", ("llama", "gpt2", "mixtral"))
def test_what_moves_is_laid_out_for_where_it_comes(name, scheme, monkeypatch):
    """As if a GPU had the memory: nothing else tells the two apart."""
    stock, model = tiny(name), tiny(name)
    patch(model, quantize=Quantize(scheme, originals="keep"), **OFF)
    expected, before = logits(model, prompt()), {each: dense_of(module) for each, module in quantized(model)}
    monkeypatch.setattr("hf_accel_patch.ops.modules.block_on", lambda device: 2)
    read = pickle.loads(pickle.dumps(model))
    model._apply(clone)
    for each in (model, read):
        for path, module in quantized(each):
            codes, _, spec = module.held(next(iter(module.specs)))
            assert codes.shape[-1] == 1 and codes.shape[-3] == -(-spec.shape[0] // 2)
            assert torch.equal(dense_of(module), before[path])
        shared = [module for _, module in quantized(each) if getattr(module, "weight", None) is not None]
        heads = [module._buffers["weight"] for module in shared if isinstance(module, torch.nn.Embedding)]
        assert all(any(head is module._buffers["weight"] for module in shared) for head in heads)
        if name != "mixtral":  # whose router may choose anew where weights are unpacked to bfloat16
            assert (logits(each, prompt()) - expected).norm() < 0.05 * expected.norm()
    monkeypatch.undo()
    for each in (model, read, pickle.loads(pickle.dumps(model._apply(clone)))):
        codes = [module.held(next(iter(module.specs)))[0] for _, module in quantized(each)]
        each._apply(clone)
        found = [module.held(next(iter(module.specs)))[0] for _, module in quantized(each)]
        assert not any(new is old for new, old in zip(found, codes, strict=True))  # what was read moves too
        assert torch.equal(logits(each, prompt()), expected)
    assert same_state(unpatch(model), stock)


def same_state(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def quantized(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedModule)]


def dense_of(module):
    if hasattr(module, "dequantize"):
        return module.dequantize(torch.float32)
    return torch.cat([module.dequantize_expert(key, 1, torch.float32).flatten() for key in module.specs])


ALONE = """
import sys, transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
LATE = """
import sys
import hf_accel_patch
import torch, transformers
assert "transformers.modeling_utils" not in sys.modules, "the import is not light"
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(module).__module__.startswith("hf_accel_patch") for module in model.modules()))
"""


@pytest.mark.parametrize("family, scheme", (("llama", "int8"), ("gpt2", "int4"), ("mixtral", "nf4")))
def test_without_this_package_it_is_refused(family, scheme, tmp_path):
    patch(tiny(family), quantize=scheme).save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", ALONE, tmp_path], capture_output=True, text=True, timeout=300)
    assert run.returncode and "ignore_mismatched_sizes" in run.stderr


def test_an_import_before_transformers_is_enough(tmp_path):
    patch(tiny("llama"), quantize="int4").save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", LATE, tmp_path], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "29", run.stderr[-1000:]


def rewritten(folder, change):
    """The checkpoint with its tensors changed, in a new file: the old one may be mapped."""
    tensors = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UP, SCALES = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight_scales"
DAMAGE = {
    "no codes": (lambda t: t.pop(UP), f"{UP} is not in the checkpoint"),
    "no scales": (lambda t: t.pop(SCALES), f"{SCALES} is not in the checkpoint"),
    "short codes": (
        lambda t: t.update({UP: t[UP][:-1].clone()}),
        # Rows per block are the processor's: one block is missing, however many there are.
        rf"{UP} is \('U8', \[(\d+), 64, (\d+)\]\) in the checkpoint where \('U8', \[(?!\1)\d+, 64, \2\]\) belongs",
    ),
    "other dtype": (lambda t: t.update({SCALES: t[SCALES].float()}), rf"{SCALES} is \('F32'"),
    "not finite": (
        lambda t: t[SCALES].view(torch.bfloat16).fill_(float("nan")),
        f"{SCALES} holds values that cannot be",
    ),
}


@pytest.mark.parametrize("change, text", DAMAGE.values(), ids=DAMAGE)
def test_damaged_tensors_are_named(change, text, tmp_path):
    patch(tiny("llama"), quantize="int4").save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    for reads in (read, load):
        with pytest.raises(HfAccelError, match=text):
            reads(tmp_path)


CONFIGURATIONS = {
    "version": ({"version": 2}, ValueError, "version 2; this package reads version 1"),
    "entry": ({"secret": 1}, ValueError, "unknown entries secret"),
    "scheme": ({"scheme": "int3"}, ValueError, "unknown scheme 'int3'"),
    "block": ({"block": 48}, ValueError, "block=48"),
    "no weights": ({"weights": {}}, HfAccelError, "names no quantized weights"),
    "no group": ({"weights": {"small": []}}, ValueError, "lists of names by group size"),
    **{
        f"weights {entry}": ({"weights": entry}, ValueError, "lists of names by group size")
        for entry in ([["a"]], {"64": [5]}, {"64": [None]}, {"64": [[]]}, {"64": [["lm_head", 5]]}, {"²": []})
    },
    "ordered": ({"ordered": "lm_head"}, ValueError, "ordered one of names"),
    "names to skip": ({"skip": 5}, TypeError, "skip=5 is not a tuple of names"),
    "a module": (
        {"weights": {"64": ["model.layers.9.mlp.up_proj"]}},
        HfAccelError,
        "9.mlp.up_proj, which this model lacks",
    ),
    "a norm": ({"weights": {"64": ["model.norm"]}}, HfAccelError, "model.norm: it is no linear layer"),
    "a group": ({"weights": {"48": ["lm_head"]}}, HfAccelError, "groups of 48 for lm_head, which do not fit"),
}


@pytest.mark.parametrize("change, kind, text", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_tampered_configuration_is_refused(change, kind, text, tmp_path):
    patch(tiny("llama"), quantize="int4").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=text):
        read(tmp_path)


def test_pickled_checkpoints_are_not_read(tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(HfAccelError, match="pickled checkpoints are not read"):
        read(tmp_path, quantization_config=HfAccelConfig("int4"))
    with pytest.raises((HfAccelError, OSError), match="safetensors"):
        load(tmp_path, quantize="int4")


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_weights_that_are_not_numbers_are_named_while_reading(value, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load(tmp_path, quantize="int4")


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"quantize": "int5"}, ValueError, "unknown scheme 'int5'"),
        ({"quantize": Quantize("int4", originals="keep")}, ValueError, "leave out originals='keep'"),
        ({"quantize": Quantize("int4", calibrate=["text"])}, ValueError, "calibration runs the float model"),
        ({"quantize": Quantize("int4", group_size=128)}, ValueError, "group_size=128 does not divide the 64"),
    ],
)
def test_bad_options_of_load(options, kind, text, saved):
    folder, _ = saved("llama")
    with pytest.raises(kind, match=text):
        load(folder, **options)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    patch(tiny("llama"), quantize="int4").save_pretrained(tmp_path)
    with pytest.raises(HfAccelError, match="quantized by hf_accel_patch already"):
        load(tmp_path, quantize="int8")


def test_names_to_skip_hold_while_reading(saved):
    folder, _ = saved("llama")
    model = load(folder, quantize=Quantize("int4", skip=("lm_head", "model.layers.0.*")))
    assert not isinstance(model.lm_head, QuantizedModule)
    assert {"name": "lm_head", "reason": "asked for by skip"} in quantize_row(model)["skipped"]
    names = {name for name, _ in quantized(model)}
    assert names and not any("layers.0." in name for name in names)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_report_is_that_of_a_patched_model(family, tmp_path):
    """Tied tables count once, though ties are cut while a model is read."""
    tiny(family).save_pretrained(tmp_path)
    theirs = quantize_row(patch(read(tmp_path), quantize="int4", **OFF))
    ours = quantize_row(load(tmp_path, quantize="int4", **OFF))
    assert {key: ours[key] for key in theirs} == theirs


def test_modules_of_bitsandbytes_are_not_made_while_reading():
    with pytest.raises(ValueError, match=r"HfAccelConfig quantizes onto our kernels; for the modules of bitsandbytes"):
        HfAccelConfig("nf4", backend="bitsandbytes")
