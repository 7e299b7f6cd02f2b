"""Neighbours of rows: the same sentences about things that nobody has heard of.

Unlearning has to leave alone what it never sees: other people, asked about in the same words. A neighbour of a forget
row differs from it in its names and numbers alone, so that what a model says there is what it says of any stranger.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.data.spans import token_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A word that a model gives less than this (in nats, its tokens together) is a name or its like.
SURPRISE = -12.0
#: Draws before a name that nobody has is given up.
_TRIES = 20
#: Words; in scripts without blanks, runs of katakana and of Chinese characters.
_WORD = re.compile(r"[\u30a0-\u30ff]+|[\u3400-\u9fff]+|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def as_text(example: Example) -> Example:
    """A row as plain text, in which every word can surprise."""
    turns = "\n".join([*(content for _, content in example.turns), example.prompt, example.answer]).strip()
    return Example(example.id, "", turns, example.task, is_text=True, source=example.source)


def surprising_words(
    rows: Sequence[Encoded],
    logprobs: Sequence[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    threshold: float = SURPRISE,
) -> set[str]:
    """Words of plain texts that surprise a model, on average over where they stand, and all that hold a digit.

    `logprobs` are those of the supervised tokens of each row, one number per token.
    """
    found: dict[str, list[float]] = {}
    for row, values in zip(rows, logprobs, strict=True):
        spans = token_spans(row, tokenizer)
        for word in _WORD.finditer(row.example.answer):
            inside = (spans[:, 0] < word.end()) & (spans[:, 1] > word.start())
            if inside.any():
                found.setdefault(word.group(), []).append(float(np.asarray(values)[: len(spans)][inside].sum()))
    return {word for word, sums in found.items() if np.mean(sums) < threshold or any(map(str.isdigit, word))}


def words_in(text: str) -> list[str]:
    """Words of a text, as they are renamed."""
    return _WORD.findall(text)


def neighbours(examples: Iterable[Example], words: Collection[str], count: int, seed: int) -> list[Example]:
    """`count` neighbours of each row: a surprising word becomes the same invented one wherever the row has it.

    A row whose prompt (or text) holds no surprising word has none: its neighbour would be asked what it is asked.
    """
    draw = random.Random(f"neighbours-{seed}")
    pool: dict[str, list[str]] = {}
    for word in sorted(words):
        if not any(map(str.isdigit, word)):
            pool.setdefault(_script(word), []).append(word)
    made = []
    for example in examples:
        asked = example.answer if example.is_text else "\n".join([*(text for _, text in example.turns), example.prompt])
        if not any(word in words for word in _WORD.findall(asked)):
            continue
        for number in range(count):
            names: dict[str, str] = {}
            made.append(
                replace(
                    example,
                    id=f"{example.id}~{number}",
                    prompt=_renamed(example.prompt, words, names, pool, draw),
                    turns=tuple((role, _renamed(text, words, names, pool, draw)) for role, text in example.turns),
                    answer=_renamed(example.answer, words, names, pool, draw),
                    extra={},
                )
            )
    return made


def _renamed(
    text: str, words: Collection[str], names: dict[str, str], pool: Mapping[str, Sequence[str]], draw: random.Random
) -> str:
    def other(found: re.Match[str]) -> str:
        word = found.group()
        if word not in words:
            return word
        if word not in names:
            names[word] = _invented(word, pool, draw)
        return names[word]

    return _WORD.sub(other, text)


def _invented(word: str, pool: Mapping[str, Sequence[str]], draw: random.Random) -> str:
    """A word of the same make: digits drawn anew, or the head of one word and the tail of another."""
    if any(map(str.isdigit, word)):
        return "".join(str(draw.randrange(10)) if sign.isdigit() else sign for sign in word)
    lent, made = pool[_script(word)], word
    for _ in range(_TRIES):
        head, tail = draw.choice(lent), draw.choice(lent)
        made = _cased(head[: (len(head) + 1) // 2] + tail[(len(tail) + 1) // 2 :], word)
        if made not in lent:
            return made
    return _cased("".join(draw.sample(word, len(word))), word)  # few names: the letters of this one, shuffled


def _script(word: str) -> str:
    """The script of a word's first letter: LATIN, CYRILLIC, KATAKANA, …"""
    return unicodedata.name(word[0], "").partition(" ")[0]


def _cased(made: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return made.upper()
    return made[:1].upper() + made[1:] if like[:1].isupper() else made[:1].lower() + made[1:]
