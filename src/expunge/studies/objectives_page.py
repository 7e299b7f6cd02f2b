"""What `objectives` found, as a document: the plane, the methods, the learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.figure_data import Plane, Spot
from expunge.report.text import compact, human, listed, number, plural
from expunge.studies.rules import Measured, balance, keeps, pareto_front, spread

if TYPE_CHECKING:
    from expunge.studies.ground import Ground, Outcome
    from expunge.studies.objectives import Objectives

SUMMARY = "every unlearning objective on one target, each at its best learning rate, over seeds"
VALIDATION, JUDGED = "validation", "retain_unseen"
REPORTED = ("forget", "retain", JUDGED)
#: Methods on the front that the answer names.
_NAMED = 4


@dataclass(frozen=True)
class Found:
    """A method at its chosen rate: outcomes over seeds, and means and deviations of its strengths."""

    method: str
    rate: float
    met: bool  # the chosen rate keeps its share of the validation strength
    tried: Mapping[float, Outcome]
    seeds: Sequence[Outcome]

    def over(self, split: str) -> tuple[float, float | None]:
        """Mean and standard deviation over the seeds that came through."""
        return spread([outcome[split] for outcome in self.seeds if outcome.strengths])


def document(
    ground: Ground,
    options: Objectives,
    found: Sequence[Found],
    tried: Mapping[str, Mapping[float, Outcome]],
    left_out: Mapping[str, str],
) -> Document:
    """The whole document."""
    target = ground.outcomes["target"]
    measured = {item.method: Measured(item.over("forget")[0], item.over(JUDGED)[0]) for item in found}
    front = pareto_front(measured)
    best = max(measured, key=lambda name: balance(measured[name], target[JUDGED])) if measured else None
    ranked = sorted(found, key=lambda item: -balance(measured[item.method], target[JUDGED]))
    sections = [
        _plane(ground, options, ranked, front, best),
        Section(title="Methods", tables=[_methods(ground, options, ranked, front, best)]),
        Section(
            title="Learning rates",
            lead=f"One trial per rate with seed {options.seed}; chosen by the rule above, on validation rows that are "
            "in no other column of this page.",
            tables=[_rates(ground, options, found, tried)],
        ),
    ]
    return Document(
        name="objectives",
        summary=SUMMARY,
        paper="",
        answer=answer(options.model, measured, front, best, target),
        rule=rule(options),
        remarks=ground.remarks,
        planned=ground.planned,
        done=len(ground.trials),
        facts={"Methods": str(len(tried)), "Seeds per method": str(options.seeds)},
        settings=_settings(ground, options, left_out),
        sections=sections,
        limits=_limits(options),
        results={
            "chosen": {item.method: {"rate": item.rate, "meets_rule": item.met} for item in found},
            "front": front,
            "best": best,
            "trial": next((item.seeds[0].name for item in found if item.method == best), None),
            "left_out": dict(left_out),
        },
    )


def rate_text(rate: float) -> str:
    """A learning rate as it is written in papers: 1.4e-4."""
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def rule(options: Objectives) -> str:
    """How rates are chosen, in words."""
    return (
        "Fixed beforehand: of each method the learning rate with the lowest extraction strength on the forget rows "
        f"among those that keep at least {options.share:.0%} of the target's on validation rows put aside from retain; "
        "if none does, the best balance (harmonic mean of forgotten and kept). What is reported on retain rows chose "
        "nothing."
    )


def answer(
    model: str, measured: Mapping[str, Measured], front: Sequence[str], best: str | None, target: Outcome
) -> str:
    """One sentence: which objective stands where on this model."""
    if best is None:
        return f"Nothing can be said of {model}: no method was finished."
    found = measured[best]
    numbers = (
        f"forget strength {number(target['forget'])} → {number(found.forget)}, "
        f"unseen retain strength {number(target[JUDGED])} → {number(found.kept)}"
    )
    others = [name for name in front if name != best]
    named = listed(others) if len(others) <= _NAMED else f"{len(others)} others"
    beside = f"; nothing dominates {named} either" if others else ""
    return f"On {model}, {best} has the best balance of {plural(len(measured), 'objective')}: {numbers}{beside}."


def _plane(
    ground: Ground, options: Objectives, found: Sequence[Found], front: Sequence[str], best: str | None
) -> Section:
    spots = []
    for item in found:
        (x, x_spread), (y, y_spread) = item.over("forget"), item.over(JUDGED)
        role = "result" if item.method == best else "specialist"
        ends = [None if s is None else (max(0.0, v - s), min(1.0, v + s)) for v, s in ((x, x_spread), (y, y_spread))]
        spots.append(Spot(name=item.method, role=role, x=x, y=y, x_ends=ends[0], y_ends=ends[1]))
    for name in ("original", "target", "reference"):
        if name in ground.outcomes:
            yardstick = ground.outcomes[name]
            spots.append(Spot(name=name, role=name, x=yardstick["forget"], y=yardstick[JUDGED]))
    words = [
        "Each mark is one method at its chosen learning rate, whiskers one standard deviation over seeds. The upper "
        "left corner is ideal. The dotted line joins the methods that no other beats on one side without losing on the "
        "other.",
        f"In the shaded field at least {options.share:.0%} of the target's strength is kept on retain rows that "
        "unlearning never saw. A mark without a name shows it under the pointer; the table names them all.",
    ]
    figure = Plane(
        title="Forgetting against keeping",
        retain_name="unseen retain",
        spots=spots,
        front=list(front),
        retain_at_least=options.share * ground.outcomes["target"][JUDGED],
        words=words,
    )
    return Section(title="Forgetting against keeping", figures=[figure])


def _methods(
    ground: Ground, options: Objectives, found: Sequence[Found], front: Sequence[str], best: str | None
) -> Table:
    target = ground.outcomes["target"]
    columns = [Column(label="Method", number=False), Column(label="Learning rate")]
    columns += [Column(label=f"{human(split)} ES\u00a0{'↓' if split == 'forget' else '↑'}") for split in REPORTED]
    columns += [
        Column(label="Balance\u00a0↑", hint="harmonic mean of what is forgotten and of what unseen retain rows keep"),
        Column(label="Seconds", hint="training and scoring of one trial"),
        Column(label="", number=False),
    ]
    rows = []
    for item in found:
        cells = [TableCell(text=item.method), TableCell(text=rate_text(item.rate))]
        cells += [_deviating(*item.over(split)) for split in REPORTED]
        measured = Measured(item.over("forget")[0], item.over(JUDGED)[0])
        cells.append(TableCell(text=number(balance(measured, target[JUDGED]))))
        mean, deviation = spread([outcome.seconds for outcome in item.seeds])
        cells.append(TableCell(text=f"{mean:.1f}", under="" if deviation is None else f"± {deviation:.1f}"))
        cells.append(TableCell(text="; ".join(_remarks(item, options, target, front, best))))
        rows.append(TableRow(cells=cells, role="result" if item.method == best else "specialist"))
    for name in ("original", "target", "reference"):
        if name in ground.outcomes:
            yardstick = ground.outcomes[name]
            cells = [TableCell(text=human(name)), TableCell(text="–")]
            cells += [TableCell(text=number(yardstick[split])) for split in REPORTED]
            rows.append(TableRow(cells=[*cells, *(TableCell(text="") for _ in range(3))], role=name))
    title = f"Mean ± standard deviation over {plural(options.seeds, 'seed')}, best balance first"
    return Table(title=title, columns=columns, rows=rows)


def _remarks(item: Found, options: Objectives, target: Outcome, front: Sequence[str], best: str | None) -> list[str]:
    said = ["best balance"] if item.method == best else []
    said += ["on the front"] if item.method in front and item.method != best else []
    said += [] if item.met else ["no rate met the rule"]
    kept = keeps(Measured(0.0, item.over(JUDGED)[0]), target[JUDGED], options.share)
    said += [f"keeps {options.share:.0%}"] if kept else []
    broken = sum(bool(outcome.failed) for outcome in item.seeds)
    said += [f"{plural(broken, 'seed')} broke off"] if broken else []
    said += [f"{len(item.seeds)} of {options.seeds} seeds"] if len(item.seeds) < options.seeds else []
    return said


def _deviating(mean: float, deviation: float | None) -> TableCell:
    return TableCell(text=number(mean), under="" if deviation is None else f"± {number(deviation)}")


def _rates(
    ground: Ground, options: Objectives, found: Sequence[Found], tried: Mapping[str, Mapping[float, Outcome]]
) -> Table:
    chosen = {item.method: item for item in found}
    target = ground.outcomes["target"]
    columns = [Column(label="Method", number=False), Column(label="Learning rate"), Column(label="Forget ES\u00a0↓")]
    columns += [Column(label="Validation ES\u00a0↑"), Column(label="", number=False)]
    rows = []
    for method, trials in tried.items():
        for rate, outcome in trials.items():
            words, role = outcome.failed or outcome.note, ""
            if method in chosen and chosen[method].rate == rate:
                role = "result"
                words = "chosen" if chosen[method].met else "chosen: best balance"
            elif outcome.strengths and not keeps(Measured(0, outcome[VALIDATION]), target[VALIDATION], options.share):
                words = words or f"keeps less than {options.share:.0%}"
            values = [number(outcome[split]) if outcome.strengths else "–" for split in ("forget", VALIDATION)]
            cells = [TableCell(text=text) for text in (method, rate_text(rate), *values, words)]
            rows.append(TableRow(cells=cells, role=role))
    title = f"{plural(len(rows), 'trial')}; target on validation rows: {number(target[VALIDATION])}"
    return Table(title=title, columns=columns, rows=rows, folded=len(rows) > 12)


def _settings(ground: Ground, options: Objectives, left_out: Mapping[str, str]) -> dict[str, str]:
    train = ground.whole.recipe.unlearn[0].train
    how = f"LoRA of rank {options.lora}" if options.lora else "the parameters that the method trains by default"
    words = (
        f"{how}, {compact(train.epochs)} epochs over the forget rows, {train.batch_size} of them a step, AdamW "
        f"({train.schedule}), {train.precision}; retain terms and other hyper-parameters as the method declares them"
    )
    said = {"Every trial": words}
    if options.rates is None:
        said["Learning rates"] = (
            "the published ones, filled up to three by factors of 3, times √(7·10⁹ / parameters of this model) "
            f"(arXiv:2203.03466){', and times 10 for adapters' if options.lora else ''}"
        )
    if options.parameters:
        said["Hyper-parameters"] = ", ".join(options.parameters)
    if left_out:
        said["Left out"] = "; ".join(f"{method}: {reason}" for method, reason in left_out.items())
    return said


def _limits(options: Objectives) -> list[str]:
    return [
        "Only the learning rate is tuned. Weights of terms and other hyper-parameters stand at the methods' published "
        "defaults, which were found on larger models and other data.",
        "The rule looks at forget strength on the forget rows themselves: there is no second set of what is to be "
        "forgotten.",
        "Every method has the same number of epochs, not the same time: see the seconds.",
        f"{plural(options.seeds, 'seed')}: the order of rows and what adapters start from differ; data and target do "
        "not. A standard deviation of so few is itself uncertain.",
        "Extraction strength is what greedy decoding gives back. Methods that suppress rather than remove look as good "
        "here until they are attacked.",
    ]
