"""Whether generated text is still text: models that collapse repeat themselves.

The unit is a word or a sign, read off the text (a letter in scripts without spaces): tables hold no generated tokens.
What is measured is the output alone, so the good end is the same on every split, those to be forgotten included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Direction, Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.texts import units, until_stop
from expunge.recipe.conventions import EXPUNGE, Convention

_HIGHER: dict[str, Direction] = dict.fromkeys(("forget", "retain", "utility"), "higher")
_LOWER: dict[str, Direction] = dict.fromkeys(("forget", "retain", "utility"), "lower")


@metric(
    "token_entropy",
    summary="entropy of the output's words over the entropy if all were different; falls when a model repeats itself",
    needs="generations",
    range=(0, 1),
    unit="part of the largest entropy",
    paper="arXiv:2410.08109",
    learnt=None,
    good=_HIGHER,
    anchors=False,
)
def token_entropy(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """−Σ f log2 f / log2 n over the words and signs of the output; 0 for one unit or none, as in the paper's code.

    Read it beside the target's value: where the right answer is one word, the best model has 0 too.
    """

    def entropy(found: Sequence[str]) -> float:
        return min(1.0, _entropy(found, 1) / math.log2(len(found))) if len(found) > 1 else 0.0

    return _per_output(table, convention, entropy)


@metric(
    "repetition",
    summary="part of the output's runs of four words that stood in it before",
    needs="generations",
    range=(0, 1),
    unit="part of the runs",
    paper="arXiv:1908.04319",
    learnt=None,
    good=_LOWER,
    anchors=False,
)
def repetition(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """1 − different 4-grams / 4-grams; 0 where the output is too short for two (nothing can repeat)."""

    def repeated(found: Sequence[str]) -> float:
        runs = _ngrams(found, 4)
        return 1 - len(runs) / runs.total() if runs else 0.0

    return _per_output(table, convention, repeated)


@metric(
    "ngram_entropy",
    summary="weighted entropy of the output's runs of two (1/3) and three (2/3) words: KnowEdit's fluency",
    needs="generations",
    range=(0, np.inf),
    unit="bits",
    paper="arXiv:2401.01286",
    learnt=None,
    good=_HIGHER,
    anchors=False,
)
def ngram_entropy(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """(2/3 H2 + 4/3 H3) / 2, the mean of both entropies under the weights of the public code; 0 for an empty output.

    It grows with length, so compare outputs under the same limit.
    """
    return _per_output(table, convention, lambda found: (2 / 3 * _entropy(found, 2) + 4 / 3 * _entropy(found, 3)) / 2)


def _per_output(table: pa.Table, convention: Convention, score: Callable[[Sequence[str]], float]) -> Values:
    # cut at the answer's length, no output could show that it repeats itself
    texts = table.column("generated").to_pylist()
    return Examples.of(table).mean(np.array([score(units(until_stop(text, convention))) for text in texts], np.float64))


def _ngrams(found: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(found[start:] for start in range(size)), strict=False))


def _entropy(found: Sequence[str], size: int) -> float:
    """Entropy of runs of `size` units in bits; 0 without any."""
    counts = np.fromiter(_ngrams(found, size).values(), dtype=np.float64)
    part = counts / counts.sum() if len(counts) else counts
    return float(-(part * np.log2(part)).sum()) + 0.0  # no −0
