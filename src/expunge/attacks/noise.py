"""Token noise: random tokens take the place of a few tokens of the prompt."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from pydantic import Field

from expunge.attacks.base import Point, PromptAttack, World, attack, setting
from expunge.attacks.prompts import drawing
from expunge.data.example import Example

Part = Annotated[float, Field(gt=0, le=1)]
Span = tuple[int, int]  # characters [begin, end)


@attack(
    name="token_noise",
    idea="random tokens in the place of some tokens of the prompt",
    paper="2406.09179",
    kind="behaviour",
    budget="percent of the prompt's tokens replaced",
    suite="quick",
)
class TokenNoise(PromptAttack):
    """Breaks unlearning that is tied to exact prompts; at least one token is replaced.

    The tokens that a weaker point replaces are replaced by the same ones at a stronger point.
    """

    parts: tuple[Part, ...] = setting((0.01, 0.05, 0.1), description="parts of the prompt's tokens", published="0.05")
    draws: int = setting(1, description="noisy prompts per row, the worst of them counts", gt=0)

    def points(self) -> list[Point]:
        """One per part."""
        return [Point(f"{100 * part:g}pct", 100 * part, {"part": part}) for part in sorted(set(self.parts))]

    def rewrite(self, example: Example, point: Point, world: World) -> list[Example]:
        """Prompts with replaced tokens; turns before the prompt stay as they are."""
        if not example.prompt.strip():
            return []
        words = _vocabulary(world.tokenizer)
        spans = token_places(example.prompt, world.tokenizer)
        noisy = []
        for number in range(self.draws):
            generator = drawing(world.seed, example.id, number)
            prompt = _replaced(example.prompt, spans, point.settings["part"], words, generator)
            noisy.append(replace(example, prompt=prompt, candidate=number))
        return noisy


def token_places(text: str, tokenizer: Any) -> list[Span]:
    """Characters of each token, in order; tokens that share one are one place. Of each word for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        return [found.span() for found in re.finditer(r"\S+", text)]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    places: list[Span] = []
    for begin, end in offsets:
        if places and begin < places[-1][1]:
            places[-1] = (places[-1][0], max(end, places[-1][1]))
        elif end > begin and text[begin:end].strip():
            places.append((begin, end))
    return places


def _replaced(text: str, spans: list[Span], part: float, words: list[str], generator: random.Random) -> str:
    """`text` with a random word in the place of that part of its spans."""
    order = list(range(len(spans)))
    generator.shuffle(order)
    drawn = [words[generator.randrange(len(words))] for _ in order]
    new = dict(zip(order, drawn, strict=True))
    count = max(1, round(part * len(spans)))
    pieces, last = [], 0
    for place in sorted(order[:count]):
        begin, end = spans[place]
        kept = text[begin:end]
        lead = kept[: len(kept) - len(kept.lstrip())]  # some tokenizers count the blank before a word to it
        pieces += [text[last:begin], lead, new[place]]
        last = end
    return "".join([*pieces, text[last:]])


_VOCABULARIES: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> list[str]:
    """Texts of the tokens that are whole, visible characters, special ones left out; in the order of their ids."""
    if tokenizer not in _VOCABULARIES:
        special = set(tokenizer.all_special_ids)
        ids = [number for number in range(len(tokenizer)) if number not in special]
        texts = tokenizer.batch_decode([[number] for number in ids], clean_up_tokenization_spaces=False)
        stripped = (text.strip() for text in texts)
        words = [text for text in stripped if text and "\ufffd" not in text and text.isprintable()]
        _VOCABULARIES[tokenizer] = words
    return _VOCABULARIES[tokenizer]
