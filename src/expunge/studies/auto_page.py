"""What `auto` was chosen from and how it stands beside published objectives, as a document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import methodcaller
from typing import TYPE_CHECKING, Literal

from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.figure_data import Plane, Spot
from expunge.report.text import human, listed, number, plural
from expunge.studies.auto_space import AUTO, DEFAULT, Entrant
from expunge.studies.rules import Measured, pareto_front, spread

if TYPE_CHECKING:
    from expunge.recipe.model import Thresholds
    from expunge.studies.auto import Auto
    from expunge.studies.auto_beside import Beside
    from expunge.studies.ground import Ground, Outcome

SUMMARY = "what `auto` is chosen from, each scaled to keep enough and attacked, and how it stands on other people"
VALIDATION, JUDGED = "validation", "retain_unseen"
#: Variants that everything is held against.
_YARDSTICKS = ("original", "target", "reference")
#: Measures beside the subject: column, direction, hint.
_BESIDE: Mapping[str, tuple[str, Literal["↑", "↓"], str]] = {
    "general": ("General", "↑", "accuracy on general knowledge; chance is 0.25"),
    "repetition": ("Repetition", "↓", "part of the runs of four words in greedy texts that stood there before"),
    "perplexity": ("Perplexity", "↓", "of the greedy texts, under the reference"),
}

#: Attack point → (strength of the model, that of the reference).
Standings = Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True)
class Examined:
    """An entrant on the people of one seed: strengths of it and of its yardsticks, its scale, and what attacks show."""

    entrant: Entrant
    people: int
    outcomes: Mapping[str, Outcome]
    scale: float | None
    attacks: Standings
    calibrated: float | None = None  # what is left where unseen rows keep enough
    beside: Mapping[str, Beside] = field(default_factory=dict)  # of it and of its yardsticks

    @property
    def own(self) -> Outcome:
        """Its own strengths."""
        return self.outcomes[self.entrant.name]

    def of(self, variant: str, split: str) -> float | None:
        """A yardstick's strength, if there is such a yardstick."""
        return self.outcomes[variant][split] if variant in self.outcomes else None

    @property
    def kept(self) -> float:
        """Part of the target's strength on unseen rows that is left."""
        return self.own[JUDGED] / (self.of("target", JUDGED) or 1.0)

    def besides(self, measure: str, variant: str | None = None) -> float | None:
        """General knowledge or fluency of it, or of a yardstick."""
        found = self.beside.get(variant or self.entrant.name)
        value: float | None = getattr(found, measure, None)
        return value

    def under(self, label: str) -> float | None:
        """Its strength at an attack point."""
        return self.attacks[label][0] if label in self.attacks else None

    def reference_under(self, label: str) -> float | None:
        """The reference's strength at an attack point."""
        return self.attacks[label][1] if label in self.attacks else None

    def share_of(self, variant: str) -> float:
        """Part of the target's strength on unseen rows that a yardstick has."""
        return (self.of(variant, JUDGED) or 0.0) / (self.of("target", JUDGED) or 1.0)

    @property
    def worst(self) -> float | None:
        """Its strength under the attack that leaves it farthest above the reference, or highest without one."""
        pairs = self.attacks.values()
        return max(pairs, key=lambda pair: pair[0] - (pair[1] or 0.0))[0] if pairs else None

    @property
    def margin(self) -> float | None:
        """The largest distance to the reference under any attack; None without one."""
        found = [strength - known for strength, known in self.attacks.values() if known is not None]
        return max(found, default=None)


def forgets(found: Examined, thresholds: Thresholds) -> bool:
    """Whether the forget strength is within the recipe's margin of the reference, or below its threshold."""
    reference = found.of("reference", "forget") or 0.0
    return found.own["forget"] <= max(reference + thresholds.reference_margin, thresholds.forget_extraction)


def chosen_of(tried: Sequence[Examined], thresholds: Thresholds) -> list[Examined]:
    """The chosen variation, `auto` as it stands, and of each rival the best rate; looks at no unseen row.

    That enough is kept has been seen to before: every update is scaled until it is.
    """
    ours = [found for found in tried if found.entrant.is_auto]
    eligible = [found for found in ours if forgets(found, thresholds)]
    best = min(eligible, key=lambda found: (found.margin or 0.0, found.own["forget"]), default=None)
    default = next((found for found in ours if found.entrant.name == f"{AUTO}-{DEFAULT}"), None)
    families = dict.fromkeys(found.entrant.family for found in tried if not found.entrant.is_auto)
    rivals = [_least([found for found in tried if found.entrant.family == family]) for family in families]
    going_on = (best or _least(ours), default, *rivals)
    return list({found.entrant.name: found for found in going_on if found is not None}.values())


def _least(found: Sequence[Examined]) -> Examined | None:
    """What leaves least of the forget rows."""
    return min(found, key=_forget, default=None)


def document(
    ground: Ground, options: Auto, tried: Sequence[Examined], chosen: Sequence[Examined], reported: Sequence[Examined]
) -> Document:
    """The whole document."""
    final = reported or list(chosen)
    people = sorted({found.people for found in final})
    sections = [_report(final, options, bool(reported))] if final else []
    if tried:
        sections.append(_search(tried, chosen, options))
    return Document(
        name="auto",
        summary=SUMMARY,
        answer=_answer(final, options, bool(reported)),
        rule=f"Fixed beforehand: every update is scaled down until validation rows keep {options.share:.0%} of their "
        "strength (within their standard error, until forget rows would stand again). Of the variations of auto that "
        "then leave the forget rows within the thresholds of the recipe, the one with the smallest margin over the "
        "reference under its worst attack, else the one that leaves least; of each rival, the rate that leaves least. "
        "No unseen row chooses anything, and where other people are reported on, none of theirs does.",
        remarks=list(ground.remarks),
        planned=ground.planned,
        done=len(ground.trials),
        facts={
            "Tried": plural(len(tried), "model"),
            "Chosen on": f"people of seed {options.seed}",
            "Reported on": f"people of {plural(len(people), 'seed')}: {listed([str(seed) for seed in people])}"
            if reported
            else "the same people, unseen rows",
            "Kept": f"{options.share:.0%} of the target's on validation rows",
        },
        settings={"Attacks": ", ".join(options.attacks), "Settings": ", ".join(options.parameters)},
        sections=sections,
        limits=[
            "One training per model and set of people; what differs by less than the deviation over people is not "
            "told apart.",
            "Facts that were taught in a fine-tuning are easier to remove than those of pretraining.",
            *([] if reported else ["No other people were looked at: give --report 43,44,45."]),
        ],
        results={
            "chosen": chosen[0].entrant.name if chosen else None,
            "tried": [_plain(found) for found in tried],
            "reported": [_plain(found) for found in reported],
        },
    )


def _plain(found: Examined) -> dict[str, object]:
    return {
        "name": found.entrant.name,
        "people": found.people,
        "scale": found.scale,
        "forget": found.own["forget"],
        "kept": found.kept,
        "calibrated": found.calibrated,
        "margin": found.margin,
        "attacks": {label: list(pair) for label, pair in found.attacks.items()},
        "beside": {name: asdict(values) for name, values in found.beside.items()},
        "seconds": found.own.seconds,
    }


def _answer(final: Sequence[Examined], options: Auto, others: bool) -> str:
    if not final:
        return f"Nothing can be said of {options.model}: no model was finished."
    groups = _grouped(final)
    name = next(iter(groups))
    ours = groups[name]
    forget, kept = (_mean(ours, read) for read in (lambda f: f.own["forget"], lambda f: f.kept))
    reference = _mean(ours, lambda f: f.of("reference", "forget"))
    beside = "" if reference is None else f" (reference {number(reference)})"
    worst = _mean(ours, lambda f: f.margin)
    attacked = "" if worst is None else f", and under its worst attack stands {number(worst)} above the reference"
    rest = _against_rivals(ours, {name: found for name, found in groups.items() if not found[0].entrant.is_auto})
    where = "on other people" if others else "on the people that chose it"
    return (
        f"On {options.model}, {name} leaves extraction strength {number(forget)} of the forget rows{beside} and keeps "
        f"{kept or 0:.1%} of unseen rows {where}{attacked}{rest}."
    )


def _against_rivals(ours: Sequence[Examined], rivals: Mapping[str, Sequence[Examined]]) -> str:
    """How the best rival stands beside the model: calibrated where both can be, else as they are handed out."""
    calibrated = {name: left for name, found in rivals.items() if (left := _mean(found, _calibrated)) is not None}
    own = _mean(ours, _calibrated)
    if own is not None and calibrated:
        best = min(calibrated, key=lambda name: calibrated[name])
        theirs = number(calibrated[best])
        return f"; calibrated on unseen rows it leaves {number(own)}, and the best rival, {best}, {theirs}"
    best = min(rivals, key=lambda name: _mean(rivals[name], _forget) or 0.0, default="")
    return f"; the best rival, {best}, leaves {number(_mean(rivals[best], _forget))}" if best else ""


def _calibrated(found: Examined) -> float | None:
    return found.calibrated


def _forget(found: Examined) -> float:
    return found.own["forget"]


def _grouped(found: Sequence[Examined]) -> dict[str, list[Examined]]:
    groups: dict[str, list[Examined]] = {}
    for one in found:
        groups.setdefault(one.entrant.name, []).append(one)
    return groups


def _mean(found: Sequence[Examined], read: Callable[[Examined], float | None]) -> float | None:
    values = [value for one in found if (value := read(one)) is not None]
    return spread(values)[0] if values else None


def _cell(found: Sequence[Examined], read: Callable[[Examined], float | None], share: bool = False) -> TableCell:
    values = [value for one in found if (value := read(one)) is not None]
    if not values:
        return TableCell(text="–")
    mean, deviation = spread(values)
    shown = [f"{value:.1%}" if share else number(value) for value in (mean, deviation or 0.0)]
    return TableCell(text=shown[0], under="" if deviation is None else f"± {shown[1]}")


def _table(groups: Mapping[str, Sequence[Examined]], best: str, title: str) -> Table:
    labels = list(dict.fromkeys(label for found in groups.values() for one in found for label in one.attacks))
    beside = any(one.beside for found in groups.values() for one in found)
    columns = [
        Column(label="Model", number=False),
        Column(label="Scale", hint="of the update, so that validation rows keep enough"),
        Column(label="Forget ES", arrow="↓", hint="extraction strength on the forget rows"),
        Column(label="Unseen kept", arrow="↑", hint="part of the target's strength on rows that nothing looked at"),
        Column(
            label="Calibrated",
            arrow="↓",
            hint="forget strength where the update is scaled to keep enough of unseen rows",
        ),
        *(Column(label=human(label), arrow="↓", hint="strength on the forget rows then") for label in labels),
        Column(label="Worst margin", arrow="↓", hint="largest distance to the reference under any attack"),
        *(Column(label=label, arrow=arrow, hint=hint) for label, arrow, hint in _BESIDE.values() if beside),
        Column(label="Seconds", hint="training and scoring"),
    ]
    rows = []
    for name, found in groups.items():
        cells = [
            TableCell(text=name),
            _cell(found, lambda f: f.scale),
            _cell(found, _forget),
            _cell(found, lambda f: f.kept, share=True),
            _cell(found, _calibrated),
            *(_cell(found, methodcaller("under", label)) for label in labels),
            _cell(found, lambda f: f.margin),
            *(_cell(found, methodcaller("besides", measure)) for measure in _BESIDE if beside),
            _cell(found, lambda f: f.own.seconds),
        ]
        rows.append(TableRow(cells=cells, role="result" if name == best else "specialist"))
    some = list({found.people: found for group in groups.values() for found in group}.values())
    for name in _YARDSTICKS:
        if any(name in found.outcomes for found in some):
            known = [
                _cell(some, methodcaller("reference_under", label)) if name == "reference" else TableCell(text="–")
                for label in labels
            ]
            cells = [TableCell(text=human(name)), TableCell(text="–"), _cell(some, methodcaller("of", name, "forget"))]
            kept = _cell(some, methodcaller("share_of", name), share=True)
            nothing = TableCell(text="–")
            others = [_cell(some, methodcaller("besides", measure, name)) for measure in _BESIDE if beside]
            rows.append(TableRow(cells=[*cells, kept, nothing, *known, nothing, *others, nothing], role=name))
    return Table(title=title, columns=columns, rows=rows)


def _report(final: Sequence[Examined], options: Auto, others: bool) -> Section:
    groups = _grouped(final)
    seeds = len({found.people for found in final})
    attacked = any(found.attacks for found in final)
    words = f"Mean ± standard deviation over the people of {plural(seeds, 'seed')}" if others else "One set of people"
    return Section(
        title="On other people" if others else "What was chosen",
        lead="Strengths are extraction strength. The choice had been made before these people were looked at."
        if others
        else "Strengths are extraction strength; unseen rows chose nothing.",
        figures=[_plane(groups, options, False), *([_plane(groups, options, True)] if attacked else [])],
        tables=[_table(groups, next(iter(groups)), words)],
    )


def _search(tried: Sequence[Examined], chosen: Sequence[Examined], options: Auto) -> Section:
    return Section(
        title="What was tried",
        lead=f"Every variation of auto and every rate of every rival, one training each, on the people of seed "
        f"{options.seed}. A variation differs from the default in what its name says.",
        tables=[_table(_grouped(tried), chosen[0].entrant.name if chosen else "", plural(len(tried), "model"))],
    )


def _plane(groups: Mapping[str, Sequence[Examined]], options: Auto, attacked: bool) -> Plane:
    """Means over people, as the models are or under their worst attacks, against what unseen rows keep."""
    read = (lambda f: f.worst) if attacked else _forget
    first = next(iter(groups))
    measured = {
        name: Measured(_mean(found, read) or 0.0, _mean(found, lambda f: f.own[JUDGED]) or 0.0)
        for name, found in groups.items()
    }
    spots = [
        Spot(name=name, role="result" if name == first else "specialist", x=found.forget, y=found.kept)
        for name, found in measured.items()
    ]
    for name in _YARDSTICKS:
        x = _mean(groups[first], methodcaller("of", name, "forget"))
        if attacked:
            x = _mean(groups[first], _reference_worst) if name == "reference" else None
        y = _mean(groups[first], methodcaller("of", name, JUDGED))
        if x is not None and y is not None:
            spots.append(Spot(name=name, role=name, x=x, y=y))
    target = _mean(groups[first], methodcaller("of", "target", JUDGED)) or 0.0
    return Plane(
        title="After the worst attack" if attacked else "Forgetting against keeping",
        retain_name="unseen retain",
        spots=spots,
        front=pareto_front(measured),
        retain_at_least=options.share * target,
        words=[
            "The same models, with their forget strength under the attack that brings most back."
            if attacked
            else "Means over people. The upper left corner is ideal; in the shaded field enough is kept on rows that "
            "nothing looked at."
        ],
    )


def _reference_worst(found: Examined) -> float | None:
    return max((known for _, known in found.attacks.values() if known is not None), default=None)
