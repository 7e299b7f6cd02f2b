"""What `zjuklab` found, as a document: claims, trajectory, losses, weights, merges, and what the scores do not tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from expunge.numbers import without_nan
from expunge.report.document import Column, Document, Section, Table, TableCell, TableRow
from expunge.report.text import coinciding, human, interval, number, plural, shorten
from expunge.studies import trends_page
from expunge.studies.trends import Trend
from expunge.studies.zjuklab import PAPER, SUMMARY
from expunge.studies.zjuklab_claims import JUDGED, claims, judged, mean_of, published, the_merge, wins
from expunge.studies.zjuklab_record import OVER, UNDER, Answer, Found, Merged, Scores
from expunge.studies.zjuklab_sections import NAMES, dynamics, trajectory
from expunge.studies.zjuklab_tables import called, grouped, merges, relative_norm
from expunge.studies.zjuklab_weights import weights

if TYPE_CHECKING:
    from expunge.studies.base import StudyOptions
    from expunge.studies.ground import Ground

#: Characters of a prompt (its end) and of an answer (its beginning) that are shown.
_ASKED, _SAID = 240, 360
#: Rows per split and task, and of all, whose answers stand on the page.
_PER_TASK, _ROWS = 2, 10
#: An AUC so near to 0.5 does not lean to a side.
_CLOSE = 0.05
_RULE = (
    "Fixed beforehand: merges are judged by the official final score (mean of task aggregate, MIA score and general "
    "knowledge; by the task aggregate where that can't be had), seed by seed, against the better of the two "
    "specialists of that seed. The merge is the searched one; without a search, TIES at density 0.8. Methods are "
    "compared at density 0.8 or the nearest to it. A claim is shown when Student's 95% interval of the differences "
    "over seeds lies above 0."
)
_SUBMITTED = "Published setting"
_SCORES = (
    ("Forget texts", "", "↓"),  # computed
    ("MIA AUC", "mia_auc", ""),
    ("MIA score", "mia_score", "↑"),
    ("Task aggregate", "task_aggregate", "↑"),
    ("General", "general", "↑"),
    ("Retain ES", "retain_es", "↑"),
    ("Final", "final", "↑"),
)


def document(ground: Ground, options: StudyOptions, found: Found) -> Document:
    """The whole document."""
    made = claims(found)
    return Document(
        name="zjuklab",
        summary=SUMMARY,
        paper=PAPER,
        answer=answer(found, made),
        rule=_RULE,
        remarks=list(ground.remarks),
        planned=ground.planned,
        done=len(ground.trials),
        facts={
            "Specialists": str(len(found.specialists)),
            "Merges": str(len(found.merges)),
            "Seeds": str(found.seeds),
            "Judged by": JUDGED[judged(found)],
        },
        settings={"Share that counts as kept": f"{options.share:.0%}", "First seed": str(options.seed)},
        sections=[
            Section(
                title="What was found",
                figures=[trends_page.forest(made)] if any(one.value is not None for one in made) else [],
                tables=[trends_page.table(made)],
                words=told(found, made),
            ),
            trajectory(found),
            dynamics(found),
            weights(found),
            merges(found),
            misleading(found),
        ],
        limits=_limits(found),
        results=results(found, made),
    )


def answer(found: Found, made: Sequence[Trend]) -> str:
    """The study in a sentence."""
    words, chosen = the_merge(found)
    won, of = wins(found)
    if not chosen:
        return "No merge came through."
    name = judged(found)
    mean = number(mean_of([merge.scores[name] for merge in chosen.values()])[0])
    if not of:
        said = f"{capital(words)} reaches a {JUDGED[name]} of {mean}"
    else:
        seeds = "in the one seed" if of == 1 else f"in {won} of {of} seeds"
        beats = "beats" if won or of > 1 else "does not beat"
        said = f"{capital(words)} {beats} both specialists {seeds} ({JUDGED[name]} {mean})"
    ahead = _scale_matched(made)
    return f"{said}{f'; {ahead}' if ahead else ''}."


def _scale_matched(made: Sequence[Trend]) -> str:
    trend = _known(made, "TIES over linear, matched")
    if trend is None:
        return ""
    between = interval(trend.low, trend.high)
    words = {"yes": "TIES is ahead of linear", "no": "TIES is behind linear"}.get(
        trend.shown, "TIES is not shown to be ahead of linear"
    )
    return f"with scale matched {words} ({number(trend.value)}{f', {between}' if between else ', one seed'})"


def told(found: Found, made: Sequence[Trend]) -> list[str]:
    """The findings in sentences, each from its numbers."""
    said = []
    name = judged(found)
    for which in (OVER, UNDER):
        scores = [one.scores for one in found.specialists if one.name == which]
        if scores:
            aggregate, auc = (mean_of([one[key] for one in scores]) for key in ("task_aggregate", "mia_auc"))
            final = mean_of([one[name] for one in scores])
            parts = [f"task aggregate {_with(aggregate)}", f"MIA AUC {_with(auc)}", f"{JUDGED[name]} {_with(final)}"]
            remark = "" if math.isnan(auc[0]) else f" ({_leaning(auc[0])})"
            said.append(f"The {NAMES[which]}: {', '.join(parts)}{remark}.")
    said += _scale(made)
    factors = _known(made, "weights over factors")
    if factors is not None:
        outcome = {"yes": "is ahead of", "no": "is behind"}.get(factors.shown, "can't be told from")
        words = f"Merging ΔW {outcome} merging LoRA's A and B apart: difference {_estimate(factors)}"
        cosine = found.factor_cosine
        tail = "" if math.isnan(cosine) else f"; the two are different merges, with a cosine of {number(cosine)}"
        said.append(f"{words}{tail}.")
    if found.collapsed is not None:
        said.append(
            f"A model that gradient ascent has destroyed has a MIA score of {number(found.collapsed['mia_score'])} and "
            f"a task aggregate of {number(found.collapsed['task_aggregate'])}; what it says stands below."
        )
    return said


def _scale(made: Sequence[Trend]) -> list[str]:
    """What is left of TIES's advantage when the scale is taken out of the comparison."""
    names = ("TIES over linear, factors", "TIES over linear, weights", "TIES over linear, matched")
    factors, weights_, matched = (_known(made, name) for name in names)
    own = factors or weights_
    if own is None or matched is None:
        return []
    where = {"LoRA's factors": factors, "the weights": weights_}
    parts = [f"{_estimate(one)} on {place}" for place, one in where.items() if one is not None]
    said = f"TIES − linear: {' and '.join(parts)} at each method's own scale, {_estimate(matched)} at the same norm"
    reading = {
        ("yes", "yes"): "an advantage stays when the norms are equal",
        ("yes", "not shown"): "the advantage is not shown any more when the norms are equal",
        ("yes", "no"): "the advantage turns round when the norms are equal",
        ("not shown", "yes"): "it shows only when the norms are equal",
        ("no", "yes"): "it shows only when the norms are equal",
    }.get((own.shown, matched.shown), "no advantage of TIES is shown at either")
    return [f"{said}: {reading}."]


def _known(made: Sequence[Trend], label: str) -> Trend | None:
    return next((one for one in made if one.label == label and one.value is not None), None)


def _estimate(trend: Trend) -> str:
    between = interval(trend.low, trend.high)
    return f"{number(trend.value)} ({between or 'one seed'})"


def _leaning(auc: float) -> str:
    """What an AUC of a membership attack says of forgetting."""
    if abs(auc - 0.5) <= _CLOSE:
        return "close to 0.5: members can't be told from others"
    return "below 0.5: it has forgotten too much" if auc < 0.5 else "above 0.5: it has forgotten too little"


def capital(words: str) -> str:
    """Words with a capital at the start."""
    return f"{words[:1].upper()}{words[1:]}"


def _with(spread: tuple[float, float | None]) -> str:
    mean, deviation = spread
    return number(mean) if deviation is None else f"{number(mean)} ± {number(deviation)}"


# ------------------------------------------------------------ what ROUGE and MIA do not tell


def misleading(found: Found) -> Section:
    """Official numbers beside what is said, for a model of each kind."""
    models = _models(found)
    columns = [Column(label="Model", number=False)]
    columns += [Column(label=label, arrow=arrow) for label, _, arrow in _SCORES]
    columns[1] = columns[1].model_copy(update={"hint": "ROUGE-L recall of continued forget texts, mean over tasks"})
    columns[2] = columns[2].model_copy(
        update={"hint": "0.5: members can't be told from others", "under": "0.5 is best"}
    )
    rows = [
        TableRow(
            cells=[
                TableCell(text=name),
                *(
                    trends_page.deviating(mean_of([one[key] if key else forget_texts(one, found) for one in scores]))
                    for _, key, _ in _SCORES
                ),
            ],
            role=role,
        )
        for name, role, scores in models
    ]
    tables = [Table(columns=columns, rows=rows)]
    samples = _samples(found, models)
    lead = (
        "ROUGE and membership inference ask whether the forget texts come back, not whether anything sensible comes "
        "instead. Read the numbers beside the answers and the accuracy on general knowledge."
    )
    return Section(
        title="What ROUGE and MIA do not tell", lead=lead, tables=[*tables, *samples], words=_misleads(found)
    )


def forget_texts(scores: Scores, found: Found) -> float:
    """What is given back of the forget texts: ROUGE-L recall, mean over tasks."""
    return mean_of([1 - scores[f"forget_{task}_regurgitation"] for task in found.tasks])[0]


def _models(found: Found) -> list[tuple[str, str, list[Scores]]]:
    """Name, role and scores over seeds; the first seed's answers are shown."""
    made: list[tuple[str, str, list[Scores]]] = [("Target", "target", [found.target])]
    for name in (OVER, UNDER):
        made.append((human(NAMES[name]), "specialist", [s.scores for s in found.specialists if s.name == name]))
    words, chosen = the_merge(found)
    made.append((capital(words.removeprefix("the ")), "result", [merge.scores for merge in chosen.values()]))
    submitted = [merge for seed, merge in published(found).items() if merge is not chosen.get(seed)]
    made.append((_SUBMITTED, "specialist", [merge.scores for merge in submitted]))
    if found.collapsed is not None:
        made.append(("Collapsed", "original", [found.collapsed]))
    return [(name, role, scores) for name, role, scores in made if scores]


def _misleads(found: Found) -> list[str]:
    broken, (words, chosen) = found.collapsed, the_merge(found)
    if broken is None:
        return ["No collapsed model was made, so that the scores of one can't be shown."]
    said = [
        f"The collapsed model gives back {number(forget_texts(broken, found))} of the forget texts and has a MIA score "
        f"of {number(broken['mia_score'])}, against {number(forget_texts(found.target, found))} and "
        f"{number(found.target['mia_score'])} of the target. It answers {number(broken['general'])} of the general "
        f"questions rightly (target {number(found.target['general'])}), and its retain strength is "
        f"{number(broken['retain_es'])} (target {number(found.target['retain_es'])})."
    ]
    if chosen:
        mean = {key: mean_of([merge.scores[key] for merge in chosen.values()])[0] for key in ("mia_score", "final")}
        texts = mean_of([forget_texts(merge.scores, found) for merge in chosen.values()])[0]
        better = [
            label
            for label, ahead in (
                ("ROUGE on the forget texts", forget_texts(broken, found) < texts),
                ("the MIA score", broken["mia_score"] > mean["mia_score"]),
            )
            if ahead
        ]
        verdict = f"By {' and by '.join(better)} alone it would be preferred to" if better else "Neither prefers it to"
        said.append(
            f"{verdict} {words} ({number(texts)} and {number(mean['mia_score'])}). The final score gives it "
            f"{number(broken['final'])}, and {words} {number(mean['final'])}."
        )
    return said


def _samples(found: Found, models: Sequence[tuple[str, str, Sequence[Scores]]]) -> list[Table]:
    """Answers of each model to the same rows, forget rows first."""
    spoken = [
        (name, {_key(answer): answer for answer in scores[0].answers})
        for name, _, scores in models
        if scores[0].answers and name != _SUBMITTED  # so many columns find room beside each other
    ]
    if not spoken:
        return []
    keys = _chosen(list(spoken[0][1].values()))
    columns = [Column(label=label, number=False) for label in ("Asked", "Wanted", *(name for name, _ in spoken))]
    rows = []
    for key in keys:
        first = spoken[0][1][key]
        about = f"{human(first.split)}, {found.tasks.get(first.task, first.task)}"
        asked = first.prompt if len(first.prompt) <= _ASKED else f"… {first.prompt[-_ASKED:].lstrip()}"
        cells = [TableCell(text=asked, under=about), TableCell(text=first.wanted)]
        for _, answers in spoken:
            said, cut = shorten(answers[key].said, _SAID) if key in answers else ("–", "")
            cells.append(TableCell(text=said, under=cut, marked=coinciding(said, first.wanted)))
        rows.append(TableRow(cells=cells))
    words = "greedy, of the first seed; what coincides with the wanted text is marked"
    return [Table(title="What the models say", words=words, columns=columns, rows=rows, texts=True)]


def _key(answer: Answer) -> tuple[str, str, str]:
    return answer.split, answer.task, answer.prompt


def _chosen(answers: Sequence[Answer]) -> list[tuple[str, str, str]]:
    """The first rows of each split and task, forget rows first."""
    taken: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for one in sorted(answers, key=lambda answer: answer.split != "forget"):
        rows = taken.setdefault((one.split, one.task), [])
        if len(rows) < _PER_TASK:
            rows.append(_key(one))
    return [key for rows in taken.values() for key in rows][:_ROWS]


# ------------------------------------------------------------ limits, and the same for machines


def _limits(found: Found) -> list[str]:
    few = (
        "One seed: no interval can be given. Elsewhere the MIA score alone had a standard deviation of 0.1 to 0.3 over "
        "seeds (arXiv:2503.13690)."
        if found.seeds < 2
        else f"{plural(found.seeds, 'seed')}: of the specialists, not of the target or the rows. Student's interval of "
        "so few is wide, and takes the differences to be normal."
    )
    return [
        few,
        "Trajectory, losses, angles and the comparison of task vectors are of the first seed.",
        "The hyper-parameters were published for OLMo-7B. How far each specialist goes too far or not far enough is a "
        "matter of model, rows and steps.",
        "The harmonic mean of twelve values is 0 as soon as one of them is: one question that nobody answers exactly "
        "can decide the task aggregate.",
        "With few members and non-members the AUC of a perfect model strays around 0.5, which costs it MIA score.",
        "The accuracy on general knowledge stands in for MMLU, which says nothing on small models.",
        "The compared methods have weights of 1 and their own defaults; only the search tunes anything.",
    ]


def results(found: Found, made: Sequence[Trend]) -> dict[str, Any]:
    """The same for machines; None for what is not known."""
    won, of = wins(found)
    return without_nan(
        {
            "trends": [{**vars(one), "shown": one.shown} for one in made],
            "wins": {"merge": the_merge(found)[0], "seeds_won": won, "seeds": of, "judged_by": judged(found)},
            "target": dict(found.target.values),
            "collapsed": None if found.collapsed is None else dict(found.collapsed.values),
            "specialists": [
                {"name": one.name, "seed": one.seed, "steps": one.steps, "scores": dict(one.scores.values)}
                for one in found.specialists
            ],
            "merges": [_merged(group) for group in grouped([m for m in found.merges if not m.searched])],
            "searched": [
                {
                    "seed": m.seed,
                    "method": called(m.method),
                    "settings": dict(m.settings),
                    "scores": dict(m.scores.values),
                }
                for m in found.merges
                if m.searched
            ],
            "angles": [asdict(turn) for turn in found.turns],
            "groups": [asdict(group) for group in found.groups],
            "factor_cosine": found.factor_cosine,
        }
    )


def _merged(group: Sequence[Merged]) -> dict[str, Any]:
    first = group[0]
    names = dict.fromkeys(name for merge in group for name in merge.scores.values)
    return {
        "method": first.method,
        "density": first.density,
        "scope": first.scope,
        "scale_match": first.scale_match,
        "seeds": [merge.seed for merge in group],
        "relative_norm": mean_of([relative_norm(merge) for merge in group]),
        "scores": {name: mean_of([merge.scores[name] for merge in group]) for name in names},
    }
