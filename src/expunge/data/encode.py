"""Rows as tokens: prompt, answer and terminator, cut to a length that is counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from expunge.data.example import Example
from expunge.data.template import Template, under
from expunge.recipe.conventions import Convention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 2048  # rows handed to a fast tokenizer at once


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One row in tokens. `input_ids[:prompt_tokens]` is exactly what generation is given."""

    example: Example
    input_ids: np.ndarray  # int32 [T]: prompt + answer + terminator
    prompt_tokens: int  # >= 1
    answer_tokens: int  # without terminator; the supervised tokens are input_ids[prompt_tokens:]
    truncated: int  # tokens cut off by max_length
    hidden: np.ndarray | None = None  # bool [T]: tokens that attention does not see; None: it sees all

    @property
    def supervised_tokens(self) -> int:
        """Answer and terminator."""
        return len(self.input_ids) - self.prompt_tokens

    def whole(self) -> Encoded:
        """The same row with prompt and answer supervised, but for its first token, before which nothing stands."""
        return self.after(0, 1)

    def after(self, start: int, prompt_tokens: int) -> Encoded:
        """The same row from token `start` on, of which the first `prompt_tokens` are given."""
        answer = self.prompt_tokens + self.answer_tokens - start - prompt_tokens
        hidden = None if self.hidden is None else self.hidden[start:]
        return replace(
            self, input_ids=self.input_ids[start:], prompt_tokens=prompt_tokens, answer_tokens=answer, hidden=hidden
        )

    @property
    def terminator_ids(self) -> list[int]:
        """Tokens that end the answer; empty if the answer was cut."""
        ids: list[int] = self.input_ids[self.prompt_tokens + self.answer_tokens :].tolist()
        return ids


def encode(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int,
    convention: Convention | None = None,
) -> list[Encoded]:
    """Every example in tokens, in order. Raises UserError where a row does not fit the template.

    `convention` changes what the template makes of label span, join and mask; None leaves it as it was resolved.
    """
    if convention is not None:
        template = under(convention, template, tokenizer)
    encoder = _Encoder(tokenizer, template, max_length)
    rows: list[Encoded] = []
    remaining = iter(examples)
    while chunk := list(islice(remaining, _CHUNK)):
        rows.extend(encoder.encode(chunk))
    return rows


def truncation_note(rows: Sequence[Encoded]) -> str | None:
    """One sentence on the rows that were cut, or None if none was."""
    cut = [row for row in rows if row.truncated]
    if not cut:
        return None
    limit = max(len(row.input_ids) for row in cut)
    lost = sum(row.truncated for row in cut)
    unfinished = sum(not row.terminator_ids for row in cut)
    several = "row" if unfinished == 1 else "rows"
    answers = f"; {unfinished} {several} within the answer" if unfinished else "; all within the prompt"
    return f"{len(cut)} of {len(rows)} rows were cut at {limit} tokens ({lost} tokens lost{answers})"


class _Encoder:
    """What one tokenizer and one template need for every row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int) -> None:
        if max_length < 2:
            raise ValueError("max_length must leave room for a prompt token and a supervised one")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.prefix = self._own_prefix()
        self.text_prefix = self.prefix or [i for i in [tokenizer.bos_token_id] if i is not None]
        self.prepends_space = self._prepends_space()
        self.end = [] if tokenizer.eos_token_id is None or not template.ends_texts else [int(tokenizer.eos_token_id)]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.hidden_token = pad if template.hides_pad else None
        self.terminator = self._suffix_ids(template.terminator)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """A chunk of rows, in order."""
        rows: dict[int, Encoded] = {}
        plain = [i for i, example in enumerate(examples) if example.is_text]
        asked = [i for i, example in enumerate(examples) if not example.is_text]
        if plain:
            for i, ids in zip(plain, self._ids([examples[i].answer for i in plain]), strict=True):
                rows[i] = self._row(examples[i], self._with(self.text_prefix, ids), [], self.end, as_text=True)
        if asked:
            pairs = self.template.texts([examples[i] for i in asked])
            for i, (prompt, answer) in zip(asked, self._pairs(pairs), strict=True):
                if self.template.adds_prefix:
                    prompt = self._with(self.prefix, prompt)
                rows[i] = self._row(examples[i], prompt, answer, self.terminator, as_text=False)
        return [rows[i] for i in range(len(examples))]

    def _pairs(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of prompt and answer: tokenised as one text where that begins with the prompt's own ids."""
        prompts = self._ids([prompt for prompt, _ in texts])
        whole = self._ids([prompt + answer for prompt, answer in texts])
        pairs = []
        for (_, answer), prompt, joint in zip(texts, prompts, whole, strict=True):
            together = joint[: len(prompt)] == prompt
            pairs.append((prompt, joint[len(prompt) :] if together else self._suffix_ids(answer)))
        return pairs

    def _row(self, example: Example, prompt: list[int], answer: list[int], end: list[int], *, as_text: bool) -> Encoded:
        if as_text or not prompt:
            # Nothing comes before the first token, so it cannot be predicted: it is the prompt.
            body = prompt + answer
            prompt, answer = body[:1], body[1:]
            if not prompt:
                prompt, end = end or [0], []
        total = len(prompt) + len(answer) + len(end)
        if total > self.max_length:
            room = self.max_length - len(answer) - len(end)
            if room < 1:
                end, room = [], max(1, self.max_length - len(answer))
                answer = answer[: self.max_length - 1]
            prompt = self._cut_left(prompt, room)
        ids = np.asarray(prompt + answer + end, dtype=np.int32)
        hidden = ids == self.hidden_token if self.hidden_token is not None else np.zeros(1, dtype=bool)
        return Encoded(example, ids, len(prompt), len(answer), total - len(ids), hidden if hidden.any() else None)

    def _cut_left(self, prompt: list[int], room: int) -> list[int]:
        """The last `room` tokens of the prompt; BOS stays in front."""
        if len(prompt) <= room:
            return prompt
        kept = self.prefix if prompt[: len(self.prefix)] == self.prefix and len(self.prefix) < room else []
        return kept + prompt[len(prompt) - (room - len(kept)) :]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _suffix_ids(self, text: str) -> list[int]:
        """Ids of `text` as it stands after other text."""
        if not text:
            return []
        if not self.prepends_space:
            return self._ids([text])[0]
        # Such a tokenizer puts a space in front of a text of its own: a newline takes it.
        anchor, anchored = self._ids(["\n", "\n" + text])
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._ids([text])[0]

    def _prepends_space(self) -> bool:
        ids = self._ids(["x"])[0]
        tokens: list[str] = self.tokenizer.convert_ids_to_tokens(ids)
        return bool(tokens) and tokens[0][:1] in ("▁", "Ġ")

    def _own_prefix(self) -> list[int]:
        """Special tokens that the tokenizer itself puts in front of a text (BOS, if any)."""
        bare = self._ids(["x"])[0]
        full: list[int] = self.tokenizer("x", add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start]
        return []

    @staticmethod
    def _with(prefix: list[int], ids: list[int]) -> list[int]:
        return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids
