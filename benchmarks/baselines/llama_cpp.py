"""llama.cpp through llama-cpp-python: the weights of the model, written as GGUF in Q4_0 or Q8_0, norms in float32; or
in Q4_K_M, the mixture that most published files have, by llama.cpp's own quantizer from bfloat16.

Installing it compiles it for this processor, which takes from minutes to half an hour; without it these rows say so.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Loaded, Tick, missing

distributions = ("llama_cpp_python", "gguf")
NAMES = {  # of transformers' Llama, in llama.cpp
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def available(variant: str, device: str) -> str | None:
    return "compared on a CPU only" if device != "cpu" else missing("llama_cpp", "gguf")


def load(model: Any, variant: str, texts: Sequence[str]) -> Loaded:
    import llama_cpp

    if model.config.model_type != "llama":
        raise ValueError(f"written for llama models only, this one is {model.config.model_type}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        if variant == "Q4_K_M":
            write_gguf(model, path.with_name("dense.gguf"), "BF16")
            _quantize(path.with_name("dense.gguf"), path, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M)
        else:
            write_gguf(model, path, variant)
        size = path.stat().st_size
        if not model.config.tie_word_embeddings:
            size = size * _read_weights(model) // sum(parameter.numel() for parameter in model.parameters())
        threads = torch.get_num_threads()
        llama = llama_cpp.Llama(
            str(path), n_ctx=4096, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False
        )

    def generate(ids: Tensor, mask: Tensor, new_tokens: int, clock: Tick) -> None:
        if ids.shape[0] > 1:
            raise ValueError("batches are not compared with llama.cpp")
        llama.reset()
        clock.put()
        tokens = llama.generate(ids[0].tolist(), temp=0.0, top_k=1)
        for _ in range(new_tokens):
            next(tokens)
            clock.put()

    return Loaded(generate, lambda ids: _logits(llama, ids), weight_bytes=size)


def _quantize(source: Path, target: Path, file_type: int) -> None:
    """Write a GGUF file in another type; llama.cpp says on stderr what it does."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = file_type, torch.get_num_threads()
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp does not quantize to its file type {file_type}")


def _logits(llama: Any, ids: Tensor) -> Tensor:
    """Logits [T, vocabulary] of every position of a prompt [1, T]: the bindings alone keep those of the last."""
    import llama_cpp

    tokens = ids[0].tolist()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, at, True
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        code = llama_cpp.llama_decode(llama.ctx, batch)
        if code:
            raise RuntimeError(f"llama.cpp did not take {len(tokens)} tokens: code {code}")
        values = llama_cpp.llama_get_logits(llama.ctx)
        found = torch.frombuffer(ctypes.string_at(values, 4 * len(tokens) * llama.n_vocab()), dtype=torch.float32)
    finally:
        llama_cpp.llama_batch_free(batch)
    return found.view(len(tokens), -1)


def write_gguf(model: Any, path: Path, variant: str) -> None:
    """Write a Llama as GGUF, its matrices in the type `variant` and its vectors in float32."""
    import gguf

    config, rope = model.config, model.config.rope_parameters
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[variant]
    for name, parameter in model.named_parameters():
        values = _interleaved(name, parameter.detach().float(), config.head_dim).numpy()
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.weight"
    layer, _, role = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[role]}.weight"


def _interleaved(name: str, weight: Tensor, head_size: int) -> Tensor:
    """llama.cpp rotates neighbours (0, 1), transformers halves (0, D/2): the rows of queries and keys are reordered."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.view(-1, 2, head_size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _read_weights(model: Any) -> int:
    """Weights that a token reads where the embedding table is not the head: all but that table."""
    table: int = model.get_input_embeddings().weight.numel()
    return int(sum(parameter.numel() for parameter in model.parameters())) - table
