"""What `localization` found, as a document: the answer on both axes, pairs of seeds, attributions, the match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from expunge.numbers import without_nan
from expunge.report.document import Document, Section
from expunge.report.figure_data import AnyFigure
from expunge.report.text import interval, listed, number, plural, sentence
from expunge.studies.localization import PAPER, PUBLISHED_DENSITY, SUMMARY
from expunge.studies.localization_claims import (
    AUES,
    AXES,
    ENDS,
    LEFT,
    MARGIN,
    MATCHED,
    MEASURES,
    MOVED,
    RELEARNED,
    UNSEEN,
    Claims,
    Measure,
    method_name,
    region_name,
)
from expunge.studies.localization_figures import forest, fronts, pairs, relearning
from expunge.studies.localization_record import ORACLE, RANDOM, Found
from expunge.studies.localization_stats import SHARE
from expunge.studies.localization_tables import (
    attributions,
    comparison,
    injections,
    matching,
    p_words,
    published,
    robustness,
    runs,
)
from expunge.studies.zjuklab_claims import mean_of

if TYPE_CHECKING:
    from expunge.studies.ground import Ground
    from expunge.studies.localization import Localization

#: An injection that leaves the forget rows weaker than this taught too little to be unlearned.
_TAUGHT = 0.5
#: Attributions that a rank correlation needs.
_RANKED = 4
_RULE = (
    "Fixed beforehand: for each axis the oracle (updates in the true region alone) is compared with random regions "
    "disjoint from it, seed by seed, on the mean over methods. Localization informs unlearning where Student's 95% "
    "interval of the differences lies above 0, and misleads it below 0. It makes no difference where two one-sided "
    f"tests (5% each) put it inside ±{MARGIN:g} and there was room to differ (forget strength fell by at least "
    f"{MOVED:g}; relearning left a mean strength between {ENDS[0]:g} and {ENDS[1]:g}). Where both hold there is a "
    f"difference, but one below {MARGIN:g}. All else is left open: a p above 0.05 alone shows nothing."
)


def document(ground: Ground, options: Localization, found: Found) -> Document:
    """The whole document."""
    claims = Claims(found)
    planned, done = _progress(ground, found)
    return Document(
        name="localization",
        summary=SUMMARY,
        paper=f"arXiv:{PAPER}",
        answer=answer(options.model, claims),
        rule=_RULE,
        remarks=[*ground.remarks, *remarks(claims)],
        planned=planned,
        done=done,
        facts={
            "Seeds": _of(len({run.seed for run in claims.came}), len(found.seeds)),
            "Methods": str(len(found.methods)),
            "Tried in": plural(len(found.regions()), "region"),
            "Region": f"{found.density:.0%} of {plural(found.pool, _unit(found))}",
            "Forget rows": str(found.forget_rows),
        },
        settings=_settings(options, found),
        sections=sections(claims),
        limits=[*departures(options), *limits(claims)],
        results=results(claims),
    )


def sections(claims: Claims) -> list[Section]:
    """What was found, then each part of it."""
    made = [
        _found(claims),
        _trade_off(claims),
        _robust(claims),
        _attributed(claims),
        _matched(claims),
        _injected(claims),
    ]
    if claims.found.runs:
        made.append(Section(title="Runs", tables=[runs(claims)]))
    made.append(Section(title="The paper", tables=[published()]))
    return made


def _progress(ground: Ground, found: Found) -> tuple[int, int]:
    """Pieces of work that were planned, and those that are done."""
    if not found.progress:
        return ground.planned, len(ground.trials)
    planned, done = (sum(pair[place] for pair in found.progress.values()) for place in (0, 1))
    return planned, done


def _of(done: int, planned: int) -> str:
    return str(done) if done == planned else f"{done} of {planned}"


def _unit(found: Found) -> str:
    return found.unit.replace("_", " ")


# ------------------------------------------------------------ the answer


def answer(model: str, claims: Claims) -> str:
    """The study in a sentence: both axes, each with its numbers."""
    if not claims.came:
        return f"Nothing can be said of {model}: no unlearning came through."
    return f"On {model}, knowing where the rows are kept {' and '.join(claims.said(measure) for measure in AXES)}."


def remarks(claims: Claims) -> list[str]:
    """What else a reader should know at once."""
    said = [words for measure in AXES if (words := _found_by(claims, measure))]
    weak = [one for one in claims.found.injected if not one.failed and one.after.forget < _TAUGHT]
    if weak:
        seeds = listed(str(one.seed) for one in weak)
        said.append(
            f"The injection taught little in seed {seeds} (forget strength below {_TAUGHT:g}): there is not much to be "
            "unlearned there."
        )
    broken = [run for run in claims.found.runs if run.failed]
    if broken:
        where = listed(dict.fromkeys(f"{method_name(run.method)} in {region_name(run.region)}" for run in broken))
        said.append(
            f"{plural(len(broken), 'run')} broke off ({where}); their pairs are missing, which is no chance omission."
        )
    return said


def _found_by(claims: Claims, measure: Measure) -> str:
    """Whether attributions gain on random by a measure, in a sentence."""
    states = {name: claims.state(measure, None, name) for name in claims.attributions}
    states = {name: state for name, state in states.items() if state != "none"}
    if not states:
        return ""
    label = {AUES.name: "By AUES", RELEARNED.name: "After relearning"}[measure.name]
    groups = {word: [name for name, state in states.items() if state == word] for word in ("better", "worse", "slight")}
    said = {
        "better": "better than random",
        "worse": "worse than random",
        "slight": f"different from random, by less than {MARGIN:g}",
    }
    parts = [f"{_are(names)} {said[word]}" for word, names in groups.items() if names]
    rest = [name for name, state in states.items() if state in ("alike", "open")]
    if not parts:
        alike = [name for name in rest if states[name] == "alike"]
        largest = max(claims.compared(measure, None, name).detectable or 0.0 for name in rest)
        which = "the one attribution is not" if len(rest) == 1 else f"none of {len(rest)} attributions is"
        equal = f"; inside ±{MARGIN:g} of it by TOST: {listed(map(region_name, alike))}" if alike else ""
        power = f"differences of {number(largest)} and more could have been found"
        return f"{label}, {which} shown to differ from random ({power}{equal})."
    return f"{label}, of {plural(len(states), 'attribution')} {listed(parts)} (by Holm)."


def _are(names: Sequence[str]) -> str:
    return f"{listed(map(region_name, names))} {'is' if len(names) == 1 else 'are'}"


# ------------------------------------------------------------ sections


def _found(claims: Claims) -> Section:
    figures: list[AnyFigure] = [figure for measure in AXES if (figure := forest(claims, measure)) is not None]
    words = [words for measure in MEASURES if measure is not LEFT and (words := told(claims, measure))]
    lead = (
        "Oracle: updates in the vectors that hold the forget rows. Random: as many others. Every number is the "
        "difference of a pair with the same seed, so that above 0 the true region does better."
    )
    return Section(title="What was found", lead=lead, figures=figures, words=words or ["There is no pair yet."])


def told(claims: Claims, measure: Measure) -> str:
    """A measure in a sentence: the estimate, the interval, what could have been found, and equivalence."""
    found = claims.compared(measure, None)
    if found.mean is None:
        return ""
    methods = listed(map(method_name, claims.pooled_methods(measure)))
    what = f"{measure.label}, {measure.difference(ORACLE)}, mean over {methods}: {number(found.mean)}"
    if found.p is None:
        return sentence(f"{what} ({'one seed' if found.n == 1 else 'the same in every seed'}, nothing can be tested)")
    said = (
        f"{what} (95% CI {interval(found.low, found.high)}, {p_words(found.p)}, {plural(found.n, 'seed')}, which could "
        f"have found {number(found.detectable)})"
    )
    if found.tost is None:
        said += f"; the smallest margin that equivalence would hold for is ±{number(found.bound)}"
    elif found.state not in ("better", "worse"):
        inside = "it is inside" if found.equivalent else "it is not shown to be inside"
        said += f"; {inside} ±{MARGIN:g} ({p_words(found.tost)}), and would be inside ±{number(found.bound)}"
    reason = claims.no_room(measure)
    return sentence(f"{said}. No equality can be concluded: {reason}" if found.equivalent and reason else said)


def _trade_off(claims: Claims) -> Section:
    measures = [AUES, MATCHED]
    if any(look.unseen is not None for run in claims.came for look in run.looks):
        measures.insert(1, UNSEEN)
    never = sum(claims.value(run, MATCHED) is None for run in claims.came)
    words = (
        [f"{never} of {len(claims.came)} runs never fell to {SHARE:.0%} of the start's retain strength: no MU95."]
        if never
        else []
    )
    lead = (
        "AUES is ∫ max{1 − forget : retain ≥ τ} dτ over the looks of a run, the area below its envelope. MU95 is log10 "
        f"p of a KS test of {claims.found.compared} on the forget rows against the reference, where "
        f"{SHARE:.0%} of the start's retain strength is left; its size depends on the number of rows, so no margin was "
        "fixed for it. Lines: mean over seeds, bands one standard deviation (attributed: from the least to the "
        "greatest attribution)."
    )
    tables = [comparison(claims, measure) for measure in measures]
    return Section(
        title="Trade-off", lead=lead, figures=[*pairs(claims, AUES), *fronts(claims)], tables=tables, words=words
    )


def _robust(claims: Claims) -> Section:
    title = "After relearning"
    if not claims.budgets:
        return Section(title=title, words=["Nothing was relearned."])
    lead = (
        "The last model of each run is trained on the forget rows again, with all weights; so is the reference, which "
        "never knew them. Later work reports that the true region pays here, not in the trade-off (arXiv:2607.02513). "
        "The control is the same for both of a pair, so that it cancels from their difference. Regions that start from "
        "different forget strengths are not at equal footing: see the table."
    )
    return Section(
        title=title,
        lead=lead,
        figures=[*relearning(claims), *pairs(claims, RELEARNED)],
        tables=[comparison(claims, RELEARNED), robustness(claims)],
        words=[words] if (words := told(claims, LEFT)) else [],
    )


def _attributed(claims: Claims) -> Section:
    title = "Attributions"
    if not claims.found.attributed and not claims.attributions:
        return Section(title=title, words=["No attribution was asked."])
    lead = (
        "Each attribution looks for the region without knowing it, at the same size. Updates of the oracle lie in it "
        "wholly, updates of random regions not at all."
    )
    return Section(title=title, lead=lead, tables=attributions(claims), words=_ranked(claims))


def _ranked(claims: Claims) -> list[str]:
    """Whether attributions that find more of the region also unlearn better, by rank."""
    points = []
    for name in claims.attributions:
        precision = mean_of([one.precision for one in claims.found.attributed if one.name == name])[0]
        gain = claims.compared(AUES, None, name).mean
        if gain is not None and not math.isnan(precision):
            points.append((precision, gain))
    if len(points) < _RANKED or any(len(set(column)) < 2 for column in zip(*points, strict=True)):
        return []
    from scipy.stats import spearmanr  # imported on use: a list of studies needs none of it

    found = float(spearmanr(*zip(*points, strict=True)).statistic)
    return [
        f"Over {len(points)} attributions, precision and the gain of AUES on random have a rank correlation "
        f"(Spearman) of {number(found)}. It describes these attributions; they share seeds and are no sample."
    ]


def _matched(claims: Claims) -> Section:
    title = "Without an objective"
    if not claims.found.matchings:
        return Section(title=title, words=["MLP outputs were not matched."])
    lead = (
        "The value vectors of a region alone are fitted to the MLP outputs of the reference. If other regions reach "
        "what the true one reaches, its vectors are not needed to take the rows away."
    )
    return Section(title=title, lead=lead, tables=[matching(claims)])


def _injected(claims: Claims) -> Section:
    title = "Injection"
    good = [one for one in claims.found.injected if not one.failed]
    if not claims.found.injected:
        return Section(title=title, words=["Nothing was injected yet."])
    words = []
    if good:
        lost = mean_of([one.before.retain - one.after.retain for one in good])[0]
        gained = mean_of([one.after.forget for one in good])[0]
        words = [
            f"Forget strength reaches {number(gained)} in the mean; retain strength falls by {number(lost)}. What a "
            "retain term repairs afterwards is damage of the injection, and counts for AUES where updates reach it."
        ]
    lead = "The reference is taught the forget rows through the region's vectors alone: all else keeps every bit."
    return Section(title=title, lead=lead, tables=[injections(claims)], words=words)


# ------------------------------------------------------------ settings, limits, and the same for machines


def _settings(options: Localization, found: Found) -> dict[str, str]:
    first = next((one for one in found.injected if not one.failed), None)
    region = f"{found.density:.0%} of the {_unit(found)}s, drawn anew for each seed"
    if first is not None:
        region += f": {plural(first.units, 'vector')}, {plural(first.weights, 'weight')}"
    said = {"Region": region, "Unlearning": f"{options.steps} steps of {options.batch} forget and retain rows each"}
    if found.attributions:
        said["Attributions"] = listed(map(region_name, found.attributions))
    for kind, (planned, done) in found.progress.items():
        said[f"Done: {kind}"] = _of(done, planned)
    return said


def departures(options: Localization) -> list[str]:
    """Where the settings leave the published protocol."""
    found = []
    if options.kept_rows:
        found.append(f"{options.kept_rows:g} retain rows were taught beside each forget row; the paper teaches none.")
    if options.part != PUBLISHED_DENSITY:
        found.append(f"The region is {options.part:.0%} of the value vectors; in the paper {PUBLISHED_DENSITY:.0%}.")
    if options.tiny:
        found.append(
            "The settings for tiny, and RMU's there, were chosen by hand on seed 42 so that it learns, forgets and can "
            "be told apart at all: a check of the machinery, and no evidence for either side."
        )
    return found


def limits(claims: Claims) -> list[str]:
    """What the study can't tell."""
    pairs_ = claims.compared(AUES, None)
    n = f"{plural(pairs_.n, 'pair')} of seeds"
    few = (
        f"{n}: no interval can be given."
        if pairs_.n < 2
        else f"{n}. Student's interval of so few takes the differences to be normal."
    )
    return [
        few,
        "Seeds draw regions, injections and the order of rows. The reference, the rows and the model are the same in "
        "all: another model may say something else.",
        "Value vectors of the MLP alone are units: attention, embeddings and norms are never in a region.",
        "Knowledge that training was forced into a random part is artificial. What pretraining leaves may be more, or "
        "less, local.",
        "Several looks, methods and attributions are tested. The answer rests on one test per axis; the others are "
        "corrected by Holm within their table, not across tables, and tests of equivalence not at all.",
        f"The margin of ±{MARGIN:g} is twice the deviation over seeds that the paper prints for AUES. It is taken for "
        "strengths after relearning too, for which nothing was published.",
        "One learning rate and one number of steps per method, the same in every region: none was tuned for one.",
        "Forget quality of few rows has little power: read log10 p near 0 as not told apart, not as alike.",
    ]


def results(claims: Claims) -> dict[str, Any]:
    """The same for machines; None for what is not known."""
    regions = [name for name in claims.found.regions() if name != RANDOM]
    found = {
        "compared": [
            {
                "measure": measure.name,
                "method": method,
                "region": region,
                "difference": measure.difference(region),
                "state": claims.state(measure, method, region),
                **asdict(claims.compared(measure, method, region)),
            }
            for measure in MEASURES
            for region in regions
            for method in (*claims.found.methods, None)
            if claims.compared(measure, method, region).n
        ],
        "attributed": [asdict(one) for one in claims.found.attributed],
        "no_room": {measure.name: claims.no_room(measure) for measure in AXES},
        "progress": {kind: list(pair) for kind, pair in claims.found.progress.items()},
    }
    return dict(without_nan(found))
