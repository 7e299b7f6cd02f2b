"""The generation pass: greedy decoding in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from expunge.data.collate import pad_left_prompts
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.forward import unwrap
from expunge.scoring.batches import evaluating, generation_batches
from expunge.scoring.tables import GENERATIONS

#: A plain text has no question: generation is given its first tokens, at most this many and at most half of it.
TEXT_PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Sampling:
    """Draw tokens from the model's whole distribution instead of taking the likeliest."""

    temperature: float = 1.0
    seed: int = 0


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
) -> pa.Table:
    """The GENERATIONS table of `rows`, in their order: greedy, whatever sampling defaults the model brings along.

    With `sampling`, tokens are drawn; the same rows in the same batches and the same seed give the same texts.

    A row ends at EOS, at any end token that the model declares, at its own terminator, or after `max_new_tokens`.
    With `margin`, a batch also ends `margin` tokens after its longest answer: cheaper for models that ramble, but it
    raises their ROUGE-L F1 (less of what is wrong is seen) and can lower recall. `new_tokens` leaves the terminator
    out. Raises UserError if a prompt fills the model's context.
    """
    inner = unwrap(model)
    prompts = [_continuation(row) if row.example.is_text else row for row in rows]
    ends = _end_tokens(inner, tokenizer)
    outputs: dict[int, _Output] = {}
    with torch.inference_mode(), evaluating(model), torch.random.fork_rng(enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        for index in generation_batches(prompts, batch_size):
            batch = [prompts[i] for i in index]
            limit = max_new_tokens
            if margin is not None:
                limit = min(limit, max(row.answer_tokens for row in batch) + margin)
            decoded = _decode_batch(inner, batch, limit, ends, _pad_id(tokenizer), sampling)
            outputs.update(zip(index, decoded, strict=True))
            if progress is not None:
                progress(len(index))
    return _table(rows, prompts, [outputs[i] for i in range(len(rows))], tokenizer, max_new_tokens)


def _decode_batch(
    model: Any, rows: list[Encoded], limit: int, ends: list[int], pad_id: int, sampling: Sampling | None
) -> list[_Output]:
    input_ids, attention_mask = pad_left_prompts(rows, pad_id)
    width = input_ids.shape[1]
    limit = min(limit, _room(model, width))
    terminators = [row.terminator_ids for row in rows]
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling else {}
    config = GenerationConfig(
        **{"do_sample": False, **drawn},
        num_beams=1,
        max_new_tokens=limit,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=ends,
    )
    device = next(model.parameters()).device
    own_ends = any(end and not (len(end) == 1 and end[0] in ends) for end in terminators)
    criteria = StoppingCriteriaList([_AtTerminator(terminators, width)] if own_ends else [])
    with _generation_config(model, config):
        sequences = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            stopping_criteria=criteria,
        )
    new = sequences[:, width:].tolist()
    return [_cut(tokens, ends, end) for tokens, end in zip(new, terminators, strict=True)]


class _AtTerminator(StoppingCriteria):
    """Ends a row at its own terminator, which may be several tokens."""

    def __init__(self, terminators: list[list[int]], width: int) -> None:
        self.terminators = terminators
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """bool [B]: the rows whose last new tokens are their terminator."""
        longest = max(map(len, self.terminators), default=0)
        tails = input_ids[:, self.width :][:, -longest:].tolist() if longest else [[]] * len(self.terminators)
        done = [bool(end) and tail[-len(end) :] == end for tail, end in zip(tails, self.terminators, strict=True)]
        return torch.tensor(done, device=input_ids.device)


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
    return Encoded(row.example, row.input_ids, given, text - given, row.truncated)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({int(token) for token in [tokenizer.eos_token_id, *declared] if token is not None})


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def _room(model: Any, width: int) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and width >= context:
        raise UserError(
            f"a prompt has {width} tokens, but the model's context ends at {context}",
            f"cut the rows with a smaller data.max_length (below {context})",
        )
    return context - width if context is not None else 2**31


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
    rows: Sequence[Encoded], prompts: list[Encoded], outputs: list[_Output], tokenizer: Any, max_new_tokens: int
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
        "task": [row.example.task for row in rows],
        "prompt": asked,
        "answer": expected,
        "generated": [decode(output.tokens) for output in outputs],
        "new_tokens": [len(output.tokens) for output in outputs],
        "stopped": [output.stopped for output in outputs],
    }
    return pa.Table.from_pydict(columns, schema=GENERATIONS)
