"""Drafts that are held against the text as it comes, against what verifying them would have given."""

import random

import pytest

from hf_accel_patch.ops.ngrams import LONGEST, NGrams
from hf_accel_patch.ops.rehearsing import EXPECTED, Rehearsal


def verified(text, start, most):
    """Passes of a model that says this text from `start` on and verifies every draft, and the tokens each accepts."""
    place, accepted = start, []
    while place < len(text):
        draft, _ = NGrams(text[:place]).draft(text[:place][-LONGEST:], most)
        right = next((i for i, token in enumerate(draft) if text[place + i : place + i + 1] != [token]), len(draft))
        accepted.append(right)
        place += right + 1
    return accepted


@pytest.mark.parametrize("seed", range(6))
def test_a_rehearsal_counts_what_verifying_would_have_accepted(seed):
    draw = random.Random(seed)
    text = [draw.randrange(4) for _ in range(30)]
    for _ in range(8):
        start = draw.randrange(len(text) - 12)
        text += text[start : start + 12] if draw.random() < 0.6 else [draw.randrange(4) for _ in range(6)]
    ngrams, rehearsal, accepted = NGrams(text[:30]), Rehearsal(), []
    rehearsal.start(*ngrams.draft(text[:30][-LONGEST:], 8))
    for token in text[30:]:
        over, right = rehearsal.hear(token), rehearsal.right
        ngrams.extend([token])
        if over:
            accepted.append(right)
            rehearsal.start(*ngrams.draft(ngrams.tokens[-LONGEST:], 8))
    expected = verified(text, 30, 8)
    assert accepted == expected[: len(accepted)] and len(accepted) >= len(expected) - 1
    assert 3 < len(accepted) < len(text) - 30 and any(accepted)


def test_the_rate_is_that_of_the_last_dozen_drafts():
    rehearsal = Rehearsal()
    assert rehearsal.rate == EXPECTED
    for _ in range(12):
        assert rehearsal.hear(1)
    assert 1 < rehearsal.rate < 1.2, "a dozen tokens show that nothing is to be had"
    for _ in range(40):
        rehearsal.start([1, 2, 3], 4)
        assert [rehearsal.hear(token) for token in (1, 2, 3, 9)] == [False, False, False, True]
    assert rehearsal.rate == pytest.approx(4, abs=0.1)


def test_a_long_right_draft_counts_before_it_ends():
    rehearsal = Rehearsal()
    rehearsal.start([7] * 16, 2)
    for _ in range(12):
        assert not rehearsal.hear(7)
    assert rehearsal.rate > 4


def test_trust_falls_where_drafts_are_worse_than_elsewhere():
    rehearsal = Rehearsal()
    assert rehearsal.trust == 1
    for _ in range(12):
        rehearsal.start([1], 2)
        rehearsal.hear(0)
        rehearsal.expected(0.8)
    assert rehearsal.trust < 0.1
    for _ in range(60):
        rehearsal.start([1], 2)
        rehearsal.hear(1)
        rehearsal.expected(0.8)
    assert rehearsal.trust == pytest.approx(1 / 0.8, rel=0.02)
