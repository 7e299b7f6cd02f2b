"""The tables of models under attack: every attack's point on every subject is a stage that is not done twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expunge.attacks.base import Attack, Lesson, ModelAttack, Point, PromptAttack, SamplingAttack, TrainingAttack, World
from expunge.attacks.prompts import safe, secrets
from expunge.data.encode import Encoded, truncation_note
from expunge.data.example import Example
from expunge.errors import UserError
from expunge.metrics.base import METRICS, Statistic
from expunge.models.load import Loaded
from expunge.pipeline.asked import AT, SAMPLED, Exam, Rows
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.job import Job
from expunge.pipeline.looks import Looks, as_evaluated
from expunge.pipeline.progress import Reporter, Tick
from expunge.pipeline.resolve import rows_digest
from expunge.pipeline.stages import job_inputs
from expunge.pipeline.trainer import DivergedError
from expunge.pipeline.training import fit
from expunge.recipe import LoraConfig, ModelConfig, TrainConfig
from expunge.report.attack_record import Dropped
from expunge.runs.store import RunDirectory
from expunge.scoring.generate import Sampling, generate
from expunge.scoring.scores import score

FORGET = "forget"
#: What "most" means where a row is asked in several ways: per kind of table the metric, the higher the more.
STRENGTH = {"scores": "extraction_strength", "generations": "rouge_l_recall"}


@dataclass(frozen=True)
class Subject:
    """A whole model that is attacked, and the digest of what it is made of."""

    name: str
    config: ModelConfig
    digest: str


@dataclass(frozen=True)
class Rewritten:
    """The rows of a point of a prompt attack, candidates side by side, and what became of the forget rows."""

    rows: Rows
    dropped: Dropped
    notes: list[str]


def place(subject: str, attack: str = "", label: str = "") -> str:
    """Where the tables stand: of a subject as it is, or under a point of an attack."""
    return f"tables/{subject}~{attack}/{label}" if attack else f"tables/{subject}"


class Attacked:
    """Makes tables inside one run directory. What it can't make is in `left_out`: (attack, label, subject) → why."""

    def __init__(
        self,
        directory: RunDirectory,
        exam: Exam,
        world: World,
        rows: Rows,
        views: Rows,
        yardsticks: Mapping[str, str],
        reporter: Reporter,
    ) -> None:
        self.directory, self.exam, self.world, self.reporter = directory, exam, world, reporter
        self.rows = rows  # that are measured
        self.whole = {**rows, **views}  # and the same asked in other ways, where an attack leaves prompts alone
        self.yardsticks = yardsticks  # need → digest of the model that it stands for
        self.left_out: dict[tuple[str, str, str], str] = {}
        self.rewritten: dict[tuple[str, str], Rewritten] = {}
        self.measured: dict[str, frozenset[str]] = {}  # training attack → ids of the forget rows that are measured
        self.taught: set[str] = set()  # training attacks on the very rows that are measured
        self._world_digest = {name: rows_digest(chosen) for name, chosen in world.rows.items()}

    def unattacked(self, subject: Subject, model: LazyModel, generations: bool) -> None:
        """The subject as it is."""
        self._pass(subject, "", "", model, self.whole, {}, generations, lambda: _as_it_is(model))

    def attack(self, subject: Subject, attack: Attack, model: LazyModel) -> None:
        """Every point of an attack on a subject."""
        if isinstance(attack, TrainingAttack):
            self._train(subject, attack)
            return
        for point in attack.points():
            inputs = {"attack": repr(attack), "point": point.label, "seed": self.world.seed}
            name, label = attack.about.name, point.label
            texts = "generations" in attack.about.outputs
            if isinstance(attack, PromptAttack):
                rows = self._asked(attack, point).rows
                if rows:
                    self._pass(subject, name, label, model, rows, inputs, texts, lambda: _as_it_is(model))
            elif isinstance(attack, SamplingAttack):
                drawn = Sampling(seed=self.world.seed, **attack.sampling(point))
                inputs |= {"sampling": repr(drawn)}
                self._pass(subject, name, label, model, self.rows, inputs, True, lambda: _as_it_is(model), drawn)
            elif isinstance(attack, ModelAttack):
                inputs |= {"world": self._world_digest, **self._needed(attack)}
                applied = _applied(attack, point, model, self.world)
                self._pass(subject, name, label, model, self.whole, inputs, texts, applied)

    # ------------------------------------------------------------ rewritten prompts

    def _asked(self, attack: PromptAttack, point: Point) -> Rewritten:
        """The rows of a point; they are the same for every subject."""
        key = (attack.about.name, point.label)
        if key not in self.rewritten:
            self.rewritten[key] = rewrite_rows(attack, point, self.world, self.rows)
            if not self.rewritten[key].rows:
                self.left_out[*key, ""] = "no forget row can be asked in this way"
        return self.rewritten[key]

    # ------------------------------------------------------------ passes

    def _pass(
        self,
        subject: Subject,
        attack: str,
        label: str,
        model: LazyModel,
        rows: Rows,
        inputs: Mapping[str, Any],
        generations: bool,
        opened: Callable[[], Any],
        drawn: Sampling | None = None,
    ) -> None:
        """One stage: the tables of a subject within the context that `opened` gives."""
        config = self.exam.config
        texts = config.generate is not None and generations
        target = place(subject.name, attack, label)
        name = target.removeprefix("tables/")

        def work(folder: Path) -> dict[str, Any]:
            out = folder / "out"
            with self.reporter.bar(name, sum(map(len, rows.values()))) as tick:
                try:
                    with opened() as module:
                        tables = make_tables(module, model.loaded.tokenizer, rows, self.exam, texts, tick, drawn)
                except UserError as error:  # nothing is written yet: it is not about the disk
                    if not attack:
                        raise
                    out.mkdir()
                    return {"left_out": error.message}
            write_tables(tables, out)
            return {}

        settings = config.generate.model_dump() if texts and config.generate is not None else None
        asked = {"dtype": config.dtype, "generate": settings, "rows": _digests(rows)}
        done = self.directory.stage(name, target, {"model": subject.digest, **asked, **inputs}, work)
        if "left_out" in done.outputs:
            self.left_out[attack, label, subject.name] = done.outputs["left_out"]

    # ------------------------------------------------------------ training

    def _train(self, subject: Subject, attack: TrainingAttack) -> None:
        """One training; its points are looked at on the way."""
        name, config = attack.about.name, self.exam.config
        try:
            lesson = attack.lesson(self.world)
        except UserError as error:
            self.left_out[name, "", ""] = error.message
            return
        rows = dict(self.whole)
        shown = {row.example.id for row in lesson.rows}
        if lesson.measured is None and any(row.example.id in shown for row in rows[FORGET]):
            self.taught.add(name)
        if lesson.measured is not None:
            self.measured[name] = lesson.measured
            for split in [split for split in rows if split.partition(AT)[0] == FORGET]:
                rows[split] = [row for row in rows[split] if row.example.id in lesson.measured]
        job = lesson_job(lesson, subject.config, self.world.seed)
        labels = {int(point.budget): point.label for point in attack.points()}
        texts = "generations" in attack.about.outputs and config.generate is not None
        inputs = {"model": subject.digest, "dtype": config.dtype, "rows": _digests(rows), "looks": labels}
        stage = f"{subject.name}~{name}"

        def work(folder: Path) -> dict[str, Any]:
            looked = folder / "looks"

            def look(step: int, module: Any) -> None:
                with as_evaluated(module, config.dtype):
                    tables = make_tables(module, self.world.tokenizer, rows, self.exam, texts, lambda count: None)
                shutil.rmtree(looked / labels[step], ignore_errors=True)
                write_tables(tables, looked / labels[step])

            made = self._fit(job, folder, stage, sorted(labels), look)
            looked.mkdir(exist_ok=True)
            looked.rename(folder / "out")
            return made

        done = self.directory.stage(stage, f"tables/{stage}", {**job_inputs(job), **inputs, "generations": texts}, work)
        for label in labels.values():
            if not (done.path / label).is_dir():
                reason = done.outputs.get("left_out", "its training ended before")
                self.left_out[name, label, subject.name] = reason

    def _fit(
        self, job: Job, folder: Path, name: str, steps: Sequence[int], look: Callable[[int, Any], None]
    ) -> dict[str, Any]:
        with self.reporter.bar(name, max(steps)) as tick:
            last = 0

            def on_step(step: int, terms: Mapping[str, float]) -> None:
                nonlocal last
                tick(step - last, f"loss {terms['loss']:.3f}")
                last = step

            looks = Looks(steps, look)
            try:
                with fit(job, folder, on_step=on_step, callbacks=[looks]) as fitted:
                    return {"steps": fitted.steps}
            except DivergedError as error:
                return {"steps": last, "left_out": error.message}

    def _needed(self, attack: Attack) -> dict[str, str]:
        """Digests of the models beside the subject that the attack may read."""
        return dict(self.yardsticks) if attack.about.needs else {}


def rewrite_rows(attack: PromptAttack, point: Point, world: World, rows: Rows) -> Rewritten:
    """Candidates of every row, those left out that say the row's answer; rows are {} where no forget row has any."""
    kept: dict[str, list[Example]] = {}
    dropped = {"candidates": 0, "rows": 0, "exempt": 0}
    for split, chosen in rows.items():
        kept[split] = []
        for row in chosen:
            example = row.example
            hidden = secrets(example)
            candidates = attack.rewrite(example, point, world)
            if any((other.id, other.answer) != (example.id, example.answer) for other in candidates):
                raise ValueError(f"attack {attack.about.name} changed the id or the answer of row {example.id}")
            good = safe(candidates, hidden)
            kept[split] += good
            if split == FORGET:
                dropped["candidates"] += len(candidates) - len(good)
                dropped["rows"] += not good
                dropped["exempt"] += not hidden
    if not kept.get(FORGET):
        return Rewritten({}, Dropped(**dropped), [])
    encoded = {split: world.encode(examples) for split, examples in kept.items() if examples}
    note = truncation_note(encoded[FORGET])
    return Rewritten(encoded, Dropped(**dropped), [note] if note else [])


def lesson_job(lesson: Lesson, model: ModelConfig, seed: int) -> Job:
    """The training run of a lesson: plain fine-tuning, in float32 weights."""
    batch = min(lesson.batch_size, len(lesson.rows))
    train = TrainConfig(
        epochs=float(ceil(lesson.steps * batch / len(lesson.rows)) + 1),
        max_steps=lesson.steps,
        lr=lesson.lr,
        batch_size=lesson.batch_size,
        weight_decay=lesson.weight_decay,
        warmup=lesson.warmup,
        checkpoint_every=50,
    )
    lora = None if lesson.lora_rank is None else LoraConfig(rank=lesson.lora_rank)
    return Job(model=model, retain=list(lesson.rows), train=train, seed=seed, lora=lora)


def make_tables(
    module: Any, tokenizer: Any, rows: Rows, exam: Exam, texts: bool, tick: Tick, drawn: Sampling | None = None
) -> dict[str, pa.Table]:
    """Tables by `kind/split`: scores of every split, and texts of the forget rows if they are wanted.

    Of a row's candidates, the one with the largest strength is kept. With `drawn`, samples are all that is made.
    """
    settings = exam.config.generate
    limits: dict[str, Any] = {}
    if settings is not None:
        limits = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    tables: dict[str, pa.Table] = {}
    asked = list(rows[FORGET])
    if drawn is None:
        whole = [row for split in rows.values() for row in split]
        table = score(module, whole, batch_size=exam.config.batch_size, progress=tick, tokenizer=tokenizer)
        start = 0
        for split, chosen in rows.items():
            part = table.slice(start, len(chosen))
            start += len(chosen)
            best = list(range(len(part))) if AT in split else strongest(part, "scores")
            tables[f"scores/{split}"] = part.take(pa.array(best, pa.int64()))
            if split == FORGET:
                asked = [chosen[i] for i in best]
    if texts and settings is not None:
        asked = asked[: settings.limit]
        if drawn is None:
            tables[f"generations/{FORGET}"] = generate(module, tokenizer, asked, **limits)
        else:
            samples = generate(module, tokenizer, asked, sampling=drawn, progress=tick, **limits)
            best = strongest(samples, "generations")
            tables[f"generations/{FORGET}{AT}{SAMPLED}"] = samples
            tables[f"generations/{FORGET}"] = samples.take(pa.array(best, pa.int64()))
    return tables


def write_tables(tables: Mapping[str, pa.Table], out: Path) -> None:
    """A parquet file per table; the folder appears whole."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, table in tables.items():
        file = part / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
    out.parent.mkdir(parents=True, exist_ok=True)
    part.rename(out)


def strongest(table: pa.Table, kind: str) -> list[int]:
    """Places of the candidate from which most is extracted, one per example in order of first appearance.

    Ties go to the likelier answer (scores), then to the first candidate; an unscored candidate comes last.
    """
    ids = table.column("example_id").to_pylist()
    if len(set(ids)) == len(ids):
        return list(range(len(ids)))
    apart = table.set_column(0, table.schema.field(0), pa.array([str(i) for i in range(len(ids))], pa.string()))
    values = [_values(apart, STRENGTH[kind])]
    if kind == "scores":
        values.append(_values(apart, "probability"))
    best: dict[str, int] = {}
    for i, example in enumerate(ids):
        if example not in best or [v[i] for v in values] > [v[best[example]] for v in values]:
            best[example] = i
    return list(best.values())


def _values(table: pa.Table, metric: str) -> list[float]:
    found = METRICS.get(metric).compute([table])
    assert not isinstance(found, Statistic)
    return [-1.0 if value != value else float(value) for value in found]


def _applied(attack: ModelAttack, point: Point, model: LazyModel, world: World) -> Callable[[], Any]:
    return lambda: attack.applied(model.loaded.model, point, world)


@contextmanager
def _as_it_is(model: LazyModel) -> Iterator[Any]:
    loaded: Loaded = model.loaded
    yield loaded.model


def _digests(rows: Mapping[str, Sequence[Encoded]]) -> dict[str, str]:
    return {name: rows_digest(chosen) for name, chosen in rows.items()}
