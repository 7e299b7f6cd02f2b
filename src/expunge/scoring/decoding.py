"""Decoding over a key–value cache: rows that have ended leave the batch, waiting ones take their places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expunge.scoring.prefix import picked
from expunge.scoring.shared_prompts import Prompts

#: Rows leave and enter when at least this part of the batch has ended: it copies the cache.
RETIRE = 0.25

#: Columns by which a cache grows at once.
_ROOM = 64

#: From rows, the number of tokens that each has said, and the logits after those: the next token of each.
Choose = Callable[[Sequence[int], Sequence[int], Float[Tensor, "B V"]], Int[Tensor, " B"]]

#: The prompts of some rows, and which of them each row has.
Read = Callable[[list[int]], tuple[Prompts, list[int]]]


class RoomyLayer(DynamicLayer):
    """A growing cache layer that writes behind its last column; `torch.cat` would copy all of it for every token."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; both are views of what is held."""
        start, new = self.keys.shape[-2], key_states.shape[-2]
        if self.room is None or start + new > self.room[0].shape[-2]:
            self.room = (_with_room(self.keys, new), _with_room(self.values, new))
        keys, values = self.room
        keys[:, :, start : start + new] = key_states
        values[:, :, start : start + new] = value_states
        self.keys, self.values = keys[:, :, : start + new], values[:, :, : start + new]
        return self.keys, self.values


@dataclass
class _Batch:
    """Rows that are being continued. Columns of the cache are aligned on the right; on the left is padding."""

    rows: list[int]
    tokens: Int[Tensor, " B"]  # said last, and not yet given to the model
    positions: Int[Tensor, " B"]  # of those tokens
    seen: Int[Tensor, "B W"]
    cache: Any

    def step(self, model: nn.Module) -> Float[Tensor, "B V"]:
        """The logits after the tokens."""
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(self.rows), 1)], 1)
        output = model(
            input_ids=self.tokens[:, None],
            attention_mask=self.seen,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def only(self, places: list[int]) -> _Batch:
        """These rows alone, without columns that none of them sees."""
        at = torch.tensor(places, device=self.seen.device)
        seen = self.seen[at]
        width = seen.shape[1] - int(seen.any(0).int().argmax())
        cache = copy.copy(self.cache)
        cache.layers = [_layer(layer, [(layer.keys[at], layer.values[at])], width) for layer in self.cache.layers]
        rows = [self.rows[place] for place in places]
        return _Batch(rows, self.tokens[at], self.positions[at], seen[:, seen.shape[1] - width :], cache)

    def joined(self, other: _Batch) -> _Batch:
        """The rows of both."""
        width = max(self.seen.shape[1], other.seen.shape[1])
        cache = copy.copy(self.cache)
        cache.layers = [
            _layer(one, [(one.keys, one.values), (two.keys, two.values)], width)
            for one, two in zip(self.cache.layers, other.cache.layers, strict=True)
        ]
        tokens, positions = torch.cat([self.tokens, other.tokens]), torch.cat([self.positions, other.positions])
        seen = torch.cat([_on_the_right(part.seen[:, None, :, None], width)[:, 0, :, 0] for part in (self, other)])
        return _Batch(self.rows + other.rows, tokens, positions, seen, cache)


class Decoding:
    """Continues rows, at most `batch_size` of them at a time; the order in which they are given does not matter for
    what they say. `ended(row, said)` is asked after each token, `done(n)` is told of rows that have ended, and `begun`
    is what each has said already, which `read` has behind its prompt."""

    def __init__(
        self,
        model: nn.Module,
        read: Read,
        choose: Choose,
        ended: Callable[[int, list[int]], bool],
        limits: Sequence[int],
        done: Callable[[int], None],
        begun: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.model, self.read, self.choose = model, read, choose
        self.ended, self.limits, self.done = ended, limits, done
        self.said: list[list[int]] = [[] for _ in limits] if begun is None else [list(said) for said in begun]
        self.running = [True] * len(limits)

    def run(self, queue: Sequence[int], batch_size: int) -> list[list[int]]:
        """The tokens said by each row of the queue."""
        waiting, batch = list(queue), None
        while True:
            rows: list[int] = [] if batch is None else batch.rows
            places = [place for place, row in enumerate(rows) if self.running[row]]
            gone = len(rows) - len(places)
            free = batch_size - len(places)
            enters = bool(waiting) and free >= max(1, RETIRE * batch_size)
            if batch is not None and (enters or gone >= RETIRE * len(rows)):
                batch = batch.only(places) if places and gone else batch if places else None
            if enters:
                taken, waiting = waiting[:free], waiting[free:]
                fresh = self._begin(taken)
                batch = fresh if batch is None else batch.joined(fresh)
                continue  # some may have ended with their first token
            if batch is None:
                return self.said
            self._say(batch, batch.step(self.model))

    def _begin(self, rows: list[int]) -> _Batch:
        prompts, which = self.read(rows)
        assert prompts.logits is not None
        at = torch.tensor(which, device=prompts.seen.device)
        positions = torch.tensor([prompts.tokens[i] for i in which], device=prompts.seen.device)
        cache = picked(prompts.cache, at)
        width = prompts.seen.shape[1]
        cache.layers = [_layer(layer, [(layer.keys, layer.values)], width) for layer in cache.layers]
        batch = _Batch(rows, positions, positions, prompts.seen[at], cache)
        self._say(batch, prompts.logits[at])
        return batch

    def _say(self, batch: _Batch, logits: Tensor) -> None:
        """Choose a token for every row, and see which rows have ended."""
        # a row that has ended stays until there is reason to leave it out: what is chosen for it is not said
        steps = [min(len(self.said[row]), self.limits[row] - 1) for row in batch.rows]
        batch.tokens = self.choose(batch.rows, steps, logits)
        ended = 0
        for row, token in zip(batch.rows, batch.tokens.tolist(), strict=True):
            if self.running[row]:
                said = self.said[row]
                said.append(token)
                self.running[row] = len(said) < self.limits[row] and not self.ended(row, said)
                ended += not self.running[row]
        if ended:
            self.done(ended)


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Prompts that were read apart, as one."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.seen.shape[1] for part in parts)
    cache = copy.copy(parts[0].cache)
    cache.layers = [
        _layer(layers[0], [(layer.keys, layer.values) for layer in layers], width)
        for layers in zip(*(part.cache.layers for part in parts), strict=True)
    ]
    return Prompts(
        cache,
        torch.cat([_on_the_right(part.seen[:, None, :, None], width)[:, 0, :, 0] for part in parts]),
        [tokens for part in parts for tokens in part.tokens],
        torch.cat([part.logits for part in parts if part.logits is not None]),
    )


def _layer(like: DynamicLayer, parts: Sequence[tuple[Tensor, Tensor]], width: int) -> DynamicLayer:
    """A layer of `width` columns that holds the rows of all parts; a sliding layer keeps what it looks back on."""
    sliding = isinstance(like, DynamicSlidingWindowLayer)
    stored = min(width, like.sliding_window - 1) if isinstance(like, DynamicSlidingWindowLayer) else width
    keys, values = (torch.cat([_on_the_right(part[i], stored) for part in parts]) for i in range(2))
    if not sliding:
        return RoomyLayer(keys, values)
    made = copy.copy(like)
    made.keys, made.values = keys, values
    made.cumulative_length = width
    return made


def _on_the_right(states: Tensor, width: int) -> Tensor:
    """[B, H, W, D] with its last columns, and zeros before them where there are too few."""
    missing = width - states.shape[-2]
    return nn.functional.pad(states, (0, 0, missing, 0)) if missing > 0 else states[:, :, -missing:]


def _with_room(states: Tensor, new: int) -> Tensor:
    batch, heads, length, size = states.shape
    room = states.new_empty(batch, heads, length + max(new, _ROOM), size)
    room[:, :, :length] = states
    return room
