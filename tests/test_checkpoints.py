"""load() on checkpoints of other quantizers, written here by the formats' definitions."""

import json
import random
import sys

import pytest
import torch
import transformers
from cases import greedy, logits, prompt, randomise
from safetensors.torch import load_file, save_file

from hf_accel_patch import HfAccelError, UnsupportedModel, load, report
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.planning.stored import opened

BFLOAT16 = 0.04  # of the logits' standard deviation: scales, and activations in prefills, are rounded to bfloat16
GROUP = 64


def model():
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, attention_bias=True,
    )  # fmt: skip
    return randomise(transformers.AutoModelForCausalLM.from_config(config)).eval()


def words(values, dim, order=range(8)):
    """Eight 4-bit values to an int32 along `dim`, value order[i] in half-byte i."""
    v = values.movedim(dim, -1).long().unflatten(-1, (-1, 8))[..., list(order)]
    packed = (v << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int().movedim(-1, dim).contiguous()


def gptq(weight, generator, v1=True, ordered=False):
    N, K = weight.shape
    codes = torch.randint(0, 16, (K, N), generator=generator)
    zeros = torch.randint(1, 16, (K // GROUP, N), generator=generator)
    scales = (0.01 + 0.01 * torch.rand(K // GROUP, N, generator=generator)).half()
    group = torch.arange(K) // GROUP
    group = group[torch.randperm(K, generator=generator)] if ordered else group
    dense = ((codes - zeros[group]) * scales.float()[group]).T
    return dense, {
        "qweight": words(codes, 0), "scales": scales, "g_idx": group.int(), "qzeros": words(zeros - int(v1), 1),
    }  # fmt: skip


def awq(weight, generator):
    N, K = weight.shape
    codes = torch.randint(0, 16, (K, N), generator=generator)
    zeros = torch.randint(0, 16, (K // GROUP, N), generator=generator)
    scales = (0.01 + 0.01 * torch.rand(K // GROUP, N, generator=generator)).half()
    group, order = torch.arange(K) // GROUP, (0, 2, 4, 6, 1, 3, 5, 7)
    dense = ((codes - zeros[group]) * scales.float()[group]).T
    return dense, {"qweight": words(codes, 1, order), "qzeros": words(zeros, 1, order), "scales": scales}


def four_bits(weight, generator, kind):
    N, K = weight.shape
    codes = torch.randint(0, 16, (N * K,), generator=generator)
    absmax = 0.05 + 0.05 * torch.rand(N * K // GROUP, generator=generator)
    dense = (TABLES[kind][codes].view(-1, GROUP) * absmax[:, None]).view(N, K)
    state = json.dumps({"quant_type": kind, "blocksize": GROUP, "dtype": "float16", "shape": [N, K]})
    return dense, {
        "weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], "weight.absmax": absmax,
        "weight.quant_map": TABLES[kind].clone(),
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }  # fmt: skip


def eight_bits(weight, generator):
    codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8, generator=generator)
    scale = 0.1 + 0.1 * torch.rand(len(weight), generator=generator)
    return codes * scale[:, None] / 127, {
        "weight": codes,
        "SCB": scale,
        "weight_format": torch.tensor(0).to(torch.uint8),
    }


HOW = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
FORMATS = {
    "gptq": (gptq, HOW),
    "gptq v2": (lambda w, g: gptq(w, g, v1=False), HOW | {"checkpoint_format": "gptq_v2"}),
    "gptq act-order": (lambda w, g: gptq(w, g, ordered=True), HOW | {"desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "nf4": (lambda w, g: four_bits(w, g, "nf4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp4": (lambda w, g: four_bits(w, g, "fp4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "8 bits": (eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


@torch.no_grad()
def write(folder, name, shards=1):
    """A checkpoint, and the stock model with the weights that it stands for."""
    make, how = FORMATS[name]
    stock, tensors, generator = model(), {}, torch.Generator().manual_seed(0)
    for key, parameter in stock.named_parameters():
        if key.endswith("_proj.weight"):
            dense, parts = make(parameter, generator)
            parameter.copy_(dense)
            tensors |= {f"{key.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[key] = parameter.copy_(parameter.half()).half()
    names = sorted(tensors)
    random.Random(0).shuffle(names)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    config = stock.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return stock


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_of_other_quantizers(name, shards, tmp_path, monkeypatch):
    for package in ("gptqmodel", "auto_gptq", "awq", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    stock = write(tmp_path, name, shards)
    ours = load(tmp_path, dtype=torch.float32)
    expected = logits(stock, prompt())
    assert (logits(ours, prompt()) - expected).std() < BFLOAT16 * expected.std()
    assert torch.equal(greedy(ours, input_ids=prompt(), tokens=1), greedy(stock, input_ids=prompt(), tokens=1))
    row = next(row for row in report(ours).to_dict()["passes"] if row["pass"] == "quantize")
    assert row["checkpoint"] == FORMATS[name][1]["quant_method"] and row["weights"] == 14
    assert row["exact"] == (name in ("nf4", "fp4")) and ("read" in row) != row["exact"]
    assert ours.name_or_path == str(tmp_path)


EXPERTS = {  # how checkpoints name what a model holds in one parameter
    "mixtral": (transformers.MixtralConfig, ".block_sparse_moe.", ("w1", "w3"), "w2", {"num_local_experts": 4}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig, ".mlp.", ("gate_proj", "up_proj"), "down_proj",
        {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
}  # fmt: skip


@torch.no_grad()
def write_experts(folder, family, name, left_out=()):
    """As `write`, of a model with experts."""
    kind, place, into, out, options = EXPERTS[family]
    config = kind(
        vocab_size=256, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, **options,
    )  # fmt: skip
    stock = randomise(transformers.AutoModelForCausalLM.from_config(config)).eval()
    (make, how), tensors, generator = FORMATS[name], {}, torch.Generator().manual_seed(0)
    for key, parameter in stock.named_parameters():
        prefix = key.replace(".mlp.", place).rpartition(".")[0]
        if parameter.ndim == 3:
            names = into if key.endswith("gate_up_proj") else (out,)
            for expert, weight in enumerate(parameter):
                for part, rows in zip(names, weight.chunk(len(names)), strict=True):
                    dense, parts = make(rows, generator)
                    rows.copy_(dense)
                    layer = f"{prefix}.{expert}.{part}"
                    if (expert, part) in left_out:
                        parts = {"weight": dense.half().contiguous()}
                    tensors |= {f"{layer}.{each}": tensor for each, tensor in parts.items()}
        elif key.endswith("_proj.weight"):
            dense, parts = make(parameter, generator)
            parameter.copy_(dense)
            tensors |= {f"{prefix}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[key.replace(".mlp.", place)] = parameter.copy_(parameter.half()).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = stock.config.to_dict() | {"architectures": [type(stock).__name__], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return stock


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "gptq act-order"])
def test_experts_of_checkpoints_of_other_quantizers(name, family, tmp_path):
    """They lie there one by one, under names of their own."""
    stock = write_experts(tmp_path, family, name)
    ours = load(tmp_path, dtype=torch.float32)
    assert "Quantized" in str(type(ours.model.layers[0].mlp.experts).__mro__)
    expected, found = logits(stock, prompt()), logits(ours, prompt())
    near = (found - expected).abs().amax(-1)[0] < 4 * BFLOAT16 * expected.std()
    assert near.double().mean() > 0.8  # but for tokens that the router sends elsewhere
    row = next(row for row in report(ours).to_dict()["passes"] if row["pass"] == "quantize")
    assert row["weights"] == 10
    for layer, theirs in zip(ours.model.layers, stock.model.layers, strict=True):
        for key in ("gate_up_proj", "down_proj"):
            for expert in range(4):
                dense = layer.mlp.experts.dequantize_expert(key, expert, torch.float32)
                wanted = getattr(theirs.mlp.experts, key)[expert]
                assert (dense - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_experts_can_be_saved_as_ours(tmp_path):
    (tmp_path / "theirs").mkdir()
    write_experts(tmp_path / "theirs", "qwen3_moe", "gptq")
    model = load(tmp_path / "theirs", attention=False, linear=False)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, prompt()), logits(model, prompt()))


def test_experts_of_which_some_are_float_are_refused(tmp_path):
    write_experts(tmp_path, "mixtral", "gptq", left_out={(2, "w2")})
    with pytest.raises(UnsupportedModel, match=r"of its 4 experts 1 are not quantized .* \(the first is 2\)"):
        load(tmp_path)


def test_experts_with_sorted_columns_are_refused(tmp_path):
    write_experts(tmp_path, "mixtral", "gptq act-order")
    with pytest.raises(HfAccelError, match="act-order is not supported for experts"):
        load(tmp_path)


@pytest.mark.parametrize("name", ("gptq act-order", "nf4", "fp4", "8 bits"))
def test_they_can_be_saved_as_ours(name, tmp_path):
    (tmp_path / "theirs").mkdir()
    write(tmp_path / "theirs", name)
    model = load(tmp_path / "theirs", attention=False, linear=False)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.float16 and torch.equal(logits(again, prompt()), logits(model, prompt()))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "awq"])  # which knows no such layer
def test_layers_that_hold_their_weights_transposed(name, tmp_path):
    """GPT-2's `Conv1D` are [K, N]; other quantizers quantize and write [N, K]."""
    config = transformers.GPT2Config(vocab_size=256, n_embd=128, n_layer=2, n_head=4, n_positions=128)
    stock = randomise(transformers.AutoModelForCausalLM.from_config(config)).eval()
    (make, how), tensors, generator = FORMATS[name], {}, torch.Generator().manual_seed(0)
    for key, parameter in stock.named_parameters():
        layer = key.removesuffix(".weight")
        if layer.endswith(("c_attn", "c_proj", "c_fc")):
            dense, parts = make(parameter.T, generator)
            parameter.copy_(dense.T)
            tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[key] = parameter.copy_(parameter.half()).half()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    described = config.to_dict() | {"architectures": ["GPT2LMHeadModel"], "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(described | {"quantization_config": how}))
    ours, expected = load(tmp_path, dtype=torch.float32), logits(stock, prompt())
    assert (logits(ours, prompt()) - expected).std() < BFLOAT16 * expected.std()
    row = next(row for row in report(ours).to_dict()["passes"] if row["pass"] == "quantize")
    assert row["weights"] == 8
    ours.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(logits(again, prompt()), logits(ours, prompt()))


def test_its_generation_config_is_read(tmp_path):
    write(tmp_path, "gptq")
    transformers.GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.temperature == 0.3


def change(folder, edit):
    tensors = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj"
DAMAGE = {
    "no scales": (lambda t: t.pop(f"{UP}.scales"), HfAccelError, f"{UP}: tensor scales is missing"),
    "short codes": (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1].clone()}), HfAccelError, UP),
    "a layer of none": (
        lambda t: t.update({"model.more.qweight": t[f"{UP}.qweight"].clone()}),
        UnsupportedModel,
        "lacks",
    ),
    "an expert": (
        lambda t: t.update({"model.layers.0.mlp.experts.0.w1.qweight": t[f"{UP}.qweight"].clone()}),
        UnsupportedModel,
        "which this model lacks",
    ),
}


@pytest.mark.parametrize("edit, kind, text", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(edit, kind, text, tmp_path):
    write(tmp_path, "gptq")
    change(tmp_path, edit)
    with pytest.raises(kind, match=text):
        load(tmp_path)


@pytest.mark.parametrize(
    "how, text",
    [
        ({"bits": 3}, "4 or 8 bits, not 3"),
        ({"checkpoint_format": "marlin"}, "formats gptq and gptq_v2, not 'marlin'"),
        ({"quant_method": "awq", "version": "llm-awq"}, "gemm and gemv, not 'llm-awq'"),
        ({"quant_method": "bitsandbytes"}, "and has no such layer"),
    ],
)
def test_formats_that_are_not_read(how, text, tmp_path):
    write(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= how
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HfAccelError, match=text):
        load(tmp_path)


def test_a_missing_shard_and_no_safetensors(tmp_path):
    write(tmp_path, "gptq", shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises((HfAccelError, OSError)):
        load(tmp_path)
    for file in tmp_path.glob("*safetensors*"):
        file.unlink()
    with pytest.raises(HfAccelError, match="pickled checkpoints are not read"):
        load(tmp_path)


def test_an_unknown_method_and_a_config_of_the_caller(tmp_path):
    write(tmp_path, "gptq")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    load(tmp_path, config=config)
    assert config.quantization_config["quant_method"] == "gptq", "the caller's configuration is changed"
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"]["quant_method"] = "zzz"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(HfAccelError, match="quantized by zzz, which is not read"):
        load(tmp_path)


def test_asking_for_more_quantization_is_refused(tmp_path):
    write(tmp_path, "gptq")
    with pytest.raises(HfAccelError, match="quantized by gptq already"):
        load(tmp_path, quantize="int8")


def test_a_configuration_that_holds_an_object(tmp_path):
    write(tmp_path, "gptq")
    expected = logits(load(tmp_path), prompt())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    described = {key: value for key, value in HOW.items() if key != "quant_method"}
    config.quantization_config = transformers.GPTQConfig(**described)
    assert torch.equal(logits(load(tmp_path, config=config), prompt()), expected)
    assert isinstance(config.quantization_config, transformers.GPTQConfig)
    assert opened(tmp_path, config).quantized == "gptq (int4)"


def test_fewer_heads_are_refused_before_anything_is_read(tmp_path):
    write(tmp_path, "gptq")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(HfAccelError, match=r"gqa=1: the checkpoint .* quantized by gptq") as raised:
        load(tmp_path, gqa=1)
    assert "load(path, gqa=1, quantize=...)" in str(raised.value)


def test_an_adapter_elsewhere_is_named(tmp_path):
    """Whose configuration the caller gives: its base is another checkpoint."""
    write(tmp_path, "gptq")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(HfAccelError, match="has an adapter"):
        load(tmp_path, config=config)


@pytest.mark.parametrize("scale", (1.0, 1.5))
def test_scales_of_activations_are_refused_unless_they_are_one(scale, tmp_path):
    write(tmp_path, "awq")
    expected = logits(load(tmp_path), prompt())
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.act.scales": torch.full((192,), scale)}, file, {"format": "pt"})
    if scale == 1:
        assert torch.equal(logits(load(tmp_path), prompt()), expected)
        return
    with pytest.raises(HfAccelError, match=r"model.layers.0.mlp.act.scales: the checkpoint divides activations"):
        load(tmp_path)


def test_quantized_layers_that_the_configuration_does_not_mention_are_named(tmp_path):
    write(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HfAccelError, match=r"qweight, and config.json has no quantization_config"):
        load(tmp_path)
