"""What drafts would have brought, had they been verified: known once the text has gone on, and so for nothing."""

from __future__ import annotations

KEPT = 11 / 12  # of what is known of a text, at each draft: a dozen of them count
EXPECTED = 1.5  # tokens per pass, before a text has said otherwise
TRUST = 2.0  # passes that this is worth


class Rehearsal:
    """One sequence. A draft is held against the tokens that come; with the one that ends it begins the next."""

    def __init__(self) -> None:
        self.draft: list[int] = []
        self.length = 0  # of the n-gram that it followed
        self.right = 0  # tokens of the draft that have come so far
        self._tokens, self._passes = TRUST * EXPECTED, TRUST
        self._begun, self._hoped = 1.0, 1.0  # drafts whose first token was right, and that should have been

    def start(self, draft: list[int], length: int) -> None:
        """What follows is drafted to be this."""
        self.draft, self.length, self.right = draft, length, 0

    def hear(self, token: int) -> bool:
        """The next token is this one. Whether that ends the draft: a wrong token does, and one beyond it."""
        right = self.right
        if right < len(self.draft) and self.draft[right] == token:
            self.right = right + 1
            return False
        self._tokens = KEPT * self._tokens + right + 1
        self._passes = KEPT * self._passes + 1
        return True

    def expected(self, chance: float) -> None:
        """The draft that has ended was expected to begin with a right token with this chance."""
        self._begun = KEPT * self._begun + (self.right > 0)
        self._hoped = KEPT * self._hoped + chance

    @property
    def rate(self) -> float:
        """Tokens per pass in this text lately, if every draft were verified."""
        if self.right:  # as if the next token ended it
            return (KEPT * self._tokens + self.right + 1) / (KEPT * self._passes + 1)
        return self._tokens / self._passes

    @property
    def trust(self) -> float:
        """How many times as often as in other texts drafts are right in this one."""
        return self._begun / self._hoped
