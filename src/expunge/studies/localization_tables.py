"""The tables of `localization`: oracle against random, attributions, the objective-free match, injection, the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence

from expunge.report.document import Column, Table, TableCell, TableRow
from expunge.report.text import human, interval, listed, number, percent, plural
from expunge.studies.localization_claims import (
    AUES,
    AXES,
    MARGIN,
    MATCHED,
    RELEARNED,
    Claims,
    Measure,
    method_name,
    region_name,
)
from expunge.studies.localization_record import ORACLE, RANDOM, Look, Run
from expunge.studies.localization_stats import Paired, State
from expunge.studies.trends_page import deviating
from expunge.studies.zjuklab_claims import mean_of

#: arXiv:2505.16252, table 2: method → for Llama-3.1-8B and OLMo-2-7B on TOFU forget10, mean and deviation over five
#: seeds: (random, oracle, |Δ|, p) of AUES, then (random, oracle, p) of MU95. |Δ| is the mean over seeds.
Printed = tuple[str, str, str, str, str, str, str]
PUBLISHED: dict[str, tuple[Printed, Printed]] = {
    "wga": (
        (".586 ± .020", ".593 ± .016", ".018", ".61", "−10.33 ± 1.73", "−10.00 ± .42", ".46"),
        (".609 ± .020", ".605 ± .011", ".008", ".64", "−13.88 ± .58", "−13.77 ± .45", ".56"),
    ),
    "npo": (
        (".625 ± .016", ".619 ± .011", ".011", ".71", "−9.45 ± 1.91", "−8.56 ± 1.39", ".31"),
        (".638 ± .015", ".639 ± .017", ".007", ".52", "−14.19 ± .47", "−14.33 ± .58", ".72"),
    ),
    "dpo": (
        (".497 ± .013", ".492 ± .012", ".007", ".66", "−13.26 ± 1.06", "−13.60 ± .72", ".68"),
        (".561 ± .011", ".568 ± .013", ".010", ".36", "−13.62 ± .31", "−13.52 ± .53", ".57"),
    ),
    "rmu": (
        (".506 ± .030", ".502 ± .017", ".017", ".37", "−13.75 ± .91", "−13.64 ± .63", ".39"),
        (".437 ± .024", ".439 ± .020", ".004", ".62", "−12.95 ± .69", "−13.62 ± 1.32", ".57"),
    ),
}
_MODELS = ("Llama-3.1-8B", "OLMo-2-7B")
#: The same, table 1, Llama-3.1-8B: AUES and MU95 by localizer.
LOCALIZERS = {
    "Random": (".529", "−14.87"),
    "Activations": (".522", "−16.84"),
    "MemFlex": (".491", "−15.97"),
    "WAGLE": (".525", "−16.61"),
}
#: The same, figure 1, read off the plot: forgetting and retain strength after MLP outputs were matched.
_FIGURE = "oracle .93 and random .88 at a retain strength of .87 to .89; retrained .96 at .91; before .19"

_SHOWN: dict[State, str] = {
    "better": "better",
    "worse": "worse",
    "slight": f"differs, < {MARGIN:g}",
    "alike": f"within ±{MARGIN:g}",
    "open": "open",
    "none": "–",
}
_NOTE = (
    f"Shown, after Holm's correction: better or worse than random; differs, < {MARGIN:g}: it does, and lies inside "
    f"±{MARGIN:g} all the same; within ±{MARGIN:g}: equal by two one-sided tests; open: neither is shown."
)


def state_cell(claims: Claims, measure: Measure, method: str | None, region: str = ORACLE) -> TableCell:
    """What is shown, with the reason where a measure can't tell."""
    found, state = claims.compared(measure, method, region), claims.state(measure, method, region)
    if state == "none":
        reason = "no pair" if not found.n else "one pair" if found.n == 1 else "all pairs differ alike"
        return TableCell(text="–", under=reason)
    nothing = state == "open" and found.equivalent
    return TableCell(text=_SHOWN[state], under="no room to differ" if nothing else "")


def p_text(p: float | None) -> str:
    """A p value; what is below a thousandth only so."""
    return "–" if p is None else "< 0.001" if p < 0.001 else number(p)


def p_cell(claims: Claims, measure: Measure, method: str | None, region: str = ORACLE) -> TableCell:
    """p, and below it what Holm's correction makes of it where there is a family."""
    p, corrected = claims.compared(measure, method, region).p, claims.corrected(measure, method, region)
    alone = method is None and region not in claims.attributions
    return TableCell(text=p_text(p), under="" if alone or corrected is None else p_text(corrected))


def p_words(p: float) -> str:
    """`p 0.012`, `p < 0.001`."""
    return f"p {p_text(p)}"


def difference_cell(found: Paired) -> TableCell:
    """A mean difference with Student's interval."""
    return TableCell(text=number(found.mean), under=interval(found.low, found.high))


# ------------------------------------------------------------ oracle against random


def comparison(claims: Claims, measure: Measure) -> Table:
    """One measure, method by method: both regions, their difference, and what could have been found."""
    printed = {AUES.name: (2, 3), MATCHED.name: (None, 6)}.get(measure.name)
    columns = [
        Column(label="Method", number=False),
        Column(label="Oracle"),
        Column(label="Random"),
        Column(
            label=human(measure.difference(ORACLE)), under="95% CI (t)", hint="above 0: the true region does better"
        ),
        Column(label="Bootstrap", under="95% CI of pairs", hint="too narrow for a handful of seeds"),
        Column(label="p", under="by Holm", hint="paired t-test; below it corrected for the number of methods"),
        Column(label="Could have found", under="power 80%", hint="the smallest true difference"),
        Column(label="Equal within ±", under="TOST, 5%", hint="the smallest margin that would have held"),
        Column(
            label="|Δ|",
            under="paper" if printed else "",
            hint=f"mean over seeds of the size; below it what was published for {_MODELS[0]}",
        ),
        Column(label="Shown", number=False),
    ]
    rows = []
    for method in (*claims.found.methods, None):
        found = claims.compared(measure, method)
        cells = [TableCell(text="All methods" if method is None else method_name(method), under=_pairs(found))]
        for region in (ORACLE, RANDOM):
            values = claims.level(measure, region) if method is None else _values(claims, measure, method, region)
            cells.append(deviating(mean_of(values)))
        cells.append(difference_cell(found))
        cells.append(TableCell(text=interval(found.boot_low, found.boot_high) or "–"))
        cells += [p_cell(claims, measure, method), TableCell(text=number(found.detectable))]
        sizes = [abs(value) for value in found.differences.values()]
        cells += [TableCell(text=number(found.bound)), TableCell(text=_mean(sizes), under=_printed(method, printed))]
        cells.append(state_cell(claims, measure, method))
        rows.append(TableRow(cells=cells, role="result" if method is None else ""))
    notes = [_NOTE] if measure in AXES else []
    return Table(title=human(measure.label), words=measure.words, columns=columns, rows=rows, notes=notes)


def _values(claims: Claims, measure: Measure, method: str, region: str) -> list[float]:
    return list(claims.values(measure, method, region).values())


def _pairs(found: Paired) -> str:
    return plural(found.n, "pair")


def _printed(method: str | None, places: tuple[int | None, int] | None) -> str:
    """`.018, p .61`: what the paper has for a method."""
    if method not in PUBLISHED or places is None:
        return ""
    row, (size, p) = PUBLISHED[method][0], places
    return f"p {row[p]}" if size is None else f"{row[size]}, p {row[p]}"


def robustness(claims: Claims) -> Table:
    """Before and after relearning, and how far above the reference that was taught likewise."""
    columns = [
        Column(label="Method", number=False),
        Column(label="Region", number=False),
        Column(label="Forget", under="before", arrow="↓"),
        Column(label="Retain", under="before", arrow="↑"),
        Column(label="Forget", under="after", arrow="↓"),
        Column(label="Above the reference", under="after", hint="strength minus the control's", arrow="↓"),
    ]
    rows = []
    for method in claims.found.methods:
        for region in claims.found.regions():
            runs = [run for run in claims.came if (run.method, run.region) == (method, region) and run.relearned]
            if not runs:
                continue
            cells = [TableCell(text=method_name(method)), TableCell(text=region_name(region))]
            for name in ("forget", "retain"):
                cells.append(deviating(mean_of([getattr(run.looks[-1], name) for run in runs])))
            cells.append(deviating(mean_of(_values(claims, RELEARNED, method, region))))
            cells.append(deviating(mean_of(list(claims.above_control(method, region).values()))))
            rows.append(TableRow(cells=cells, role="result" if region == ORACLE else ""))
    title = f"Mean ± standard deviation over seeds, after {steps_in_words(claims.budgets)} of relearning"
    return Table(title="Before and after", words=title, columns=columns, rows=rows, folded=len(rows) > 12)


def steps_in_words(steps: Sequence[int]) -> str:
    """`4 and 8 steps (mean of the two)`."""
    if not steps:
        return "no step"
    return f"{listed(map(str, steps))} step{'s' if steps[-1] != 1 else ''}{' (mean)' if len(steps) > 1 else ''}"


# ------------------------------------------------------------ attributions


def attributions(claims: Claims) -> list[Table]:
    """How well each attribution finds the true region, and what unlearning there gains on random."""
    attributed = dict.fromkeys(one.name for one in claims.found.attributed)
    names = list(dict.fromkeys((*claims.found.regions(), *attributed)))
    unlearned = [name for name in names if name in claims.found.regions()]
    return [_finding(claims, names), *([_gains(claims, unlearned)] if unlearned else [])]


def _finding(claims: Claims, names: Sequence[str]) -> Table:
    columns = [
        Column(label="Region", number=False),
        Column(label="Precision", under="by chance", hint="part of the chosen units that are true ones", arrow="↑"),
        Column(label="AUC", under="0.5: chance", hint="that a true unit's score is above another's", arrow="↑"),
        Column(label="Overlap", under="Jaccard", arrow="↑"),
        Column(label="Update energy inside", hint="part of the squared update that lies in the true region"),
        Column(label="Seconds", hint="of the attribution"),
    ]
    rows = []
    for name in names:
        quality = [one for one in claims.found.attributed if one.name == name]
        cells = [
            TableCell(text=region_name(name)),
            TableCell(text=_mean([o.precision for o in quality]), under=_mean([o.chance for o in quality], "")),
            deviating(mean_of([one.auc for one in quality])),
            TableCell(text=_mean([one.overlap for one in quality])),
            TableCell(text=_share([run.energy_inside for run in claims.came if run.region == name])),
            TableCell(text=_mean([one.seconds for one in quality])),
        ]
        rows.append(TableRow(cells=cells, role="result" if name == ORACLE else ""))
    return Table(title="Finding the region", words="mean over seeds", columns=columns, rows=rows)


def _gains(claims: Claims, names: Sequence[str]) -> Table:
    columns = [Column(label="Region", number=False), Column(label="AUES", arrow="↑")]
    for label in ("AUES − random", "Relearned: random − it"):
        columns += [
            Column(label=label, under="95% CI (t)", hint="above 0: better than random"),
            Column(label="p", under="by Holm", hint="paired t-test; below it corrected for the number of attributions"),
            Column(label="Could have found"),
            Column(label="Shown", number=False),
        ]
    rows = []
    for name in names:
        cells = [TableCell(text=region_name(name)), deviating(mean_of(claims.level(AUES, name)))]
        for measure in (AUES, RELEARNED):
            cells += _gain(claims, measure, name)
        rows.append(TableRow(cells=cells, role="result" if name == ORACLE else ""))
    return Table(title="Unlearning there", words="mean over methods", columns=columns, rows=rows, notes=[_NOTE])


def _gain(claims: Claims, measure: Measure, name: str) -> list[TableCell]:
    """The cells of a difference from random; random itself has none."""
    if name == RANDOM:
        return [TableCell(text="–") for _ in range(4)]
    found = claims.compared(measure, None, name)
    cells = [difference_cell(found), p_cell(claims, measure, None, name), TableCell(text=number(found.detectable))]
    return [*cells, state_cell(claims, measure, None, name)]


def _mean(values: Sequence[float], none: str = "–") -> str:
    mean, _ = mean_of(values)
    return none if math.isnan(mean) else number(mean)


def _share(values: Sequence[float]) -> str:
    mean, _ = mean_of(values)
    return "–" if math.isnan(mean) else percent(mean)


# ------------------------------------------------------------ matching and injection


def matching(claims: Claims) -> Table:
    """What fitting the reference's MLP outputs reaches, region by region."""
    columns = [
        Column(label="Region", number=False),
        Column(label="Seeds"),
        Column(label="Residual", hint="what is left of the squared distance to the reference's outputs", arrow="↓"),
        Column(label="Forget", arrow="↓"),
        Column(label="Retain", arrow="↑"),
        Column(label="Retain, unseen", arrow="↑"),
        Column(label="Forget quality", under="log10 p", arrow="↑"),
        Column(label="Size of the change", hint="over the norm of the weights that may change"),
    ]
    found = claims.found
    rows = []
    injected = [one.after for one in found.injected if not one.failed]
    if injected:
        rows.append(TableRow(cells=_match_cells("before (injected)", injected, [], [], "–")))
    for region in dict.fromkeys(one.region for one in found.matchings):
        own = [one for one in found.matchings if one.region == region]
        cells = _match_cells(
            region_name(region),
            [one.look for one in own],
            [one.residual for one in own],
            [one.norm for one in own],
        )
        rows.append(TableRow(cells=cells, role="result" if region == ORACLE else ""))
    rows.append(TableRow(cells=_match_cells("reference", [found.reference], [], [], "–"), role="reference"))
    notes = [f"In the paper, forgetting after matching (read off figure 1): {_FIGURE}."]
    return Table(title="Mean ± standard deviation over seeds", columns=columns, rows=rows, notes=notes)


def _match_cells(
    name: str, looks: Sequence[Look], residuals: Sequence[float], norms: Sequence[float], count: str = ""
) -> list[TableCell]:
    columns = [
        residuals,
        [look.forget for look in looks],
        [look.retain for look in looks],
        [look.unseen for look in looks if look.unseen is not None],
        [look.forget_quality for look in looks],
        norms,
    ]
    return [TableCell(text=name), TableCell(text=count or str(len(looks))), *(deviating(mean_of(c)) for c in columns)]


def injections(claims: Claims) -> Table:
    """What teaching the forget rows to a part of the model did, wanted and not wanted."""
    pairs = (("Forget", "forget"), ("Retain", "retain"), ("Retain, unseen", "unseen"))
    columns = [Column(label="Seed", number=False), Column(label="Steps")]
    columns += [Column(label=label, under=when) for label, _ in pairs for when in ("before", "after")]
    broken = any(one.failed for one in claims.found.injected)
    columns += [Column(label="", number=False)] if broken else []
    rows = []
    for one in claims.found.injected:
        cells = [TableCell(text=str(one.seed)), TableCell(text=str(one.steps))]
        for _, name in pairs:
            cells += [TableCell(text=number(getattr(look, name))) for look in (one.before, one.after)]
        words = f"broke off: {one.failed}" if one.failed else ""
        rows.append(TableRow(cells=[*cells, *([TableCell(text=words)] if broken else [])]))
    return Table(columns=columns, rows=rows)


# ------------------------------------------------------------ the paper, and every run


def published() -> Table:
    """What the paper prints, for the eye to compare."""
    columns = [Column(label="Method", number=False), Column(label="Model", number=False)]
    columns += [Column(label=label, under="AUES") for label in ("Random", "Oracle", "|Δ|", "p")]
    columns += [Column(label=label, under="MU95") for label in ("Random", "Oracle", "p")]
    rows = [
        TableRow(cells=[TableCell(text=text) for text in (method_name(method), model, *printed)])
        for method, both in PUBLISHED.items()
        for model, printed in zip(_MODELS, both, strict=True)
    ]
    listed_ = "; ".join(f"{name} {aues} and {quality}" for name, (aues, quality) in LOCALIZERS.items())
    notes = [
        f"arXiv:2505.16252, table 2: TOFU forget10, five seeds, mean ± standard deviation. Table 1, {_MODELS[0]}, AUES "
        f"and MU95 by localizer: {listed_}.",
        "AUES here is the area of the monotone envelope over the looks of a run, and MU95 reads retain strength where "
        "the paper has TOFU's model utility: compare differences, not levels.",
    ]
    return Table(title="As published", columns=columns, rows=rows, notes=notes)


def runs(claims: Claims) -> Table:
    """Every run with its numbers."""
    columns = [Column(label="Seed", number=False), Column(label="Method", number=False)]
    columns += [Column(label="Region", number=False), Column(label="AUES"), Column(label="MU95")]
    columns += [Column(label="Forget", under="last look"), Column(label="Retain", under="last look")]
    columns += [Column(label="After relearning"), Column(label="Energy inside")]
    columns += [Column(label="Size of the change"), Column(label="Seconds"), Column(label="", number=False)]
    rows = [TableRow(cells=_run_cells(claims, run)) for run in claims.found.runs]
    title = f"All {plural(len(rows), 'run')}"
    return Table(title=title, columns=columns, rows=rows, folded=len(rows) > 12)


def _run_cells(claims: Claims, run: Run) -> list[TableCell]:
    head = [str(run.seed), method_name(run.method), region_name(run.region)]
    words = f"broke off: {run.failed}" if run.failed else run.note
    if run.failed or not run.looks:
        texts = ["–"] * 8
    else:
        last = run.looks[-1]
        texts = [number(claims.value(run, measure)) for measure in (AUES, MATCHED)]
        texts += [number(last.forget), number(last.retain), number(claims.value(run, RELEARNED))]
        energy = run.energy_inside
        texts += [percent(None if math.isnan(energy) else energy), number(run.update_norm), f"{run.seconds:.1f}"]
    return [TableCell(text=text) for text in (*head, *texts, words)]
