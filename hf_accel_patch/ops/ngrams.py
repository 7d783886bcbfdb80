"""What followed the last time: drafts from the text itself (prompt lookup)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

LONGEST = 16  # tokens of an n-gram: longer ones say nothing more
PLACES = 16  # the latest at which the last two tokens occurred, of which the one with the longest n-gram is taken
TOKEN_BYTES = 230  # what the entries of a token take, about: measured, CPython 3.11
BETWEEN = -1  # no token: between texts
ADDING = threading.Lock()  # a history may be pickled, a lock may not


class NGrams:
    """For every pair of tokens, where it occurred. Adding a token and looking up cost the same, however long the text
    is."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._single: dict[int, int] = {}  # where the token occurred last, as the place after it
        self._pair: dict[tuple[int, int], int] = {}
        self._before: list[int] = []  # for each place, the one before it after the same pair, or -1
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add to the end."""
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Add to the end. The place after an n-gram is entered when its next token comes, so a lookup of the end finds
        an earlier one."""
        text, place = self.tokens, len(self.tokens)
        before = text[-2:]
        self._before.append(self._pair.get((before[0], before[1]), -1) if place > 1 else -1)
        text.append(token)  # first: other threads may look it up
        if place > 1:
            self._pair[before[0], before[1]] = place
        if place:
            self._single[before[-1]] = place

    def part(self) -> None:
        """What follows is another text."""
        self._before.append(-1)
        self.tokens.append(BETWEEN)

    def draft(self, end: Sequence[int], most: int) -> tuple[list[int], int]:
        """At most `most` tokens that followed the longest n-gram with which `end` ends, where it occurred last, and the
        length of that n-gram; [] and 0 if there is none."""
        place, length = self._longest(end)
        if not length:
            return [], 0
        draft = self.tokens[place : place + most]
        if BETWEEN in draft:
            del draft[draft.index(BETWEEN) :]
        while len(draft) < most:  # past the end the text repeats what it has been repeating
            draft += draft[: most - len(draft)]
        return draft, length

    def _longest(self, end: Sequence[int]) -> tuple[int, int]:
        text, most = self.tokens, min(len(end), LONGEST)
        place = self._pair.get((end[-2], end[-1]), -1) if most > 1 else -1
        if place < 0:
            place = self._single.get(end[-1], -1) if end else -1
            return place, int(place >= 0)
        best, longest = place, 1
        for _ in range(PLACES):
            length, limit = 2, min(most, place)
            while length < limit and text[place - 1 - length] == end[-1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
                if length == most:
                    break
            place = self._before[place]
            if place < 0:
                break
        return best, longest


class History:
    """Texts of earlier calls, in two halves of `limit` bytes: with the later full, the earlier is dropped. A lookup
    costs the same, however many texts there are."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._halves = NGrams(), NGrams()  # the later first

    def add(self, text: NGrams) -> None:
        """Keep a text that is complete."""
        size = (len(text.tokens) + 1) * TOKEN_BYTES
        if size > self.limit:  # it would drive all others out, and not fit either
            return
        with ADDING:
            later, earlier = self._halves
            if later.tokens and len(later.tokens) * TOKEN_BYTES + size > self.limit // 2:
                later, earlier = NGrams(), later
            if (len(later.tokens) + len(earlier.tokens)) * TOKEN_BYTES + size > self.limit:
                earlier = NGrams()
            self._halves = later, earlier
            later.extend(text.tokens)
            later.part()

    @property
    def bytes(self) -> int:
        """About what it takes."""
        return sum(len(half.tokens) for half in self._halves) * TOKEN_BYTES

    def draft(self, end: Sequence[int], most: int, longer_than: int) -> tuple[list[int], int]:
        """The best draft from a text in which a longer n-gram than this is known; of equals, from the latest."""
        later, earlier = (half.draft(end, most) for half in self._halves)
        best = later if later[1] >= earlier[1] else earlier
        return best if best[1] > longer_than else ([], 0)
