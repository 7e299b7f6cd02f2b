"""The one way in which a user's mistake is reported."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of the user: one sentence, and a hint that says what to type next (exit code 2)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """The hint for a mistyped name: the near name if there is one, else every valid name."""
    names = sorted(valid)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"valid: {', '.join(names)}" if names else "nothing is registered under this heading"
