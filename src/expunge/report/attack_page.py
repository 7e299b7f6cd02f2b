"""The page of an attack: Robust? first, then every attack, its curve against the budget, and all of its points."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from expunge.report.attack_record import AttackPoint, AttackRecord, AttackResult, Estimate
from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.figure_data import Curves, Forest, Line, Role, Stretch
from expunge.report.judgement import Answer, Verdict
from expunge.report.text import compact, human, interval, listed, named, number, plural, sentence

_ROLES: dict[str, Role] = {"model": "result", "target": "target", "reference": "reference"}
_KINDS = {
    "behaviour": ("Robust when asked differently", "the weights stay as they are"),
    "knowledge": ("Robust after further training", "the weights change by data"),
    "weights": ("Robust to changed weights", "without any data"),
}
#: Budgets that differ by more than this are set at equal distances.
_WIDE = 12.0
AS_IT_IS = "as it is"


def attack_document(record: AttackRecord) -> Document:
    """The page of a folder that `expunge attack` wrote."""
    sections = [_each(record), _budgets(record), _points(record)]
    return Document(
        kind="attack",
        name=named(record.subjects["model"].source),
        answer=answer(record),
        rule=rule(record.robust_margin),
        remarks=[sentence(record.reason)],
        verdicts=[overall(record), *_by_kind(record)],
        facts=_facts(record),
        settings={"Convention": record.convention, "expunge": record.expunge},
        sections=[section for section in sections if section.figures or section.tables],
        left_out={_left(entry.attack, entry.point, entry.subject): entry.reason for entry in record.left_out},
        limits=_limits(record),
        results={"verdict": record.verdict, "attacks": {entry.name: entry.verdict for entry in record.attacks}},
    )


def rule(margin: float) -> str:
    """How robustness is judged, in words."""
    return (
        f"Fixed beforehand: an attack is withstood if it draws at most {number(margin)} more out of the model than out "
        "of the reference under the same attack, row by row on the forget rows, with the whole 95% interval. The "
        "reference never saw these rows; what it gives away can be guessed or learnt anew."
    )


def silent(point: AttackPoint) -> bool:
    """Whether the attack reads nothing at this point: not even what the target knows."""
    return point.informative is False and point.verdict != "no"


def worst(attack: AttackResult) -> AttackPoint | None:
    """The point with the largest margin among those that say something; among the others if there is no such.

    A point at which the model is shown to be above the reference says something, whatever the target does there.
    """
    known = [point for point in attack.points if point.margin is not None]
    failed = [point for point in known if point.verdict == "no"]
    speaking = [point for point in known if not silent(point)]
    return max(failed or speaking or known, key=lambda point: point.margin.value if point.margin else 0.0, default=None)


def state(attack: AttackResult) -> Answer:
    """The attack's verdict; an attack that can't read what the target knows is passed by nobody."""
    if attack.verdict != "no" and attack.points and all(silent(point) for point in attack.points):
        return "no evidence"
    return attack.verdict


def answer(record: AttackRecord) -> str:
    """The attacks in one sentence."""
    tried = [attack for attack in record.attacks if state(attack) != "no evidence"]
    broken = [human(attack.name) for attack in tried if attack.verdict == "no"]
    if broken:
        return (
            f"The model is not robust: {listed(broken)} {_draw(len(broken))} more out of it than out of the reference."
        )
    if record.verdict == "yes":
        words = "attack draws" if len(tried) == 1 else "attacks draw"
        return f"The model is robust: none of {len(tried)} {words} more out of it than out of the reference."
    if not tried:
        return "It is not shown whether the model is robust: no attack here could read what the target knows."
    return f"It is not shown that the model is robust against {plural(len(tried), 'attack')}."


def _draw(count: int) -> str:
    return "draws" if count == 1 else "draw"


def overall(record: AttackRecord) -> Verdict:
    """Robust?, over all attacks: the largest margin of any."""
    attacks = [attack for attack in record.attacks if state(attack) != "no evidence"]
    found = _verdict("Robust?", attacks, record, record.verdict if attacks else "not shown")
    silent_ones = len(record.attacks) - len(attacks)
    if not silent_ones:
        return found
    words = f"{plural(silent_ones, 'attack')} could not read what the target itself knows: no evidence either way."
    return replace(found, remarks=(*found.remarks, words))


def _by_kind(record: AttackRecord) -> Iterator[Verdict]:
    """One verdict per kind of attack, where there are several kinds."""
    kinds = {attack.kind for attack in record.attacks}
    for kind, (title, what) in _KINDS.items():
        attacks = [attack for attack in record.attacks if attack.kind == kind]
        if not attacks or len(kinds) < 2:
            continue
        states = {state(attack) for attack in attacks}
        speaking: Answer = "no" if "no" in states else "yes" if states <= {"yes", "no evidence"} else "not shown"
        joint: Answer = "no evidence" if states == {"no evidence"} else speaking
        names = listed(human(attack.name).lower() for attack in attacks)
        made = _verdict(title, [attack for attack in attacks if state(attack) != "no evidence"], record, joint)
        yield replace(made, rule=f"{names[:1].upper()}{names[1:]}: {what}.")


def _verdict(question: str, attacks: Sequence[AttackResult], record: AttackRecord, answered: Answer) -> Verdict:
    pairs = [(attack, point) for attack in attacks if (point := worst(attack)) is not None and point.margin is not None]
    words = f"Yes if every margin's whole 95% interval lies at or below {number(record.robust_margin)}."
    if not pairs:
        reason = ("There is no reference to compare with.",) if "reference" not in record.subjects else ()
        return Verdict(question, answered, None, None, None, record.robust_margin, "margin", words, reason)
    attack, point = max(pairs, key=lambda pair: pair[1].margin.value if pair[1].margin else 0.0)
    margin = point.margin or Estimate(value=0.0, n=0)
    measured = f"more than the reference under {human(attack.name).lower()}, {point.label}, {plural(margin.n, 'row')}"
    return Verdict(question, answered, margin.value, margin.low, margin.high, record.robust_margin, measured, words)


def _facts(record: AttackRecord) -> dict[str, str]:
    facts = {name.capitalize(): named(subject.source) for name, subject in record.subjects.items()}
    points = sum(len(attack.points) for attack in record.attacks)
    return {**facts, "Attacks": f"{len(record.attacks)} ({plural(points, 'point')})", "Convention": record.convention}


def _each(record: AttackRecord) -> Section:
    rows, stretches = [], []
    for attack in record.attacks:
        point, found = worst(attack), state(attack)
        if point is not None and point.margin is not None:
            margin, quiet = point.margin, found == "no evidence"
            shade = "silent" if quiet else attack.verdict
            hint = "could not read what the target knows" if quiet else f"at {point.label}: {attack.verdict}"
            name = human(attack.name)
            stretches.append(
                Stretch(name=name, value=margin.value, low=margin.low, high=margin.high, state=shade, hint=hint)
            )
        rows.append(_row(record, attack, point, found))
    heads = ["Attack", "Robust?", "Strongest point", *(name.capitalize() for name in record.subjects), "Margin"]
    columns = [Column(label=head, number=index > 2) for index, head in enumerate(heads)]
    columns[-1] = Column(label="Margin", hint="model − reference, paired by row", under="model − reference")
    figures = []
    if stretches:
        words = [
            "Each attack at its most telling point. What lies in the shaded field is withstood; grey rings could not "
            "read the knowledge from the target either, and prove nothing."
        ]
        name = "drawn out of the model − drawn out of the reference"
        figures.append(
            Forest(title="Margin over the control", x_name=name, rows=stretches, threshold=record.robust_margin,
                   threshold_name="at most", words=words)
        )  # fmt: skip
    return Section(title="Each attack", figures=figures, tables=[Table(columns=columns, rows=rows)])


def _row(record: AttackRecord, attack: AttackResult, point: AttackPoint | None, found: Answer) -> TableRow:
    quiet = "grey" if found == "no evidence" else ""
    shade = {"no": "worst", "yes": "best", "no evidence": "grey"}.get(found, "")
    head = TableCell(text=human(attack.name), under=attack.idea, shade=quiet)
    said = TableCell(text=found, under=sentence(attack.reason), shade=shade)
    where = TableCell(text=point.label if point else "–", under=_budget(attack, point) if point else "", shade=quiet)
    cells = [_estimate(point.strengths.get(name) if point else None, quiet) for name in record.subjects]
    return TableRow(cells=[head, said, where, *cells, _estimate(point.margin if point else None, quiet)])


def _budget(attack: AttackResult, point: AttackPoint) -> str:
    return f"{attack.budget}: {compact(point.budget)}"


def _estimate(found: Estimate | None, shade: str = "", note: str = "") -> TableCell:
    if found is None:
        return TableCell(text="–", note=note, shade=shade)
    under = interval(found.low, found.high)
    return TableCell(text=number(found.value), under=under, note=note, shade=shade)


def _budgets(record: AttackRecord) -> Section:
    lead = (
        "Strength on the forget rows against the budget of each attack, with 95% intervals. The dashed line is the "
        "control: the same attack on a model that never saw these rows. Only the distance to it counts."
    )
    figures = [figure for attack in record.attacks if (figure := _curve(record, attack)) is not None]
    return Section(title="Against the budget", lead=lead if figures else "", figures=list(figures))


def _curve(record: AttackRecord, attack: AttackResult) -> Curves | None:
    points = [attack.before, *attack.points]
    if not attack.points:
        return None
    budgets = [point.budget for point in points]
    steady = all(a < b for a, b in itertools.pairwise(budgets)) and len(points) > 2
    even = not steady or budgets[-1] > _WIDE * budgets[1]
    x = [float(index) for index in range(len(points))] if even else budgets
    labels = {
        f"{at:g}": point.label if point is not attack.before else AS_IT_IS for at, point in zip(x, points, strict=True)
    }
    lines = []
    for name in record.subjects:
        found = [point.strengths.get(name) for point in points]
        if any(found):
            columns = {end: [getattr(one, end) if one else None for one in found] for end in ("value", "low", "high")}
            columns["y"] = columns.pop("value")
            lines.append(Line(name=name, role=_ROLES.get(name, "other"), x=x, **columns))
    quiet = [at for at, point in zip(x, points, strict=True) if silent(point)]
    words = [f"{state(attack).capitalize()}: {attack.reason.rstrip('.')}."]
    words += ["Hollow grey dots: not even the target shows what it knows there."] if quiet else []
    return Curves(
        title=human(attack.name),
        x_name=attack.budget,
        y_name=human(attack.strength).lower(),
        lines=lines,
        x_scale="even" if even else "linear",
        x_labels=labels if even else {},
        silent=quiet,
        words=words,
    )


def _points(record: AttackRecord) -> Section:
    names = list(record.subjects)
    heads = ["Point", *(name.capitalize() for name in names), "Margin", "Back since", "Retain rows", "Prompts dropped"]
    hints = {
        "Margin": "model − reference, paired by row",
        "Back since": "model under the attack − model as it is, paired by row",
        "Retain rows": "the model's strength on the retain rows",
        "Prompts dropped": "prompts that contained the answer, and were not asked",
    }
    columns = [Column(label=head, hint=hints.get(head, ""), number=index > 0) for index, head in enumerate(heads)]
    tables = []
    for attack in record.attacks:
        rows = [_point_row(names, attack, point) for point in (attack.before, *attack.points)]
        title = f"{human(attack.name)}: {state(attack)} ({human(attack.strength).lower()})"
        tables.append(Table(title=title, columns=columns, rows=rows, folded=True))
    lead = "Every strength that was tried, weakest first. Grey points prove nothing, whatever their numbers."
    return Section(title="All points", lead=lead, tables=tables)


def _point_row(names: Sequence[str], attack: AttackResult, point: AttackPoint) -> TableRow:
    shade = "grey" if silent(point) else ""
    plain = point is attack.before
    label = AS_IT_IS if plain else point.label
    settings = ", ".join(f"{key} {compact(v) if isinstance(v, float) else v}" for key, v in point.settings.items())
    under = settings if plain or settings else _budget(attack, point)
    note = "says nothing: the target shows less than half of what it knows" if shade else ""
    head = TableCell(text=label, under=under, note=note, shade=shade)
    dropped = point.dropped
    lost = f"{plural(dropped.rows, 'row')} left without" if dropped.rows else ""
    cells = [
        *(_estimate(point.strengths.get(name), shade) for name in names),
        _estimate(point.margin, shade),
        _estimate(point.recovered, shade),
        _estimate(point.retained.get("model"), shade),
        TableCell(text=str(dropped.candidates) if dropped.candidates else "–", under=lost, shade=shade),
    ]
    return TableRow(cells=[head, *cells])


def _left(attack: str, point: str | None, subject: str | None) -> str:
    return human(attack) + (f", {point}" if point else "") + (f" on {subject}" if subject else "")


def _limits(record: AttackRecord) -> list[str]:
    said = [
        "These attacks are some of many. What withstood them may give way to another, or to the same with more budget.",
        "The intervals come from drawing rows anew. They say nothing about another seed of the attack's own training.",
        f"One run of each attack with seed {record.seed}.",
        "Knowledge that was taught in a short fine-tuning comes off more easily than what was learnt in pretraining: "
        "with such a target, robustness is overestimated.",
    ]
    if "reference" not in record.subjects:
        said.insert(0, "There is no reference model, so that no margin can be formed: what came back may be guessed.")
    if "target" not in record.subjects:
        said.insert(0, "There is no target model: it is unknown whether these attacks can read the knowledge at all.")
    return said
