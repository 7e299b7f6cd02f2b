"""Where the update landed, for the page of a run: the energy of each unlearned model's change by layer and module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expunge.report.document import Column, Section, Table, TableCell, TableRow
from expunge.report.figure_data import Heat
from expunge.report.records import RunRecord
from expunge.report.tables import variant_label
from expunge.report.text import compact, grouped, listed, plural
from expunge.report.update_record import TensorUpdate, Updates, read_updates, relative

TITLE = "Where the update landed"
#: Models that get a heat map, the result first, as long as the cells of all maps together stay below.
_MAPS, _CELLS = 4, 2500


def update_section(record: RunRecord) -> Section | None:
    """Heat maps and tables of a run's updates; None for a run that recorded none. Raises UserError for broken ones."""
    found = read_updates(record.path)
    if not found:
        return None
    order = {name: place for place, name in enumerate(record.variants)}
    names = sorted(found, key=lambda name: (name != record.result, order.get(name, len(order)), name))
    compared = [name for name in names if found[name].tensors]
    mapped = _mapped({name: found[name] for name in compared})
    lead = (
        "Δ is the difference between a model and the one that unlearning started from; its energy is ‖Δ‖², the sum of "
        "squared differences. A cell holds the part of a model's energy, in per cent, that lies in one module of one "
        "decoder layer."
    )
    words = []
    for name in names:
        label, updates = variant_label(record, name), found[name]
        if updates.problem:
            words.append(f"{label} could not be compared: {updates.problem}.")
        elif not _drawable(updates):
            words.append(f"{label}: {' '.join(in_words(updates))}")
    return Section(
        title=TITLE,
        lead=lead,
        figures=[_map(variant_label(record, name), found[name]) for name in mapped],
        tables=[
            *([_models(record, {name: found[name] for name in compared})] if compared else []),
            *(_modules(variant_label(record, name), found[name]) for name in mapped),
        ],
        words=words,
    )


def in_words(updates: Updates) -> list[str]:
    """What the map shows: how far, where most of it, what lies outside the layers and outside the mask."""
    if not updates.energy:
        return [*_broken(updates), *(["No weight changed."] if not any(t.changed for t in updates.tensors) else [])]
    size = f"The change is {_percent(updates.relative)} of the weights' norm (‖Δ‖/‖θ‖)"
    said = [f"{size}; {_part(updates.changed)} of the weights changed at all."]
    inner = [tensor for tensor in updates.tensors if tensor.layer is not None]
    if inner and updates.part(inner):
        layers, modules = _layers(inner), _by_module(inner)
        layer = max(layers, key=lambda each: updates.part(layers[each]))
        module = max(modules, key=lambda each: updates.part(modules[each]))
        even = updates.part(inner) / len(layers)
        said.append(
            f"Layer {layer} holds the largest part of its energy, {_part(updates.part(layers[layer]))} (an even spread "
            f"over {plural(len(layers), 'layer')} would give {_part(even)}); of the modules, {module} holds most: "
            f"{_part(updates.part(modules[module]))}."
        )
    return [*said, _outside(updates), *_masked(updates), *_broken(updates)]


def _outside(updates: Updates) -> str:
    outer = _by_module(tensor for tensor in updates.tensors if tensor.layer is None)
    moved = {name: updates.part(tensors) for name, tensors in outer.items() if any(t.changed for t in tensors)}
    if not moved:
        return "Nothing outside the decoder layers changed." if outer else "All of the model lies in decoder layers."
    each = listed(f"{name} {_part(part)}" for name, part in moved.items())
    return f"Outside the decoder layers: {each}."


def _masked(updates: Updates) -> list[str]:
    inside, masked = updates.inside, updates.masked
    if inside is None or masked is None:
        return []
    if not updates.changed_outside:
        return [f"All of it lies inside the mask, which holds {_part(masked)} of the weights: none outside it changed."]
    return [
        f"Only {_part(inside)} of its energy lies inside the mask, which holds {_part(masked)} of the weights: "
        f"{plural(updates.changed_outside, 'weight')} outside it changed too."
    ]


def _broken(updates: Updates) -> list[str]:
    broken = [tensor.tensor for tensor in updates.tensors if tensor.energy is None or tensor.before is None]
    if not broken:
        return []
    if len(broken) == 1:
        return [f"1 tensor holds numbers that are not finite and is left out: {broken[0]}."]
    return [f"{plural(len(broken), 'tensor')} hold numbers that are not finite and are left out, {broken[0]} first."]


def _mapped(found: dict[str, Updates]) -> list[str]:
    """The models that are drawn: the first ones, as many as a page bears."""
    chosen: list[str] = []
    cells = 0
    for name, updates in found.items():
        if not _drawable(updates):
            continue
        inner = [tensor for tensor in updates.tensors if tensor.layer is not None]
        cells += len(_layers(inner)) * len(_by_module(inner))
        if len(chosen) == _MAPS or (chosen and cells > _CELLS):
            break
        chosen.append(name)
    return chosen


def _drawable(updates: Updates) -> bool:
    return any(tensor.layer is not None and tensor.energy is not None for tensor in updates.tensors)


def _map(label: str, updates: Updates) -> Heat:
    inner = [tensor for tensor in updates.tensors if tensor.layer is not None]
    layers, modules = sorted(_layers(inner)), list(_by_module(inner))
    cells: dict[tuple[str, int | None], list[TensorUpdate]] = {}
    for tensor in inner:
        cells.setdefault((tensor.module, tensor.layer), []).append(tensor)
    values = [[_cell(updates, cells.get((module, layer), [])) for layer in layers] for module in modules]
    highest = max((value for line in values for value in line if value is not None), default=0.0)
    return Heat(
        title=label,
        measure="energy in %",
        row_name="module",
        rows=modules,
        column_name="decoder layer",
        columns=[str(layer) for layer in layers],
        values=values,
        high=highest or 1.0,
        words=in_words(updates),
    )


def _cell(updates: Updates, tensors: Sequence[TensorUpdate]) -> float | None:
    """In per cent; None where a layer has no such module, or its numbers are not finite."""
    if not tensors or any(tensor.energy is None for tensor in tensors):
        return None
    return 100 * updates.part(tensors)


def _models(record: RunRecord, found: dict[str, Updates]) -> Table:
    masked = any(updates.mask is not None for updates in found.values())
    columns = [
        Column(label="Model", number=False),
        Column(label="‖Δ‖/‖θ‖", hint="norm of the change over the norm of the weights before it"),
        Column(label="Weights changed", hint="part of the weights that are another number than before"),
        Column(label="In the decoder layers", hint="part of the energy"),
        Column(label="Outside them", hint="part of the energy in embeddings, head and last norm"),
        *(
            [Column(label="Inside the mask", hint="part of the energy; under it, the mask's part of the weights")]
            * masked
        ),
    ]
    rows = []
    for name, updates in found.items():
        inner = updates.part(tensor for tensor in updates.tensors if tensor.layer is not None)
        outer = updates.part(tensor for tensor in updates.tensors if tensor.layer is None)
        cells = [variant_label(record, name), _percent(updates.relative), _part(updates.changed)]
        cells += [_part(inner), _part(outer)] if updates.energy else ["–", "–"]
        shown = [TableCell(text=text) for text in cells]
        if masked:
            inside, part = updates.inside, updates.masked
            under = "" if part is None else f"{_part(part)} of the weights"
            shown.append(TableCell(text="–" if inside is None else _inside(updates, inside), under=under))
        rows.append(TableRow(cells=shown, role=record.kind(name)))
    return Table(title="Model by model", columns=columns, rows=rows)


def _inside(updates: Updates, inside: float) -> str:
    return _part(inside) if updates.changed_outside else "all"


def _modules(label: str, updates: Updates) -> Table:
    """Modules of the decoder layers, then what lies outside them."""
    columns = [
        Column(label="Module", number=False),
        Column(label="Part of the energy"),
        Column(label="‖Δ‖/‖θ‖"),
        Column(label="Weights changed"),
        Column(label="Weights"),
    ]
    inner = [tensor for tensor in updates.tensors if tensor.layer is not None]
    outer = [tensor for tensor in updates.tensors if tensor.layer is None]
    rows = []
    for tensors, place in ((inner, "all layers"), (outer, "outside the layers")):
        for module, own in _by_module(tensors).items():
            weights = sum(tensor.weights for tensor in own)
            cells = [_part(updates.part(own)), _percent(relative(own))]
            cells += [_part(sum(tensor.changed for tensor in own) / max(1, weights)), grouped(weights)]
            head = TableCell(text=module, under=place if tensors is outer else "")
            rows.append(TableRow(cells=[head, *(TableCell(text=text) for text in cells)]))
    return Table(title=label, columns=columns, rows=rows, group="Module by module")


def _layers(tensors: Iterable[TensorUpdate]) -> dict[int, list[TensorUpdate]]:
    found: dict[int, list[TensorUpdate]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            found.setdefault(tensor.layer, []).append(tensor)
    return found


def _by_module(tensors: Iterable[TensorUpdate]) -> dict[str, list[TensorUpdate]]:
    """By module, in the order of the model."""
    found: dict[str, list[TensorUpdate]] = {}
    for tensor in tensors:
        found.setdefault(tensor.module, []).append(tensor)
    return found


def _part(value: float) -> str:
    """A part of a whole as per cent; a little is not nothing, and nearly all is not all."""
    if 0 < value < 0.0005:
        return "< 0.1%"
    if 0.9995 <= value < 1:
        return "> 99.9%"
    return f"{100 * value:.1f}%" if 0 < value < 1 else f"{100 * value:.0f}%"


def _percent(value: float) -> str:
    """A ratio as per cent with two significant digits, however small."""
    return f"{compact(100 * value, 2)}%"
