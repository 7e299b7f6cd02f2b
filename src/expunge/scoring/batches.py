"""Which rows go through the model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil, sqrt

from expunge.data.encode import Encoded

#: Bytes that the float32 logits of one batch may take; a single row may exceed them.
LOGITS_BYTES = 512 * 2**20

#: A batch of this many tokens keeps the processor busy; it is not filled up at the price of more padding than this.
ENOUGH_TOKENS = 512
PADDING = 0.05


def scoring_batches(
    rows: Sequence[Encoded], batch_size: int, vocabulary: int, token_budget: int | None = None
) -> list[list[int]]:
    """Indices of rows per batch: neighbours in length, longest first, so that too little memory shows at once.

    A batch ends at `batch_size` rows, at `token_budget` tokens with padding, at LOGITS_BYTES of logits, or where it is
    large enough and more padding would not pay. Rows without a supervised token are in no batch.
    """
    order = [i for i in range(len(rows)) if rows[i].supervised_tokens > 0]
    order.sort(key=lambda i: (-len(rows[i].input_ids), -rows[i].supervised_tokens, i))
    batches: list[list[int]] = []
    longest = tokens = supervised = 0
    for i in order:
        own, answer = len(rows[i].input_ids), rows[i].supervised_tokens
        padded = (len(batches[-1]) + 1) * longest if batches else 0
        full = not batches or len(batches[-1]) >= batch_size
        too_wide = token_budget is not None and padded > token_budget
        too_deep = (supervised + answer) * vocabulary * 4 > LOGITS_BYTES
        wasteful = tokens >= ENOUGH_TOKENS and padded - tokens - own > PADDING * padded
        if full or too_wide or too_deep or wasteful:
            batches.append([])
            longest, tokens, supervised = own, 0, 0
        batches[-1].append(i)
        tokens += own
        supervised += answer
    return batches


def generation_batches(rows: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Indices of rows per batch: alike in the length of the answer and, among those, in the length of the prompt.

    A batch costs its longest prompt (one wide forward) plus its longest output (one forward per token); a model that
    knows its answers stops where they end. So rows are laid in strips of like answers, cut into batches by prompt.
    """
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].answer_tokens, i))
    strip = ceil(sqrt(ceil(len(rows) / batch_size) or 1)) * batch_size
    arranged: list[int] = []
    for part in _chunks(order, strip):
        arranged.extend(sorted(part, key=lambda i: (-rows[i].prompt_tokens, i)))
    return list(_chunks(arranged, batch_size))


def _chunks(items: Sequence[int], size: int) -> Iterator[list[int]]:
    remaining = iter(items)
    while part := list(islice(remaining, size)):
        yield part
