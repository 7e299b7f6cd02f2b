"""Rows in tokens for tests of objectives and training: no tokenizer, no file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expunge.data.encode import Encoded
from expunge.data.example import Example


def rows(count: int, seed: int, vocabulary: int = 500, shortest: int = 6, longest: int = 24) -> list[Encoded]:
    """Random rows of different lengths; each prompt takes a third of its row."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(generator.integers(shortest, longest + 1))
        ids = generator.integers(3, vocabulary, size=length).astype(np.int32)
        prompt = max(1, length // 3)
        example = Example(id=f"{seed}-{number}", prompt="p", answer="a")
        made.append(Encoded(example, ids, prompt, length - prompt - 1, 0))
    return made


def supervised(rows: Sequence[Encoded]) -> list[int]:
    """Supervised tokens per row."""
    return [row.supervised_tokens for row in rows]
