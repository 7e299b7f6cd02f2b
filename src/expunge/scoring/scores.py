"""The teacher-forced pass: what the model gives every supervised token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.forward import supervised_head, unwrap
from expunge.scoring.batches import evaluating, scoring_batches
from expunge.scoring.prefix import SharedPrefix, shared_prefix
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
) -> pa.Table:
    """The SCORES table of `rows`, in their order; values don't depend on how rows are batched.

    The dtype is the model's; statistics are float32. `progress` is called with the number of rows just finished.
    Raises UserError if a row is longer than the model's context.
    """
    inner: Any = unwrap(model)
    _check_lengths(rows, inner.config)
    device = device or next(model.parameters()).device
    head = inner.get_output_embeddings()
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else inner.config.get_text_config().vocab_size
    parts: dict[int, list[np.ndarray]] = {}
    with torch.inference_mode(), evaluating(model):
        prefix = shared_prefix(model, rows, device)
        for index in scoring_batches(rows, batch_size, vocabulary, token_budget, prefix.tokens):
            parts.update(_score_batch(model, rows, index, prefix, device))
            if progress is not None:
                progress(len(index))
    if progress is not None and len(parts) < len(rows):
        progress(len(rows) - len(parts))
    return _table(rows, parts)


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
    model: nn.Module, rows: Sequence[Encoded], index: list[int], prefix: SharedPrefix, device: torch.device | str
) -> dict[int, list[np.ndarray]]:
    # padding is masked out: any id will do
    batch = pad_right([rows[i] for i in index], index, pad_id=0).to(device)
    # without the beginning that the cache holds, and without the last token: it predicts nothing
    rest = slice(prefix.tokens, -1)
    with supervised_head(model, batch.supervised[:, rest]):
        logits = model(
            input_ids=batch.input_ids[:, rest],
            attention_mask=batch.attention_mask[:, :-1],
            **prefix.inputs(len(index)),
        ).logits[0]
    columns = [column.cpu().numpy() for column in token_statistics(logits, batch.targets.to(logits.device))]
    ends = np.cumsum(batch.lengths.cpu().numpy())[:-1]
    return dict(zip(index, map(list, zip(*(np.split(column, ends) for column in columns), strict=True)), strict=True))


def _check_lengths(rows: Sequence[Encoded], config: Any) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(row.input_ids) for row in rows), default=0)
    if context is not None and longest > context:
        raise UserError(
            f"a row has {longest} tokens, but the model's context ends at {context}",
            f"cut the rows with data.max_length={context} (cuts are counted and reported)",
        )


def _table(rows: Sequence[Encoded], parts: dict[int, list[np.ndarray]]) -> pa.Table:
    empty = [np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, np.float32), np.zeros(0, np.float32)]
    ordered = [parts.get(i, empty) for i in range(len(rows))]
    logprob, hit, entropy, std = ([row[column] for row in ordered] for column in range(4))
    columns = {
        "example_id": pa.array([row.example.id for row in rows], pa.string()),
        "task": pa.array([row.example.task for row in rows], pa.string()),
        "answer_tokens": pa.array([row.answer_tokens for row in rows], pa.int32()),
        "truncated": pa.array([row.truncated for row in rows], pa.int32()),
        "token_ids": _lists([row.input_ids[row.prompt_tokens :] for row in rows], pa.int32()),
        "logprob": _lists(logprob, pa.float32()),
        "hit": _lists(hit, pa.bool_()),
        "entropy": _lists(entropy, pa.float32()),
        # E_p[log p] is −entropy: it has a column because metrics should not need to know that
        "mean_logprob": _lists([-values for values in entropy], pa.float32()),
        "std_logprob": _lists(std, pa.float32()),
    }
    return pa.Table.from_arrays([columns[name] for name in SCORES.names], schema=SCORES)


def _lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))
