"""The likelihood family: one sum of log-probabilities over the answer's tokens, seen in three units."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.tokens import answer_tokens

#: exp(700) is the last power that float64 holds with room for a mean; a collapsed model is not "infinite" but "1e304".
_LARGEST_EXPONENT = 700.0


@metric(
    "nll",
    summary="−Σ log p(token) over the answer's tokens",
    needs="scores",
    range=(0, np.inf),
    unit="nats per answer",
    paper="arXiv:2406.09179",
    learnt="low",
)
def nll(table: pa.Table) -> Values:
    """Negative log-likelihood of the answer in nats, terminator left out; NaN when T = 0."""
    answers = answer_tokens(table)
    return np.where(answers.length > 0, -answers.sum(answers.logprob), np.nan)


@metric(
    "perplexity",
    summary="exp(NLL / T) of the answer; over examples the geometric mean, with its interval on the log scale",
    needs="scores",
    range=(1, np.inf),
    unit="equally likely tokens",
    paper="doi:10.1121/1.2016299",
    learnt="low",
    average="geometric",
)
def perplexity(table: pa.Table) -> Values:
    """Perplexity of the answer, terminator left out; NaN when T = 0."""
    answers = answer_tokens(table)
    return np.exp(np.minimum(-answers.mean(answers.logprob), _LARGEST_EXPONENT))


@metric(
    "probability",
    summary="exp(−NLL / T): the geometric mean of the answer's token probabilities",
    needs="scores",
    range=(0, 1),
    unit="probability per token",
    paper="arXiv:2401.06121",
)
def probability(table: pa.Table) -> Values:
    """Length-normalised probability of the answer; NaN when T = 0.

    The terminator is left out as in the other metrics; TOFU's own code keeps it.
    """
    answers = answer_tokens(table)
    return np.exp(answers.mean(answers.logprob))
