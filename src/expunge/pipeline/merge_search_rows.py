"""What the search of a merge is asked: aims and constraints that its rows can answer, and those rows in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expunge.data.encode import Encoded
from expunge.data.example import Role, Split, Splits
from expunge.errors import UserError, did_you_mean
from expunge.metrics.base import METRICS, Need
from expunge.pipeline.asked import AT, ask, exam_of
from expunge.recipe import Aim, DataConfig, EvaluateConfig, Keep, SearchConfig
from expunge.recipe.conventions import Convention

#: The split that metrics of membership name; another one may stand for it.
HOLDOUT = "holdout"
#: What is kept when nothing else is asked for.
DEFAULT_KEEP = Keep(split="retain", metric="extraction_strength", part=0.95)


@dataclass(frozen=True)
class SearchRows:
    """Aims, constraints, and the rows of all tables that they need, by `split` or `split@view`."""

    aims: tuple[Aim, ...]
    keep: tuple[Keep, ...]
    rows: Mapping[str, Sequence[Encoded]]
    roles: Mapping[str, Role]
    against: str | None  # the split that stands for the holdout rows; None where no metric asks for them
    needs_reference: bool
    unused: tuple[str, ...]  # splits that the search does not look at
    convention: Convention
    evaluate: EvaluateConfig
    notes: tuple[str, ...] = ()

    @property
    def measures(self) -> tuple[tuple[str, str], ...]:
        """(split, metric), each once: the aims first."""
        entries: list[Aim | Keep] = [*self.aims, *self.keep]
        return tuple(dict.fromkeys((entry.split, entry.metric) for entry in entries))


def search_rows(
    search: SearchConfig,
    splits: Splits,
    tokenizer: Any,
    data: DataConfig,
    evaluate: EvaluateConfig,
    has_reference: bool,
) -> SearchRows:
    """Fill in what is not said, check every aim and constraint, encode the rows. Raises UserError."""
    against = _against(search, splits)
    aims = tuple(search.aims) or (_default_aim(splits, against, has_reference),)
    keep = tuple(search.keep) or (DEFAULT_KEEP,)
    entries: list[Aim | Keep] = [*aims, *keep]
    for entry in entries:
        _check(entry, splits, against, has_reference)
    measures = dict.fromkeys((entry.split, entry.metric) for entry in entries)
    needs = [(split, need) for split, metric in measures for need in METRICS.get(metric).addresses]
    wanted = dict.fromkeys(place_of(need, split, against) for split, need in needs)
    tables = {need.table for _, need in needs}
    chosen = Splits({name: _cut(splits[name], search.limit) for name in wanted})
    exam = exam_of(evaluate.model_copy(update={"generate": None, "metrics": None}), data.benchmark)
    asked = ask(replace(exam, tables=frozenset({"scores", *tables})), chosen, tokenizer, data)
    rows = {name: asked.scores[name] for name in _needed(measures, against, asked.scores)}
    asks_holdout = any(need.split == HOLDOUT for _, need in needs)
    return SearchRows(
        aims=aims,
        keep=keep,
        rows=rows,
        roles={split.name: split.role for split in splits},
        against=against if asks_holdout else None,
        needs_reference=any(need.variant == "reference" for _, need in needs)
        or any(aim.value == "reference" for aim in aims),
        unused=tuple(split.name for split in splits if split.name not in wanted and len(split) and split.evaluated),
        convention=exam.convention,
        evaluate=exam.config,
        notes=tuple(note for note in asked.notes() if note.partition(": ")[0] in rows),
    )


def _against(search: SearchConfig, splits: Splits) -> str | None:
    """The split that stands for the holdout rows: as said, else one that the report does not use."""
    if search.holdout is not None:
        if search.holdout not in splits:
            raise UserError(
                f"there is no split '{search.holdout}' to compare the forget rows with",
                did_you_mean(search.holdout, [split.name for split in splits]),
            )
        return search.holdout
    names = [split.name for split in splits if split.role == "holdout" and len(split)]
    return next((name for name in names if name != HOLDOUT), names[0] if names else None)


def _default_aim(splits: Splits, against: str | None, has_reference: bool) -> Aim:
    """AUC of the loss 0.5, of the first forget rows of the holdout's kind; else extraction strength 0."""
    if against is not None:
        kinds = _kinds(splits[against])
        names = [split.name for split in splits if split.role == "forget" and len(split) and _kinds(split) == kinds]
        if names:
            chosen = "forget" if "forget" in names else names[0]
            return Aim(split=chosen, metric="mia_loss", value=0.5)
    wanted: Any = "reference" if has_reference else 0.0
    return Aim(split="forget", metric="extraction_strength", value=wanted, side="<=")


def _check(entry: Aim | Keep, splits: Splits, against: str | None, has_reference: bool) -> None:
    """Raises UserError for a split, metric or table that a search can't have."""
    metric = METRICS.get(entry.metric)
    named = f"{entry.split}:{entry.metric}"
    if entry.split not in splits:
        hint = did_you_mean(entry.split, [split.name for split in splits])
        flag = f"; or give --{entry.split} FILE" if entry.split in ("forget", "retain", HOLDOUT) else ""
        raise UserError(f"{named}: there are no rows called {entry.split}", f"{hint}{flag}")
    split = splits[entry.split]
    if split.role not in metric.roles:
        hint = f"it speaks of {', '.join(metric.roles)} rows"
        raise UserError(f"{named}: {metric.name} has nothing to say of {split.role} rows", hint)
    for need in metric.addresses:
        _check_need(named, need.table, need.variant, has_reference)
        other = place_of(need, entry.split, against)
        if other not in splits:
            raise UserError(f"{named} needs {need.split} rows", f"give them: --{need.split} FILE")
        if metric.one_kind and _kinds(splits[other]) != _kinds(split):
            raise UserError(
                f"{named} compares rows of one kind, and of {entry.split} and {other} one holds plain texts",
                "compare other rows: --against SPLIT, or another split in --aim",
            )
    if isinstance(entry, Aim) and entry.value == "reference" and not has_reference:
        raise UserError(f"{named} is to be what the reference has, and there is none", "give it: --reference MODEL")
    if isinstance(entry, Keep) and metric.direction(split.role) != "higher":
        raise UserError(
            f"{named}: a part of it can't be kept, for higher values of {metric.name} are not better there",
            "for instance: --keep retain:extraction_strength=0.95",
        )


def _check_need(named: str, table: str, variant: str | None, has_reference: bool) -> None:
    kind = table.partition("/")[0]
    if kind != "scores":
        raise UserError(
            f"{named} needs {kind}, and a search makes the scoring pass alone",
            "choose a metric made from scores, such as extraction_strength or mia_loss: expunge list metrics NAME",
        )
    if variant == "reference" and not has_reference:
        raise UserError(f"{named} needs a reference model", "give it: --reference MODEL")


def _needed(
    measures: Mapping[tuple[str, str], None], against: str | None, made: Mapping[str, Sequence[Encoded]]
) -> list[str]:
    """The rows of every table that is needed, by `split` or `split@view`. Raises UserError for a view without rows."""
    names: dict[str, None] = {}
    for split, metric in measures:
        for need in METRICS.get(metric).addresses:
            of, view = place_of(need, split, against), need.table.partition("/")[2]
            name = f"{of}{AT}{view}" if view else of
            if not made.get(name):
                what = f"no rows of {of} that can be asked as {view}" if view else f"no rows of {of}"
                raise UserError(f"{split}:{metric}: there are {what}", "choose another metric, or give such rows")
            names[name] = None
    return list(names)


def place_of(need: Need, split: str, against: str | None) -> str:
    """The split whose rows a table is about, for a metric of `split`."""
    if need.split is None:
        return split
    return against or HOLDOUT if need.split == HOLDOUT else need.split


def _cut(split: Split, limit: int | None) -> Split:
    return replace(split, examples=split.examples[:limit], evaluated=True)


def _kinds(split: Split) -> frozenset[bool]:
    return frozenset(example.is_text for example in split.examples)
