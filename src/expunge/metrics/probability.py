"""The likelihood family: one sum of log-probabilities over the answer's tokens, in several units and views."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from expunge.metrics.base import Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.tokens import answer_tokens, entity_tokens, likelihood_tokens, mean_logprobs, per_example
from expunge.recipe.conventions import EXPUNGE, Convention

#: exp(700) is the last power that float64 holds with room for a mean; a collapsed model is not "infinite" but "1e304".
LARGEST_EXPONENT = 700.0
_TOFU = "arXiv:2401.06121"


@metric(
    "nll",
    summary="−Σ log p(token) over the answer's tokens",
    needs="scores",
    range=(0, np.inf),
    unit="nats per answer",
    paper="arXiv:2406.09179",
    learnt="low",
)
def nll(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Negative log-likelihood of the answer in nats; NaN when T = 0."""
    tokens = likelihood_tokens(table, convention)
    return per_example(table, np.where(tokens.length > 0, -tokens.sum(tokens.logprob), np.nan))


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
def perplexity(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Perplexity of the answer; NaN when T = 0. Of general text (a utility split) it is the usual fluency check."""
    return np.exp(np.minimum(-per_example(table, mean_logprobs(table, convention)), LARGEST_EXPONENT))


@metric(
    "probability",
    summary="exp(−NLL / T): the geometric mean of the answer's token probabilities",
    needs="scores",
    range=(0, 1),
    unit="probability per token",
    paper=_TOFU,
)
def probability(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Length-normalised probability of the answer; NaN when T = 0.

    The terminator is left out as in the other metrics; TOFU's own code keeps it (see the conventions).
    """
    return per_example(table, np.exp(mean_logprobs(table, convention)))


@metric(
    "probability_entity",
    summary="geometric mean of the token probabilities of the answer's entities, each after the true tokens before it",
    needs="scores",
    range=(0, 1),
    unit="probability per token",
    paper=_TOFU,
)
def probability_entity(table: pa.Table) -> Values:
    """Length-normalised probability of the entities that the row names; NaN where it names none."""
    tokens = entity_tokens(answer_tokens(table))
    return per_example(table, np.exp(tokens.mean(tokens.logprob)))


@metric(
    "probability_paraphrase",
    summary="probability of paraphrased answers after the original prompt, mean over a row's paraphrases",
    needs="scores/paraphrased_answer",
    range=(0, 1),
    unit="probability per token",
    paper="arXiv:2506.12618",
)
def probability_paraphrase(table: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """Mean over each example's candidates; NaN where none has tokens."""
    return probability(table, convention)


@metric(
    "probability_normalised",
    summary="probability of the answer over the sum of its own and those of the row's wrong answers",
    needs=("scores", "scores/perturbed_answer"),
    range=(0, 1),
    unit="part of the probability of all options",
    paper=_TOFU,
)
def probability_normalised(table: pa.Table, perturbed: pa.Table, convention: Convention = EXPUNGE) -> Values:
    """p / (p + Σ p_wrong) of length-normalised probabilities; NaN where the row has no wrong answer."""
    examples, others = Examples.of(table), Examples.of(perturbed)
    right = examples.mean(mean_logprobs(table, convention))
    wrong = examples.align(others.log_sum_exp(mean_logprobs(perturbed, convention)), others)
    return share(right, wrong, convention)


def share(right: Values, wrong: Values, convention: Convention) -> Values:
    """p / (p + q) from log p and log q; both may be far below what exp can hold."""
    if convention.epsilon:
        return np.exp(right) / (np.exp(right) + np.exp(wrong) + convention.epsilon)
    return 1 / (1 + np.exp(np.clip(wrong - right, -LARGEST_EXPONENT, LARGEST_EXPONENT)))
