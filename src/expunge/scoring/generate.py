"""The generation pass: greedy or sampled decoding in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from expunge.data.collate import pad_left_prompts
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.forward import evaluating, unwrap
from expunge.scoring.batches import generation_batches
from expunge.scoring.decoding import Decoding, join_prompts
from expunge.scoring.prefix import SharedPrefix, shared_prefix, window
from expunge.scoring.shared_prompts import Prompts, continues_prompts, read_prompts
from expunge.scoring.tables import GENERATIONS

#: A plain text has no question: generation is given its first tokens, at most this many and at most half of it.
TEXT_PROMPT_TOKENS = 32

#: Tokens of prompts that are read at once: what a CPU's cache holds is read faster than more.
_PIECE_TOKENS = {"cpu": 512}
_PIECE_TOKENS_ELSEWHERE = 16_384


@dataclass(frozen=True)
class Sampling:
    """Draw tokens from the model's whole distribution instead of taking the likeliest; `count` texts per row."""

    temperature: float = 1.0
    seed: int = 0
    count: int = 1


@dataclass(frozen=True)
class _Output:
    tokens: list[int]  # without the terminator
    stopped: bool


def generate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Encoded],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
    margin: int | None = None,
    sampling: Sampling | None = None,
    known: pa.Table | None = None,
) -> pa.Table:
    """The GENERATIONS table of `rows`, in their order: greedy, whatever sampling defaults the model brings along.

    With `sampling`, tokens are drawn, and each row has `count` table rows, one after another, with candidates
    row.candidate · count + 0, 1, … A draw depends on the seed, the example's id and the candidate alone: neither on
    how rows are batched or dealt to processes, nor on how many samples there are.

    A row ends at EOS, at any end token that the model declares, at its own terminator, or after `max_new_tokens`.
    With `margin`, a row also ends when it is `margin` tokens longer than its answer: cheaper for models that ramble,
    but it raises their ROUGE-L F1 (less of what is wrong is seen) and can lower recall. `new_tokens` leaves the
    terminator out. `known` is the SCORES table of the same rows under the same model: the first tokens of an answer
    that are all likeliest there are what greedy decoding says, and are not decoded again. Raises UserError if a prompt
    fills the model's context.
    """
    inner = unwrap(model)
    count = 1 if sampling is None else sampling.count
    asked = [row for row in rows for _ in range(count)]
    candidates = [row.example.candidate * count + sample for row in rows for sample in range(count)]
    prompts = [_continuation(row) if row.example.is_text else row for row in asked]
    limits = [
        min(max_new_tokens if margin is None else min(max_new_tokens, row.answer_tokens + margin), _room(inner, row))
        for row in prompts
    ]
    draw = None
    if sampling is not None:
        ids = [row.example.id for row in prompts]
        draw = Drawing(lambda row: _uniforms(sampling.seed, ids[row], candidates[row], limits[row]), sampling)
    drafts = verified(rows, prompts, known) if known is not None and sampling is None else [[] for _ in prompts]
    writer = _Writer(inner, prompts, limits, draw, _end_tokens(inner, tokenizer), _pad_id(tokenizer), drafts)
    with torch.inference_mode(), evaluating(model):
        said = writer.write(batch_size, progress or (lambda _: None))
    outputs = [_cut(tokens, writer.ends, row.terminator_ids) for tokens, row in zip(said, prompts, strict=True)]
    return _table(asked, prompts, candidates, outputs, tokenizer, max_new_tokens)


def verified(rows: Sequence[Encoded], prompts: Sequence[Encoded], known: pa.Table) -> list[list[int]]:
    """Per prompt, the tokens behind it that the SCORES table of its row shows to be said, greedily, from the first."""
    drafts = []
    for row, prompt, hits in zip(rows, prompts, known.column("hit").to_pylist(), strict=True):
        said = hits[prompt.prompt_tokens - row.prompt_tokens :]
        count = said.index(False) if False in said else len(said)
        drafts.append(prompt.input_ids[prompt.prompt_tokens : prompt.prompt_tokens + count].tolist())
    return drafts


class Drawing:
    """Tokens drawn by one uniform number each: the first at which the cumulative probability exceeds it."""

    def __init__(self, uniforms: Callable[[int], np.ndarray], sampling: Sampling) -> None:
        self.uniforms = cache(uniforms)  # of a row: float64 [tokens]
        self.temperature = sampling.temperature

    def __call__(self, rows: Sequence[int], steps: Sequence[int], logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        """The next token of each row, which has said `steps` tokens."""
        total = (logits.float() / self.temperature).softmax(-1).double().cumsum(-1)
        drawn = torch.tensor([self.uniforms(row)[step] for row, step in zip(rows, steps, strict=True)])
        places = torch.searchsorted(total, drawn.to(total.device)[:, None] * total[:, -1:], right=True)
        return places[:, 0].clamp(max=total.shape[-1] - 1)


class _Writer:
    """Continues prompts; models without an ordinary key–value cache do it with `transformers`' own generate."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Encoded],
        limits: Sequence[int],
        draw: Drawing | None,
        ends: list[int],
        pad_id: int,
        drafts: Sequence[Sequence[int]],
    ) -> None:
        self.model, self.limits, self.draw = model, limits, draw
        self.ends, self.pad_id = ends, pad_id
        self.terminators = [prompt.terminator_ids for prompt in prompts]
        self.begun = [self._begun(row, draft) for row, draft in enumerate(drafts)]
        self.prompts = [
            prompt.after(0, prompt.prompt_tokens + len(said)) if said else prompt
            for prompt, said in zip(prompts, self.begun, strict=True)
        ]
        self.open = [row for row, said in enumerate(self.begun) if not self._done(row, said)]
        self.device = next(model.parameters()).device
        self.prefix = SharedPrefix()

    def write(self, batch_size: int, progress: Callable[[int], None]) -> list[list[int]]:
        """What is said after each prompt."""
        progress(len(self.prompts) - len(self.open))
        prompts = [self.prompts[row] for row in self.open]
        # a mask with holes moves positions as `transformers` counts them
        if any(row.hidden is not None for row in prompts) or not continues_prompts(self.model):
            said = [list(tokens) for tokens in self.begun]
            for places in generation_batches(prompts, batch_size):
                index = [self.open[place] for place in places]
                for row, tokens in zip(index, self._by_transformers(index), strict=True):
                    said[row] += tokens
                progress(len(index))
            return said
        narrow = window(self.model)
        longest = max((self.prompts[row].prompt_tokens + self._left(row) for row in self.open), default=0)
        if narrow is None or longest <= narrow:  # else padding behind the prefix would push it out too early
            self.prefix = shared_prefix(self.model, prompts, self.device)
        decoding = Decoding(self.model, self._read, self._choose, self._ended, self.limits, progress, self.begun)
        queue = sorted(self.open, key=lambda i: (-self.prompts[i].prompt_tokens, i))
        return decoding.run(queue, batch_size)

    def _begun(self, row: int, draft: Sequence[int]) -> list[int]:
        """The draft up to where decoding would have ended."""
        said: list[int] = []
        for token in draft:
            if self._done(row, said):
                break
            said.append(token)
        return said

    def _left(self, row: int) -> int:
        """How many tokens the row may still say."""
        return self.limits[row] - len(self.begun[row])

    def _done(self, row: int, said: list[int]) -> bool:
        return len(said) >= self.limits[row] or (bool(said) and self._ended(row, said))

    def _read(self, rows: list[int]) -> tuple[Prompts, list[int]]:
        """The prompts of rows, each once, in pieces of like length that keep the processor busy."""
        first: dict[bytes, int] = {}
        for row in rows:
            first.setdefault(self._key(row), row)
        different = sorted(first.values(), key=lambda row: (-self.prompts[row].prompt_tokens, row))
        pieces: list[list[int]] = []
        tokens = _PIECE_TOKENS.get(self.device.type, _PIECE_TOKENS_ELSEWHERE)
        for row in different:
            if not pieces or self.prompts[pieces[-1][0]].prompt_tokens * (len(pieces[-1]) + 1) > tokens:
                pieces.append([])
            pieces[-1].append(row)
        parts = [
            read_prompts(self.model, [self.prompts[i] for i in piece], self.prefix, self.device, whole=True)
            for piece in pieces
        ]
        place = {self._key(row): number for number, row in enumerate(different)}
        return join_prompts([part for part in parts if part is not None]), [place[self._key(row)] for row in rows]

    def _key(self, row: int) -> bytes:
        prompt = self.prompts[row]
        return prompt.input_ids[: prompt.prompt_tokens].tobytes()

    def _choose(self, rows: Sequence[int], steps: Sequence[int], logits: Tensor) -> Tensor:
        return logits.argmax(-1) if self.draw is None else self.draw(rows, steps, logits)

    def _ended(self, row: int, said: list[int]) -> bool:
        own = self.terminators[row]
        return said[-1] in self.ends or (bool(own) and said[-len(own) :] == own)

    def _by_transformers(self, index: list[int]) -> list[list[int]]:
        rows = [self.prompts[i] for i in index]
        input_ids, attention_mask = pad_left_prompts(rows, self.pad_id)
        width = input_ids.shape[1]
        limit = min(max(map(self._left, index)), _room(self.model, max(rows, key=lambda row: row.prompt_tokens)))
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=limit,
            use_cache=True,
            pad_token_id=self.pad_id,
            eos_token_id=self.ends,
        )
        with _generation_config(self.model, config):
            sequences = self.model.generate(
                input_ids=input_ids.to(self.device),
                attention_mask=attention_mask.to(self.device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_Ended(self, index, width)]),
                logits_processor=LogitsProcessorList([_Drawn(self, index, width)] if self.draw else []),
            )
        new: list[list[int]] = sequences[:, width:].tolist()
        return [tokens[: self._left(i)] for i, tokens in zip(index, new, strict=True)]


class _Ended(StoppingCriteria):
    """Ends a row at its own terminator, which may be several tokens, and at its own limit."""

    def __init__(self, writer: _Writer, index: list[int], width: int) -> None:
        self.writer, self.index, self.width = writer, index, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """bool [B]: the rows that have ended."""
        said = input_ids[:, self.width :].tolist()
        done = [
            self.writer._done(row, self.writer.begun[row] + tokens)
            for row, tokens in zip(self.index, said, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)


class _Drawn(LogitsProcessor):
    """Leaves greedy decoding the drawn token alone."""

    def __init__(self, writer: _Writer, index: list[int], width: int) -> None:
        self.writer, self.index, self.width = writer, index, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float [B, V]: 0 at the drawn token, −inf elsewhere."""
        step = input_ids.shape[1] - self.width
        steps = [min(step, self.writer.limits[row] - 1) for row in self.index]  # rows that have ended go on unread
        tokens = self.writer._choose(self.index, steps, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0)


def _uniforms(seed: int, example: str, candidate: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1), of this example and candidate alone."""
    digest = blake2b(f"{seed}\0{candidate}\0{example}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).random(count)


def _cut(tokens: list[int], ends: list[int], terminator: list[int]) -> _Output:
    """What was said before the first end token or terminator (after it, a finished row is padding)."""
    size = len(terminator)
    for i, token in enumerate(tokens):
        if token in ends or (size and tokens[i : i + size] == terminator):
            return _Output(tokens[:i], stopped=True)
    return _Output(tokens, stopped=False)


def _continuation(row: Encoded) -> Encoded:
    """A text as prompt and answer: its first tokens are given, the rest is to be said."""
    text = row.prompt_tokens + row.answer_tokens
    given = max(1, min(TEXT_PROMPT_TOKENS, text // 2))
    return row.after(0, given)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({int(token) for token in [tokenizer.eos_token_id, *declared] if token is not None})


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def _room(model: Any, row: Encoded) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and row.prompt_tokens >= context:
        raise UserError(
            f"a prompt has {row.prompt_tokens} tokens, but the model's context ends at {context}",
            f"cut the rows with a smaller data.max_length (below {context})",
        )
    return context - row.prompt_tokens if context is not None else 2**31


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    # `generate` fills what `config` leaves open from the model's own defaults (repetition penalty, forced tokens, …)
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _table(
    rows: Sequence[Encoded],
    prompts: list[Encoded],
    candidates: list[int],
    outputs: list[_Output],
    tokenizer: Any,
    max_new_tokens: int,
) -> pa.Table:

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    asked, expected = [], []
    for row, prompt in zip(rows, prompts, strict=True):
        if row.example.is_text:
            given, end = prompt.prompt_tokens, prompt.prompt_tokens + min(prompt.answer_tokens, max_new_tokens)
            asked.append(decode(row.input_ids[:given].tolist()))
            expected.append(decode(row.input_ids[given:end].tolist()))
        else:
            asked.append(row.example.prompt)
            expected.append(row.example.answer)
    columns = {
        "example_id": [row.example.id for row in rows],
        "candidate": candidates,
        "task": [row.example.task for row in rows],
        "prompt": asked,
        "answer": expected,
        "generated": [decode(output.tokens) for output in outputs],
        "new_tokens": [len(output.tokens) for output in outputs],
        "stopped": [output.stopped for output in outputs],
    }
    return pa.Table.from_pydict(columns, schema=GENERATIONS)
