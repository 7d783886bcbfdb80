"""Prompts in chunks where attention is hand-written and stays so: same tokens, nothing left behind."""

import cases
import pytest
import torch
from cases import greedy, left_padded, prompt, tiny

from hf_accel_patch import patch, report
from hf_accel_patch.families.chunkable import CHUNKABLE
from hf_accel_patch.passes import attention, prefill


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    """Attention of classes that the package does not know, as a remote file may have them."""
    monkeypatch.setattr(attention, "handwritten_modules", lambda view: [])


FAMILIES = ("bloom", "codegen", "falcon_alibi", "falcon_mqa", "falcon_new", "gpt_neo", "gptj", "mpt")


@pytest.mark.parametrize("name", FAMILIES)
def test_same_tokens_in_chunks(name, monkeypatch, tmp_path):
    if cases.FAMILIES[name].registry:
        pytest.skip("its attention is not hand-written in this version of transformers")
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 16)
    model = tiny(name)
    model.generation_config.use_cache = True
    assert model.config.model_type in CHUNKABLE
    stock = greedy(model, prompt(), 8), greedy(model, tokens=8, **left_padded())
    model.save_pretrained(tmp_path / "stock")
    patch(model)
    assert "reason" not in {row["pass"]: row for row in report(model).to_dict()["passes"]}["prefill"]
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(greedy(model, prompt(), 8), stock[0])
    assert lengths[:3] == [16, 16, 8]
    hook.remove()
    assert torch.equal(greedy(model, tokens=8, **left_padded()), stock[1])
    assert model.generation_config.prefill_chunk_size is None
    model.save_pretrained(tmp_path / "ours")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("stock", "ours")]
    assert files[0] == files[1]


def test_calls_that_do_not_fit_run_as_before(monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 16)
    model = tiny("bloom")
    calls = {
        "no cache": {"use_cache": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    }

    def run(options):
        out = model.generate(prompt(), max_new_tokens=4, do_sample=False, **options)
        return out if isinstance(out, torch.Tensor) else out.hidden_states[0][-1]

    stock = {name: run(options) for name, options in calls.items()}
    patch(model)
    for name, options in calls.items():
        assert torch.allclose(run(options).float(), stock[name].float(), atol=1e-5), name
