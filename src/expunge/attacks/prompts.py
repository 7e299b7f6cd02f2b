"""What attacks on prompts share: draws that depend on the row alone, and the test for prompts that tell the answer."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from expunge.data.example import Example
from expunge.data.registry import RowError
from expunge.data.spans import entity_spans
from expunge.data.template import needs_space


def drawing(seed: int, *about: object) -> random.Random:
    """A generator that is the same for the same seed and row in every process."""
    text = ":".join(map(str, (seed, *about)))
    return random.Random(hashlib.sha256(text.encode()).digest())


@lru_cache(maxsize=65536)
def normalised(text: str) -> str:
    """` words between single spaces `: case, punctuation and width folded; a letter of an unspaced script is a word."""
    words: list[str] = []
    open_word = False
    for char in unicodedata.normalize("NFKC", text).casefold():
        category = unicodedata.category(char)
        if category == "Cf":  # joiners inside words
            continue
        if category[0] not in "LMN":
            open_word = False
            continue
        alone = category[0] != "M" and not needs_space(char, "a")
        if words and (category[0] == "M" or (open_word and not alone)):
            words[-1] += char
        else:
            words.append(char)
        open_word = not alone
    return f" {' '.join(words)} "


def prompt_text(example: Example) -> str:
    """All that is asked: the turns before, and the prompt."""
    return "\n".join([*(content for _, content in example.turns), example.prompt])


@lru_cache(maxsize=4096)
def _entities(answer: str, spans: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
    return tuple(normalised(answer[begin:end]) for begin, end in spans)


def secrets(example: Example) -> list[str]:
    """What a prompt must not say: the answer and the entities that the row names in it, normalised.

    What the row's own prompt says already is none; the list is empty where that is the whole answer.
    """
    if not example.answer.strip():
        return []
    try:
        spans = tuple(entity_spans(example))
    except RowError:  # the row names none
        spans = ()
    asked = normalised(prompt_text(example))
    answer = normalised(example.answer)
    if not answer.strip() or answer in asked:
        return []
    return [answer, *(part for part in _entities(example.answer, spans) if part.strip() and part not in asked)]


def gives_away(text: str, hidden: Iterable[str]) -> bool:
    """Whether a text says one of the secrets, blanks, case and punctuation aside."""
    said = normalised(text)
    return any(secret in said for secret in hidden)


def safe(examples: Sequence[Example], hidden: Sequence[str]) -> list[Example]:
    """The candidates that give none of the secrets away."""
    return [example for example in examples if not gives_away(prompt_text(example), hidden)]
