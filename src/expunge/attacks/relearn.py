"""Relearning: a little training, and a look at whether what was to go comes back (arXiv:2406.13356, 2410.08827)."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from expunge.attacks.base import Lesson, Point, TrainingAttack, World, attack, setting
from expunge.attacks.prompts import drawing, gives_away, normalised, prompt_text, secrets
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.settings import with_settings

#: Columns that say which document or person a row is about.
DOCUMENT_COLUMNS = ("document", "document_id", "doc_id", "author", "person", "subject", "entity", "title")
#: Splits of a fine-tuning that are not to be forgotten.
_RETAIN = ("retain", "retain_unseen")
#: Ids of LUME's shape: document, kind of row, number.
_DOCUMENT_ID = re.compile(r"(.+?)(?:sc|qa)\d+")


@with_settings
class Relearning(TrainingAttack):
    """What the three attacks share: a budget, and how a step is made."""

    steps: int = setting(40, description="optimizer steps of the largest budget", published="one epoch", gt=0)
    looks: int = setting(4, description="budgets: the steps, their half, a quarter, …", gt=0)
    lr: float | None = setting(
        None,
        description="learning rate; 2e-5, and 2e-4 with lora_rank when absent",
        published="2e-5 (2506.12618, 2406.09179), 2e-4 with LoRA (2409.18025)",
        gt=0,
    )
    batch_size: int = setting(8, description="rows of a step", published="32 (2506.12618), 1 (2409.18025)", gt=0)
    lora_rank: int | None = setting(
        None, description="train adapters of this rank instead of the weights", published="128", gt=0
    )

    def points(self) -> list[Point]:
        """Looks during one training, after fewer steps first."""
        steps = sorted({max(1, round(self.steps / 2**back)) for back in range(self.looks)})
        return [Point(f"{count}steps", count, {"steps": count}) for count in steps]

    def lesson(self, world: World) -> Lesson:
        """The training. Raises UserError where rows are missing."""
        rows, measured = self.chosen(world)
        lr = self.lr or (2e-5 if self.lora_rank is None else 2e-4)
        return Lesson(rows, self.steps, lr, self.batch_size, self.lora_rank, measured=measured)

    @abstractmethod
    def chosen(self, world: World) -> tuple[list[Encoded], frozenset[str] | None]:
        """Rows to train on, and the forget rows to measure (None: all)."""


@attack(
    name="relearn",
    idea="fine-tune on forget rows: how much faster does it come back than the reference learns it?",
    paper="2406.09179, 2506.12618",
    kind="knowledge",
    budget="optimizer steps",
    needs=("forget",),
)
class Relearn(Relearning):
    """Trained on all forget rows, only the difference from the reference counts; on a part, the rest is measured."""

    part: float = setting(
        1.0, description="part of the forget rows that are trained on; below 1 the rest is measured", gt=0, le=1
    )
    beside: Literal["nothing", "retain"] = setting(
        "nothing", description="retain: every retain row is trained on too, as when the model is fine-tuned anew"
    )

    def chosen(self, world: World) -> tuple[list[Encoded], frozenset[str] | None]:
        """A part of the forget rows, drawn by the seed. Raises UserError where nothing would be left."""
        rows = list(world.rows["forget"])
        beside = [row for name in _RETAIN for row in world.rows.get(name, ())] if self.beside == "retain" else []
        count = round(self.part * len(rows))
        if self.part >= 1:
            return [*rows, *beside], None
        drawing(world.seed, "relearn").shuffle(rows)
        return [*rows[:count], *beside], _unseen(rows[count:], [*rows[:count], *beside])


@attack(
    name="benign_relearn",
    idea="fine-tune on rows that hold none of the answers",
    paper="2406.13356, 2411.12103",
    kind="knowledge",
    budget="optimizer steps",
    needs=("forget", "retain"),
)
class BenignRelearn(Relearning):
    """Training on retain or holdout rows alone: what comes back was hidden, not gone."""

    source: Literal["retain", "holdout"] = setting("retain", description="the rows that are trained on")

    def chosen(self, world: World) -> tuple[list[Encoded], frozenset[str] | None]:
        """Rows of the source that say no answer of a forget row."""
        answers = [normalised(row.example.answer) for row in world.rows["forget"] if row.example.answer.strip()]
        given = world.rows.get(self.source, ())
        rows = [row for row in given if not gives_away(_whole(row), answers)]
        if not rows:
            why = f"every {self.source} row says the answer of a forget row" if given else f"no {self.source} rows"
            raise UserError(f"benign_relearn has nothing to train on: {why}", "give other rows to train on")
        return rows, None


@attack(
    name="rtt",
    idea="train on half of the facts, measure on the other half",
    paper="2410.08827",
    kind="knowledge",
    budget="optimizer steps",
    needs=("forget",),
)
class RetrainOnT(Relearning):
    """Retraining on T: the halves are independent, so that what is learnt of one says nothing about the other.

    Rows of one document (or person) stay together; where rows don't say which, they are cut in the middle of the file.
    """

    fold: Literal[0, 1] = setting(0, description="which half is trained on", published="both")

    def chosen(self, world: World) -> tuple[list[Encoded], frozenset[str] | None]:
        """One half, and those rows of the other whose answers the first one does not say."""
        halves = independent_halves(world.rows["forget"], world.seed)
        return halves[self.fold], _unseen(halves[1 - self.fold], halves[self.fold])


def document_of(row: Encoded) -> str | None:
    """What tells a row's document or person from others; None where it does not say."""
    for column in DOCUMENT_COLUMNS:
        value = row.example.extra.get(column)
        if isinstance(value, str | int) and str(value).strip():
            return str(value)
    found = _DOCUMENT_ID.fullmatch(row.example.id)
    return found.group(1) if found else None


def independent_halves(rows: Sequence[Encoded], seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """Two halves of about equal size; a document is in one of them alone."""
    documents: dict[str, list[Encoded]] = {}
    for row in rows:
        name = document_of(row)
        if name is None:  # files hold what belongs together side by side: one document at most is divided
            middle = len(rows) // 2
            return list(rows[:middle]), list(rows[middle:])
        documents.setdefault(name, []).append(row)
    names = sorted(documents)
    drawing(seed, "rtt").shuffle(names)
    halves: tuple[list[Encoded], list[Encoded]] = ([], [])
    for name in sorted(names, key=lambda name: -len(documents[name])):
        min(halves, key=len).extend(documents[name])
    return halves


def _unseen(rows: Sequence[Encoded], trained: Sequence[Encoded]) -> frozenset[str]:
    """Ids of rows whose answers the trained rows don't say. Raises UserError where one side is empty."""
    said = " ".join(normalised(_whole(row)) for row in trained)
    found = frozenset(row.example.id for row in rows if not any(secret in said for secret in _hidden(row)))
    if not trained or not found:
        raise UserError(
            "too few forget rows: some have to be trained on, and others, that those don't answer, measured",
            "give more rows to forget",
        )
    return found


def _hidden(row: Encoded) -> list[str]:
    return secrets(row.example)[:1]  # the whole answer: what is said of an entity elsewhere is no answer


def _whole(row: Encoded) -> str:
    return f"{prompt_text(row.example)}\n{row.example.answer}"
