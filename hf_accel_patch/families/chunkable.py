"""Model types whose prompt can be read in chunks: the logits of the last token, and those after it, are those of the
whole prompt at once, padded or not, up to rounding. `tests/test_chunkable.py` compares both for every causal LM type.

One that is not named here does not go on from the recurrent states of a chunk, chooses keys by blocks that chunks cut,
sees later tokens, or has no cache that grows.
"""

from __future__ import annotations

from hf_accel_patch.compat import GOES_ON

ATTENTION = """
afmoe apertus arcee aria_text axk1 bart beam bert bert-generation bigbird_pegasus biogpt bitnet blenderbot
blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm data2vec-text dbrx
deepseek_v2 deepseek_v3 deepseek_v4 diffllama doge dots1 electra emu3_text_model ernie ernie4_5 ernie4_5_moe exaone4
exaone_moe falcon flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text
gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite got_ocr2 gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text
hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama
llama4_text longcat_flash marian mbart mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral
ministral3 mistral mixtral mllama_text_model modernbert-decoder moss_transcribe_diarize mpt mvp nanochat nemotron
olmo olmo2 olmo3 olmoe opt pegasus persimmon phi phi3 phi4_multimodal phimoe plbart qwen2 qwen2_moe qwen3 qwen3_moe
roberta roberta-prelayernorm roc_bert seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm
xlm-roberta xlm-roberta-xl xmod youtu
"""

# Beside attention they have recurrent states or convolutions
RECURRENT = """
bailing_hybrid bamba falcon_h1 granitemoehybrid inkling2_text inkling_text kimi_linear lfm2 lfm2_moe lfm3 nemotron_h
olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text zamba2 zaya
"""

CHUNKABLE = frozenset([*ATTENTION.split(), *(RECURRENT.split() if GOES_ON else ())])
