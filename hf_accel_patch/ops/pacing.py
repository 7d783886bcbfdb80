"""How many tokens to draft: as many as pay, by what passes have cost and what drafts have been worth so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # drafted tokens that are considered
FORGET = 0.05  # the weight of a new observation
GAIN = 1.03  # expected at least, or nothing is drafted
LEAST_WAIT, MOST_WAIT = 4, 64  # drafts that are let go by before one that does not seem to pay is tried anew


@dataclass(frozen=True)
class Guess:
    """A draft that is to be had for one sequence: how it was found, how often such tokens are right before that is
    known, at most how many tokens there are, and what a token of this sequence counts."""

    kind: int
    prior: float
    most: int
    weight: float = 1.0


@dataclass
class Pace:
    """What one model does on this machine. Costs are seconds, by the tokens of a pass; chances that a drafted token is
    right, given that those before it were, by how the draft was found."""

    costs: dict[int, float] = field(default_factory=dict)
    chances: dict[int, float] = field(default_factory=dict)
    draft_cost: float = 0.0  # seconds per token that a model drafted
    waits: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, int] = field(default_factory=dict)
    hopeless: set[int] = field(default_factory=set)  # kinds that would not pay if they were always right
    held_up: bool = False  # whether the pass that is timed next has done more than passes of its kind do

    def choose(self, guesses: Sequence[Guess], draft_cost: float = 0.0) -> int:
        """How many tokens to draft, of those that are to be had for each sequence, for `draft_cost` seconds each, and
        verify; 0 where a plain pass is the better choice."""
        plain, most = self.cost(1), max(guess.most for guess in guesses)
        if plain is None or not most:
            return 0
        chances = [self.chances.get(guess.kind, guess.prior) for guess in guesses]
        weights = sum(guess.weight for guess in guesses)
        best, choice, right = GAIN * weights / plain, 0, 0.0
        for width in WIDTHS:
            if width > most:
                break
            cost = self.cost(1 + width)
            if cost is None:  # the first time
                return min(most, 4)
            cost += width * draft_cost
            tokens = certain = 0.0
            for guess, chance in zip(guesses, chances, strict=True):
                tokens += guess.weight * expected(chance, min(width, guess.most))
                certain += guess.weight * expected(1, min(width, guess.most))
            right = max(right, certain / cost)
            if tokens / cost > best:
                best, choice = tokens / cost, width
        kind = max(zip(chances, guesses, strict=True), key=lambda pair: (pair[1].most > 0, pair[0]))[1].kind
        if choice:
            self.skipped[kind] = 0
            self.hopeless.discard(kind)
            return choice
        (self.hopeless.discard if right > best else self.hopeless.add)(kind)
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        wait = self.waits.setdefault(kind, LEAST_WAIT)
        if self.skipped[kind] >= wait:
            self.skipped[kind], self.waits[kind] = 0, min(2 * wait, MOST_WAIT)
            return 1
        return 0

    def learn(self, kind: int, prior: float, drafted: int, accepted: int) -> None:
        """After a pass: `accepted` of the tokens drafted were right."""
        chance = self.chances.get(kind, prior)
        for _ in range(accepted):
            chance += FORGET * (1 - chance)
        if accepted < drafted:
            chance -= FORGET * chance
        if accepted and kind not in self.hopeless:
            self.waits[kind] = LEAST_WAIT
        self.chances[kind] = chance

    def drafted(self, tokens: int, seconds: float) -> None:
        """A model drafted so many tokens in so long."""
        each = seconds / tokens
        known = self.draft_cost or each
        self.draft_cost = known + (0.5 if each < known else FORGET) * (min(each, 2 * known) - known)

    def timed(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens per sequence took so long. One that was held up counts little, one that was not at
        once: the first of all is often held up. One that was `held_up` for a known reason does not count."""
        if self.held_up:
            self.held_up = False
            return
        known = self.costs.get(tokens, seconds)
        share = 0.5 if seconds < known else FORGET
        self.costs[tokens] = known + share * (min(seconds, 2 * known) - known)

    def cost(self, tokens: int) -> float | None:
        """Seconds of a pass, between those that were timed; beyond them in proportion to the tokens, at most."""
        if tokens in self.costs:
            return self.costs[tokens]
        timed = tuple(self.costs)  # other threads may add to it
        below = max((known for known in timed if known < tokens), default=None)
        above = min((known for known in timed if known > tokens), default=None)
        if below is not None and above is not None:
            share = (tokens - below) / (above - below)
            return self.costs[below] + share * (self.costs[above] - self.costs[below])
        if below is not None:
            return self._beyond(tokens, below)
        return None if above is None else self.costs[above]

    def _beyond(self, tokens: int, below: int) -> float | None:
        if below == 1:
            return None
        least = min(tuple(self.costs))
        slope = max(0.0, (self.costs[below] - self.costs[least]) / (below - least)) if below > least else 0.0
        return self.costs[below] + slope * (tokens - below)


def expected(chance: float, width: int) -> float:
    """Tokens of a pass over a draft of `width` tokens (arXiv 2211.17192, equation 1)."""
    return width + 1.0 if chance >= 1 else (1 - chance ** (width + 1)) / (1 - chance)
