"""What the tests cannot ask of older transformers, in one place: what those lack, and their own faults."""

from __future__ import annotations

import re

import pytest

from hf_accel_patch.compat import RECORDS_PAST

BEFORE_5_15 = {  # a pattern of the ids of tests: why they are skipped
    r"test_speculative\.py::test_(tokens|sampled|drafts_from|a_copy|another_model)\w*\[(mistral|gemma2|gpt_oss)": (
        "a sliding window takes back no tokens"
    ),
    r"test_(streaming|dynamic|rope|self_extend)\.py::.*deepseek_v3": "it caches what latents expand to",
    r"test_rope\.py::.*(gemma3_text-(trained|own|yarn)|yarn:4-gemma3)": "yarn by type of layer is refused",
    r"lookup|everything_that_generates|generation_with_quantized_caches": "drafts from the prompt need an end token",
}


def skip_what_is_lacking(items: list[pytest.Item]) -> None:
    """Mark tests that this transformers cannot pass."""
    for pattern, reason in () if RECORDS_PAST else BEFORE_5_15.items():
        for item in items:
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=f"before transformers 5.15: {reason}"))
