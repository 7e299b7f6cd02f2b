"""Rows for tests of the passes: random tokens, so that no tokenizer is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from expunge.data.encode import Encoded
from expunge.data.example import Example

VOCABULARY = 500  # below tiny's special tokens at the end and above those at its beginning
FIRST = 3
END = 2  # tiny's EOS


def row(name: str, prompt: list[int], answer: list[int], end: list[int], *, is_text: bool = False) -> Encoded:
    """One row from token ids."""
    example = Example(id=name, prompt=f"prompt of {name}", answer=f"answer of {name}", task="t", is_text=is_text)
    return Encoded(example, np.array(prompt + answer + end, np.int32), len(prompt), len(answer), 0)


def random_rows(count: int, seed: int = 0, longest: int = 40) -> list[Encoded]:
    """Rows of random tokens and lengths; the terminator is EOS."""
    generator = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return generator.integers(FIRST, VOCABULARY, size=generator.integers(low, high)).tolist()

    return [row(f"r{i}", tokens(1, longest), tokens(1, longest), [END]) for i in range(count)]


def lively(model: Any, *, embeddings: bool = False) -> Any:
    """The model with six times its small initial weights, in place: fresh ones repeat the last token and hide errors
    in positions and masks."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "norm" not in name and (embeddings or "embed" not in name):
                weight.mul_(6)
    return model
