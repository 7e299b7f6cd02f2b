"""What `rmu_layers` found, as a document: heat maps per method, the norm profile, every trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.figure_data import Cell, HeatMap, Profile
from expunge.report.text import human, interval, listed, number
from expunge.studies.rules import Choice, Measured, balance, choose, keeps

if TYPE_CHECKING:
    from expunge.studies.ground import Ground, Outcome
    from expunge.studies.rmu_layers import RmuLayers

SUMMARY = "RMU and adaptive RMU over decoder layers and strengths: which layers serve best on this model?"
PAPER = "arXiv:2408.06223, arXiv:2506.16548"
JUDGED = "retain_unseen"
#: Two cells this near in forget strength are called alike.
ALIKE = 0.02

#: Per method: its name in words, the parameter that is its strength, and the sign of that.
METHODS = {"rmu": ("RMU", "coefficient", "c"), "adaptive_rmu": ("Adaptive RMU", "beta", "β")}

#: For columns: whether low is good → the arrow, which stays beside its word.
ARROW = {True: "\u00a0↓", False: "\u00a0↑"}

Key = tuple[str, int, float]  # method, layer, strength


@dataclass(frozen=True)
class Grid:
    """What was scanned: layers of a model of some depth, strengths by method, at a learning rate."""

    depth: int
    layers: Sequence[int]
    strengths: Mapping[str, Sequence[float]]
    rate: float


def document(ground: Ground, options: RmuLayers, grid: Grid, norms: Mapping[str, list[float]]) -> Document:
    """The whole document."""
    depth, layers = grid.depth, grid.layers
    model, target = options.model, ground.outcomes["target"]
    trials = {_key(outcome): outcome for outcome in ground.trials}
    measured = {
        key: Measured(outcome["forget"], outcome[JUDGED]) for key, outcome in trials.items() if outcome.strengths
    }
    choice = choose(measured, target[JUDGED], options.share)
    eligible = {key for key, found in measured.items() if keeps(found, target[JUDGED], options.share)}
    sections = [_maps(method, layers, grid.strengths[method], trials, eligible, choice, target) for method in METHODS]
    return Document(
        name="rmu_layers",
        summary=SUMMARY,
        paper=PAPER,
        answer=answer(model, depth, measured, choice, target, options.share),
        rule=rule(options.share),
        remarks=[*ground.remarks, *_best_balance(measured, choice, target, depth)],
        planned=ground.planned,
        done=len(trials),
        facts={"Layers": f"{len(layers)} of {depth}"},
        settings=_settings(ground, grid.rate),
        sections=[*sections, _profile(grid.strengths["rmu"], layers, norms), _table(ground, eligible, choice)],
        limits=_limits(),
        results={
            "depth": depth,
            "chosen": None if choice is None else dict(zip(("method", "layer", "strength"), choice.key, strict=True)),
            "trial": None if choice is None else trials[choice.key].name,
            "meets_rule": choice is not None and choice.met,
            "norms": dict(norms),
        },
    )


def _key(outcome: Outcome) -> Key:
    return (str(outcome.about["method"]), int(outcome.about["layer"]), float(outcome.about["strength"]))


def rule(share: float) -> str:
    """The rule that the answer follows, in words."""
    return (
        f"Fixed beforehand: among the cells that keep at least {share:.0%} of the target's extraction strength on "
        "retain rows that unlearning never saw, the one with the lowest strength on the forget rows; if no cell does, "
        "the best balance (harmonic mean) of what is forgotten and what is kept."
    )


def answer(
    model: str,
    depth: int,
    measured: Mapping[Key, Measured],
    choice: Choice[Key] | None,
    target: Outcome,
    share: float,
) -> str:
    """One sentence: which layers serve best on this model."""
    if choice is None:
        return f"Nothing can be said of {model}: no trial was finished."
    found = measured[choice.key]
    fall = f"forget strength {number(target['forget'])} → {number(found.forget)}"
    kept = _kept(found, target)
    if not choice.met:
        none = f"On {model} no layer keeps {share:.0%} of unseen retain strength"
        return f"{none}; the best balance has {_cell(choice.key, depth)} ({fall}, {kept} kept)."
    layer = choice.key[1]
    alike = sorted(
        {
            key[1]
            for key, other in measured.items()
            if key[1] != layer and keeps(other, target[JUDGED], share) and other.forget <= found.forget + ALIKE
        }
    )
    near = f"; layer{'s' if len(alike) > 1 else ''} {listed(map(str, alike))} within {ALIKE:g}" if alike else ""
    cell = _cell(choice.key, depth)
    return f"On {model}, {cell} serves best: {fall}, {kept} of unseen retain strength kept{near}."


def _cell(key: Key, depth: int) -> str:
    method, layer, strength = key
    name, _, sign = METHODS[method]
    return f"{name} at layer {layer} of {depth} with {sign} = {strength:g}"


def _kept(found: Measured, target: Outcome) -> str:
    return f"{found.kept / target[JUDGED] if target[JUDGED] > 0 else 1.0:.0%}"


def _best_balance(
    measured: Mapping[Key, Measured], choice: Choice[Key] | None, target: Outcome, depth: int
) -> list[str]:
    """What would be chosen if no share were asked for, where that is another cell."""
    best = max(measured, key=lambda key: balance(measured[key], target[JUDGED]), default=None)
    if best is None or choice is None or best == choice.key:
        return []
    found = measured[best]
    numbers = f"forget strength {number(found.forget)}, {_kept(found, target)} kept"
    return [f"Whatever share is kept, {_cell(best, depth)} has the best balance of forgotten and kept ({numbers})."]


def _maps(
    method: str,
    layers: Sequence[int],
    strengths: Sequence[float],
    trials: Mapping[Key, Outcome],
    eligible: set[Key],
    choice: Choice[Key] | None,
    target: Outcome,
) -> Section:
    name, parameter, sign = METHODS[method]
    cells = {
        (method, layer, strength): (i, j) for i, layer in enumerate(layers) for j, strength in enumerate(strengths)
    }

    def places(keys: set[Key]) -> list[Cell]:
        return [cell for key, cell in cells.items() if key in keys]

    def value(key: Key, split: str) -> float | None:
        found = trials.get(key)
        return found.strengths[split].value if found is not None and split in found.strengths else None

    figures = []
    for split in ("forget", "retain", JUDGED):
        values = [[value((method, layer, strength), split) for strength in strengths] for layer in layers]
        good = "low" if split == "forget" else "high"
        figures.append(
            HeatMap(
                title=f"{human(split)} ES{ARROW[good == 'low']} (target {number(target[split])})",
                measure=f"{human(split)} extraction strength",
                good=good,
                row_name="layer",
                rows=[str(layer) for layer in layers],
                column_name=f"{parameter} {sign}",
                columns=[f"{strength:g}" for strength in strengths],
                values=values,
                eligible=places(eligible),
                failed=places({key for key, outcome in trials.items() if outcome.failed}),
                best=cells.get(choice.key) if choice is not None else None,
            )
        )
    lead = (
        f"Extraction strength (ES) by layer ℓ and {parameter} {sign}; down_proj of layers ℓ−2 to ℓ is trained. Bold: "
        "the cell meets the rule; framed: chosen; ✕: training broke off."
    )
    return Section(title=name, lead=lead, figures=figures)


def _profile(coefficients: Sequence[float], layers: Sequence[int], norms: Mapping[str, list[float]]) -> Section:
    depth = len(next(iter(norms.values())))
    figure = Profile(
        title="Mean norm of the hidden states",
        x_name="decoder layer ℓ",
        y_name="mean ‖h_ℓ‖",
        x=[float(layer) for layer in range(depth)],
        curves=dict(norms),
        levels={f"c {value:g}": value for value in coefficients},
        marked=[float(layer) for layer in layers],
    )
    lead = (
        "How long the target's hidden states are, over the supervised tokens of forget and retain rows; dots are the "
        "layers of this study. RMU steers to the length c at every layer (dashed), adaptive RMU to β times the curve. "
        "Where the states are longer than c, steering shortens them: there RMU was found to fail (arXiv:2408.06223)."
    )
    return Section(title="Norms of the hidden states", lead=lead, figures=[figure])


def _table(ground: Ground, eligible: set[Key], choice: Choice[Key] | None) -> Section:
    splits = list(ground.rows)
    columns = [Column(label="Trial", number=False)]
    columns += [Column(label=f"{human(split)} ES{ARROW[split == 'forget']}") for split in splits]
    columns += [Column(label="Steps"), Column(label="Time (s)"), Column(label="", number=False)]
    rows = []
    for outcome in ground.outcomes.values():
        role, words = outcome.name, ""
        if outcome.name not in ground.variants:
            key = _key(outcome)
            chosen = choice is not None and key == choice.key
            role = "result" if chosen else ""
            words = (
                outcome.failed or outcome.note or ("chosen" if chosen else "meets the rule" if key in eligible else "")
            )
        cells = [TableCell(text=human(outcome.name) if role in ground.variants else outcome.name)]
        cells += [_strength(outcome, split) for split in splits]
        cells += [TableCell(text=text) for text in (str(outcome.steps), f"{outcome.seconds:.1f}", words)]
        rows.append(TableRow(cells=cells, role=role))
    title = f"All {len(ground.trials)} trials and the yardsticks"
    return Section(title="Trials", tables=[Table(title=title, columns=columns, rows=rows, folded=len(rows) > 12)])


def _strength(outcome: Outcome, split: str) -> TableCell:
    found = outcome.strengths.get(split)
    if found is None:
        return TableCell(text="–")
    return TableCell(text=number(found.value), under=interval(found.low, found.high))


def _settings(ground: Ground, rate: float) -> dict[str, str]:
    shared = ground.whole.recipe.unlearn[0]
    alpha = shared.parameters.get("alpha", "the methods' own (1200)")
    words = (
        f"{shared.train.epochs:g} epochs over the forget rows, {shared.train.batch_size} of them a step and as many "
        f"retain rows, AdamW at {rate:g} ({shared.train.schedule}), retain weight α {alpha}, "
        f"{shared.train.precision}"
    )
    return {"Every trial": words}


def _limits() -> list[str]:
    return [
        "One seed per cell: neighbouring cells that differ by less than their intervals are not told apart.",
        "The chosen cell is the best of many on the very rows that it is reported on, which flatters it a little; a "
        "run of its own on other rows would say how much.",
        "All cells have the same number of steps and the same learning rate. A layer that would need more of either "
        "looks worse than it is.",
        "Steering hides what it steers away from: taking the direction out of RMU's models was reported to bring "
        "much of it back. The maps show what greedy decoding gives, not what is left in the weights.",
    ]
