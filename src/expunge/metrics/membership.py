"""Membership inference: can rows of the forget set be told from rows that no model has seen?

The value is the area under the ROC curve, oriented so that 1 means "still known". Good is not 0 but the reference's
value, about 0.5: a model far below has been pushed so hard on these rows that they stand out again. So these metrics
have no learnt end, hence no better direction; `anchored` and s_MIA say how far a model is from the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from expunge.metrics.auc import auc_statistic
from expunge.metrics.base import Resampling, Statistic, Values, metric
from expunge.metrics.examples import Examples
from expunge.metrics.tokens import AnswerTokens, matched_tokens, mean_logprobs, per_example
from expunge.recipe.conventions import EXPUNGE, Convention

#: A model that is sure of the next token has no spread to measure by (as in public code: variance of at least 1e-6).
_LEAST_SPREAD = 1e-3
_OTHER_TOKENS = "the reference cuts rows into other tokens, so that losses per token are not of the same things"

Score = Callable[[pa.Table, Convention], Values]

_SETTINGS: dict[str, Any] = {
    "range": (0, 1),
    "unit": "area under the ROC curve",
    "learnt": None,
    "roles": ("forget",),
    "per_example": False,
    "one_kind": True,
}
_PLAIN = ("scores", "holdout:scores")


def loss(table: pa.Table, convention: Convention) -> Values:
    """[examples]: NLL / T, high for what looks less like a member (as all scores here); NaN when T = 0."""
    return per_example(table, -mean_logprobs(table, convention))


def zlib(table: pa.Table, convention: Convention) -> Values:
    """[examples]: NLL / T over the bytes of the compressed answer, so that repetitive text is no sign of membership."""
    size = np.asarray(table.column("answer_zlib"), dtype=np.float64)
    return per_example(table, -mean_logprobs(table, convention) / size)


def min_k(table: pa.Table, convention: Convention) -> Values:
    """[examples]: −mean of the lowest log-probabilities, of part `min_k` of the tokens."""
    tokens = matched_tokens(table, convention)
    return per_example(table, -tokens.lowest(tokens.logprob, convention.min_k))


def min_k_plus_plus(table: pa.Table, convention: Convention) -> Values:
    """[examples]: as min_k, of (log p − mean) / sd, both over the vocabulary under the model's distribution."""
    tokens = matched_tokens(table, convention)
    return per_example(table, -tokens.lowest(_standardised(tokens), convention.min_k))


#: What tells members apart without another model.
SCORES: dict[str, Score] = {score.__name__: score for score in (loss, zlib, min_k, min_k_plus_plus)}


@metric(
    "mia_loss",
    summary="AUC of the mean loss, forget against holdout rows: 1 tells all apart; good is the reference's, about 0.5",
    needs=_PLAIN,
    paper="arXiv:1709.01604",
    **_SETTINGS,
)
def mia_loss(
    forget: pa.Table,
    holdout: pa.Table,
    convention: Convention = EXPUNGE,
    resampling: Resampling = Resampling(),
) -> Statistic:
    """AUC of `loss`."""
    return _auc(loss, forget, holdout, convention, resampling)


@metric(
    "mia_zlib",
    summary="AUC of the mean loss over the answer's zlib bytes, forget against holdout; good is the reference's",
    needs=_PLAIN,
    paper="arXiv:2012.07805",
    **_SETTINGS,
)
def mia_zlib(
    forget: pa.Table,
    holdout: pa.Table,
    convention: Convention = EXPUNGE,
    resampling: Resampling = Resampling(),
) -> Statistic:
    """AUC of `zlib`."""
    return _auc(zlib, forget, holdout, convention, resampling)


@metric(
    "mia_min_k",
    summary="AUC of the mean log-probability of the least likely tokens, forget against holdout; good: the reference's",
    needs=_PLAIN,
    paper="arXiv:2310.16789",
    **_SETTINGS,
)
def mia_min_k(
    forget: pa.Table,
    holdout: pa.Table,
    convention: Convention = EXPUNGE,
    resampling: Resampling = Resampling(),
) -> Statistic:
    """AUC of `min_k`."""
    return _auc(min_k, forget, holdout, convention, resampling)


@metric(
    "mia_min_k_plus_plus",
    summary="as mia_min_k, each log-probability standardised over the vocabulary; good is the reference's",
    needs=_PLAIN,
    paper="arXiv:2404.02936",
    **_SETTINGS,
)
def mia_min_k_plus_plus(
    forget: pa.Table,
    holdout: pa.Table,
    convention: Convention = EXPUNGE,
    resampling: Resampling = Resampling(),
) -> Statistic:
    """AUC of `min_k_plus_plus`."""
    return _auc(min_k_plus_plus, forget, holdout, convention, resampling)


@metric(
    "mia_reference",
    summary="AUC of the mean loss beyond the reference's own, forget against holdout; good is 0.5, the reference's",
    needs=(*_PLAIN, "reference@scores", "reference@holdout:scores"),
    paper="arXiv:2111.08440",
    **_SETTINGS,
)
def mia_reference(
    forget: pa.Table,
    holdout: pa.Table,
    reference_forget: pa.Table,
    reference_holdout: pa.Table,
    convention: Convention = EXPUNGE,
    resampling: Resampling = Resampling(),
) -> Statistic:
    """AUC of NLL / T minus the reference's NLL / T of the same row: what is hard or easy for any model cancels out."""
    members = _beyond(forget, reference_forget, convention)
    others = _beyond(holdout, reference_holdout, convention)
    found = auc_statistic(members, others, resampling)
    alike = _same_tokens(forget, reference_forget) and _same_tokens(holdout, reference_holdout)
    return found if alike else replace(found, note="; ".join(filter(None, (found.note, _OTHER_TOKENS))))


def _auc(
    score: Score, forget: pa.Table, holdout: pa.Table, convention: Convention, resampling: Resampling
) -> Statistic:
    return auc_statistic(score(forget, convention), score(holdout, convention), resampling)


def _beyond(table: pa.Table, reference: pa.Table, convention: Convention) -> Values:
    examples, others = Examples.of(table), Examples.of(reference)
    return loss(table, convention) - examples.align(loss(reference, convention), others)


def _same_tokens(table: pa.Table, reference: pa.Table) -> bool:
    """Whether rows that two models were given consist of the same tokens; true where that can't be seen."""
    if not table.column("example_id").equals(reference.column("example_id")):
        return True
    return bool(table.column("token_ids").equals(reference.column("token_ids")))


def _standardised(tokens: AnswerTokens) -> Values:
    spread = np.maximum(tokens.column("std_logprob"), _LEAST_SPREAD)
    return (tokens.logprob - tokens.column("mean_logprob")) / spread
