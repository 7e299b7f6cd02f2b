"""Neighbours of the forget rows as rows to train on: where names are looked for, and what is made of them."""

from __future__ import annotations

from pathlib import Path

from expunge.data.encode import Encoded, encode
from expunge.data.example import Example
from expunge.data.neighbours import as_text, neighbours, surprising_words
from expunge.pipeline.entries import logprobs
from expunge.pipeline.resolve import Resolved
from expunge.recipe import UnlearnConfig

#: The split of the pass in which the names are found.
WORDS = "words"
#: Retain rows that are looked at beside the forget rows: they only lend their names.
_LENT = 500


def plain_rows(resolved: Resolved) -> list[Encoded]:
    """Forget rows and some retain rows as plain texts."""
    known = [*resolved.rows["forget"], *resolved.rows.get("retain", ())[:_LENT]]
    return _encoded(resolved, [as_text(row.example) for row in known])


def stranger_rows(resolved: Resolved, entry: UnlearnConfig, scores: Path) -> list[Encoded]:
    """Neighbours of the forget rows, renamed where `scores` says that a word is a name; none if no prompt has one."""
    seed = resolved.recipe.seed if entry.seed is None else entry.seed
    values = [found for found, _ in logprobs(scores / f"{WORDS}.parquet")]
    words = surprising_words(plain_rows(resolved), values, resolved.tokenizer)
    forget = [row.example for row in resolved.rows["forget"]]
    return _encoded(resolved, neighbours(forget, words, entry.neighbours or 0, seed))


def _encoded(resolved: Resolved, examples: list[Example]) -> list[Encoded]:
    return encode(examples, resolved.tokenizer, resolved.template, resolved.recipe.data.max_length)
