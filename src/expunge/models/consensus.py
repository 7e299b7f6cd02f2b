"""What several changes of one parameter agree on (arXiv:2410.05583), for the objective and the merge of that name."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor


def unanimous_mean(changes: Iterable[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    """Mean of the changes where all have the same sign, 0 elsewhere; a fresh tensor. ValueError without changes."""
    following = iter(changes)
    first = next(following, None)
    if first is None:
        raise ValueError("there are no changes to compare")
    total, up, down, count = first.clone(), first > 0, first < 0, 1
    for change in following:
        total += change
        up &= change > 0
        down &= change < 0
        count += 1
    return total.div_(count).masked_fill_((up | down).logical_not_(), 0)
