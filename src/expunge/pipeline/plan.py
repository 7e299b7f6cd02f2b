"""Which rows each optimizer step sees, decided before training: the same for any number of processes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from expunge.errors import UserError
from expunge.methods.step import SIDES, Totals
from expunge.recipe import TrainConfig


@dataclass(frozen=True)
class Sides:
    """Numbers of the rows of each side in a job's one list of rows, and the tokens that the loss sees of each row."""

    tokens: Sequence[int]
    forget: Sequence[int] = ()
    retain: Sequence[int] = ()
    #: numbers of the alternatives of each row that has some
    alternatives: Mapping[int, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """Rows by side of one forward pass on one process, and the totals of the optimizer step that it is part of."""

    rows: Mapping[str, tuple[int, ...]]
    totals: Totals


@dataclass(frozen=True)
class Plan:
    """Micro-batches in the order step, accumulation, process."""

    steps: int
    micro_batches: tuple[MicroBatch, ...]
    #: steps at which a new chunk of forget rows begins, with a fresh optimizer and schedule; the first is 0
    restarts: tuple[int, ...] = (0,)

    def rows(self, *sides: str, rank: int = 0, world: int = 1) -> list[int]:
        """Rows of some sides that a process will see, each once, in order of first use."""
        mine = self.micro_batches[rank::world]
        return list(dict.fromkeys(row for batch in mine for side in sides for row in batch.rows[side]))

    def uses(self, rank: int = 0, world: int = 1) -> int:
        """Rows that a process passes through the model, repetitions included."""
        return sum(len(rows) for batch in self.micro_batches[rank::world] for rows in batch.rows.values())


def make_plan(
    sides: Sides,
    train: TrainConfig,
    seed: int,
    *,
    retain_batch: int | None = None,
    retain_ratio: int = 1,
    chunk: int | None = None,
    world: int = 1,
    reads_forget: bool = True,
) -> Plan:
    """Steps over the rows of a job.

    Forget rows are a stream of shuffled epochs cut into equal steps; retain rows are an independent stream, so every
    retain row is met. Without forget rows (fine-tuning) the retain stream sets the number of steps. With `chunk`, the
    forget rows are cut into chunks of that many rows, each trained on for all epochs before the next one comes. Unless
    the loss `reads_forget`, forget rows are in no step: they only say how many steps there are.
    """
    leading = sides.forget or sides.retain
    steps = _Steps(sides, train, seed, retain_batch, retain_ratio, world, reads_forget)
    restarts = []
    for start in range(0, len(leading), chunk or max(len(leading), 1)):
        restarts.append(steps.count)
        steps.add(leading[start : start + chunk] if chunk else leading)
    return Plan(steps.count, tuple(steps.micro_batches), tuple(step for step in restarts if step < steps.count))


class _Steps:
    """Steps so far, and the streams that the next ones draw from."""

    def __init__(
        self,
        sides: Sides,
        train: TrainConfig,
        seed: int,
        retain_batch: int | None,
        retain_ratio: int,
        world: int,
        reads_forget: bool,
    ) -> None:
        self.sides, self.train, self.seed = sides, train, seed
        self.reads_forget = reads_forget
        self.retain_batch, self.retain_ratio = retain_batch, retain_ratio
        self.parts = train.accumulation * world
        self.micro_batches: list[MicroBatch] = []
        self.count = 0
        self.retain = _stream(sides.retain, random.Random(f"retain-{seed}"))
        self.used: dict[int, int] = {}

    def add(self, leading: Sequence[int]) -> None:
        """All epochs over these rows."""
        sides, train = self.sides, self.train
        batch = min(train.batch_size, len(leading))
        beside = min(self.retain_batch or batch * self.retain_ratio, len(sides.retain)) if sides.forget else 0
        self._check_split((batch if self.reads_forget or not sides.forget else 0) + beside)
        steps = math.ceil(train.epochs * len(leading) / batch) if batch else 0
        if train.max_steps is not None:
            steps = min(steps, train.max_steps - self.count)
        forget = _stream(leading, random.Random(f"forget-{self.seed}")) if sides.forget else iter(())
        for step in range(steps):
            first = [next(forget) for _ in range(batch)] if sides.forget else []
            second = [next(self.retain) for _ in range(beside if sides.forget else batch)] if sides.retain else []
            self._step(first if self.reads_forget else [], second, epoch=step * batch // len(leading))

    def _step(self, forget: Sequence[int], retain: Sequence[int], epoch: int) -> None:
        first, second = ([self._beside(row) for row in rows] for rows in (forget, retain))
        chosen = _by_side(first, second)
        tokens = self.sides.tokens
        totals = Totals(
            {side: len(rows) for side, rows in chosen.items()},
            {side: sum(tokens[row] for row in rows) for side, rows in chosen.items()},
            self.count,
            epoch,
        )
        # retain rows are dealt from the other end, so that no part gets the larger share of both sides
        shares = zip(_deal(first, tokens, self.parts), reversed(_deal(second, tokens, self.parts)), strict=True)
        self.micro_batches += [MicroBatch(_by_side(a, b), totals) for a, b in shares]
        self.count += 1

    def _beside(self, row: int) -> tuple[int, ...]:
        """The row, and another one of its alternatives each time that it is used."""
        choices = self.sides.alternatives.get(row)
        if not choices:
            return (row,)
        self.used[row] = self.used.get(row, -1) + 1
        return row, choices[self.used[row] % len(choices)]

    def _check_split(self, rows: int) -> None:
        if rows < self.parts:
            raise UserError(
                f"a step of {rows} rows can't be split into {self.parts} parts "
                f"({self.train.accumulation} micro-batches × {self.parts // self.train.accumulation} processes)",
                "raise train.batch_size, or lower train.accumulation",
            )


def _stream(rows: Sequence[int], generator: random.Random) -> Iterator[int]:
    while True:
        order = list(rows)
        generator.shuffle(order)
        yield from order


def _by_side(forget: Sequence[tuple[int, ...]], retain: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Rows by side out of rows with what is beside them."""
    parts = [tuple(both[place] for both in side if len(both) > place) for side in (forget, retain) for place in (0, 1)]
    return dict(zip(SIDES, parts, strict=True))


def _deal(rows: Sequence[tuple[int, ...]], tokens: Sequence[int], parts: int) -> list[list[tuple[int, ...]]]:
    """Rows (with what is beside them) dealt to parts of about equal work, longest first."""
    ordered = sorted(rows, key=lambda both: (-sum(tokens[row] for row in both), both))
    return [ordered[part::parts] for part in range(parts)]
