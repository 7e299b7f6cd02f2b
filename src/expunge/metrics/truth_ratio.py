"""How likely wrong answers of the same form are beside the right one, and what is made of that ratio."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.probability import LARGEST_EXPONENT, share
from expunge.metrics.tokens import mean_logprobs
from expunge.recipe.conventions import EXPUNGE, Convention

#: plain rows, paraphrased answers and wrong answers
NEEDS = ("scores", "scores/paraphrased_answer", "scores/perturbed_answer")
_TOFU = "arXiv:2401.06121"


@metric(
    "truth_ratio",
    summary="R: mean probability of wrong answers over that of the paraphrased (or else original) right one",
    needs=NEEDS,
    range=(0, np.inf),
    unit="ratio of probabilities per token",
    paper=_TOFU,
    learnt="low",
    average="geometric",
)
def truth_ratio(
    table: pa.Table, paraphrased: pa.Table, perturbed: pa.Table, convention: Convention = EXPUNGE
) -> Values:
    """R of each example, within e^±700; NaN where it has no wrong answer."""
    return _ratio(*_logprobs(table, paraphrased, perturbed, convention), convention)


@metric(
    "truth_ratio_closer_to_one",
    summary="min(R, 1/R): 1 where wrong answers are as likely as the right one, so that nothing tells them apart",
    needs=NEEDS,
    range=(0, 1),
    unit="ratio of probabilities per token",
    paper=_TOFU,
    learnt="low",
    roles=("forget", "holdout"),
)
def truth_ratio_closer_to_one(
    table: pa.Table, paraphrased: pa.Table, perturbed: pa.Table, convention: Convention = EXPUNGE
) -> Values:
    """TOFU's truth ratio of a forget set."""
    ratio = truth_ratio(table, paraphrased, perturbed, convention)
    return np.minimum(ratio, 1 / (ratio + convention.epsilon))


@metric(
    "truth_ratio_true_better",
    summary="max(0, 1 − R): 1 where wrong answers are ruled out, 0 where they are as likely as the right one or more",
    needs=NEEDS,
    range=(0, 1),
    unit="1 − ratio of probabilities per token",
    paper=_TOFU,
    roles=("retain", "holdout", "utility"),
)
def truth_ratio_true_better(
    table: pa.Table, paraphrased: pa.Table, perturbed: pa.Table, convention: Convention = EXPUNGE
) -> Values:
    """TOFU's truth ratio of what is to be kept, one of the nine numbers of its model utility."""
    return np.maximum(0, 1 - truth_ratio(table, paraphrased, perturbed, convention))


@metric(
    "truth_ratio_prob",
    summary="p / (p + q) for the probabilities p of the right and q of the wrong answers",
    needs=NEEDS,
    range=(0, 1),
    unit="part of the probability of both",
    paper="arXiv:2506.12618",
)
def truth_ratio_prob(
    table: pa.Table, paraphrased: pa.Table, perturbed: pa.Table, convention: Convention = EXPUNGE
) -> Values:
    """1 / (1 + R), the form that OpenUnlearning found most faithful; NaN where the row has no wrong answer."""
    return share(*_logprobs(table, paraphrased, perturbed, convention), convention)


def _logprobs(
    table: pa.Table, paraphrased: pa.Table, perturbed: pa.Table, convention: Convention
) -> tuple[Values, Values]:
    """[examples of `table`]: log-probability per token of the right answer and of the wrong ones.

    Several answers count by the mean of their probabilities (as in the paper) or of their losses (as in public code).
    """
    plain = Examples.of(table)
    original = plain.mean(mean_logprobs(table, convention))
    right = _candidates(plain, paraphrased, convention)
    right = np.where(plain.among(Examples.of(paraphrased)), right, original)
    return right, _candidates(plain, perturbed, convention)


def _candidates(plain: Examples, table: pa.Table, convention: Convention) -> Values:
    examples = Examples.of(table)
    values = mean_logprobs(table, convention)
    reduced = examples.mean(values) if convention.averages_losses else examples.log_mean_exp(values)
    return plain.align(reduced, examples)


def _ratio(right: Values, wrong: Values, convention: Convention) -> Values:
    if convention.epsilon:
        ratio = np.exp(wrong) / (np.exp(right) + convention.epsilon)
        return np.maximum(ratio, np.exp(-LARGEST_EXPONENT))
    return np.exp(np.clip(wrong - right, -LARGEST_EXPONENT, LARGEST_EXPONENT))
