"""The page of a search: which merge was chosen, what it was chosen by, and what else was tried."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.document_page import told_record, write_page
from expunge.report.figure_data import Curves, Line
from expunge.report.search_record import PAGE, Estimate, Search, Tried
from expunge.report.text import compact, interval, named, number, percent, plural

#: Rows of the table of the best merges that are not folded away.
_BEST = 10
_ROLES = {"target": "target", "reference": "reference", "input": "specialist"}


def write_search_page(folder: Path, record: Search) -> Path:
    """Write `search.html` into a folder."""
    models = {f"model {place}": {"source": model} for place, model in enumerate(record.models, start=1)}
    info: dict[str, Any] = {"models": {"base": {"source": record.base}, **models}, "seed": record.seed}
    return write_page(folder, search_document(record), told_record(folder, info), PAGE)


def search_document(record: Search) -> Document:
    """The page of a search."""
    return Document(
        kind="search",
        name=" + ".join(map(named, record.models)),
        answer=record.answer,
        rule=(
            f"Fixed beforehand: of the merges that were measured, those that keep {_wanted_keep(record)}; of these the "
            f"one nearest to {_listed(record.aims)}; of equally near ones the one that keeps most."
        ),
        remarks=_remarks(record),
        facts=_facts(record),
        settings=_settings(record),
        command=command(record),
        sections=[_figures(record), _tables(record)],
        limits=_limits(record),
        results={"chosen": record.best.model_dump(mode="json"), "met": record.best.met},
    )


def setting_words(tried: Tried, models: Sequence[str] = ()) -> str:
    """A merge in words: `ties, weights 0.4 and 0.6, density 0.8, scale 1.1`."""
    if tried.kind == "input" and 1.0 in tried.weights and models:
        return f"{named(models[tried.weights.index(1.0)])} alone"
    if not tried.method:
        return tried.kind
    parts = [tried.method, f"weights {' and '.join(_value(weight) for weight in tried.weights)}"]
    parts += [f"density {_value(tried.density)}"] if tried.density is not None else []
    parts += [f"{name} {_value(value)}" for name, value in tried.parameters.items()]
    return ", ".join(parts)


def command(record: Search) -> str:
    """What makes the chosen merge again, without a search."""
    best = record.best
    parts = ["expunge merge", *map(_quoted, record.models), f"--base {_quoted(record.base)}", f"--method {best.method}"]
    parts.append(f"--weights {_flow(best.weights)}")
    parts += [f"--density {_flow(best.density)}"] if best.density is not None else []
    parts += [f"--set {name}={_flow(value)}" for name, value in best.parameters.items()]
    return " ".join([*parts, "-o OUT"])


def best_first(record: Search) -> list[int]:
    """Places of the measured merges: the chosen one, then by what they lack, then by distance."""
    places = [place for place, one in enumerate(record.tried) if one.method and one.distance is not None]

    def key(place: int) -> tuple[Any, ...]:
        one = record.tried[place]
        return (place != record.chosen, not one.met, round(one.shortfall, 9), round(one.distance or 0.0, 9), place)

    return sorted(places, key=key)


def _remarks(record: Search) -> list[str]:
    said = list(record.notes)
    if not record.best.met:
        said.insert(0, "No merge that was tried keeps what had to be kept. What was written is the nearest to it.")
    rows = ", ".join(f"{name} ({plural(count, 'row')})" for name, count in record.rows.items())
    others = f"report on others: {', '.join(record.unused)}" if record.unused else "report on others"
    said.append(f"The search looked at {rows}. What it measures there is the best of many looks; {others}.")
    return said


def _facts(record: Search) -> dict[str, str]:
    best = record.best
    facts = {"Base": named(record.base), "Chosen": setting_words(best, record.models)}
    facts |= {_short(name): number(estimate.value) for name, estimate in best.values.items() if name in record.wanted}
    facts |= {f"Kept, {_short(name)}": percent(part) for name, part in best.kept.items()}
    return {**facts, "Tried": plural(sum(bool(one.method) for one in record.tried), "merge")}


def _settings(record: Search) -> dict[str, str]:
    limit = f", none begun after {compact(record.minutes)} minutes" if record.minutes else ""
    lines = {
        "Aims": _listed(record.aims),
        "Kept": _listed([f"{name} ≥ {number(least)}" for name, least in record.least.items()]),
        "Methods": ", ".join(record.methods),
        "Searched": ", ".join(record.over),
        "Trials": f"{record.trials} by Optuna's TPE, seed {record.seed}{limit}",
        "Rows": ", ".join(f"{name}: {count}" for name, count in record.rows.items()),
        "Scores": f"{record.dtype}, convention {record.convention}",
        "expunge": record.expunge,
    }
    if record.against:
        lines["Holdout rows"] = record.against
    if record.line is not None:
        under, over = (named(record.models[place]) for place in (record.line.under, record.line.over))
        lines["Line"] = f"from {under} (forgets less, t = 0) to {over} (t = 1)"
    return lines


# ---------------------------------------------------------------- figures


def _figures(record: Search) -> Section:
    figures = [*_along(record), *_front(record), *_progress(record)]
    return Section(title="What was traded", figures=figures)


def _along(record: Search) -> list[Curves]:
    """The first aim and what is kept along the line between two models."""
    points = sorted((one for one in record.tried if one.at is not None and one.distance is not None), key=_at)
    if record.line is None or len(points) < 2:
        return []
    name, wanted = next(iter(record.wanted.items()))
    places = [_at(one) for one in points]
    lines = [Line(name=_short(name), role="forget", x=places, y=[one.values[name].value for one in points])]
    for kept in record.least:
        column: list[float | None] = [one.kept.get(kept) for one in points]
        lines.append(Line(name=f"kept, {_short(kept)}", role="retain", x=places, y=column))
    words = ["Base + (1 − t) Δ of the model that forgets less + t Δ of the one that forgets more; dots were measured."]
    return [
        Curves(
            title="Along the line between the two models",
            x_name="t",
            y_name="measured",
            lines=lines,
            y_range=None,
            levels={"aim": wanted},
            marks={f"t = {compact(record.line.at)}": record.line.at},
            words=words,
        )
    ]


def _front(record: Search) -> list[Curves]:
    """The least distance at each level of keeping: a step wherever a merge drops out."""
    name = next(iter(record.least))
    points = [one for one in record.tried if one.method and one.distance is not None]
    levels = sorted({one.kept[name] for one in points})
    if len(levels) < 2:
        return []
    least: list[float | None] = [
        min(one.distance for one in points if one.distance is not None and one.kept[name] >= level) for level in levels
    ]
    whole = record.target.values[name].value or 1.0
    demanded = record.least[name] / whole
    return [
        Curves(
            title="Least distance from the aims at each level of keeping",
            x_name=f"part of the target's {_short(name)} that is kept",
            y_name="distance from the aims",
            lines=[Line(name="least distance", role="result", x=levels, y=least)],
            stepped=True,
            y_range=None,
            marks={f"wanted: {compact(demanded)}": demanded},
            words=["Of all measured merges, those that keep at least so much; what another demand would have cost."],
        )
    ]


def _progress(record: Search) -> list[Curves]:
    """The distance of the best merge that keeps enough, after each one that was measured."""
    best: float | None = None
    column: list[float | None] = []
    for one in record.tried:
        if not one.method:
            continue
        if one.met and one.distance is not None:
            best = one.distance if best is None else min(best, one.distance)
        column.append(best)
    if len([value for value in column if value is not None]) < 2:
        return []
    places = [float(place) for place in range(1, len(column) + 1)]
    return [
        Curves(
            title="Best so far",
            x_name="merges measured",
            y_name="distance from the aims",
            lines=[Line(name="keeps enough", role="result", x=places, y=column)],
            y_range=None,
            words=["Where it still falls at the end, more trials may help."],
        )
    ]


def _at(one: Tried) -> float:
    return one.at or 0.0


# ---------------------------------------------------------------- tables


def _tables(record: Search) -> Section:
    order = best_first(record)
    yardsticks = [place for place, one in enumerate(record.tried) if one.kind in ("target", "reference")]
    inputs = [place for place, one in enumerate(record.tried) if one.kind == "input" and place not in order[:_BEST]]
    first = _table(record, [*order[:_BEST], *inputs, *yardsticks], "The best merges", folded=False)
    tables = [first]
    rest = [place for place in order[_BEST:] if place not in inputs]
    if rest:
        tables.append(_table(record, rest, f"{plural(len(rest), 'further merge')}", folded=True))
    failed = [one for one in record.tried if one.failed]
    if failed:
        columns = [Column(label="Merge", number=False), Column(label="Why", number=False)]
        rows = [
            TableRow(cells=[TableCell(text=setting_words(one, record.models)), TableCell(text=one.failed)])
            for one in failed
        ]
        tables.append(Table(title="Could not be measured", columns=columns, rows=rows, folded=True))
    return Section(title="Numbers", tables=tables)


def _table(record: Search, places: Sequence[int], title: str, folded: bool) -> Table:
    names = list(dict.fromkeys(name for one in record.tried for name in one.values))
    columns = [Column(label="Merge", number=False), Column(label="Distance", arrow="↓", hint="weighted, from the aims")]
    columns += [Column(label=_short(name)) for name in names]
    columns += [Column(label="Kept", under=_short(name), arrow="↑") for name in record.least]
    return Table(
        title=title,
        words="with 95% intervals over rows",
        columns=columns,
        rows=[_row(record, place, names) for place in places],
        folded=folded,
    )


def _row(record: Search, place: int, names: Sequence[str]) -> TableRow:
    one = record.tried[place]
    chosen = place == record.chosen
    under = f"t = {compact(one.at)}" if one.at is not None else ""
    lacking = "" if one.met or one.failed else "keeps too little"
    head = TableCell(text=setting_words(one, record.models), under=under, note=lacking)
    shade: Any = "best" if chosen else ""
    cells = [head, TableCell(text=number(one.distance), shade=shade)]
    cells += [_cell(one.values.get(name), shade) for name in names]
    cells += [TableCell(text=percent(one.kept.get(name)), shade=shade) for name in record.least]
    return TableRow(cells=cells, role="result" if chosen else _ROLES.get(one.kind, ""))


def _cell(found: Estimate | None, shade: Any) -> TableCell:
    if found is None or found.value is None:
        return TableCell(text="–")
    counts = f"n {found.n}" + (f", {found.unscored} unscored" if found.unscored else "")
    ends = interval(found.low, found.high)
    return TableCell(text=number(found.value), under=f"{ends} · {counts}" if ends else counts, shade=shade)


def _limits(record: Search) -> list[str]:
    return [
        "Evidence of tests, not proof of deletion: an aim that is met on these rows may be missed on others.",
        "The chosen merge is the best of many looks at the same rows, so its numbers here flatter it.",
        "The intervals come from drawing rows anew; they hold neither the search nor another training of the models.",
        "Only the scoring pass was made: what the models write by themselves was not looked at.",
    ]


def _wanted_keep(record: Search) -> str:
    return _listed([f"{name} of at least {number(least)}" for name, least in record.least.items()])


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts)


def _short(name: str) -> str:
    """`forget:mia_loss` → `forget, mia loss`."""
    split, _, metric = name.partition(":")
    return f"{split.replace('_', ' ')}, {metric.replace('_', ' ')}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return compact(float(value)) if isinstance(value, int | float) else _plain(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flow(value: Any) -> str:
    """A value for the command line: lists of numbers as they are typed, what is nested as quoted YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:.10g}"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Sequence) and all(isinstance(part, int | float) for part in value):
        return ",".join(f"{part:.10g}" for part in value)
    return f"'{json.dumps(value)}'" if isinstance(value, Mapping | Sequence) else str(value)


def _quoted(text: str) -> str:
    return shlex.quote(text)
