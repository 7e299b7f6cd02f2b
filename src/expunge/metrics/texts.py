"""Generated text as a convention reads it, and the words in it, in every script."""

from __future__ import annotations

import unicodedata
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values
from expunge.recipe.conventions import EXPUNGE, Convention

#: Unicode names of the scripts that are written without spaces between words: each letter is a unit of its own.
_UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "YI ")


def answers_and_outputs(table: pa.Table, convention: Convention = EXPUNGE) -> list[tuple[str, str]]:
    """(answer, generated text as the convention cuts it) of every row of a GENERATIONS table."""
    pairs = zip(table.column("answer").to_pylist(), table.column("generated").to_pylist(), strict=True)
    return [(answer, cut_at_answer(until_stop(said, convention), answer, convention)) for answer, said in pairs]


def until_stop(generated: str, convention: Convention) -> str:
    """The text before the first of the convention's stop strings."""
    places = [generated.find(stop) for stop in convention.stops if stop]
    return generated[: min((place for place in places if place >= 0), default=len(generated))]


def cut_at_answer(generated: str, answer: str, convention: Convention) -> str:
    """With `stops_at_answer`: as many characters as the answer has, blanks in front of either aside.

    A model that says the answer and goes on for lack of an end is then seen as one that ended.
    """
    return generated.lstrip()[: len(answer.strip())] if convention.stops_at_answer else generated


def contained(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Per row: 1 if the answer's words stand one after the other in the generated text, else 0.

    Case, punctuation and form of letters (NFKC) aside, and word by word: "Paris" does not stand in "Parisian". NaN
    where the answer has no words.
    """
    pairs = answers_and_outputs(table, convention)
    return np.array([_contains(answer, said) for answer, said in pairs], dtype=np.float64)


def words(text: str, stemmed: bool = True, ascii_words: bool = False) -> list[str]:
    """The units that ROUGE compares: lower-case words; single letters in scripts without spaces.

    ASCII goes through rouge-score's own tokenizer. That one drops every other letter ("José" → "jos", Japanese →
    nothing), so other text is split here, unless `ascii_words`: letters, digits and their marks form words, everything
    else parts them.
    """
    if ascii_words or text.isascii():
        return list(_tools()[0].tokenize(text, _CachedStemmer if stemmed else None))
    return [_stem(unit) if stemmed else unit for unit in _split(text, signs=False)]


def units(text: str) -> list[str]:
    """Words and signs: as `words` without stemming, and every sign of punctuation or symbol is a unit of its own."""
    return _split(text, signs=True)


@lru_cache(maxsize=2**16)
def _contains(answer: str, said: str) -> float:
    # no word has a blank in it
    expected = " ".join(words(answer, stemmed=False))
    return float(f" {expected} " in f" {' '.join(words(said, stemmed=False))} ") if expected else np.nan


def _split(text: str, signs: bool) -> list[str]:
    found: list[str] = []
    last = "separator"
    for char in unicodedata.normalize("NFKC", text).lower():
        kind = _kind(char)
        if kind == "sign" and not signs:
            kind = "separator"
        if kind == "ignored":
            continue
        if kind == "mark":
            # an accent or vowel sign belongs to the letter before it; alone (after an emoji, say) it is nothing
            if last != "separator":
                found[-1] += char
            continue
        if kind == "letter" and last == "letter":
            found[-1] += char
        elif kind != "separator":
            found.append(char)
        last = kind
    return found


@cache
def _tools() -> tuple[Any, Any]:
    # imported on first use: it brings nltk along, and `expunge list metrics` needs none of it
    from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]
    from rouge_score import tokenize

    return tokenize, PorterStemmer()


class _CachedStemmer:
    """The Porter stemmer behind a cache: it is slow, and texts repeat their words."""

    @staticmethod
    @lru_cache(maxsize=65536)
    def stem(word: str) -> str:
        return str(_tools()[1].stem(word))


def _stem(word: str) -> str:
    # like rouge-score: only words of more than three letters, and Porter's rules are for English alone
    return _CachedStemmer.stem(word) if len(word) > 3 and word.isascii() else word


@lru_cache(maxsize=65536)
def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if category[0] == "M":
        return "mark"
    if category == "Cf":  # joiners inside words, soft hyphens
        return "ignored"
    if category[0] in "PS":
        return "sign"
    if category[0] not in "LN":
        return "separator"
    return "unspaced" if unicodedata.name(char, "").startswith(_UNSPACED) else "letter"
