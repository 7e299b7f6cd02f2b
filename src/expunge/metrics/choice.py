"""Multiple choice: does the model find the right answer likelier than the wrong ones that the row brings?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.tokens import answer_tokens

_NEEDS = ("scores", "scores/paraphrased_answer", "scores/perturbed_answer")


@metric(
    "choice_accuracy",
    summary="1 if the answer is likelier than every wrong option (sum of log-probabilities), else 0",
    needs=_NEEDS,
    range=(0, 1),
    unit="part of the questions",
    paper="arXiv:2403.03218",
)
def choice_accuracy(table: pa.Table, paraphrased: pa.Table, options: pa.Table) -> Values:
    """Options as wholes, as lm-eval's `acc`; equally likely ones share the point. NaN without options, or a broken one.

    Wrong options are the rows' column `perturbed_answer`; chance is 1 / (1 + their number). The right one is the
    paraphrased answer where a row has it, for wrong ones are of its form, or else the answer itself.
    """
    return _accuracy(table, paraphrased, options, _sums)


@metric(
    "choice_accuracy_normalised",
    summary="1 if the answer is likelier per token than every wrong option, else 0",
    needs=_NEEDS,
    range=(0, 1),
    unit="part of the questions",
    paper="arXiv:2403.03218",
)
def choice_accuracy_normalised(table: pa.Table, paraphrased: pa.Table, options: pa.Table) -> Values:
    """As `choice_accuracy` over mean log-probabilities: long options are not punished.

    lm-eval's `acc_norm` divides by characters instead, which tables of tokens do not have.
    """
    return _accuracy(table, paraphrased, options, _means)


def _sums(table: pa.Table) -> Values:
    answers = answer_tokens(table)
    return np.where(answers.length > 0, answers.sum(answers.logprob), np.nan)


def _means(table: pa.Table) -> Values:
    answers = answer_tokens(table)
    return answers.mean(answers.logprob)


def _accuracy(
    table: pa.Table, paraphrased: pa.Table, options: pa.Table, likelihood: Callable[[pa.Table], Values]
) -> Values:
    examples, others, reworded = (Examples.of(given) for given in (table, options, paraphrased))
    right = examples.align(reworded.mean(likelihood(paraphrased)), reworded)
    right = np.where(examples.among(reworded), right, examples.mean(likelihood(table)))
    wrong = likelihood(options)
    place = {name: i for i, name in enumerate(examples.ids)}
    own = np.array([place.get(name, -1) for name in others.ids], dtype=np.int64)[others.row]
    wrong, own = wrong[own >= 0], own[own >= 0]

    def count(which: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(own[which], minlength=len(right))

    better, equal, broken = count(wrong > right[own]), count(wrong == right[own]), count(np.isnan(wrong))
    scored = (count(np.ones(len(own), dtype=bool)) > 0) & (broken == 0) & ~np.isnan(right)
    return np.where(scored, np.where(better > 0, 0.0, 1 / (1 + equal)), np.nan)
