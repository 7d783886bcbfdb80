"""The pace of drafts: it pays or it stops, and it tries again."""

import random
import threading
from itertools import pairwise

import pytest

from hf_accel_patch.ops.pacing import (
    GAIN,
    LEAST_WAIT,
    LENT,
    MOST_KEPT,
    MOST_WAIT,
    STAKE,
    WIDTHS,
    Chance,
    Guess,
    Pace,
    expected,
)

KIND, PRIOR = 64, 0.7


def seconds(tokens, slope):
    """A pass: a fixed cost and one for each token."""
    return 1.0 + slope * (tokens - 1)


def through(tokens, recorded):
    """A pass over so many tokens is one over these."""
    return min((each for each in recorded if each >= tokens), default=tokens) if tokens > 1 else 1


def simulate(pace, chance, slope, passes=600, most=16, draft_cost=0.0, seed=0, noise=0.0, held=0.0, **more):
    """Tokens and seconds of so many passes, of a machine and drafts like this, and the widths that were chosen. `held`:
    of what drafts bring, what never arrives. `slower(number)`: how many times as slow a pass is."""
    slower, rehearsed = more.get("slower", lambda number: 1.0), more.get("rehearsed", False)
    pace.recorded = more.get("recorded", ())
    draw = random.Random(seed)
    tokens = spent = 0.0
    widths = []
    for number in range(passes):
        width = pace.choose([Guess(KIND, PRIOR, most, rehearsed=rehearsed)], draft_cost)
        widths.append(width)
        took = seconds(through(1 + width, pace.recorded), slope) * (1 + noise * draw.random()) * slower(number)
        accepted = 0
        while accepted < width and draw.random() < chance:
            accepted += 1
        new = 1 if draw.random() < held else 1 + accepted
        if width or rehearsed:
            pace.learn(KIND, PRIOR, width or 1, accepted if width else draw.random() < chance)
        if width:
            pace.passed(1 + width, new, took + width * draft_cost, width * draft_cost)
        else:
            pace.timed(took)
        tokens, spent = tokens + new, spent + took + width * draft_cost
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
    assert tokens / spent > 0.86 * best


RECORDED = (2, 4, 8, 16)


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("rehearsed", [False, True])
@pytest.mark.parametrize("slope", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("chance", [0.6, 0.9, 0.99])
def test_drafts_fill_the_passes_that_are_recorded(chance, slope, rehearsed, batch):
    """One over five tokens costs as much as one over eight, so there is one of four or one of eight."""
    options = {"most": 15, "rehearsed": rehearsed, "recorded": RECORDED}
    tokens, spent, widths = simulate(Pace(batch=batch), chance, slope, passes=1500, **options)
    best = max(expected(chance, each - 1) / seconds(each, slope) for each in RECORDED)
    assert tokens / spent > 0.86 * best and {1 + width for width in widths} <= {1, *RECORDED}
    assert sum(widths) > 0


def test_what_is_known_of_a_recorded_pass_holds_for_all_that_go_through_it():
    pace = Pace(plain=1.0, usual=1.0, recorded=RECORDED)
    pace.passed(5, 2, 1.5)
    assert pace.ratios == {8: 1.5} and pace.ratio(6) == pace.ratio(8) == 1.5 and pace.ratio(9) == pace.ratio(16) > 1.5
    assert 1 < pace.ratio(2) < pace.ratio(3) == pace.ratio(4) < 1.5
    pace.passed(17, 2, 1.9)
    assert pace.ratios[17] == 1.9, "there is none as long"


@pytest.mark.parametrize("batch, widths", [(1, (7, 4)), (2, (3, 4)), (3, (1, 4)), (8, (1, 4))])
def test_a_first_draft_that_is_recorded_is_shorter_in_a_batch(batch, widths):
    for recorded, width in zip((RECORDED, ()), widths, strict=True):
        pace = Pace(batch=batch, recorded=recorded)
        pace.timed(1.0)
        assert pace.choose([Guess(1, 0.9, 15)]) == width


def test_a_try_fills_the_shortest_pass_that_is_recorded():
    """Nothing is recorded to see whether a draft is cheap by now, and none is shorter than what it costs."""
    pace = Pace(plain=1.0, usual=1.0, ratios={1: 1.1, 4: 9.0, 8: 9.0}, recorded=RECORDED, purse=100.0)
    for most, width in ((9, 3), (2, 2)):
        tries = [pace.choose([Guess(2, 0.9, most, rehearsed=True)]) for _ in range(80)]
        assert set(tries) == {0, width}


@pytest.mark.parametrize("slope", [1.0, 1.5])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_where_a_token_costs_a_pass_little_is_lost(chance, slope):
    """Nobody can be faster there: a pass over more tokens costs as much as as many passes."""
    pace = Pace()
    simulate(pace, chance, slope, passes=50)
    tokens, spent, widths = simulate(pace, chance, slope, passes=1000)
    assert tokens / spent > 0.97 and sum(width > 0 for width in widths[50:]) < 950 / LEAST_WAIT
    assert sum(width > 1 for width in widths[50:]) < 20


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
        if width:
            pace.passed(1 + width, 1 + width, 1.0)
            pace.learn(KIND, 0.99, width, width)
        else:
            pace.timed(1.0)
    assert pace.choose([Guess(KIND, 0.99, most)]) == max((width for width in WIDTHS if width <= most), default=0)


def ready(slope=0.05):
    """A pace that knows what passes cost."""
    pace = Pace()
    pace.timed(1.0)
    for tokens in (2, 5, 9):
        pace.passed(tokens, tokens, seconds(tokens, slope))
    return pace


def test_kinds_of_drafts_are_judged_apart():
    pace = ready()
    for _ in range(100):
        pace.learn(1, 0.5, 4, 0)
        pace.learn(2, 0.5, 4, 4)
    assert pace.choose([Guess(1, 0.5, 9)]) == 0 and pace.choose([Guess(2, 0.5, 9)]) == 9
    assert pace.choose([Guess(3, 0.9, 9)]) > 0 and pace.choose([Guess(4, 0.01, 9)]) == 0, (
        "one that is not known is what its prior says"
    )


def test_drafts_count_by_the_weight_of_their_sequence():
    """What pays for a batch whose sequences all count does not where the one without a draft holds it up."""
    pace, good, none = ready(0.1), Guess(1, 0.9, 9), Guess(0, 0.0, 0)
    assert pace.choose([good, good, good, none]) > 0
    assert pace.choose([Guess(1, 0.9, 9, weight=0.02)] * 3 + [none]) == 0
    assert pace.choose([Guess(0, 0.0, 0, weight=0.02)] * 3 + [good]) > 0


def test_what_a_text_has_shown_counts():
    pace = ready(0.1)
    assert pace.choose([Guess(1, 0.7, 9)]) > 0
    assert pace.choose([Guess(1, 0.7, 9, rehearsed=True, trust=0.1)]) == 0
    assert pace.choose([Guess(1, 0.1, 9, rehearsed=True, trust=8.0)]) > 0


def test_a_draft_that_starts_right_goes_on_to_be_right():
    """First tokens are right in three of ten drafts, and all that follow: a geometric law would expect far more or far
    less than 0.3 * 8 tokens."""
    chance = Chance(0.5, 0.5)
    for number in range(400):
        chance.learn(8, 8 if number % 10 in (1, 4, 8) else 0)
    assert chance.first == pytest.approx(0.3, abs=0.1) and chance.more > 0.97


@pytest.mark.parametrize("rehearsed", [False, True])
@pytest.mark.parametrize("slope", [0.05, 0.3])
@pytest.mark.parametrize("chance", [0.5, 0.9])
def test_drafts_that_bring_less_than_they_seem_to_cannot_lose_more_than_their_stake(chance, slope, rehearsed):
    """They are accepted, but the batch gets no further, as where another sequence holds it up all the time."""
    tokens, spent, widths = simulate(Pace(), chance, slope, passes=2000, held=1.0, rehearsed=rehearsed)
    assert sum(map(bool, widths)) > 3, "nothing was tried"
    most = max(seconds(1 + width, slope) for width in widths)
    assert spent - tokens <= LENT + STAKE * tokens + most * (8 if rehearsed else 1)


@pytest.mark.parametrize("rehearsed", [False, True])
@pytest.mark.parametrize("start, end, times", [(0, 1, 50), (0, 5, 4), (1, 2, 50), (3, 40, 4), (20, 60, 3), (0, 300, 3)])
@pytest.mark.parametrize("chance, slope", [(0.6, 0.1), (0.8, 0.2), (0.9, 0.05), (0.9, 0.1)])
def test_what_was_timed_on_a_busy_machine_is_forgotten(chance, slope, start, end, times, rehearsed):
    pace, options = Pace(), {"noise": 0.1, "rehearsed": rehearsed}
    simulate(pace, chance, slope, passes=500, slower=lambda number: times if start <= number < end else 1.0, **options)
    tokens, spent, _ = simulate(pace, chance, slope, passes=1500, seed=1, **options)
    assert tokens / spent > 0.87 * best_rate(chance, slope) / 1.05


def test_where_drafts_always_pay_plain_steps_and_longer_drafts_are_timed_now_and_then():
    pace = ready(0.2)
    _, _, widths = simulate(pace, 0.7, 0.2, passes=1000)
    late = widths[300:]
    usual = max(set(late), key=late.count)
    assert 0 < late.count(0) <= len(late) / MOST_WAIT and usual > 0
    assert 0 < sum(width > usual for width in late) < len(late) / 4


@pytest.mark.parametrize("first", [10.0, 100.0, 1000.0])
def test_the_first_tokens_of_a_model_that_drafts_may_take_long(first):
    """It reads the whole prompt with them. That says little about the next."""
    pace, drafts = Pace(), 0
    for number in range(600):
        width = pace.choose([Guess(0, 0.8, 8)], pace.draft_cost)
        if not width:
            pace.timed(1.0)
            continue
        took = first if drafts % 100 == 0 else 0.1 * width  # and again in each call
        drafts += 1
        pace.drafted(width, took)
        pace.learn(0, 0.8, width, width)
        pace.passed(1 + width, 1 + width, took + seconds(1 + width, 0.05), took)
        assert number < 300 or pace.draft_cost < 0.2
    assert drafts > 500


def test_a_model_whose_tokens_are_dear_soon_drafts_no_more():
    pace, drafts = Pace(), 0
    for _ in range(1000):
        width = pace.choose([Guess(0, 0.8, 8)], pace.draft_cost)
        if width:
            drafts += 1
            pace.drafted(width, 3.0 * width)
            pace.learn(0, 0.8, width, width)
            pace.passed(1 + width, 1 + width, 3.0 * width + seconds(1 + width, 0.05), 3.0 * width)
        else:
            pace.timed(1.0)
    assert 2 <= drafts <= 12


@pytest.mark.parametrize("tick", [0.0, -1.0])
@pytest.mark.parametrize("known", [False, True])
def test_a_clock_that_stands_still_divides_nothing_by_zero(tick, known):
    pace = ready() if known else Pace()
    for number in range(200):
        width = pace.choose([Guess(1, 0.9, 9)], pace.draft_cost)
        if width:
            pace.drafted(width, tick)
            pace.learn(1, 0.9, width, number % 2)
            pace.passed(1 + width, 2, tick, tick)
        else:
            pace.timed(tick)
    pace.passed(1, 1, tick)
    assert pace.plain > 0 and pace.usual > 0 and pace.ratio(2) > 0


def test_what_was_won_is_not_staked_for_long():
    """After good times bad ones lose little."""
    pace = Pace()
    simulate(pace, 0.95, 0.05, passes=500)
    assert pace.purse == pytest.approx(MOST_KEPT, rel=0.1)
    tokens, spent, _ = simulate(pace, 0.95, 0.05, passes=1000, held=1.0)
    assert spent - tokens <= MOST_KEPT + STAKE * tokens + LENT


def test_an_empty_purse_is_filled_by_what_rehearsals_show():
    """Soon where they show that much is to be won, slowly where little, and never for drafts that are not rehearsed."""

    def steps(chance, *, rehearsed):
        pace = ready(0.1)
        pace.purse = -1.0
        for step in range(400):
            if pace.choose([Guess(1, chance, 9, rehearsed=rehearsed)]):
                return step
        return None

    assert steps(0.9, rehearsed=True) < 20 < 80 < steps(0.4, rehearsed=True)
    assert steps(0.9, rehearsed=False) is None


def test_rehearsed_drafts_are_not_tried_but_where_their_cost_may_have_been_misjudged():
    pace = ready(0.1)
    for _ in range(100):
        pace.learn(1, 0.5, 4, 0)
        pace.learn(2, 0.9, 4, 4)
    assert not any(pace.choose([Guess(1, 0.5, 9, rehearsed=True)]) for _ in range(300))
    pace.ratios.update({2: 9.0, 5: 9.0, 9: 9.0})
    pace.purse = 100.0
    tries = [pace.choose([Guess(2, 0.9, 9, rehearsed=True)]) for _ in range(300)]
    assert 3 <= sum(tries) <= 8 and max(tries) == 1


def test_costs_between_and_beyond_what_was_timed():
    pace = Pace(1.0, ratios={5: 2.0, 9: 4.0})
    assert [pace.ratio(n) for n in (3, 5, 7, 9)] == [1.5, 2.0, 3.0, 4.0]
    assert pace.ratio(17) == pytest.approx(4.0 + 8 * 3 / 8)
    assert Pace().ratio(2) is None and Pace(1.0, ratios={1: 1.2}).ratio(2) is None
    assert Pace(1.0, ratios={1: 1.2, 3: 1.4}).ratio(2) == pytest.approx(1.3)
    assert Pace(5.0, ratios={4: 0.4}).ratio(9) == 0.4, "a longer pass is not faster"


def test_costs_are_compared_with_plain_steps_of_their_time():
    """A machine that becomes three times as slow, or a text that becomes long, changes nothing."""
    pace = ready(0.1)
    before = pace.ratio(9)
    for _ in range(100):
        pace.timed(3.0)
    for _ in range(3):
        pace.passed(9, 9, 3 * seconds(9, 0.1))
    assert pace.ratio(9) == pytest.approx(before, rel=0.1)


def test_a_pass_that_was_held_up_counts_little():
    pace = Pace()
    for _ in range(20):
        pace.timed(1.0)
    purse = pace.purse
    pace.timed(1000.0)
    assert pace.plain < 1.1 and pace.usual < 1.1
    for _ in range(20):
        pace.passed(2, 2, 1.2)
    purse = pace.purse
    pace.passed(2, 2, 1000.0)
    assert pace.ratios[2] < 1.4 and pace.purse > purse - 3
    late = Pace()
    late.timed(50.0)  # the first of all
    for _ in range(8):
        late.timed(1.0)
    assert late.plain < 1.3


def test_chances_stay_chances():
    pace, draw = Pace(), random.Random(0)
    for _ in range(2000):
        drafted = draw.randrange(1, 17)
        pace.learn(KIND, PRIOR, drafted, draw.randrange(drafted + 1))
        assert 0 <= pace.chances[KIND].first <= 1 and 0 <= pace.chances[KIND].more <= 1


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
                pace.timed(draw.random() + 0.1)
                pace.passed(2 + draw.randrange(400), 2, draw.random() + 0.1)
                pace.learn(draw.randrange(5), PRIOR, width, 0)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
