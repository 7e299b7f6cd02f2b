"""Neighbours of the forget rows as rows to train on: where names are looked for, and what is made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from expunge.data.encode import Encoded, encode
from expunge.data.example import Example
from expunge.data.neighbours import as_text, neighbours, surprising_words, words_in
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


def names(resolved: Resolved, scores: Path) -> set[str]:
    """The words that surprise the model whose pass over `plain_rows` is in `scores`."""
    values = [found for found, _ in logprobs(scores / f"{WORDS}.parquet")]
    return surprising_words(plain_rows(resolved), values, resolved.tokenizer)


def stranger_rows(resolved: Resolved, entry: UnlearnConfig, words: set[str]) -> list[Encoded]:
    """Neighbours of the forget rows, in which these words are renamed; none if no prompt has one of them."""
    forget = [row.example for row in resolved.rows["forget"]]
    return _encoded(resolved, neighbours(forget, words, entry.neighbours or 0, _seed(resolved, entry)))


def asked_of_strangers(resolved: Resolved, entry: UnlearnConfig, words: set[str]) -> list[Encoded]:
    """The forget answers behind the prompts of strangers; a row without names stands as it is."""
    rows = []
    for row in resolved.rows["forget"]:
        for other in neighbours([row.example], words, 1, _seed(resolved, entry)):
            asked = replace(row.example, prompt=other.prompt, turns=other.turns)
            encoded = _encoded(resolved, [asked])[0]
            if encoded.supervised_tokens == row.supervised_tokens:  # else the tokens don't answer to each other
                row = encoded
        rows.append(row)
    return rows


def words_of_their_own(resolved: Resolved) -> set[str]:
    """What the forget rows alone hold: words of no retain row, like names where a script has capitals."""
    common = {
        word for row in resolved.rows.get("retain", ()) for text in _texts(row.example) for word in words_in(text)
    }
    own = set()
    for row in resolved.rows["forget"]:
        *asked, answer = _texts(row.example)
        own |= {word for text in asked for place, word in enumerate(words_in(text)) if place or not word[0].isupper()}
        own |= set(words_in(answer))
    return {word for word in own - common if not word[0].islower()}


def _texts(example: Example) -> list[str]:
    """All that a row says, its answer last."""
    return [*(text for _, text in example.turns), example.prompt, example.answer]


def _seed(resolved: Resolved, entry: UnlearnConfig) -> int:
    return resolved.recipe.seed if entry.seed is None else entry.seed


def _encoded(resolved: Resolved, examples: list[Example]) -> list[Encoded]:
    return encode(examples, resolved.tokenizer, resolved.template, resolved.recipe.data.max_length)
