"""ROUGE-L between generated text and answer, in every script."""

from __future__ import annotations

import unicodedata
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric

#: Unicode names of the scripts that are written without spaces between words: each letter is a unit of its own.
_UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "YI ")


@metric(
    "rouge_l_recall",
    summary="longest common subsequence of generated text and answer over the answer's words (ROUGE-L recall, stemmed)",
    needs="generations",
    range=(0, 1),
    unit="part of the answer's words",
    paper="https://aclanthology.org/W04-1013",
)
def rouge_l_recall(table: pa.Table) -> Values:
    """LCS / words of the answer; NaN where the answer has no words."""
    common, answer, _ = _overlap(table)
    return _ratio(common, answer)


@metric(
    "rouge_l_f1",
    summary="harmonic mean of ROUGE-L recall and precision between generated text and answer (stemmed)",
    needs="generations",
    range=(0, 1),
    unit="part of the words",
    paper="https://aclanthology.org/W04-1013",
)
def rouge_l_f1(table: pa.Table) -> Values:
    """2 LCS / (words of the answer + words generated); NaN where the answer has no words."""
    common, answer, generated = _overlap(table)
    return _ratio(2 * common, np.where(answer > 0, answer + generated, 0))


def words(text: str) -> list[str]:
    """The units that ROUGE compares: stemmed lower-case words; single letters in scripts without spaces.

    ASCII goes through rouge-score's own tokenizer. That one drops every other letter ("José" → "jos", Japanese →
    nothing), so other text is split here: letters, digits and their marks form words, everything else parts them.
    """
    if text.isascii():
        return _ascii_words(text)
    units: list[str] = []
    last = "separator"
    for char in unicodedata.normalize("NFKC", text).lower():
        kind = _kind(char)
        if kind == "ignored":
            continue
        if kind == "mark":
            # an accent or vowel sign belongs to the letter before it; alone (after an emoji, say) it is nothing
            if last != "separator":
                units[-1] += char
            continue
        if kind == "letter" and last == "letter":
            units[-1] += char
        elif kind != "separator":
            units.append(char)
        last = kind
    return [_stem(unit) for unit in units]


def lcs_length(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel over Python's integers (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, unit in enumerate(first):
        places[unit] = places.get(unit, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for unit in second:
        match = row & places.get(unit, 0)
        row = (row + match | row - match) & full
    return len(first) - row.bit_count()


def _overlap(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per example: LCS length, words of the answer, words generated."""
    counts = np.zeros((3, len(table)), dtype=np.int64)
    pairs = zip(table.column("answer").to_pylist(), table.column("generated").to_pylist(), strict=True)
    for index, (answer, generated) in enumerate(pairs):
        expected, said = words(answer), words(generated)
        counts[:, index] = lcs_length(expected, said), len(expected), len(said)
    return counts[0], counts[1], counts[2]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> Values:
    return np.divide(numerator, denominator, out=np.full(len(denominator), np.nan), where=denominator > 0)


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


def _ascii_words(text: str) -> list[str]:
    return list(_tools()[0].tokenize(text, _CachedStemmer))


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
    if category[0] not in "LN":
        return "separator"
    return "unspaced" if unicodedata.name(char, "").startswith(_UNSPACED) else "letter"
