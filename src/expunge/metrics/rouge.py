"""ROUGE-L between generated text and answer, in every script."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.texts import answers_and_outputs, words
from expunge.recipe.conventions import EXPUNGE, Convention

_PAPER = "https://aclanthology.org/W04-1013"


@metric(
    "rouge_l_recall",
    summary="longest common subsequence of generated text and answer over the answer's words (ROUGE-L recall, stemmed)",
    needs="generations",
    range=(0, 1),
    unit="part of the answer's words",
    paper=_PAPER,
)
def rouge_l_recall(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """LCS / words of the answer; NaN where the answer has no words."""
    return Examples.of(table).mean(recall(table, convention))


@metric(
    "rouge_l_f1",
    summary="harmonic mean of ROUGE-L recall and precision between generated text and answer (stemmed)",
    needs="generations",
    range=(0, 1),
    unit="part of the words",
    paper=_PAPER,
)
def rouge_l_f1(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """2 LCS / (words of the answer + words generated); NaN where the answer has no words."""
    return Examples.of(table).mean(f1(table, convention))


@metric(
    "rouge_l",
    summary="ROUGE-L as the convention has it in aggregates: recall, or F1 in MUSE's",
    needs="generations",
    range=(0, 1),
    unit="part of the words",
    paper=_PAPER,
)
def rouge_l(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """`rouge_l_recall` or `rouge_l_f1`."""
    return rouge_l_recall(table, convention) if convention.rouge == "recall" else rouge_l_f1(table, convention)


@metric(
    "rouge_l_recall_paraphrase",
    summary="ROUGE-L recall when the question is paraphrased, mean over paraphrases",
    needs="generations/paraphrase",
    range=(0, 1),
    unit="part of the answer's words",
    paper="arXiv:2506.12618",
)
def rouge_l_recall_paraphrase(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Mean over an example's paraphrases; NaN where the answer has no words."""
    return Examples.of(table).mean(recall(table, convention))


@metric(
    "rouge_l_recall_paraphrase_worst",
    summary="ROUGE-L recall when the question is paraphrased, of the paraphrase that brings out most",
    needs="generations/paraphrase",
    range=(0, 1),
    unit="part of the answer's words",
    paper="arXiv:2509.02820",
    roles=("forget", "holdout"),
)
def rouge_l_recall_paraphrase_worst(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Largest over an example's paraphrases: what one who may ask again gets; NaN where the answer has no words."""
    return Examples.of(table).largest(recall(table, convention))


@metric(
    "rouge_l_recall_jailbreak",
    summary="ROUGE-L recall when the prompt ends in the beginning of a compliant reply",
    needs="generations/jailbreak",
    range=(0, 1),
    unit="part of the answer's words",
    paper="arXiv:2406.09179",
)
def rouge_l_recall_jailbreak(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """As `rouge_l_recall`; plain texts have no prompt and are not in the table."""
    return Examples.of(table).mean(recall(table, convention))


def recall(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """ROUGE-L recall per row of a GENERATIONS table; NaN where the answer has no words (0 with `ascii_words`)."""
    common, answer, _ = _counts(table, convention)
    return _ratio(common, answer, convention)


def f1(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """ROUGE-L F1 per row of a GENERATIONS table; NaN where the answer has no words (0 with `ascii_words`)."""
    common, answer, generated = _counts(table, convention)
    return _ratio(2 * common, np.where(answer > 0, answer + generated, 0), convention)


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


class _Overlap(NamedTuple):
    """Of one answer and one generated text: length of the LCS, words of the answer, words generated."""

    common: int
    answer: int
    generated: int


@lru_cache(maxsize=2**16)  # recall, F1 and what leaks all look at the same texts
def _overlap(answer: str, generated: str, stemmed: bool, ascii_words: bool) -> _Overlap:
    expected, said = words(answer, stemmed, ascii_words), words(generated, stemmed, ascii_words)
    return _Overlap(lcs_length(expected, said), len(expected), len(said))


def _counts(table: pa.Table, convention: Convention) -> np.ndarray:
    """_Overlap per row [3, rows]."""
    settings = convention.stemmed, convention.ascii_words
    counts = [_overlap(*pair, *settings) for pair in answers_and_outputs(table, convention)]
    return np.array(counts, dtype=np.int64).reshape(-1, 3).T


def _ratio(numerator: np.ndarray, denominator: np.ndarray, convention: Convention) -> Values:
    # rouge-score gives 0 where it finds no word in the answer, and public means count that 0
    empty = 0.0 if convention.ascii_words else np.nan
    return np.divide(numerator, denominator, out=np.full(len(denominator), empty), where=denominator > 0)
