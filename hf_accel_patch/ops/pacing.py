"""How many tokens to draft: as many as pay, by what passes have cost and what drafts have been worth so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTHS = (1, 2, 3, 4, 5, 7, 9, 11, 15, 19, 23, 31)  # drafted tokens that are considered
FORGET = 0.05  # the weight of a new observation
GAIN = 1.03  # expected at least, or nothing is drafted
FIRST_WIDTH, FIRST_GAIN = 4, 1.3  # of the draft by which the cost of a longer pass becomes known; tokens it is to bring
FIRST_TOKENS = 8  # of all sequences, of that pass, where it is recorded
COST = -1  # in the place of a kind: what tries of rehearsed drafts are about
TRIED_GAIN = 1.3  # tokens that a rehearsed draft is to bring, or it is not tried where it does not seem to pay
LEAST_WAIT, MOST_WAIT = 4, 64  # drafts that are let go by before one that does not seem to pay is tried anew
STAKE = 0.01  # of the time of plain steps: what drafts may lose in all
SHOWN = 0.05  # of a plain step, for a rehearsed draft that is twice as fast: what goes into an empty purse
MOST_DEAR = 2.0  # plain steps: what a drafted token is taken to cost at most; none that costs as much pays
FIRST_DEAR = 0.5  # the same for the first, which is held up by much
LEAST_S = 1e-9  # seconds: of a step whose clock stands still
LENT, MOST_KEPT = 4.0, 8.0  # plain steps: what they may lose at first, or owe, and of what they have won


@dataclass
class Guess:
    """A draft that is to be had for one sequence: how it was found, how often such tokens are right before that is
    known, at most how many tokens there are, what a token of this sequence counts, whether what drafts of its kind are
    worth becomes known without a try, and how many times as often as elsewhere they were right in this text."""

    kind: int
    prior: float
    most: int
    weight: float = 1.0
    rehearsed: bool = False
    trust: float = 1.0


@dataclass
class Chance:
    """That the first token of a draft is right, and that a further one is, given that those before it were: where a
    text repeats itself it goes on doing so, so the second is mostly larger. And how often either was seen."""

    first: float
    more: float
    seen: int = 0
    seen_more: int = 0

    def learn(self, drafted: int, accepted: int) -> None:
        """`accepted` of the tokens drafted were right."""
        self.seen += 1
        share = max(FORGET, 1 / (self.seen + 2))
        self.first += share * ((accepted > 0) - self.first)
        for _ in range(accepted - 1):
            self._learn_more(1)
        if 0 < accepted < drafted:
            self._learn_more(0)

    def _learn_more(self, right: int) -> None:
        self.seen_more += 1
        self.more += max(FORGET, 1 / (self.seen_more + 2)) * (right - self.more)


@dataclass
class Pace:
    """What one model does on this machine. `plain` and `usual`: seconds of a step over one token per sequence, all that
    it does beside the pass included, where nothing holds it up and on average; `ratios`: of steps over more, to that, 1
    meaning one token of sequences that are not at the same place; `chances`: by how a draft was found.

    All that drafts lose comes out of `purse`, and all that they win goes there; where it is empty nothing is drafted.
    So whatever is expected of them, they cannot cost more than a share of the time. A text in which rehearsals show
    that drafts would be much faster fills it again, by ever less as long as nothing is won.

    Where drafts always pay there is now and then a plain step or a longer draft: what they cost may have changed, or
    may have been timed while something else held up the machine.

    `batch`: sequences. `recorded`: for how many tokens there are recorded passes; one over another number costs as much
    as the next of these, through which it goes."""

    plain: float | None = None
    usual: float = 0.0
    steps: int = 0  # plain ones
    ratios: dict[int, float] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)  # that each was seen; 0: drafts of a model
    chances: dict[int, Chance] = field(default_factory=dict)
    draft_cost: float = 0.0  # seconds per token that a model drafted
    waits: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, int] = field(default_factory=dict)
    purse: float = 0.0  # plain steps
    shown: float = SHOWN
    drafts: int = 0  # since what passes cost was last looked at anew
    renewal: int = LEAST_WAIT  # drafts until that is done again
    longer: bool = False  # whether that was by a longer draft
    held_up: bool = False  # whether the step that is timed next has done more than steps of its kind do
    batch: int = 1
    recorded: tuple[int, ...] = ()

    def choose(self, guesses: Sequence[Guess], draft_cost: float = 0.0) -> int:
        """How many tokens to draft, of those that are to be had for each sequence, for `draft_cost` seconds each, and
        verify; 0 where a plain pass is the better choice."""
        most, weights = max(guess.most for guess in guesses), sum(guess.weight for guess in guesses)
        if self.plain is None or not most or not weights:
            return 0
        terms = [self._term(guess, weights) for guess in guesses if guess.most and guess.weight]
        best, choice, tokens, draft_ratio = GAIN, 0, 1.0, min(draft_cost / self.plain, MOST_DEAR)
        for width in range(1, min(most, WIDTHS[-1]) + 1):
            for term in terms:
                if width <= term[2]:
                    tokens += term[0]
                    term[0] *= term[1]
            if width not in WIDTHS and width != most:
                continue
            ratio = self.ratio(1 + width)
            if ratio is None:  # the first time
                if width < min(most, self._first()):
                    continue
                best = tokens / (1 + width * draft_ratio)
                choice = width if best > FIRST_GAIN else 0
                break
            worth = tokens / (ratio + width * draft_ratio)
            if worth > best:
                best, choice = worth, width
        kind, rehearsed = self._leading(guesses)
        if self.purse <= 0:
            if choice and rehearsed:
                self.purse += self.shown * (best - 1) ** 2
                self.shown /= 2 if self.purse > 0 else 1
            return 0
        about = COST if rehearsed else kind
        if choice:
            self.skipped[about] = 0
            return self._renewed(choice, most)
        if rehearsed and (tokens < TRIED_GAIN or not self.ratios):
            return 0
        width = min(most, self._shortest()) if rehearsed else 1
        return width if self._tries(about, width, draft_ratio) else 0

    def learn(self, kind: int, prior: float, drafted: int, accepted: int) -> None:
        """`accepted` of the tokens drafted were right."""
        self.chance(kind, prior).learn(drafted, accepted)
        if accepted and self.skipped.get(kind) == 0:  # this try, or no try at all
            self.waits[kind] = LEAST_WAIT

    def chance(self, kind: int, prior: float) -> Chance:
        """Of the tokens of drafts of this kind."""
        found = self.chances.get(kind)
        if found is None:
            found = self.chances[kind] = Chance(prior, prior)
        return found

    def drafted(self, tokens: int, seconds: float) -> None:
        """A model drafted so many tokens in so long."""
        cost, times = max(seconds, LEAST_S) / tokens, self.times.get(0, 0) + 1
        if times == 1 and self.plain is not None:
            cost = min(cost, FIRST_DEAR * self.plain)
        self.draft_cost, self.times[0] = _nearer(self.draft_cost or None, cost, 1 / times), times

    def timed(self, seconds: float) -> None:
        """A plain step took so long. One that was `held_up` for a known reason does not count."""
        if self.held_up:
            self.held_up = False
            return
        seconds = max(seconds, LEAST_S)
        if self.plain is None:
            self.usual, self.purse = seconds, LENT
        self.plain, self.steps = _nearer(self.plain, seconds), self.steps + 1
        self.usual += max(FORGET, 1 / self.steps) * (min(seconds, 2 * self.usual) - self.usual)
        self.usual = min(self.usual, 2 * self.plain)
        self.purse = min(self.purse + STAKE, MOST_KEPT)

    def passed(self, tokens: int, new: int, seconds: float, drafting: float = 0.0) -> None:
        """Another step, over so many tokens per sequence, gave each `new` ones and took so long, `drafting` of it to
        draft them. One that was `held_up` for a known reason does not count."""
        if self.held_up:
            self.held_up = False
            return
        if self.plain is None:
            if tokens == 1:  # the nearest to a plain step that there has been
                self.timed(seconds)
            return
        pass_s = max(seconds - drafting, LEAST_S)
        if tokens == 1 and pass_s < self.plain:  # no less than a plain step
            self.plain = _nearer(self.plain, pass_s)
        known = self.draft_cost * (tokens - 1) / self.usual if drafting else 0.0
        tokens = self._through(tokens)
        first, alone = tokens not in self.ratios, not self.ratios.keys() - {1}  # the very first is held up by much
        ratio = pass_s / self.plain
        times = self.times[tokens] = self.times.get(tokens, 0) + 1
        self.ratios[tokens] = min(ratio, 2.0) if first else _nearer(self.ratios[tokens], ratio, 1 / times)
        lost = min(seconds / self.usual, 2 * (known + self.ratios[tokens])) - new
        self.purse = min(max(self.purse - (min(lost, 1.0) if alone else lost), -LENT), MOST_KEPT)
        if lost < 0:
            self.waits[COST], self.shown = LEAST_WAIT, SHOWN

    def ratio(self, tokens: int) -> float | None:
        """What a pass costs, in passes over one token: between those that were timed; beyond them in proportion to the
        tokens, at most."""
        tokens = self._through(tokens)
        if tokens in self.ratios:
            return self.ratios[tokens]
        timed = tuple(self.ratios)  # other threads may add to it
        if not timed:
            return None
        below = max((known for known in timed if known < tokens), default=1)
        above = min((known for known in timed if known > tokens), default=None)
        start = self.ratios.get(below, 1.0)
        if above is None:
            return None if below == 1 else start + max(0.0, (start - 1) / (below - 1)) * (tokens - below)
        return start + (tokens - below) / (above - below) * (self.ratios[above] - start)

    def _through(self, tokens: int) -> int:
        """How many tokens the recorded pass has through which so many go."""
        return min((each for each in self.recorded if each >= tokens > 1), default=tokens)

    def _first(self) -> int:
        """Tokens of the first draft. One that is to be recorded is shorter in a batch, in which a pass sooner computes
        more than it reads; where none is, Python takes most of the time, whatever there is to compute."""
        if not self.recorded:
            return FIRST_WIDTH
        return self._through(max(2, FIRST_TOKENS // self.batch)) - 1

    def _shortest(self) -> int:
        """Tokens of the draft by which it is cheapest to see what drafts cost: as many as fill the shortest of the
        passes that were recorded already, else one."""
        return min((each - 1 for each in tuple(self.ratios) if each in self.recorded), default=1)

    def _term(self, guess: Guess, weights: float) -> list[float]:
        """What the first token of a draft is worth; of what it is worth, each further one; and how many there are."""
        chance = self.chances.get(guess.kind)
        first, more = (guess.prior, guess.prior) if chance is None else (chance.first, chance.more)
        return [min(1.0, first * guess.trust) * guess.weight / weights, more, guess.most]

    def _leading(self, guesses: Sequence[Guess]) -> tuple[int, bool]:
        """How the most promising draft was found, and whether that is rehearsed."""
        leading = max(guesses, key=lambda guess: self._term(guess, 1)[0] if guess.most else -1.0)
        return leading.kind, leading.rehearsed

    def _renewed(self, choice: int, most: int) -> int:
        """What was chosen, or now and then nothing or a longer draft, to learn what these cost now."""
        self.drafts += 1
        if self.drafts < self.renewal:
            return choice
        self.drafts, self.renewal, self.longer = 0, min(2 * self.renewal, MOST_WAIT), not self.longer
        wider = next((width for width in WIDTHS if self._through(1 + choice) <= width <= most), choice)
        return min(most, self._through(1 + wider) - 1) if self.longer else 0

    def _tries(self, kind: int, width: int, draft_ratio: float) -> bool:
        """Whether it is time for a try, as short as can be: ever more seldom, and never for more than there is."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        wait, loss = self.waits.setdefault(kind, LEAST_WAIT), (self.ratio(1 + width) or 2.0) + draft_ratio - 1
        if self.skipped[kind] < wait or loss > self.purse:
            return False
        self.skipped[kind], self.waits[kind] = 0, min(2 * wait, MOST_WAIT)
        return True


def expected(chance: float, width: int) -> float:
    """Tokens of a pass over a draft of `width` tokens (arXiv 2211.17192, equation 1)."""
    return width + 1.0 if chance >= 1 else (1 - chance ** (width + 1)) / (1 - chance)


def _nearer(known: float | None, seen: float, least: float = FORGET) -> float:
    """An average in which what was held up counts little, and what was not, at once: the first of all is often held
    up."""
    if known is None:
        return seen
    share = 0.5 if seen < known else max(FORGET, least)
    return known + share * (min(seen, 2 * known) - known)
