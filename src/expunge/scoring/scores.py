"""The teacher-forced pass: what the model gives every supervised token."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.data.spans import ENTITIES, entity_mask
from expunge.errors import UserError
from expunge.models.forward import capture_head_input, evaluating, supervised_head, unwrap
from expunge.scoring.batches import scoring_batches
from expunge.scoring.divergence import TargetStates, divergence_table, divergences, incomparable
from expunge.scoring.prefix import Beginning
from expunge.scoring.shared_prompts import beginnings
from expunge.scoring.tables import SCORES

#: Bytes of logits that the statistics work on at once. On a CPU they stay in the cache; an accelerator wants more.
_CHUNK_BYTES = {"cpu": 2**20}
_CHUNK_BYTES_ELSEWHERE = 64 * 2**20

#: exp(-1e4) is 0 in float32: raises ruled-out tokens (−inf) to where 0 × log 0 is 0 instead of NaN.
_FLOOR = -1e4


class TokenStatistics(NamedTuple):
    """Per supervised token [N]; the SCORES columns of the same names."""

    logprob: Tensor
    hit: Tensor
    entropy: Tensor
    std_logprob: Tensor


def score(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
    token_budget: int | None = None,
    tokenizer: Any = None,
) -> pa.Table:
    """The SCORES table of `rows`, in their order; values don't depend on how rows are batched. See `score_tables`."""
    return score_tables(
        model,
        rows,
        batch_size=batch_size,
        device=device,
        progress=progress,
        token_budget=token_budget,
        tokenizer=tokenizer,
    )["scores"]


def score_tables(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
    token_budget: int | None = None,
    tokenizer: Any = None,
    keep: TargetStates | None = None,
    against: TargetStates | None = None,
) -> dict[str, pa.Table]:
    """One teacher-forced pass: the table `scores`, and where it can be had `divergence`, both in the order of `rows`.

    What all rows begin with, and prompts that several rows share, go through the model once: give all rows of all
    splits and views together. With a `tokenizer`, the tokens of entities that rows name are marked. `keep` is filled
    with the states of this model, the target; `against` is a target to compare with: without a `divergence` in the
    result, `incomparable(model, rows, against)` says why. The dtype is the model's; statistics are float32.
    `progress` is called with the number of rows just finished. Raises UserError if a row is longer than the context.
    """
    inner: Any = unwrap(model)
    _check_lengths(rows, inner.config)
    device = device or next(model.parameters()).device
    head = inner.get_output_embeddings()
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else inner.config.get_text_config().vocab_size
    if against is not None and incomparable(model, rows, against) is not None:
        against = None
    if keep is not None:
        keep.open(model, rows)
    found = _Found(keep, against)
    with torch.inference_mode(), evaluating(model):
        for beginning, members in beginnings(model, rows, batch_size, device):
            tails = [_tail(rows[i], beginning.held(i)) for i in members]
            for chosen in scoring_batches(tails, batch_size, vocabulary, token_budget):
                _score_batch(model, rows, [members[i] for i in chosen], beginning, device, found)
                if progress is not None:
                    progress(len(chosen))
    if progress is not None and len(found.scores) < len(rows):
        progress(len(rows) - len(found.scores))
    tables = {"scores": scores_table(rows, found.scores, tokenizer)}
    if against is not None:
        tables["divergence"] = divergence_table(rows, found.divergence)
    return tables


@dataclass
class _Found:
    """What the batches of a pass have given so far, by row."""

    keep: TargetStates | None
    against: TargetStates | None
    scores: dict[int, list[np.ndarray]] = field(default_factory=dict)
    divergence: dict[int, np.ndarray] = field(default_factory=dict)

    def compare(self, rows: Sequence[Encoded], index: list[int], logits: Tensor) -> None:
        """The divergence from the target, of those rows of the batch that the target saw."""
        assert self.against is not None
        known = [i for i in index if self.against.knows(rows[i])]
        if not known:
            return
        counts = [rows[i].supervised_tokens for i in index]
        where = np.repeat([self.against.knows(rows[i]) for i in index], counts)
        chosen = logits if len(known) == len(index) else logits[torch.from_numpy(where).to(logits.device)]
        values = divergences(chosen, self.against.take([rows[i] for i in known]), self.against).cpu().numpy()
        ends = np.cumsum([rows[i].supervised_tokens for i in known])[:-1]
        self.divergence.update(zip(known, np.split(values, ends), strict=True))


def token_statistics(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> TokenStatistics:
    """Log-probability and argmax hit of each target, entropy and spread of each distribution, in nats.

    `std_logprob` is the standard deviation of log p under p (Min-K%++, arXiv:2404.02936). float32 logits are
    overwritten: the chunks are worked on in place, and beside them only one more chunk is held.
    """
    size = _CHUNK_BYTES.get(logits.device.type, _CHUNK_BYTES_ELSEWHERE)
    step = max(1, size // (4 * logits.shape[-1]))
    chunks = [
        _chunk_statistics(logits[start : start + step].float(), targets[start : start + step])
        for start in range(0, len(targets), step)
    ]
    return TokenStatistics(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def _chunk_statistics(shifted: Tensor, targets: Tensor) -> TokenStatistics:
    maximum, argmax = shifted.max(dim=-1, keepdim=True)  # the first of equal maxima
    hit = argmax.squeeze(-1) == targets
    shifted.sub_(maximum)
    target = shifted.gather(-1, targets[:, None]).squeeze(-1)
    shifted.clamp_(min=_FLOOR)
    weight = shifted.exp()
    total = weight.sum(-1)
    # vecdot sums in a tree; bmm's dot products lose two digits over a vocabulary
    mean = torch.linalg.vecdot(weight, shifted) / total
    variance = torch.linalg.vecdot(weight, shifted.sub_(mean[:, None]).square_()) / total
    log_total = total.log()
    return TokenStatistics(target - log_total, hit, log_total - mean, variance.sqrt())


def _score_batch(
    model: nn.Module,
    rows: Sequence[Encoded],
    index: list[int],
    beginning: Beginning,
    device: torch.device | str,
    found: _Found,
) -> None:
    # padding is masked out: any id will do
    batch = pad_right([_tail(rows[i], beginning.held(i)) for i in index], index, pad_id=0).to(device)
    # without the last token: it predicts nothing
    given, before = beginning.before(index, batch.input_ids.shape[1] - 1, device)
    vectors: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(supervised_head(model, batch.supervised[:, :-1]))
        if found.keep is not None:
            stack.enter_context(capture_head_input(model, vectors))
        logits = model(
            input_ids=batch.input_ids[:, :-1], attention_mask=torch.cat([before, batch.seen[:, :-1]], 1), **given
        ).logits[0]
    if found.keep is not None:
        found.keep.put(index, vectors[0][0], logits)
    if found.against is not None:
        found.compare(rows, index, logits)
    columns = [column.cpu().numpy() for column in token_statistics(logits, batch.targets.to(logits.device))]
    ends = np.cumsum(batch.lengths.cpu().numpy())[:-1]
    split = zip(*(np.split(column, ends) for column in columns), strict=True)
    found.scores.update(zip(index, map(list, split), strict=True))


def _tail(row: Encoded, held: int) -> Encoded:
    """The row without its first `held` tokens, which are all of its prompt."""
    return row.after(held, row.prompt_tokens - held) if held else row


def _check_lengths(rows: Sequence[Encoded], config: Any) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(row.input_ids) for row in rows), default=0)
    if context is not None and longest > context:
        raise UserError(
            f"a row has {longest} tokens, but the model's context ends at {context}",
            f"cut the rows with data.max_length={context} (cuts are counted and reported)",
        )


def scores_table(rows: Sequence[Encoded], parts: dict[int, list[np.ndarray]], tokenizer: Any) -> pa.Table:
    """The SCORES table of rows, in their order, from the columns of TokenStatistics of each; others are unscored."""
    empty = [np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, np.float32), np.zeros(0, np.float32)]
    ordered = [parts.get(i, empty) for i in range(len(rows))]
    logprob, hit, entropy, std = ([row[column] for row in ordered] for column in range(4))
    columns = {
        "example_id": pa.array([row.example.id for row in rows], pa.string()),
        "candidate": pa.array([row.example.candidate for row in rows], pa.int32()),
        "task": pa.array([row.example.task for row in rows], pa.string()),
        "group": pa.array([_group(row) for row in rows], pa.string()),
        "is_text": pa.array([row.example.is_text for row in rows], pa.bool_()),
        "answer_tokens": pa.array([row.answer_tokens for row in rows], pa.int32()),
        "answer_zlib": pa.array([len(zlib.compress(row.example.answer.encode())) for row in rows], pa.int32()),
        "truncated": pa.array([row.truncated for row in rows], pa.int32()),
        "token_ids": _lists([row.input_ids[row.prompt_tokens :] for row in rows], pa.int32()),
        "logprob": _lists(logprob, pa.float32()),
        "hit": _lists(hit, pa.bool_()),
        "entity": _lists([_entities(row, tokenizer) for row in rows], pa.bool_()),
        "entropy": _lists(entropy, pa.float32()),
        # E_p[log p] is −entropy: it has a column because metrics should not need to know that
        "mean_logprob": _lists([-values for values in entropy], pa.float32()),
        "std_logprob": _lists(std, pa.float32()),
    }
    return pa.Table.from_arrays([columns[name] for name in SCORES.names], schema=SCORES)


def _group(row: Encoded) -> str | None:
    """Whom or what the row is about: rows of one group know of each other."""
    named = (row.example.extra.get(name) for name in ("subject", "document"))
    return next((str(value) for value in named if value not in (None, "")), None)


def _entities(row: Encoded, tokenizer: Any) -> np.ndarray:
    """Bool [supervised tokens]; empty where the row names no entity, or none of its tokens is left."""
    if tokenizer is None or ENTITIES not in row.example.extra:
        return np.zeros(0, dtype=bool)
    try:
        return entity_mask(row, tokenizer)
    except UserError:  # the row is scored all the same: that it names its entities wrongly is for training to refuse
        return np.zeros(0, dtype=bool)


def _lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))
