"""A run directory, read: one small typed record that the page, the model card and the terminal table share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from expunge.errors import UserError
from expunge.recipe import load_recipe
from expunge.recipe.model import Recipe, Thresholds

Kind = Literal["original", "target", "specialist", "result", "reference", "other"]

#: The metric that the verdicts, the plot and the order of the samples rest on.
MAIN = "extraction_strength"

RESERVED = ("original", "target", "merged", "reference")
#: Numbers of a train event that are no term of the loss.
_NOT_TERMS = ("step", "steps", "epoch", "lr", "grad_norm", "seconds", "loss", "tokens")


@dataclass(frozen=True, slots=True)
class Measure:
    """One record of metrics.json. `value` and the interval are None where nothing could be scored."""

    variant: str
    split: str
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    unscored: int
    direction: str
    anchored: float | None = None  # (value − reference) / (target − reference)
    anchored_low: float | None = None
    anchored_high: float | None = None
    over_unlearned: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss terms of one training stage: term → (steps, values), finite points only."""

    stage: str
    terms: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says. Anything may be absent; `problems` says in words what could not be read."""

    path: Path
    info: Mapping[str, Any]
    recipe: Recipe | None
    recipe_text: str
    measures: tuple[Measure, ...]
    curves: tuple[Curve, ...]
    problems: tuple[str, ...] = ()
    _by_key: Mapping[tuple[str, str, str], Measure] = field(default_factory=dict, repr=False)
    _values: dict[str, pa.Table | None] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.info.get("name") or (self.recipe.name if self.recipe else "") or self.path.resolve().name)

    @property
    def status(self) -> str:
        """`done`, or how far it got."""
        return str(self.info.get("status") or "unknown")

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds of the recipe, or the defaults."""
        return self.recipe.thresholds if self.recipe else Thresholds.model_validate({})

    @property
    def seed(self) -> int:
        """The run's seed."""
        seed = self.info.get("seed")
        return seed if isinstance(seed, int) else (self.recipe.seed if self.recipe else 0)

    @property
    def variants(self) -> list[str]:
        """Measured variants: original, target, each unlearned model, merged, reference, then any other."""
        seen = dict.fromkeys(measure.variant for measure in self.measures)
        names = [entry.name for entry in self.recipe.unlearn] if self.recipe else []
        names = names or [name for name in seen if name not in RESERVED]
        order = dict.fromkeys(["original", "target", *names, "merged", "reference", *seen])
        return [name for name in order if name in seen]

    @property
    def splits(self) -> list[str]:
        """Measured splits: forget, retain, retain_unseen, holdout, then any other."""
        seen = dict.fromkeys(measure.split for measure in self.measures)
        return [name for name in dict.fromkeys(["forget", "retain", "retain_unseen", "holdout", *seen]) if name in seen]

    @property
    def metrics(self) -> list[str]:
        """Measured metrics, the main one first."""
        seen = dict.fromkeys(measure.metric for measure in self.measures)
        return [name for name in dict.fromkeys([MAIN, *seen]) if name in seen]

    @property
    def result(self) -> str | None:
        """The variant that the run was made for: the merge, or the only unlearned model."""
        if self.recipe is not None:
            return "merged" if self.recipe.merge else self.recipe.unlearn[0].name
        if self.info.get("result") or "merged" in self.variants:
            return str(self.info.get("result") or "merged")
        return next((name for name in self.variants if name not in RESERVED), None)

    @property
    def target(self) -> str | None:
        """The variant that knows the forget rows (without a prepare stage it may be called original)."""
        return next((name for name in ("target", "original") if name in self.variants), None)

    @property
    def reference(self) -> str | None:
        """The variant that never saw the forget rows, if it was measured."""
        return "reference" if "reference" in self.variants else None

    def kind(self, variant: str) -> Kind:
        """What part a variant plays."""
        if variant == self.result:
            return "result"
        if variant == self.target:
            return "target"
        if variant in ("original", "reference"):
            return variant  # type: ignore[return-value]
        names = [entry.name for entry in self.recipe.unlearn] if self.recipe else []
        return "specialist" if variant in names else "other"

    @property
    def holds_out(self) -> bool:
        """Whether some retain rows were held out of training, to scale the update by."""
        return self.recipe is not None and any(entry.keep is not None for entry in self.recipe.unlearn)

    def role(self, split: str) -> str:
        """forget, retain, holdout or utility."""
        given = mapping(mapping(self.info.get("data")).get(split)).get("role")
        if given:
            return str(given)
        if self.recipe and split in self.recipe.data.splits:
            return self.recipe.data.splits[split].role
        return next((role for role in ("forget", "retain", "holdout") if split.startswith(role)), "utility")

    def get(self, variant: str | None, split: str, metric: str = MAIN) -> Measure | None:
        """The measure, or None where it was not taken or nothing could be scored."""
        measure = self._by_key.get((variant or "", split, metric))
        return measure if measure is not None and measure.value is not None else None

    def values(self, variant: str | None, split: str, metric: str = MAIN) -> dict[str, float]:
        """Scored values by example id; empty when values.parquet has none."""
        if metric not in self._values:
            self._values[metric] = self._read_values(metric)
        table = self._values[metric]
        if table is None or variant is None:
            return {}
        mine = table.filter(pc.and_(pc.equal(table["variant"], variant), pc.equal(table["split"], split)))
        pairs = zip(mine["example_id"].to_pylist(), mine["value"].to_pylist(), strict=True)
        return {name: value for name, value in pairs if value is not None and math.isfinite(value)}

    def generated_ids(self, variant: str | None, split: str) -> list[str]:
        """Ids of the rows that were generated, in the order of the file."""
        path = self._generations(variant, split)
        return _parquet(path, columns=["example_id"])["example_id"].to_pylist() if path else []

    def generations(self, variant: str | None, split: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Rows of the generation pass by example id, the given ones only."""
        path = self._generations(variant, split)
        if path is None or not ids:
            return {}
        columns = ["example_id", "prompt", "answer", "generated"]
        rows = _parquet(path, columns=columns, filters=[("example_id", "in", list(ids))]).to_pylist()
        return {row["example_id"]: row for row in rows}

    def _generations(self, variant: str | None, split: str) -> Path | None:
        path = self.path / "generations" / (variant or "") / f"{split}.parquet"
        return path if variant and path.is_file() else None

    def _read_values(self, metric: str) -> pa.Table | None:
        path = self.path / "values.parquet"
        if not path.is_file():
            return None
        return _parquet(path, columns=["variant", "split", "example_id", "value"], filters=[("metric", "=", metric)])


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one: run.json may lack any part."""
    return value if isinstance(value, Mapping) else {}


def read_run(path: Path) -> RunRecord:
    """Read a run directory (never its weights). Raises UserError where there is no run, or a file of it is broken."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no run directory at {path}", "make one with: expunge demo, or: expunge run recipe.yaml")
    if not any((path / name).is_file() for name in ("run.json", "metrics.json")):
        raise UserError(
            f"{path} is not a run directory: it has neither run.json nor metrics.json", "see: expunge runs ."
        )
    problems: list[str] = []
    info = _json(path / "run.json", problems)
    if not isinstance(info, dict):
        info = {}
    recipe, text = _recipe(path / "recipe.resolved.yaml", problems)
    measures = tuple(_measures(path / "metrics.json", problems))
    return RunRecord(
        path=path,
        info=info,
        recipe=recipe,
        recipe_text=text,
        measures=measures,
        curves=tuple(_curves(path / "events.jsonl", problems)),
        problems=tuple(problems),
        _by_key={(m.variant, m.split, m.metric): m for m in measures},
    )


def _json(path: Path, problems: list[str]) -> Any:
    if not path.is_file():
        problems.append(f"{path.name} is missing.")
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{path}{line} is not valid JSON", "run the same recipe again: it writes the file anew"
        ) from None


def _recipe(path: Path, problems: list[str]) -> tuple[Recipe | None, str]:
    if not path.is_file():
        problems.append("recipe.resolved.yaml is missing: the default thresholds are used.")
        return None, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return load_recipe(path), text
    except UserError as error:
        problems.append(f"The recipe could not be read ({error.message}): the default thresholds are used.")
        return None, text


def _measures(path: Path, problems: list[str]) -> Iterator[Measure]:
    records = _json(path, problems)
    if records is None:
        return
    try:
        for record in records:
            yield Measure(
                variant=str(record["variant"]),
                split=str(record["split"]),
                metric=str(record["metric"]),
                value=_finite(record["value"]),
                ci_low=_finite(record.get("ci_low")),
                ci_high=_finite(record.get("ci_high")),
                n=int(record.get("n") or 0),
                unscored=int(record.get("unscored") or 0),
                direction=str(record.get("direction") or "none"),
                anchored=_finite(record.get("anchored")),
                anchored_low=_finite(record.get("anchored_low")),
                anchored_high=_finite(record.get("anchored_high")),
                over_unlearned=record.get("over_unlearned") is True,
                note=str(record.get("note") or ""),
            )
    except (KeyError, TypeError, ValueError, AttributeError):
        hint = "run the same recipe again: it writes the file anew"
        raise UserError(f"{path} is not a list of metric records", hint) from None


def _curves(path: Path, problems: list[str]) -> list[Curve]:
    """Train events by stage. A step that comes again (a resumed or repeated stage) replaces what came after it."""
    if not path.is_file():
        problems.append("events.jsonl is missing: there are no training curves.")
        return []
    stages: dict[str, dict[float, dict[str, float]]] = {}
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            # cheap test first: a long run's log is mostly lines of other kinds or very many of this one
            if '"train"' not in line:
                continue
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                broken += 1
                continue
            if isinstance(event, dict) and event.get("event") == "train" and _finite(event.get("step")) is not None:
                _add_step(stages.setdefault(str(event.get("stage", "train")), {}), event)
    if broken:
        problems.append(f"{broken} line(s) of events.jsonl could not be read and are left out.")
    return [_curve(stage, steps) for stage, steps in stages.items()]


def _add_step(steps: dict[float, dict[str, float]], event: Mapping[str, Any]) -> None:
    step = float(event["step"])
    if steps and step <= next(reversed(steps)):
        for later in [known for known in steps if known >= step]:
            del steps[later]
    numbers = {key: _finite(value) for key, value in event.items() if key not in ("event", "stage", "time")}
    steps[step] = {key: value for key, value in numbers.items() if value is not None}


def _curve(stage: str, steps: Mapping[float, Mapping[str, float]]) -> Curve:
    names = dict.fromkeys(name for numbers in steps.values() for name in numbers)
    terms = [name for name in names if name.startswith(("forget", "retain"))]
    terms = terms or [name for name in names if name not in _NOT_TERMS] or [name for name in names if name == "loss"]
    found = {}
    for term in terms:
        points = [(step, numbers[term]) for step, numbers in steps.items() if term in numbers]
        found[term] = (tuple(x for x, _ in points), tuple(y for _, y in points))
    return Curve(stage, found)


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _parquet(path: Path, **options: Any) -> pa.Table:
    try:
        return pq.read_table(path, **options)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError):
        hint = "run the same recipe again: it writes the file anew"
        raise UserError(f"{path} could not be read as a Parquet table", hint) from None
