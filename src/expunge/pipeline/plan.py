"""Which rows each optimizer step sees, decided before training: the same for any number of processes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from expunge.errors import UserError
from expunge.methods.step import Totals
from expunge.recipe import TrainConfig


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass on one process, and the totals of the optimizer step that it is part of."""

    forget: tuple[int, ...]
    retain: tuple[int, ...]
    totals: Totals


@dataclass(frozen=True)
class Plan:
    """Micro-batches in the order step, accumulation, process."""

    steps: int
    micro_batches: tuple[MicroBatch, ...]

    def rows(self, side: str, rank: int = 0, world: int = 1) -> list[int]:
        """Rows of one side that a process will see, each once, in order of first use."""
        mine = self.micro_batches[rank::world]
        return list(dict.fromkeys(row for batch in mine for row in getattr(batch, side)))


def make_plan(
    forget_tokens: Sequence[int],
    retain_tokens: Sequence[int],
    train: TrainConfig,
    retain_batch: int | None,
    seed: int,
    world: int = 1,
) -> Plan:
    """Steps over rows given by their numbers of tokens that the loss sees.

    Forget rows are a stream of shuffled epochs cut into equal steps; retain rows are an independent stream, so every
    retain row is met. Without forget rows (fine-tuning) the retain stream sets the number of steps.
    """
    leading = forget_tokens or retain_tokens
    batch = min(train.batch_size, len(leading))
    parts = train.accumulation * world
    beside = min(retain_batch or batch, len(retain_tokens)) if forget_tokens else 0
    if batch + beside < parts:
        raise UserError(
            f"a step of {batch + beside} rows can't be split into {parts} parts "
            f"({train.accumulation} micro-batches × {world} processes)",
            "raise train.batch_size, or lower train.accumulation",
        )
    steps = math.ceil(train.epochs * len(leading) / batch)
    if train.max_steps is not None:
        steps = min(steps, train.max_steps)
    forget = _stream(len(forget_tokens), random.Random(f"forget-{seed}"))
    retain = _stream(len(retain_tokens), random.Random(f"retain-{seed}"))
    micro_batches: list[MicroBatch] = []
    for _ in range(steps):
        chosen_forget = [next(forget) for _ in range(batch)] if forget_tokens else []
        chosen_retain = [next(retain) for _ in range(beside if forget_tokens else batch)] if retain_tokens else []
        totals = Totals(
            len(chosen_forget),
            sum(forget_tokens[i] for i in chosen_forget),
            len(chosen_retain),
            sum(retain_tokens[i] for i in chosen_retain),
        )
        # retain rows are dealt from the other end, so that no part gets the larger share of both sides
        shares = zip(
            _deal(chosen_forget, forget_tokens, parts),
            reversed(_deal(chosen_retain, retain_tokens, parts)),
            strict=True,
        )
        micro_batches += [MicroBatch(tuple(a), tuple(b), totals) for a, b in shares]
    return Plan(steps, tuple(micro_batches))


def _stream(count: int, generator: random.Random) -> Iterator[int]:
    while True:
        order = list(range(count))
        generator.shuffle(order)
        yield from order


def _deal(rows: Sequence[int], tokens: Sequence[int], parts: int) -> list[list[int]]:
    """Rows dealt to parts of about equal work, longest first."""
    ordered = sorted(rows, key=lambda row: (-tokens[row], row))
    return [ordered[part::parts] for part in range(parts)]
