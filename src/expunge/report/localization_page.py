"""The page of a mask: which part of a model was chosen, where its units lie, and how high they score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.document_page import told_record, write_page
from expunge.report.figure_data import Heat
from expunge.report.localization_record import Agreement, Localization, Place, beside
from expunge.report.text import compact, duration, grouped, listed, named, number, percent, plural

#: unit of a recipe → what one is called, and several are
_UNITS = {
    "weight": ("weight", "weights"),
    "value_vector": ("value vector", "value vectors"),
    "neuron": ("neuron", "neurons"),
    "head": ("attention head", "attention heads"),
    "module": ("module", "modules"),
    "layer": ("layer", "layers"),
}
_STRATA = {"model": "over the whole model", "layer": "in each layer by itself", "tensor": "in each tensor by itself"}
#: Layers of the table that are not folded away: those with the largest part chosen.
_SHOWN = 8


def write_localization_page(mask: Path, record: Localization) -> Path:
    """Write the page beside a mask."""
    page = beside(mask)["page"]
    info: dict[str, Any] = {
        "models": {"model": {"source": record.model, "digest": record.model_digest}},
        "data": {name: {"rows": rows.rows, "role": name, "digest": rows.digest} for name, rows in record.rows.items()},
        "seed": record.seed,
        "notes": record.notes,
    }
    return write_page(page.parent, localization_document(record), told_record(page.parent, info), page.name)


def localization_document(record: Localization) -> Document:
    """The page of what `expunge localize` wrote."""
    return Document(
        kind="localization",
        name=named(record.model),
        paper="" if record.paper == "-" else ", ".join(f"arXiv:{one}" for one in record.paper.split(", ")),
        answer=record.answer,
        remarks=_remarks(record),
        facts=_facts(record),
        settings=_settings(record),
        command=record.command,
        sections=[_places(record), *_agreement(record), _tables(record)],
        limits=_limits(record),
        results={"units": record.units, "chosen": record.chosen, "weights": record.weights, "inside": record.inside},
    )


def unit_words(unit: str, count: int) -> str:
    """`1 value vector`, `4 608 value vectors`."""
    one, several = _UNITS.get(unit, (unit, unit))
    return plural(count, one, several)


def answer_of(record: Localization) -> str:
    """What was chosen, in a sentence."""
    chosen = (
        f"{unit_words(record.unit, record.chosen)} of {grouped(record.units)} ({_share(record.chosen, record.units)})"
    )
    verb = "is" if record.chosen == 1 else "are"
    part = f"{grouped(record.inside)} of {grouped(record.weights)} weights ({_share(record.inside, record.weights)})"
    return f"{chosen} {verb} chosen by {record.by}: {part} may change."


def _remarks(record: Localization) -> list[str]:
    said = list(record.notes)
    if record.control:
        said.append(f"{record.by} is a control: it does not look for the knowledge, and is there to be compared with.")
    layers = [place for place in _by_layer(record) if place.layer is not None and place.units > 1]
    if len(layers) > 1 and record.strata == "model" and not record.control:
        top = max(layers, key=lambda place: place.part)
        said.append(f"Layer {top.layer} has the largest part chosen: {percent(top.part)} of its units.")
    return said


def _facts(record: Localization) -> dict[str, str]:
    facts = {
        "Model": named(record.model),
        "Chosen by": record.by,
        "Unit": _UNITS.get(record.unit, (record.unit,))[0],
        "Density": compact(record.density),
        "Chosen": f"{grouped(record.chosen)} of {grouped(record.units)} units",
        "Weights inside": f"{grouped(record.inside)} ({_share(record.inside, record.weights)})",
    }
    if record.against is not None and record.against.precision is not None:
        facts["Precision"] = f"{number(record.against.precision)} (chance {number(record.against.chance)})"
    return facts


def _settings(record: Localization) -> dict[str, str]:
    lines = {
        "Attribution": record.by + _parameters(record),
        "Density": f"{compact(record.density)} {_STRATA.get(record.strata, record.strata)}",
        "Mask": f"{record.mask}, sha256 {record.mask_digest[:16]}",
        "Seed": str(record.seed),
        "Time": duration(record.seconds),
        "expunge": record.expunge,
    }
    read = [f"{name}: {plural(rows.rows, 'row')}, {plural(rows.tokens, 'token')}" for name, rows in record.rows.items()]
    return lines | ({"Rows": "; ".join(read)} if read else {"Rows": "none: the attribution reads no rows"})


def _parameters(record: Localization) -> str:
    shown = [f"{name} {json.dumps(value)}" for name, value in record.parameters.items()]
    return f" ({', '.join(shown)})" if shown else ""


# ---------------------------------------------------------------- figures


def _places(record: Localization) -> Section:
    figures = [_chosen(record), *_scores(record)]
    lead = f"Each cell holds the {_UNITS.get(record.unit, (record.unit, 'units'))[1]} of one module in one layer."
    return Section(title="Where the chosen units lie", lead=lead, figures=figures)


def _chosen(record: Localization) -> Heat:
    part = record.chosen / record.units
    values = _grid(record, lambda place: place.part)
    highest = max((value for line in values for value in line if value is not None), default=1.0)
    high = min(1.0, max(highest, 2 * part))  # a part that differs little is not painted as if it differed much
    words = [f"The colours part at {percent(part)}, the part of all units that is chosen."]
    return _heat(record, "Part that is chosen", "part chosen", values, 0.0, high, part, words)


def _scores(record: Localization) -> list[Heat]:
    """Mean score of the units, over the highest mean: scores of different attributions have different scales."""
    known = [abs(place.score) for place in record.places if place.score is not None]
    scale = max(known, default=0.0)
    if scale == 0:
        return []
    values = _grid(record, lambda place: None if place.score is None else place.score / scale)
    low = min((value for line in values for value in line if value is not None), default=0.0)
    words = [f"Mean score of the units over the highest of these means ({scale:.3g})."]
    if low < 0:
        return [_heat(record, "Mean score", "mean score", values, -1.0, 1.0, 0.0, words)]
    return [_heat(record, "Mean score", "mean score", values, 0.0, 1.0, None, words)]


def _heat(
    record: Localization,
    title: str,
    measure: str,
    values: list[list[float | None]],
    low: float,
    high: float,
    middle: float | None,
    words: list[str],
) -> Heat:
    return Heat(
        title=title,
        measure=measure,
        row_name="module",
        rows=_modules(record),
        column_name="layer",
        columns=[_layer(layer) for layer in _layers(record)],
        values=values,
        low=low,
        high=high,
        middle=middle,
        words=words,
    )


def _grid(record: Localization, measure: Any) -> list[list[float | None]]:
    """Modules × layers; None where a layer has no such module, or nothing was measured."""
    at = {(place.module, place.layer): measure(place) for place in record.places}
    return [[at.get((module, layer)) for layer in _layers(record)] for module in _modules(record)]


def _modules(record: Localization) -> list[str]:
    return list(dict.fromkeys(place.module for place in record.places))


def _layers(record: Localization) -> list[int | None]:
    found = {place.layer for place in record.places}
    return sorted(found, key=lambda layer: (layer is None, layer or 0))


def _layer(layer: int | None) -> str:
    return "outside" if layer is None else str(layer)


# ---------------------------------------------------------------- tables


def _agreement(record: Localization) -> list[Section]:
    """How well the choice agrees with the known region."""
    found = record.against
    if found is None:
        return []
    columns = [Column(label="Measure", number=False), Column(label="Value", arrow="↑"), Column(label="By chance")]
    rows = [
        TableRow(
            cells=[TableCell(text=name, under=hint), TableCell(text=number(value)), TableCell(text=number(chance))]
        )
        for name, hint, value, chance in compared(found, record)
    ]
    words = f"{unit_words(record.unit, found.units)} lie inside the region {Path(found.file).name}."
    return [Section(title="Against the known region", lead=words, tables=[Table(columns=columns, rows=rows)])]


def compared(found: Agreement, record: Localization) -> list[tuple[str, str, float | None, float | None]]:
    """(Measure, its meaning, value, what a random choice of as many units would have) against the known region."""
    part, chance = record.chosen / record.units, found.chance
    either = part + chance - part * chance
    return [
        ("Precision", "part of the chosen units that is inside", found.precision, chance),
        ("Recall", "part of the region that is chosen", found.recall, part),
        ("Overlap", "inside both over inside either", found.overlap, part * chance / either if either else None),
        ("AUC", "a unit inside scores higher than one outside", found.auc, 0.5),
    ]


def _tables(record: Localization) -> Section:
    modules = [_summed(record, module=name) for name in _modules(record)]
    layers = sorted(_by_layer(record), key=lambda place: (-place.part, place.layer or 0))
    tables = [_table("By module", "Module", [(place.module, place) for place in modules])]
    if len(layers) > 1:
        few = [(_layer(place.layer), place) for place in layers]
        title = "By layer" if len(few) <= _SHOWN else f"The {_SHOWN} layers with the largest part chosen"
        tables.append(_table(title, "Layer", few[:_SHOWN]))
        if len(few) > _SHOWN:
            tables.append(_table(plural(len(few) - _SHOWN, "further layer"), "Layer", few[_SHOWN:], folded=True))
    return Section(title="Numbers", tables=tables)


def _table(title: str, head: str, lines: list[tuple[str, Place]], folded: bool = False) -> Table:
    columns = [Column(label=head, number=False), Column(label="Units"), Column(label="Chosen"), Column(label="Part")]
    columns += [Column(label="Mean score"), Column(label="Highest score")]
    rows = [TableRow(cells=[TableCell(text=text) for text in (name, *_cells(place))]) for name, place in lines]
    return Table(title=title, columns=columns, rows=rows, folded=folded)


def _cells(place: Place) -> list[str]:
    scores = ["–" if value is None else f"{value:.3g}" for value in (place.score, place.highest)]
    return [grouped(place.units), grouped(place.chosen), percent(place.part), *scores]


def _by_layer(record: Localization) -> list[Place]:
    return [_summed(record, layer=layer) for layer in _layers(record)]


def _summed(record: Localization, **same: Any) -> Place:
    """The places of one module, or of one layer, as one."""
    mine = [place for place in record.places if all(getattr(place, name) == value for name, value in same.items())]
    scored = [place for place in mine if place.score is not None]
    units = sum(place.units for place in scored)
    mean = sum((place.score or 0.0) * place.units for place in scored) / units if units else None
    highest = max((place.highest for place in scored if place.highest is not None), default=None)
    whole = {"units": sum(place.units for place in mine), "chosen": sum(place.chosen for place in mine)}
    return Place(**{"layer": None, "module": "", "score": mean, "highest": highest, **whole, **same})


def _limits(record: Localization) -> list[str]:
    said = [
        "A mask says which weights may change, not that the knowledge lies there: chosen regions have served "
        "unlearning no better than random ones (arXiv:2505.16252). Compare with --by random at the same density.",
        f"Scores are those of {record.by} on the rows above; other rows or settings may choose other units.",
    ]
    if record.rows:
        splits = listed(record.rows)
        said.append(
            f"The attribution read the {splits} rows as they are, not what the model says when asked otherwise."
        )
    return said


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2g}" if not whole else _percent(part / whole)


def _percent(share: float) -> str:
    """One decimal, more where that would be 0.0%."""
    return percent(share) if share == 0 or share >= 0.001 else f"{100 * share:.2g}%"
