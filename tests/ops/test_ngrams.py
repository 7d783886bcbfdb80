"""N-grams against a search through the text, and the bytes of a history."""

import pickle
import random
import threading
import tracemalloc

import pytest

from hf_accel_patch.ops.ngrams import LONGEST, PLACES, TOKEN_BYTES, History, NGrams


def search(text, end, most):
    """What `draft` claims, by looking at every place of the text."""

    def places(length):
        wanted = end[len(end) - length :]
        return [place for place in range(length, len(text)) if text[place - length : place] == wanted]

    if not end or not places(1):
        return [], 0
    considered, length = places(2)[-PLACES:] if len(end) > 1 else [], 1
    place = places(1)[-1]
    if considered:
        longest = range(min(len(end), LONGEST), 1, -1)
        length, place = next((n, max(found)) for n in longest if (found := set(considered) & set(places(n))))
    found = text[place:]
    return [found[i % len(found)] for i in range(most)], length


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("vocabulary", [2, 5, 60])
def test_drafts_equal_a_search(vocabulary, seed):
    """Of the text's own end, and of ends of other texts, after every token."""
    draw = random.Random(seed)
    text, ngrams = [], NGrams()
    for _ in range(120):
        if draw.random() < 0.2 and len(text) > 6:  # repeat a part, so that long n-grams are known
            start = draw.randrange(len(text))
            new = text[start : start + draw.randrange(1, 24)]
        else:
            new = [draw.randrange(vocabulary)]
        text += new
        ngrams.extend(new)
        most = draw.randrange(1, 12)
        other = [draw.randrange(vocabulary) for _ in range(draw.randrange(4))] + text[-draw.randrange(1, 20) :]
        for end in (text[-16:], other[-16:], other[-2:], []):
            assert ngrams.draft(end, most) == search(text, end, most)
    assert ngrams.tokens == text


def test_a_text_that_repeats_itself_goes_on_repeating():
    ngrams = NGrams([7, 8, 9, 7, 8])
    assert ngrams.draft([7, 8], 7) == ([9, 7, 8, 9, 7, 8, 9], 2)
    assert NGrams([4, 4]).draft([4], 3) == ([4, 4, 4], 1)


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3]])
def test_nothing_is_drafted_where_nothing_is_known(text):
    assert NGrams(text).draft(text[-16:], 4) == ([], 0)
    assert History(10**6).draft(text, 4, 0) == ([], 0)


def test_a_history_drops_the_oldest_text_first():
    history = History(25 * TOKEN_BYTES)
    texts = [NGrams([start + i for i in range(10)]) for start in (0, 100, 200)]
    for text in texts:
        history.add(text)
        assert history.bytes <= history.limit
    assert history.draft([3], 2, 0) == ([], 0)
    assert history.draft([103], 2, 0) == ([104, 105], 1)
    assert history.draft([203], 2, 0) == ([204, 205], 1)


def test_a_text_too_long_for_a_history_drives_nothing_out():
    history = History(25 * TOKEN_BYTES)
    history.add(NGrams(range(10)))
    history.add(NGrams(range(100, 200)))
    assert history.draft([3], 2, 0) == ([4, 5], 1) and history.draft([103], 2, 0) == ([], 0)


def test_a_history_answers_with_the_longest_n_gram_of_the_latest_text():
    history = History(10**6)
    for text in ([1, 2, 3, 10], [9, 2, 3, 20], [7, 3, 30], [2, 3, 40]):
        history.add(NGrams(text))
    assert history.draft([1, 2, 3], 1, 0) == ([10], 3)
    assert history.draft([5, 2, 3], 1, 0) == ([40], 2), "the latest of equals"
    assert history.draft([5, 2, 3], 1, 2) == ([], 0), "no longer one than is known already"


def test_the_counted_bytes_are_those_that_it_takes():
    draw = random.Random(0)
    tokens = [draw.randrange(30000) for _ in range(20000)]
    tracemalloc.start()
    ngrams = NGrams(tokens)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.6 < taken / (len(ngrams.tokens) * TOKEN_BYTES) < 1.3


def test_a_draft_from_a_history_ends_with_its_text():
    history = History(10**6)
    for start in (0, 100, 200):
        history.add(NGrams(range(start, start + 5)))
    assert history.draft([101, 102], 6, 0) == ([103, 104] * 3, 2)
    assert history.draft([103, 104], 6, 0) == ([], 0), "what comes next is another text"
    assert history.draft([104, 200], 1, 0) == ([201], 1)


def test_a_look_up_costs_the_same_however_many_texts_there_are(monkeypatch):
    calls, inner = [], NGrams._longest
    monkeypatch.setattr(NGrams, "_longest", lambda self, end: (calls.append(1), inner(self, end))[1])
    history = History(10**7)
    for number in range(2000):
        history.add(NGrams([number, number + 1, number + 2]))
    assert history.draft([1000, 1001], 1, 0) == ([1002], 2) and len(calls) == 2


def test_a_history_keeps_at_least_half_of_what_fits():
    history = History(1000 * TOKEN_BYTES)
    for number in range(300):
        history.add(NGrams(range(10 * number, 10 * number + 10)))
        assert history.bytes <= history.limit and (number < 100 or history.bytes > 0.4 * history.limit)
    assert history.draft([2600], 1, 0) == ([2601], 1) and history.draft([1000], 1, 0) == ([], 0)


def test_a_history_can_be_pickled():
    history = History(10**6)
    history.add(NGrams([1, 2, 3]))
    assert pickle.loads(pickle.dumps(history)).draft([1, 2], 1, 0) == ([3], 2)


def test_threads_share_a_history():
    history, failures = History(300 * TOKEN_BYTES), []

    def work(start):
        try:
            for i in range(300):
                history.add(NGrams(range(start, start + 20)))
                history.draft([start + i % 20, -1], 4, 0)
                history.draft([start + i % 20], 4, 0)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and history.bytes <= history.limit
