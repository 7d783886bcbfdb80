"""The pace of drafts: it pays or it stops, and it tries again."""

import random
import threading
from itertools import pairwise

import pytest

from hf_accel_patch.ops.pacing import GAIN, LEAST_WAIT, MOST_WAIT, WIDTHS, Guess, Pace, expected

KIND, PRIOR = 64, 0.7


def seconds(tokens, slope):
    """A pass: a fixed cost and one for each token."""
    return 1.0 + slope * (tokens - 1)


def simulate(pace, chance, slope, passes=600, most=16, draft_cost=0.0, seed=0, noise=0.0):
    """Tokens and seconds of so many passes, of a machine and drafts like this, and the widths that were chosen."""
    draw = random.Random(seed)
    tokens = spent = 0.0
    widths = []
    for _ in range(passes):
        width = pace.choose([Guess(KIND, PRIOR, most)], draft_cost)
        widths.append(width)
        took = seconds(1 + width, slope) * (1 + noise * draw.random())
        accepted = 0
        while accepted < width and draw.random() < chance:
            accepted += 1
        if width:
            pace.learn(KIND, PRIOR, width, accepted)
        pace.timed(1 + width, took)
        tokens, spent = tokens + 1 + accepted, spent + took + width * draft_cost
    return tokens, spent, widths


def best_rate(chance, slope, draft_cost=0.0):
    rates = [
        expected(chance, width) / (seconds(1 + width, slope) + width * draft_cost) for width in WIDTHS if width <= 16
    ]
    return max(1.0, *rates)


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.2, 0.6])
@pytest.mark.parametrize("chance", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_it_is_nearly_as_fast_as_the_best_fixed_width(chance, slope, noise):
    tokens, spent, _ = simulate(Pace(), chance, slope, noise=noise)
    best = best_rate(chance, slope) / (1 + noise / 2)
    assert tokens / spent > (0.86 if noise else 0.9) * best


@pytest.mark.parametrize("slope", [1.0, 1.5])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_where_a_token_costs_a_pass_little_is_lost(chance, slope):
    """Nobody can be faster there: a pass over more tokens costs as much as as many passes."""
    pace = Pace()
    simulate(pace, chance, slope, passes=50)
    tokens, spent, widths = simulate(pace, chance, slope, passes=1000)
    assert tokens / spent > 0.97 and sum(width > 0 for width in widths[50:]) < 950 / MOST_WAIT * 4
    assert max(widths[50:]) == 1


def test_drafts_that_are_never_right_stop_and_are_tried_again_ever_more_seldom():
    pace = Pace()
    _, _, widths = simulate(pace, 0.0, 0.05, passes=2000)
    tried = [place for place, width in enumerate(widths) if width]
    late = [place for place in tried if place > 500]
    assert 3 <= len(late) <= 1500 / MOST_WAIT + 2
    assert all(widths[place] == 1 for place in late), "a try is as short as can be"
    gaps = [b - a for a, b in pairwise(late)]
    assert max(gaps) <= MOST_WAIT + 1


def test_drafts_that_become_right_are_taken_up_again():
    pace = Pace()
    simulate(pace, 0.0, 0.05, passes=500)
    tokens, spent, widths = simulate(pace, 1.0, 0.05, passes=2000, seed=1)
    assert tokens / spent > 3 and max(widths[-100:]) >= 8


def test_a_draft_that_costs_as_much_as_it_saves_is_not_made():
    tokens, spent, widths = simulate(Pace(), 0.8, 0.02, passes=1500, draft_cost=0.9)
    assert tokens / spent > 0.97 and sum(width > 0 for width in widths[100:]) < 1400 / LEAST_WAIT
    tokens, spent, _ = simulate(Pace(), 0.95, 0.02, passes=1500, draft_cost=0.25)
    assert tokens / spent > 0.9 * best_rate(0.95, 0.02, 0.25)


@pytest.mark.parametrize("most", [0, 1, 2, 7])
def test_no_more_than_asked_for(most):
    pace = Pace()
    assert pace.choose([Guess(KIND, PRIOR, most)]) == 0, "the cost of a plain pass is not known yet"
    for _ in range(300):
        width = pace.choose([Guess(KIND, 0.99, most)])
        assert 0 <= width <= most
        pace.timed(1 + width, 1.0)
        if width:
            pace.learn(KIND, 0.99, width, width)
    assert pace.choose([Guess(KIND, 0.99, most)]) == max((width for width in WIDTHS if width <= most), default=0)


def test_kinds_of_drafts_are_judged_apart():
    pace = Pace()
    for tokens in (1, 5, 9):
        pace.timed(tokens, seconds(tokens, 0.05))
    for _ in range(100):
        pace.learn(1, 0.5, 4, 0)
        pace.learn(2, 0.5, 4, 4)
    assert pace.choose([Guess(1, 0.5, 8)]) == 0 and pace.choose([Guess(2, 0.5, 8)]) == 8
    assert pace.choose([Guess(3, 0.9, 8)]) > 0 and pace.choose([Guess(4, 0.01, 8)]) == 0, (
        "one that is not known is what its prior says"
    )


def test_costs_between_and_beyond_what_was_timed():
    pace = Pace({1: 1.0, 5: 2.0, 9: 4.0})
    assert [pace.cost(n) for n in (1, 3, 5, 7, 9)] == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert pace.cost(17) == pytest.approx(4.0 + 8 * 3 / 8)
    assert Pace().cost(1) is None and Pace({1: 1.0}).cost(2) is None
    assert Pace({4: 2.0}).cost(1) == 2.0
    assert Pace({1: 5.0, 4: 2.0}).cost(9) == 2.0, "a longer pass is not faster"


def test_a_pass_that_was_held_up_counts_little():
    pace = Pace()
    for _ in range(20):
        pace.timed(1, 1.0)
    pace.timed(1, 1000.0)
    assert pace.costs[1] < 1.1
    late = Pace()
    late.timed(1, 50.0)  # the first of all
    for _ in range(8):
        late.timed(1, 1.0)
    assert late.costs[1] < 1.3


def test_chances_stay_chances():
    pace, draw = Pace(), random.Random(0)
    for _ in range(2000):
        drafted = draw.randrange(1, 17)
        pace.learn(KIND, PRIOR, drafted, draw.randrange(drafted + 1))
        assert 0 <= pace.chances[KIND] <= 1


@pytest.mark.parametrize("chance, width, tokens", [(0.0, 4, 1.0), (1.0, 4, 5.0), (0.5, 1, 1.5), (0.5, 3, 1.875)])
def test_expected_tokens(chance, width, tokens):
    assert expected(chance, width) == pytest.approx(tokens) and GAIN > 1


def test_threads_share_a_pace():
    pace, failures = Pace(), []

    def work(seed):
        draw = random.Random(seed)
        try:
            for _ in range(2000):
                width = pace.choose([Guess(draw.randrange(5), PRIOR, 16)])
                pace.timed(1 + draw.randrange(400), draw.random() + 0.1)
                pace.learn(draw.randrange(5), PRIOR, width, 0)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
