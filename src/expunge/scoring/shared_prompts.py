"""Prompts that several rows share (candidate answers, options, samples), each computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.models.forward import supervised_head, unwrap
from expunge.scoring.prefix import WORTH_IT, Beginning, SharedPrefix, is_plain, picked, shared_prefix, window

_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Prompts:
    """Keys and values of G prompts, each padded on the left to one width behind what all rows share."""

    cache: Any
    seen: Int[Tensor, "G W"]
    tokens: list[int]  # of each prompt, padding left out
    logits: Float[Tensor, "G V"] | None = None  # after the last token, if asked for


@dataclass(frozen=True)
class PromptBlock:
    """The prompts of some groups of rows: a row is given its group's."""

    prompts: Prompts
    group: dict[int, int]  # row → prompt

    def held(self, row: int) -> int:
        """All of the row's prompt but for its last token, which predicts."""
        return self.prompts.tokens[self.group[row]]

    def before(self, index: Sequence[int], width: int, device: torch.device | str) -> tuple[dict[str, Any], Tensor]:
        """See Beginning."""
        chosen = torch.tensor([self.group[row] for row in index], device=device)
        starts = torch.tensor([self.held(row) for row in index], device=device)
        positions = starts[:, None] + torch.arange(width, device=device)
        cache = picked(self.prompts.cache, chosen)
        return {"use_cache": True, "past_key_values": cache, "position_ids": positions}, self.prompts.seen[chosen]


def beginnings(
    model: nn.Module, rows: Sequence[Encoded], batch_size: int, device: torch.device | str
) -> Iterator[tuple[Beginning, list[int]]]:
    """All rows, in parts, each with what is computed beforehand of how its rows begin: first those that share no more
    than all rows do, then, `batch_size` prompts at a time, those that share a prompt."""
    prefix = shared_prefix(model, rows, device)
    groups = prompt_groups(rows, prefix.tokens)
    if groups and not continues_prompts(model):
        groups = []
    shared = {row for group in groups for row in group}
    yield prefix, [row for row in range(len(rows)) if row not in shared]
    narrow = window(model)
    if groups and narrow is not None and max(len(row.input_ids) for row in rows) > narrow:
        prefix = SharedPrefix()  # padding between it and a prompt would push it out of the window too early
    for start in range(0, len(groups), batch_size):
        block = groups[start : start + batch_size]
        members = [row for group in block for row in group]
        prompts = read_prompts(model, [rows[group[0]] for group in block], prefix, device, whole=False)
        place = {row: number for number, group in enumerate(block) for row in group}
        yield SharedPrefix() if prompts is None else PromptBlock(prompts, place), members


def prompt_groups(rows: Sequence[Encoded], shared_by_all: int = 0) -> list[list[int]]:
    """Rows that have all tokens of their prompts in common, longest prompts first; no group of a single row, nor one
    that would save too little."""
    groups: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        if row.supervised_tokens > 0:
            groups.setdefault(row.input_ids[: row.prompt_tokens].tobytes(), []).append(i)
    own = {group[0]: rows[group[0]].prompt_tokens - 1 - shared_by_all for group in groups.values()}
    worth = [group for group in groups.values() if own[group[0]] > 0 and (len(group) - 1) * own[group[0]] >= WORTH_IT]
    return sorted(worth, key=lambda group: -own[group[0]])


def read_prompts(
    model: nn.Module, rows: Sequence[Encoded], prefix: SharedPrefix, device: torch.device | str, *, whole: bool
) -> Prompts | None:
    """One forward over the prompts of rows: `whole` with the logits after them, otherwise without their last token.

    None if the model has no ordinary key–value cache.
    """
    ends = [row.prompt_tokens - (not whole) for row in rows]
    width = max(ends) - prefix.tokens
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    seen, positions = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
        given = slice(prefix.tokens, end)
        own = slice(width - (end - prefix.tokens), None)
        input_ids[i, own] = torch.from_numpy(row.input_ids[given].astype(np.int64))
        seen[i, own] = 1 if row.hidden is None else torch.from_numpy(~row.hidden[given])
        positions[i, own] = torch.arange(prefix.tokens, end)
    _, before = prefix.before(range(len(rows)), width, device)
    seen = torch.cat([before, seen.to(device)], 1)
    last = torch.arange(1, len(rows) + 1, device=device) * width - 1
    with supervised_head(model, last if whole else last[:0]):
        output = model(
            input_ids=input_ids.to(device),
            attention_mask=seen,
            position_ids=positions.to(device),
            past_key_values=prefix.repeated(len(rows)),
            use_cache=True,
        )
    cache = getattr(output, "past_key_values", None)
    if not is_plain(cache):
        return None
    return Prompts(cache, seen, ends, output.logits[0] if whole else None)


@torch.no_grad()
def continues_prompts(model: nn.Module) -> bool:
    """Whether prompts that were padded on the left can be continued from their keys and values: tried on short rows.

    State-space models have no such cache, others compute positions in their own way.
    """
    inner = unwrap(model)
    if inner not in _KNOWN:
        found = _try(model)
        if found is None:  # broken weights: they may be mended
            return False
        _KNOWN[inner] = found
    return _KNOWN[inner]


def _try(model: nn.Module) -> bool | None:
    config: Any = unwrap(model).config.get_text_config()  # type: ignore[union-attr, operator]
    if getattr(config, "attention_chunk_size", None) is not None:  # chunks are counted from the padding on
        return False
    device = next(model.parameters()).device
    ids = (np.arange(11, 24) % config.vocab_size).astype(np.int32)
    rows = [_row(ids[:5], ids[5:8]), _row(ids[8:10], ids[10:13]), _row(ids[8:10], ids[5:8])]
    try:
        prompts = read_prompts(model, rows[:2], SharedPrefix(), device, whole=False)
        if prompts is None:
            return False
        given, seen = PromptBlock(prompts, {0: 0, 1: 1, 2: 1}).before(range(3), 3, device)
        tails = torch.stack([torch.from_numpy(row.input_ids[row.prompt_tokens - 1 : -1]) for row in rows]).to(device)
        together = model(input_ids=tails, attention_mask=torch.cat([seen, torch.ones_like(tails)], 1), **given).logits
        apart = [
            model(input_ids=torch.from_numpy(row.input_ids[None, :-1]).to(device), use_cache=False).logits[0, -3:]
            for row in rows
        ]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False
    expected = torch.stack(apart).float()
    if not torch.isfinite(expected).all():
        return None
    close = 1e-4 if together.dtype in (torch.float32, torch.float64) else 3e-2
    scale = float(expected.abs().max())
    return bool(torch.allclose(together.float(), expected, rtol=0, atol=close * scale))


def _row(prompt: np.ndarray, answer: np.ndarray) -> Encoded:
    return Encoded(Example("", "", ""), np.concatenate([prompt, answer]).astype(np.int64), len(prompt), len(answer), 0)
