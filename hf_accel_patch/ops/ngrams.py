"""What followed the last time: drafts from the text itself (prompt lookup)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

LENGTHS = (16, 12, 8, 6, 4, 3, 2, 1)  # of the n-grams that are looked up, the longest first
TOKEN_BYTES = 970  # what the entries of a token take, about: measured, CPython 3.11


class NGrams:
    """For every n-gram of a few lengths, where it occurred last. Adding a token and looking up cost the same, however
    long the text is."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._after: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in LENGTHS}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add to the end. The place after an n-gram is entered when its next token comes, so a lookup of the end finds
        an earlier one."""
        text = self.tokens
        for token in tokens:
            place = len(text)
            for length, after in self._after.items():
                if place >= length:
                    after[tuple(text[place - length :])] = place
            text.append(token)

    def draft(self, end: Sequence[int], most: int) -> tuple[list[int], int]:
        """At most `most` tokens that followed the longest n-gram with which `end` ends, where it occurred last, and the
        length of that n-gram; [] and 0 if there is none."""
        for length, after in self._after.items():
            if length <= len(end):
                place = after.get(tuple(end[len(end) - length :]))
                if place is not None:
                    draft = self.tokens[place : place + most]
                    while len(draft) < most:  # past the end the text repeats what it has been repeating
                        draft += draft[: most - len(draft)]
                    return draft, length
        return [], 0


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
            if best[1] == LENGTHS[0]:
                break
        return best if best[0] else ([], 0)
