"""accelerate: models spread by its hooks, offloaded to memory and to disk, and scripts that it launches."""

import json

import accelerate
import pytest
import torch
from programs import BUNDLED, LAYERS, bundled, program

from hf_accel_patch import Quantize, patch, report, unpatch

PROMPTS = ["def read_lines(path):\n", "import os\n"]
HALVES = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"} | {
    f"model.layers.{i}": "cpu" if i < LAYERS // 2 else "disk" for i in range(LAYERS)
}


def answers(model, tokenizer):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)


def dispatched(model, folder):
    return accelerate.dispatch_model(model, HALVES, main_device="cpu", offload_dir=str(folder))


def to_memory(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def on_meta(model):
    return sum(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("offload", (dispatched, to_memory, to_disk), ids=lambda each: each.__name__)
def test_a_patched_model_is_offloaded(stock, ours, tokenizer, tmp_path, at_work, offload):
    """Weights come and go with every forward; attention and cache are ours all the while."""
    expected = answers(stock, tokenizer)
    offload(ours, tmp_path)
    before = on_meta(ours)
    assert before >= 9 * LAYERS // 2 - 1  # every weight of the layers that were to go
    assert torch.equal(answers(ours, tokenizer), expected)
    at_work(ours, calls=LAYERS * 6)
    assert on_meta(ours) == before


@pytest.mark.parametrize("quantize", ("int8", "int4"))
@pytest.mark.parametrize("offload", (dispatched, to_memory, to_disk), ids=lambda each: each.__name__)
def test_codes_stay_where_accelerate_offloads_parameters(tokenizer, tmp_path, at_work, offload, quantize):
    """Codes are buffers, which its hooks leave where they are."""
    ours = patch(bundled(), quantize=quantize)
    expected, state = answers(ours, tokenizer), ours.state_dict()
    at_work(ours, calls=LAYERS * 6)
    offload(ours, tmp_path)
    assert torch.equal(answers(ours, tokenizer), expected)
    at_work(ours, "quantize", calls=LAYERS * 6)
    codes = dict(ours.named_buffers())
    assert len(codes) > 2 * 7 * LAYERS and all(torch.equal(state[name], codes[name]) for name in codes.keys() & state)


@pytest.mark.parametrize("offload", (dispatched, to_memory, to_disk), ids=lambda each: each.__name__)
def test_an_offloaded_model_is_patched(stock, tokenizer, tmp_path, at_work, offload):
    """Exact passes leave the weights where they are."""
    expected = answers(stock, tokenizer)
    offload(stock, tmp_path)
    before = on_meta(stock)
    assert torch.equal(answers(patch(stock), tokenizer), expected)
    at_work(stock, calls=LAYERS * 6)
    assert torch.equal(answers(unpatch(stock), tokenizer), expected)
    assert on_meta(stock) == before >= 9 * LAYERS // 2 - 1


def test_a_model_that_from_pretrained_offloads(stock, tokenizer, tmp_path, at_work):
    """As transformers loads what fits neither the GPU nor the host: layers stay in the checkpoint's file."""
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(
        BUNDLED, dtype=torch.float32, device_map=HALVES, offload_folder=str(tmp_path)
    )
    assert on_meta(ours) >= 9 * LAYERS // 2 - 1
    assert torch.equal(answers(patch(ours), tokenizer), answers(stock, tokenizer))
    at_work(ours, calls=LAYERS * 6)


def test_hooks_that_come_off_leave_a_patched_model(stock, ours, tokenizer, tmp_path, at_work):
    expected = answers(stock, tokenizer)
    to_memory(ours, tmp_path)
    accelerate.hooks.remove_hook_from_submodules(ours)
    assert on_meta(ours) == 0
    assert torch.equal(answers(ours, tokenizer), expected)
    at_work(ours, calls=LAYERS * 6)
    assert torch.equal(answers(unpatch(ours), tokenizer), expected)
    assert not report(ours).to_dict()["patched"]


@pytest.mark.parametrize("quantize", (None, "int8"))
def test_the_layers_of_a_device_map(stock, tokenizer, tmp_path, at_work, quantize):
    """`device_map="auto"` on a machine without a GPU, as stock loads it."""
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32, device_map="auto")
    patch(ours, quantize=quantize and Quantize(quantize, originals="keep"))
    found = answers(ours, tokenizer)
    at_work(ours, *(("quantize",) if quantize else ()), calls=LAYERS * 6)
    if quantize is None:
        assert torch.equal(found, answers(stock, tokenizer))


SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
import hf_accel_patch

accelerator = Accelerator()
for name in ("stock", "patched"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    if name == "patched":
        hf_accel_patch.patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(100, 228).view(4, 32)
    loader = torch.utils.data.DataLoader(ids, batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for part in loader:
        loss = model(input_ids=part, labels=part).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    inner = accelerator.unwrap_model(model)
    patched = hf_accel_patch.report(inner).to_dict()["patched"]
    print(json.dumps([accelerator.process_index, name, patched, losses]), flush=True)
"""


@pytest.mark.parametrize("processes", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_accelerate_launch(tmp_path, processes):
    """A script under `accelerate launch`, in one process and in two, whose gradients are averaged."""
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    launch += ["--multi_gpu"] if processes > 1 else []  # on processors alone, the one spelling that needs no MPI
    done = program(*launch, tmp_path / "script.py", BUNDLED, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    losses = {(process, name): values for process, name, _, values in rows}
    assert len(rows) == len(losses) == 2 * processes
    for process in range(processes):
        stock, ours = losses[process, "stock"], losses[process, "patched"]
        assert ours == pytest.approx(stock, rel=1e-4) and len(ours) == 4 // processes
    assert all(patched is (name == "patched") for _, name, patched, _ in rows)
    assert processes == 1 or losses[0, "stock"] != losses[1, "stock"]  # each has its share of the windows
