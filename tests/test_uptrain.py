"""Uptraining: the steps are AdamW's, they heal, they can be interrupted anywhere, and leave nothing but new weights."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import accelerate
import pytest
import torch
import torch.nn.functional as F
from cases import FAMILIES, build, logits, prompt, tiny
from fingerprint import changes, fingerprint
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import hf_accel_patch
from hf_accel_patch import HfAccelError, UnsupportedModel, patch, unpatch, uptrain, uptraining
from hf_accel_patch.cli import main
from hf_accel_patch.texts import calibration_texts, held_out_text
from hf_accel_patch.uptraining.data import cut
from hf_accel_patch.uptraining.run import Run, Settings

MODEL = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"
ROOT = MODEL.parent.parent.parent
WINDOW = 16
SOON = ("llama", "gemma2", "gpt_oss", "gptj", "bloom", "mixtral")
EVERY = [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in FAMILIES]


def pattern(rows=24, length=66):
    """Token ids that repeat after 6: something that can be learned."""
    return [prompt(6, rows).repeat(1, length // 6)]


def trained(model, steps=4, texts=None, **options):
    given = dict(window=WINDOW, learning_rate=1e-3, train="all", progress=False) | options
    return uptrain(model, pattern() if texts is None else texts, steps, **given)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fewer_heads(model, heads):
    """A stock model with the mean of each group of key and value heads: a conversion by hand."""
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = heads
    state = {}
    for name, weight in model.state_dict().items():
        if "k_proj" in name or "v_proj" in name:
            groups = weight.view(heads, -1, config.head_dim, weight.shape[-1])
            weight = groups.mean(1).flatten(0, 1)
        state[name] = weight
    converted = LlamaForCausalLM(config).to(model.dtype)
    converted.load_state_dict(state)
    converted.name_or_path = model.name_or_path
    return converted.eval()


def kl(model, teacher, ids):
    ours, theirs = (logits(each, ids).double().log_softmax(-1) for each in (model, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean().item()


# Steps


def test_the_steps_are_those_of_a_plain_loop():
    """In float64, with the loss of transformers: AdamW without decay, clipped gradients, a cosine."""
    model, reference = tiny("llama"), tiny("llama").double().train()
    windows = cut(pattern(), model, None, WINDOW)
    done = trained(model, 5, batch_size=3, learning_rate=3e-3)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    rates = [3e-3 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    for step, rate in enumerate(rates):
        ids = windows.batch(step, 3, 0)
        optimizer.param_groups[0]["lr"] = rate
        reference(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    before = weights(tiny("llama"))
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        moved = (theirs - before[name]).abs().max()
        assert moved > 1e-3 and (ours - theirs).abs().max() < 0.02 * moved, name
    with torch.no_grad():
        losses = [reference.eval()(input_ids=row[None], labels=row[None]).loss.item() for row in windows.held_out]
    assert done.loss_after == pytest.approx(sum(losses) / len(losses), abs=1e-3)
    assert done.tokens == 5 * 3 * WINDOW and done.parameters == model.num_parameters()


def test_every_window_is_read_once_before_any_is_read_again_and_none_that_is_measured_on():
    ids = torch.arange(4, 244).repeat(3)[: 41 * WINDOW]
    windows = cut([ids], tiny("llama"), None, WINDOW)
    assert len(windows.training) == 39 and len(windows.held_out) == 2  # the end token makes no window of its own
    assert torch.equal(torch.cat([windows.training, windows.held_out]).flatten(), ids)
    assert windows.held_out.flatten().tolist() == ids[-2 * WINDOW :].tolist()
    batches = [windows.batch(step, 3, 7) for step in range(26)]
    epochs = [sorted(map(tuple, torch.cat(part).tolist())) for part in (batches[:13], batches[13:])]
    assert epochs[0] == epochs[1] == sorted(map(tuple, windows.training.tolist()))
    assert not torch.equal(windows.batch(0, 3, 7), windows.batch(13, 3, 7))
    assert not torch.equal(windows.batch(0, 3, 7), windows.batch(0, 3, 8))


def test_it_heals_a_converted_model_and_says_how_much():
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model = fewer_heads(original, 4)
    texts = [text[:4000] for text in calibration_texts()[:12]]
    done = trained(model, 8, texts, window=64, original=original)
    assert done.loss_before > done.loss_original + 1.5
    assert 0.1 < done.recovered < 1
    assert done.recovered == (done.loss_before - done.loss_after) / (done.loss_before - done.loss_original)
    ids = cut(texts, model, None, 64).held_out
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert done.loss_after == pytest.approx(loss, abs=1e-4)
    assert f"{done.recovered:.0%} of the lost loss is recovered" in str(done)
    assert json.loads(json.dumps(done.to_dict()))["recovered"] == done.recovered


@pytest.mark.parametrize("family", EVERY)
def test_a_patched_model_is_trained_as_stock_is(family):
    stock, model = tiny(family), patch(tiny(family))
    before = weights(model)
    ours, theirs = trained(model, 2), trained(stock, 2)
    assert ours.loss_before != ours.loss_after
    assert ours.loss_after == pytest.approx(theirs.loss_after, abs=2e-3)
    still = [name for name, weight in weights(model).items() if torch.equal(weight, before[name])]
    expected = [name for name, weight in weights(stock).items() if torch.equal(weight, before[name])]
    assert still == expected and len(still) < len(before) / 2
    after = weights(model)
    assert equal(weights(unpatch(model)), after), "what was trained keeps its values"


@pytest.mark.parametrize("family", EVERY)
def test_the_attention_of_every_layer_is_trained_and_nothing_else(family):
    """By default. The names that mark it in every family are known here only."""
    stock, model = tiny(family), patch(tiny(family))
    before, flags = weights(model), {name: p.requires_grad for name, p in model.named_parameters()}
    done, other = uptrain(model, pattern(), 2, window=WINDOW, progress=False), trained(stock, 2, train="attention")
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {name for name in before if "attn" in name or "attention" in name}
    attention -= {name for name in attention if "norm" in name or "ln_" in name}
    assert attention - moved <= {name for name in attention if name.endswith("bias")}, "keys need no bias"
    assert all("attn" in name or "attention" in name for name in moved)
    assert {name.split(".layers.")[-1].split(".h.")[-1].split(".blocks.")[-1][0] for name in moved} == set("0123")
    assert done.parameters == other.parameters < model.num_parameters()
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_the_rate_falls_with_the_width(monkeypatch):
    rates = []
    monkeypatch.setattr(Settings, "rate", lambda self, step: rates.append(self.learning_rate) or 0.0)
    model = tiny("llama")
    before = weights(model)
    uptrain(model, pattern(), 1, window=WINDOW, progress=False)
    assert rates == [0.75 / 64] and equal(weights(model), before)


def test_the_rate_rises_and_then_falls_to_nothing():
    settings = Settings(steps=60, batch_size=1, learning_rate=2.0, distill=0.0, seed=0)
    rates = [settings.rate(step) for step in range(61)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[32] == pytest.approx(1.0) and rates[60] == 0.0
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_step_in_parts_is_the_same_step(monkeypatch):
    whole, parts, sizes = tiny("llama"), tiny("llama"), []
    trained(whole, 3, batch_size=5)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    parts.register_forward_pre_hook(lambda m, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    trained(parts, 3, batch_size=5)
    assert [size for size in sizes if size > 1] == [3, 2] * 3  # what is measured on is read one by one
    before, expected = weights(tiny("llama")), weights(whole)
    for name, weight in weights(parts).items():
        assert (weight - expected[name]).abs().max() < 0.02 * (expected[name] - before[name]).abs().max(), name


def test_distillation_brings_the_predictions_nearer():
    teacher = build("llama", num_key_value_heads=4)
    model, alone = fewer_heads(teacher, 2), fewer_heads(teacher, 2)
    ids = prompt(60, 6, seed=9)
    texts, before, same = [prompt(64, 40)], kl(model, teacher, ids), fingerprint(teacher)
    done = trained(model, 40, texts, original=teacher, distill=1.0, learning_rate=5e-3)
    trained(alone, 40, texts, learning_rate=5e-3)
    after = kl(model, teacher, ids)
    assert after < 0.9 * before and after < kl(alone, teacher, ids)
    assert not changes(same, fingerprint(teacher)), "the original is as it was"
    assert done.loss_original == pytest.approx(trained(teacher, 1, texts).loss_before)


# Precision


def test_small_updates_of_bfloat16_weights_are_not_lost():
    model, naive = (tiny("llama").bfloat16() for _ in range(2))
    before, rate, steps = weights(model), 2e-5, 30
    windows = cut(pattern(), model, None, WINDOW)
    optimizer = torch.optim.AdamW(naive.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        naive(input_ids=(ids := windows.batch(step, 2, 0)), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained(model, steps, learning_rate=rate)
    large = {name: weight.abs() > 2**-6 for name, weight in before.items()}  # one step is below half their spacing
    moved = [
        sum((weights(each)[name] != weight)[large[name]].sum().item() for name, weight in before.items())
        for each in (naive, model)
    ]
    assert moved[1] > 3 * moved[0] and moved[1] > 500, moved
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_float16_is_scaled_and_an_overflow_costs_a_smaller_scale_not_the_run(tmp_path):
    model = tiny("llama").half()
    done = trained(model, 20, learning_rate=3e-3, folder=tmp_path, save_every=20)
    assert done.loss_after < done.loss_before - 0.05
    with safe_open(next(tmp_path.iterdir()), "pt") as file:
        scaler = json.loads(file.metadata()["facts"])["scaler"]
    assert scaler["scale"] > 0 and scaler["_growth_tracker"] > 0
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float16 for parameter in model.parameters())


def test_a_loss_that_is_not_finite_stops_with_the_weights_of_the_last_whole_step():
    model = tiny("llama")
    before = weights(model)
    handle = model.lm_head.register_forward_hook(lambda m, args, out: out * math.inf if m.training else out)
    with pytest.raises(HfAccelError, match=r"the loss is (nan|inf) .* after 0 steps(.|\n)*a learning_rate below"):
        trained(model)
    handle.remove()
    assert equal(weights(model), before)


# As before


class Broken(Exception):
    """Raised in the middle of a run by a test."""


def break_at(monkeypatch, number, error=Broken):
    """Let the forward of this step raise."""
    whole = Run._objective
    count = []

    def objective(self, ids, teacher):
        count.append(1)
        if len(count) > number:
            raise error
        return whole(self, ids, teacher)

    monkeypatch.setattr(Run, "_objective", objective)


def prepared():
    """A model of mixed modes, with a frozen parameter and a gradient."""
    model = tiny("llama").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    return model


def test_nothing_but_weights_is_changed():
    model = prepared()
    gradient, random = model.model.norm.weight.grad, torch.get_rng_state()
    before, old = fingerprint(model), weights(model)
    trained(model)
    found = changes(before, fingerprint(model))
    new = weights(model)
    assert torch.equal(new["lm_head.weight"], old["lm_head.weight"])
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert len(moved) == len(old) - 1
    assert {place.rpartition(".")[0] for place in found} == {name.rpartition(".")[0] for name in moved}
    assert all(place.endswith((" tensor", "._parameters")) for place in found)
    assert model.model.norm.weight.grad is gradient and torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_an_exception_leaves_the_last_whole_step_and_nothing_else(monkeypatch, error):
    model, expected = prepared(), prepared()
    before, random = fingerprint(model), torch.get_rng_state()
    with monkeypatch.context() as broken:
        break_at(broken, 0, error)
        with pytest.raises(error):
            trained(model)
    assert not changes(before, fingerprint(model))
    assert torch.equal(torch.get_rng_state(), random)
    calls = []
    step = Run.step

    def counted(self, number, ids, teacher):
        if number == 2:
            calls.append(weights(self.model))
        return step(self, number, ids, teacher)

    monkeypatch.setattr(Run, "step", counted)
    trained(expected)
    with monkeypatch.context() as broken:
        break_at(broken, 2, error)
        with pytest.raises(error):
            trained(model)
    assert equal(weights(model), calls[0])
    assert not [p for p in model.parameters() if p.grad is not None and p is not model.model.norm.weight]


def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end(monkeypatch, tmp_path):
    straight = tiny("llama").bfloat16()
    trained(straight, 4)
    model, write = tiny("llama").bfloat16(), Run._write
    handler = signal.getsignal(signal.SIGINT)

    def pressed(self):
        if self.done == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        write(self)

    with monkeypatch.context() as pressing:
        pressing.setattr(Run, "_write", pressed)
        with pytest.raises(KeyboardInterrupt):
            trained(model, 4, folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [file.name for file in tmp_path.iterdir()] == ["uptrain-00000002.safetensors"]
    done = trained(model, 4, folder=tmp_path)  # the very model, in the middle of its way
    assert done.resumed_at == 2 and equal(weights(model), weights(straight))


def test_it_runs_in_another_thread():
    model, straight = tiny("llama"), tiny("llama")
    thread = threading.Thread(target=trained, args=(model,))
    thread.start()
    thread.join()
    trained(straight)
    assert equal(weights(model), weights(straight))


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 drops out at random
def test_a_run_that_is_killed_goes_on_bit_for_bit(monkeypatch, tmp_path, name, dtype):
    straight = tiny(name).to(dtype)
    whole = trained(straight, 4)
    with monkeypatch.context() as killed:
        break_at(killed, 3)
        with pytest.raises(Broken):
            trained(tiny(name).to(dtype), 4, folder=tmp_path, save_every=2)
    model = tiny(name).to(dtype)
    done = trained(model, 4, folder=tmp_path, save_every=2)
    assert done.resumed_at == 2
    assert equal(weights(model), weights(straight))
    assert (done.loss_before, done.loss_after) == (whole.loss_before, whole.loss_after)
    again = tiny(name).to(dtype)
    assert trained(again, 4, folder=tmp_path, save_every=2).resumed_at == 4
    assert equal(weights(again), weights(straight))


def test_the_last_two_checkpoints_are_kept_and_one_is_enough(tmp_path):
    other = tmp_path / "model.safetensors"
    other.write_text("not ours")
    straight = tiny("llama")
    trained(straight, 5, folder=tmp_path, save_every=1)
    files = sorted(file.name for file in tmp_path.iterdir() if file != other)
    assert files == ["uptrain-00000004.safetensors", "uptrain-00000005.safetensors"] and other.exists()
    last = tmp_path / files[1]
    last.write_bytes(last.read_bytes()[:1000])
    model = tiny("llama")
    assert trained(model, 5, folder=tmp_path, save_every=1).resumed_at == 4
    assert equal(weights(model), weights(straight))
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(HfAccelError, match="are damaged"):
        trained(model, 5, folder=tmp_path)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    trained(tiny("llama"), 2, folder=tmp_path)
    for options, words in [
        ({"learning_rate": 1e-4}, "learning_rate 0.001, not learning_rate 0.0001"),
        ({"steps": 3}, "steps 2, not steps 3"),
        ({"texts": pattern(23)}, "texts"),
        ({"batch_size": 4}, "windows per step 2, not windows per step 4"),
    ]:
        model = tiny("llama")
        before = fingerprint(model)
        with pytest.raises(HfAccelError, match=f"are of another run: {words}(.|\\n)*hint: give another folder"):
            trained(model, **{"steps": 2, "folder": tmp_path} | options)
        assert not changes(before, fingerprint(model))
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(HfAccelError, match="are of a model with a loss of"):
        trained(other, 2, folder=tmp_path)
    with pytest.raises(HfAccelError, match="parameters"):
        trained(build("llama", num_key_value_heads=4), 2, folder=tmp_path)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import test_uptrain as t
model = t.tiny("llama")
t.trained(model, 60, folder=sys.argv[2], save_every=1, batch_size=8)
t.torch.save(t.weights(model), sys.argv[3])
"""


@pytest.mark.slow
def test_killed_again_and_again_by_the_system(tmp_path):
    tests, folder, out = Path(__file__).parent, tmp_path / "checkpoints", tmp_path / "weights.pt"
    command = [sys.executable, "-c", KILLED, str(tests), str(folder), str(out)]
    reached = []
    for pause in (0.0, 0.03, 0.11):
        process = subprocess.Popen(command, cwd=ROOT)
        before = set(folder.glob("uptrain-????????.safetensors"))
        while not set(folder.glob("uptrain-????????.safetensors")) - before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        reached.append(max(folder.glob("uptrain-????????.safetensors")).name)
    assert reached == sorted(set(reached)), reached
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    straight = tiny("llama")
    trained(straight, 60, batch_size=8)
    assert equal(torch.load(out), weights(straight))


# Processes


SEVERAL = """
import sys
sys.path.insert(0, sys.argv[1])
import test_uptrain as t
from accelerate import PartialState
rank = int(t.os.environ["RANK"])
model = t.tiny("llama")
if rank:
    t.torch.nn.init.zeros_(model.lm_head.weight)  # the weights of the first process are everyone's
done = t.trained(model, 6, folder=sys.argv[2], save_every=3, learning_rate=3e-3, progress=True)
t.torch.save((t.weights(model), done.to_dict()), f"{sys.argv[2]}/{rank}.pt")
PartialState().destroy_process_group()
"""


# On processors alone accelerate leaves the start of several processes to MPI, but for this spelling
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
LAUNCH += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launched(by, *arguments):
    without = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | without | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", *by, *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SEVERAL)
    done = launched(TORCHRUN, script, Path(__file__).parent, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("uptrain 6/6") == 1, "one process shows, the other is silent"
    (ours, said), (others, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert equal(ours, others) and said["loss_after"] == same["loss_after"] and said["processes"] == 2
    single = tiny("llama")
    alone = trained(single, 6, batch_size=4, learning_rate=3e-3)
    assert said["tokens"] == alone.tokens and said["loss_before"] == pytest.approx(alone.loss_before, abs=1e-5)
    assert said["loss_after"] == pytest.approx(alone.loss_after, abs=1e-3)
    before = weights(tiny("llama"))
    for name, weight in weights(single).items():
        moved = (weight - before[name]).abs().max()
        assert (ours[name] - weight).abs().max() < 0.02 * moved, name
    assert trained(tiny("llama"), 6, batch_size=4, learning_rate=3e-3, folder=tmp_path, save_every=3).resumed_at == 6


# What is shown and refused


def test_progress_is_shown_or_not_and_accelerate_is_at_work(capfd, monkeypatch):
    made, start = [], accelerate.Accelerator.__init__
    monkeypatch.setattr(
        accelerate.Accelerator, "__init__", lambda self, *a, **k: (made.append(self), start(self, *a, **k))[1]
    )
    trained(tiny("llama"), 20)
    out, err = capfd.readouterr()
    assert not out and not err and len(made) == 1
    trained(tiny("llama"), 20, progress=True)
    out, err = capfd.readouterr()
    assert not out and err.count("uptrain") == 10 and "uptrain 20/20  loss " in err


TEXT = "for x in range(10):\n    print(x)\n"


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "steps=0", {"steps": 0}),
        (ValueError, "batch_size=0", {"batch_size": 0}),
        (ValueError, "save_every=0", {"save_every": 0}),
        (ValueError, "learning_rate=nan", {"learning_rate": math.nan}),
        (ValueError, "train='heads'; give one of attention, all", {"train": "heads"}),
        (ValueError, "distill=1.5", {"distill": 1.5}),
        (ValueError, "give original=", {"distill": 0.5}),
        (ValueError, "window=1024 tokens, but the model was made for 512", {"window": 1024}),
        (ValueError, "window=1;", {"window": 1}),
        (ValueError, "the texts hold 11 tokens; two windows of 16", {"texts": [prompt(10)]}),
        (ValueError, "the texts hold 0 tokens", {"texts": []}),
        (ValueError, r"not in 0\.\.255", {"texts": [torch.full((99,), 256)]}),
        (HfAccelError, "does not know its tokenizer(.|\n)*tokenizer= beside", {"texts": [TEXT]}),
        (ValueError, "a vocabulary of 4096 tokens, the model one of 256", {"original": MODEL}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_touched(error, words, options):
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(error, match=words):
        trained(model, **options)
    assert not changes(before, fingerprint(model))


def test_models_that_cannot_be_trained_are_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match="the very model"):
        trained(model, original=model)
    with pytest.raises(HfAccelError, match=r"no parameter of LlamaForCausalLM requires(.|\n)*requires_grad_"):
        trained(tiny("llama").requires_grad_(False))
    frozen = tiny("llama")
    for layer in frozen.model.layers:
        layer.self_attn.requires_grad_(False)
    with pytest.raises(HfAccelError, match=r"no parameter of an attention of LlamaForCausalLM(.|\n)*train='all'"):
        trained(frozen, train="attention")
    with pytest.raises(HfAccelError, match=r"are quantized(.|\n)*uptrain the float model, then quantize it"):
        trained(patch(tiny("llama"), quantize="int8"))
    with pytest.raises(UnsupportedModel):
        trained(torch.nn.Linear(2, 2))


def test_texts_of_every_kind():
    model, tokenizer = tiny("llama"), AutoTokenizer.from_pretrained(MODEL)
    large = AutoModelForCausalLM.from_pretrained(MODEL)
    ids = tokenizer(TEXT * 9)["input_ids"]
    expected = cut([torch.tensor(ids)], large, None, WINDOW).digest()
    assert cut(TEXT * 9, large, None, WINDOW).digest() == expected
    assert cut([TEXT * 9], large, tokenizer, WINDOW).digest() == expected
    assert cut(iter([TEXT * 9]), large, tokenizer, WINDOW).digest() == expected
    assert cut(torch.tensor([ids]), large, None, WINDOW).digest() == expected
    end = model.config.eos_token_id
    rows = torch.full((4, 7), 9)
    assert cut(rows, model, None, 8).training.tolist() == [[*[9] * 7, end]] * 3


# The command


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder with a checkpoint of fewer heads and two texts."""
    folder = tmp_path_factory.mktemp("damaged")
    fewer_heads(AutoModelForCausalLM.from_pretrained(MODEL), 4).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
    for name, text in zip(("a.txt", "b.txt"), calibration_texts(), strict=False):
        (folder / name).write_text(text)
    (folder / "empty.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xff")
    return folder


SMALL = ("--steps", "4", "--window", "32", "--text")


def test_the_command_trains_and_saves(damaged, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = (damaged / "model", *SMALL, damaged / "a.txt", damaged / "b.txt", "--original", MODEL, "--json")
    arguments = ["uptrain", *map(str, arguments)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["loss_after"] < said["loss_before"] and said["recovered"] > 0 and said["output"] == "model-uptrained"
    assert "uptrain 4/4" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model-uptrained"], "checkpoints are gone when it is done"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model-uptrained")
    assert model.config.num_key_value_heads == 4 and model.dtype == torch.bfloat16
    ids = cut([(damaged / name).read_text() for name in ("a.txt", "b.txt")], model, None, 32).held_out
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    assert said["loss_after"] == pytest.approx(sum(losses) / len(losses), abs=2e-2)
    assert main(arguments) == 2 and "model-uptrained is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_in_two_processes(damaged, tmp_path):
    arguments = (damaged / "model", *SMALL, damaged / "a.txt", "--output", tmp_path / "out", "--json")
    done = launched(LAUNCH, "-m", "hf_accel_patch", "uptrain", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["processes"] == 2 and said["loss_after"] < said["loss_before"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > said["parameters"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "PATH_OR_ID"),
        (("MODEL",), "--text"),
        (("MODEL", "--text", "nothing.txt"), "nothing.txt"),
        (("MODEL", "--text", "empty.txt"), "empty.txt holds no text"),
        (("MODEL", "--text", "binary.txt"), "binary.txt is no text in UTF-8"),
        (("MODEL", "--text", "a.txt", "--gqa", "0"), "--gqa"),
        (("MODEL", "--text", "a.txt", "--merge", "mean"), "--merge needs --gqa"),
        (("MODEL", "--text", "a.txt", "--distill", "0.5"), "--distill needs"),
        (("MODEL", "--text", "a.txt", "--gqa", "2", "--distill", "2"), "distill=2.0"),
        (("MODEL", "--text", "a.txt", "--learning-rate", "-1"), "learning_rate=-1.0"),
        (("MODEL", "--text", "a.txt", "--output", "model"), "model is not empty"),
        (("MODEL", "--text", "a.txt", "--window", "4096"), "window=4096 tokens, but the model was made for 512"),
        (("/no/such/model", "--text", "a.txt"), "/no/such/model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_one_line_and_exit_code_2(damaged, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(damaged)
    monkeypatch.setattr(uptraining, "mean_loss", lambda *_: pytest.fail("it has begun"))
    given = ["uptrain", *(str(MODEL) if each == "MODEL" else each for each in arguments)]
    try:
        code = main(given)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1, err
    assert not Path("code-llama-8m-uptrained").exists()


@pytest.mark.slow
def test_150_steps_recover_most_of_what_the_mean_of_heads_lost():
    """On the standard library's packages that the model was trained on; measured on two that it never saw."""
    from hf_accel_patch.measure import perplexity, spread_windows

    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model = fewer_heads(original, 2)
    windows = spread_windows(AutoTokenizer.from_pretrained(MODEL), held_out_text(), 16, 256)
    stock, lost = (math.log(perplexity(each, windows)) for each in (original, model))
    done = uptrain(model, calibration_texts(), progress=False, original=original)
    left = math.log(perplexity(model, windows))
    assert lost - stock > 2
    assert (lost - left) / (lost - stock) > 0.5, (stock, lost, left)
    assert done.recovered > 0.5
