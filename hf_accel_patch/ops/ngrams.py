"""What followed the last time: drafts from the text itself (prompt lookup)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

LONGEST = 16  # tokens of an n-gram: longer ones say nothing more
PLACES = 16  # the latest at which the last two tokens occurred, of which the one with the longest n-gram is taken
TOKEN_BYTES = 170  # what the entries of a token take, about: measured, CPython 3.11


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
        text = self.tokens
        place = len(text)
        if place > 1:
            last = text[-1]
            both = (text[-2], last)
            self._before.append(self._pair.get(both, -1))
            self._pair[both] = self._single[last] = place
        else:
            self._before.append(-1)
            if place:
                self._single[text[-1]] = place
        text.append(token)

    def draft(self, end: Sequence[int], most: int) -> tuple[list[int], int]:
        """At most `most` tokens that followed the longest n-gram with which `end` ends, where it occurred last, and the
        length of that n-gram; [] and 0 if there is none."""
        place, length = self._longest(end)
        if not length:
            return [], 0
        draft = self.tokens[place : place + most]
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
    """Texts of earlier calls, the oldest dropped beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._texts: deque[NGrams] = deque()

    def add(self, text: NGrams) -> None:
        """Keep a text that is complete."""
        if len(text.tokens) * TOKEN_BYTES > self.limit:  # it would drive all others out, and not fit either
            return
        self._texts.append(text)
        while self.bytes > self.limit:
            self._texts.popleft()

    @property
    def bytes(self) -> int:
        """About what it takes."""
        return sum(len(each.tokens) for each in tuple(self._texts)) * TOKEN_BYTES

    def draft(self, end: Sequence[int], most: int, longer_than: int) -> tuple[list[int], int]:
        """The best draft from a text in which a longer n-gram than this is known; the latest text first."""
        best: tuple[list[int], int] = ([], longer_than)
        for text in reversed(tuple(self._texts)):  # other threads may add to it
            found = text.draft(end, most)
            if found[1] > best[1]:
                best = found
            if best[1] == LONGEST:
                break
        return best if best[0] else ([], 0)
