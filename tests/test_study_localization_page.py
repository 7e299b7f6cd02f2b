"""The page of `localization`: made-up findings from whole to nothing at all, and words that follow the numbers."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expunge.report.document import STUDY, Document
from expunge.report.document_page import build_document_report
from expunge.report.text import number
from expunge.studies.localization import Localization
from expunge.studies.localization_claims import AUES, MATCHED, MEASURES, RELEARNED, Claims
from expunge.studies.localization_page import answer, document, remarks, told
from expunge.studies.localization_record import ORACLE, RANDOM, Found, Run
from expunge.studies.localization_stats import run_aues
from expunge.studies.localization_tables import PUBLISHED, comparison
from localization_found import ATTRIBUTIONS, METHODS, Effect, found, look, no_effect
from report_checks import check_figures, check_page
from study_fixture import fake_ground, options_and_recipe, write_study

EVIL = "<script>alert(1)</script>]]>&\"'\u202e"


def page_of(tmp_path: Path, given: Found) -> tuple[Document, str]:
    options, recipe = options_and_recipe("localization")
    made = document(fake_ground(recipe, []), options, given)
    folder = write_study(tmp_path / "study", recipe, made)
    json.dumps(made.to_json(), allow_nan=False)
    return made, build_document_report(folder, STUDY).read_text(encoding="utf-8")


def of(region: str, value: float) -> Effect:
    """An effect in one region alone."""
    return lambda seed, method, where: value * (where == region)


def uneven(region: str, value: float) -> Effect:
    """One that changes its sign from seed to seed."""
    return lambda seed, method, where: value * (where == region) * (-1) ** seed


def changed(given: Found, change: Callable[[Run], Run | None]) -> Found:
    """Other runs; None leaves one out."""
    runs = [made for run in given.runs if (made := change(run)) is not None]
    return replace(given, runs=runs)


def failing(given: Found, fails: Callable[[Run], bool]) -> Found:
    return changed(
        given,
        lambda run: replace(run, looks=[], relearned=[], failed="the loss is NaN at step 3") if fails(run) else run,
    )


def renamed(given: Found) -> Found:
    """Methods and attributions with names that no page should trust."""
    runs = changed(given, lambda run: replace(run, method=EVIL) if run.method == "wga" else run)
    runs = changed(runs, lambda run: replace(run, region=EVIL, note=EVIL) if run.region == "wagle" else run)
    names = [EVIL if name == "wagle" else name for name in given.attributions]
    methods = [EVIL if name == "wga" else name for name in given.methods]
    return replace(runs, methods=methods, attributions=names, unit=EVIL, compared=EVIL, progress={EVIL: (2, 1)})


def empty(**changes: Any) -> Found:
    nothing: dict[str, Any] = {"injected": [], "runs": [], "matchings": [], "attributed": [], "controls": []}
    return found(**{**nothing, **changes})


CASES: dict[str, Callable[[], Found]] = {
    "whole": found,
    "an effect": lambda: found(better=of(ORACLE, 0.1), back=of(ORACLE, -0.2)),
    "one seed": lambda: found(1),
    "two seeds": lambda: found(2),
    "nothing yet": empty,
    "no progress told": lambda: empty(progress={}),
    "injection alone": lambda: empty(injected=found().injected),
    "injection broke off": lambda: empty(injected=[replace(one, failed="no") for one in found(2).injected]),
    "oracle alone": lambda: changed(found(), lambda run: run if run.region == ORACLE else None),
    "random alone": lambda: changed(found(), lambda run: run if run.region == RANDOM else None),
    "no attributions": lambda: found(attributions=(), attributed=[]),
    "attributions without runs": lambda: changed(found(), lambda run: run if run.region in (ORACLE, RANDOM) else None),
    "one attribution": lambda: found(attributions=("gradient",)),
    "one method": lambda: found(methods=("npo",)),
    "all failed": lambda: failing(found(), lambda run: True),
    "some failed": lambda: failing(found(), lambda run: run.seed == 43 or run.method == "rmu"),
    "nothing relearned": lambda: changed(found(controls=[]), lambda run: replace(run, relearned=[])),
    "no control": lambda: found(controls=[]),
    "no unseen rows": lambda: changed(
        found(), lambda run: replace(run, looks=[replace(one, unseen=None) for one in run.looks])
    ),
    "ties": lambda: found(spread=0.0),
    "not a number": lambda: changed(
        found(), lambda run: replace(run, looks=[*run.looks[:-1], look(16, 0.1, 0.7, None, math.nan)])
    ),
    "broken looks": lambda: changed(
        found(2), lambda run: replace(run, looks=[replace(one, forget=math.nan) for one in run.looks])
    ),
    "in the middle": lambda: changed(
        found(), lambda run: run if run.seed < 44 or (run.seed == 44 and run.method in ("wga", "npo")) else None
    ),
    "hostile": lambda: renamed(found()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_page_of_any_findings_is_whole_and_safe(tmp_path: Path, name: str) -> None:
    given = CASES[name]()
    made, html = page_of(tmp_path, given)
    check_page(html)
    check_figures(html)
    assert len(html.encode()) < 1_000_000
    assert "\u202e" not in html
    assert made.answer.endswith(".")
    assert made.planned >= made.done
    words = [made.answer, made.rule, *made.limits, *made.remarks, *made.facts.values(), *made.settings.values()]
    for section in made.sections:
        words += [section.lead, *section.words]
        assert section.figures or section.tables or section.words, section.title
        for table in section.tables:
            words += [table.title, table.words, *table.notes]
            assert {len(row.cells) for row in table.rows} <= {len(table.columns)}, table.title
            words += [cell.text for row in table.rows for cell in row.cells]
    for text in words:
        assert not {"nan", "None", "inf"} & set(re.split(r"[\s,;()±]+", text)), text
        assert ".." not in text


def test_the_whole_page_has_its_parts(tmp_path: Path) -> None:
    made, html = page_of(tmp_path, found())
    assert [section.title for section in made.sections] == [
        "What was found",
        "Trade-off",
        "After relearning",
        "Attributions",
        "Without an objective",
        "Injection",
        "Runs",
        "The paper",
    ]
    kinds = [figure.kind for section in made.sections for figure in section.figures]
    assert {kind: kinds.count(kind) for kind in kinds} == {"forest": 2, "curves": 4 * 4}
    for printed in (".018", ".011", ".007", ".017", ".008", ".010", ".004", "−10.33 ± 1.73", "−13.62 ± 1.32"):
        assert f">{printed}<" in html, printed  # what was published
    for words in (".018, p .61", ".011, p .71", ".529 and −14.87", "artificial"):
        assert words in html, words
    assert made.planned == 5 + 7 * 20
    assert "Holm" in html


def test_published_differences_are_those_of_the_printed_means_or_larger() -> None:
    """|Δ| is a mean of sizes: it can't be below the size of the difference of the means, but for rounding."""
    for both in PUBLISHED.values():
        for chance, own, size, *_ in both:
            means = [float(text.partition(" ")[0]) for text in (chance, own)]
            assert float(size) >= abs(means[0] - means[1]) - 0.0015


# ------------------------------------------------------------ the answer

WORDS = {
    "better": "informs unlearning {}",
    "worse": "misleads unlearning {}",
    "slight": "makes a difference {}, but one below 0.03",
    "alike": "makes no difference of 0.03 or more {}",
    "open": "is neither shown to matter nor shown not to {}",
    "none": "can't be judged {}",
}


@pytest.mark.parametrize(
    ("better", "back", "spread", "wanted"),
    [
        (of(ORACLE, 0.12), of(ORACLE, -0.2), 0.01, ("better", "better")),
        (of(ORACLE, -0.12), of(ORACLE, 0.3), 0.01, ("worse", "worse")),
        (no_effect, no_effect, 0.01, ("alike", "alike")),
        (no_effect, of(ORACLE, -0.2), 0.01, ("alike", "better")),  # what the two papers say together
        (of(ORACLE, 0.02), no_effect, 0.002, ("slight", "slight")),
        (uneven(ORACLE, 0.1), uneven(ORACLE, -0.15), 0.02, ("open", "open")),
        (no_effect, no_effect, 0.0, ("none", "none")),
    ],
)
def test_the_answer_follows_the_numbers(better: Effect, back: Effect, spread: float, wanted: tuple[str, str]) -> None:
    claims = Claims(found(better=better, back=back, spread=spread))
    assert (claims.state(AUES), claims.state(RELEARNED)) == wanted
    said = answer("tiny", claims)
    for state, axis in zip(wanted, ("for the trade-off", "for robustness to relearning"), strict=True):
        assert WORDS[state].format(axis) in said
    assert "5 seeds" in said
    if "open" in wanted:
        assert "could have found" in said
    else:
        assert "could have found" not in said


def test_nothing_is_said_of_what_is_not_there() -> None:
    assert answer("tiny", Claims(empty())) == "Nothing can be said of tiny: no unlearning came through."
    one = answer("tiny", Claims(found(1)))
    assert one.count("can't be judged") == 2
    assert one.count("in the one seed") == 2
    alone = answer("tiny", Claims(CASES["oracle alone"]()))
    assert "no pair of oracle and random" in alone
    assert "was not tried for robustness" in answer("tiny", Claims(CASES["nothing relearned"]()))


def test_a_difference_that_is_not_significant_is_never_called_equality() -> None:
    claims = Claims(found(better=uneven(ORACLE, 0.1), back=uneven(ORACLE, 0.1)))
    for measure in MEASURES:
        compared = claims.compared(measure, None)
        assert compared.p is None or compared.p > 0.05 or claims.state(measure) in ("slight", "worse", "better")
        assert claims.state(measure) != "alike" or compared.equivalent
    assert "it is not shown to be inside ±0.03" in told(claims, AUES)
    assert claims.state(MATCHED) != "alike"  # no margin was fixed for it


def shallow(run: Run) -> Run:
    """Unlearning that hardly moved."""
    return replace(run, looks=[replace(one, forget=0.97 - 0.05 * (one.step > 0)) for one in run.looks])


def test_equality_is_not_concluded_where_nothing_could_differ() -> None:
    noisy = random.Random(0)
    given = changed(
        found(),
        lambda run: replace(
            shallow(run), relearned=[look(step, 0.98 + noisy.uniform(-0.01, 0.01), 0.8) for step in (0, 4, 8)]
        ),
    )
    claims = Claims(given)
    assert claims.compared(RELEARNED, None).equivalent
    assert claims.compared(AUES, None).equivalent
    assert (claims.state(AUES), claims.state(RELEARNED)) == ("open", "open")
    said = answer("tiny", claims)
    assert "hardly moved" in said
    assert "relearning brought everything back" in said
    assert "No equality can be concluded" in told(claims, AUES)
    assert any("no room to differ" in cell.under for row in comparison(claims, AUES).rows for cell in row.cells)


# ------------------------------------------------------------ what is counted


def test_differences_are_those_of_pairs_with_one_seed() -> None:
    given = found(3, better=of(ORACLE, 0.05))
    claims = Claims(given)
    of_run = {(run.seed, run.method, run.region): run for run in given.runs}
    for method in METHODS:
        wanted = {
            seed: (run_aues(of_run[seed, method, ORACLE].looks) or 0)
            - (run_aues(of_run[seed, method, RANDOM].looks) or 0)
            for seed in given.seeds
        }
        assert claims.compared(AUES, method).differences == pytest.approx(wanted)
    pooled = claims.compared(AUES, None).differences
    each = [claims.compared(AUES, method).differences for method in METHODS]
    assert pooled == pytest.approx({seed: sum(values[seed] for values in each) / 4 for seed in given.seeds})


def test_what_relearns_less_is_better_and_the_control_cancels() -> None:
    given = found(back=of(ORACLE, -0.2))
    claims = Claims(given)
    assert (claims.compared(RELEARNED, None).mean or 0) > 0.1
    assert Claims(replace(given, controls=[])).compared(RELEARNED, None) == claims.compared(RELEARNED, None)
    own, control = claims.values(RELEARNED, "npo", ORACLE), claims.above_control("npo", ORACLE)
    means = {one.seed: (one.looks[1].forget + one.looks[2].forget) / 2 for one in given.controls}
    assert control == pytest.approx({seed: own[seed] - means[seed] for seed in own})


def test_relearning_is_compared_at_the_steps_that_all_reached() -> None:
    given = changed(found(), lambda run: replace(run, relearned=run.relearned[:2]) if run.region == "klue" else run)
    claims = Claims(given)
    assert claims.budgets == [4]
    run = given.runs[0]
    assert claims.value(run, RELEARNED) == pytest.approx(run.relearned[1].forget)


def test_broken_runs_leave_their_pairs_out_and_say_so() -> None:
    claims = Claims(failing(found(), lambda run: (run.seed, run.method, run.region) == (43, "npo", RANDOM)))
    assert set(claims.compared(AUES, "npo").differences) == {42, 44, 45, 46}
    assert set(claims.compared(AUES, "wga").differences) == {42, 43, 44, 45, 46}
    assert set(claims.compared(AUES, None).differences) == {42, 44, 45, 46}
    assert any("1 run broke off (NPO in random)" in words for words in remarks(claims))


def test_a_method_that_mostly_fails_does_not_take_the_others_with_it() -> None:
    claims = Claims(failing(found(), lambda run: run.method == "rmu" and run.seed > 43))
    assert claims.pooled_methods(AUES) == ["wga", "npo", "dpo"]
    assert claims.compared(AUES, None).n == 5
    assert claims.compared(AUES, "rmu").n == 2


def test_random_regions_of_a_seed_are_averaged() -> None:
    given = found(3)
    more = [replace(run, looks=[look(0, 0.9, 0.9), look(2, 0.1, 0.8)]) for run in given.runs if run.region == RANDOM]
    claims, both = Claims(given), Claims(replace(given, runs=[*given.runs, *more]))
    second = 0.1 * 0.1 + 0.8 * 0.9
    first = claims.values(AUES, "npo", RANDOM)
    assert both.values(AUES, "npo", RANDOM) == pytest.approx({seed: (v + second) / 2 for seed, v in first.items()})
    assert both.compared(AUES, "npo").n == 3


# ------------------------------------------------------------ attributions


def test_attributions_are_corrected_for_their_number() -> None:
    claims = Claims(found(better=of("wagle", 0.1)))
    assert claims.state(AUES, None, "wagle") == "better"
    assert any("wagle is better than random" in words for words in remarks(claims))
    raw = {name: claims.compared(AUES, None, name).p or 1.0 for name in ATTRIBUTIONS}
    for name in ATTRIBUTIONS:
        corrected = claims.corrected(AUES, None, name)
        assert corrected is not None
        assert corrected >= raw[name]
    least = min(raw, key=lambda name: raw[name])
    assert claims.corrected(AUES, None, least) == pytest.approx(min(1.0, 5 * raw[least]))
    assert claims.corrected(AUES, None, ORACLE) == claims.compared(AUES, None).p  # the answer's test stands alone


def test_without_an_effect_attributions_are_told_with_what_could_be_found() -> None:
    (by_aues, relearned, *_) = remarks(Claims(found()))
    assert by_aues.startswith("By AUES, none of 5 attributions is shown to differ from random (differences of 0.0")
    assert relearned.startswith("After relearning, none of 5")
    assert "by TOST" in by_aues


def texts(document: Document, title: str, table: int = 0) -> dict[str, Sequence[str]]:
    (section,) = [section for section in document.sections if section.title == title]
    return {row.cells[0].text: [cell.text for cell in row.cells] for row in section.tables[table].rows}


def test_the_table_of_attributions_has_its_numbers(tmp_path: Path) -> None:
    made, _ = page_of(tmp_path, found())
    finding, gains = (texts(made, "Attributions", table) for table in (0, 1))
    names = [ORACLE, RANDOM, "gradient", "activations", "wagle", "memflex", "klue"]
    assert list(finding) == list(gains) == names
    assert finding["gradient"][1:] == ["0.310", "0.810", "0.060", "31.0%", "3.000"]
    assert finding[ORACLE][4] == "100.0%"
    assert gains[RANDOM][2:] == ["–"] * 8
    claims = Claims(found())
    assert gains["wagle"][2] == number(claims.compared(AUES, None, "wagle").mean)
    assert gains["wagle"][6] == number(claims.compared(RELEARNED, None, "wagle").mean)


def test_partial_results_say_how_far_they_are(tmp_path: Path) -> None:
    made, html = page_of(tmp_path, found(progress={"training": (140, 12)}))
    assert (made.planned, made.done) == (140, 12)
    assert made.settings["Done: training"] == "12 of 140"
    assert "128 of 140 trials are still to be done" in html


def test_results_for_machines_are_those_of_the_page(tmp_path: Path) -> None:
    given = found(better=of(ORACLE, 0.12))
    made, _ = page_of(tmp_path, given)
    claims = Claims(given)
    rows = made.results["compared"]
    assert len(rows) == len(MEASURES) * 6 * 5
    (whole,) = [row for row in rows if (row["measure"], row["method"], row["region"]) == ("aues", None, ORACLE)]
    assert whole["state"] == "better"
    assert whole["mean"] == claims.compared(AUES, None).mean
    assert set(whole["differences"]) == {"42", "43", "44", "45", "46"}


def test_options_of_the_study_reach_the_page(tmp_path: Path) -> None:
    made, _ = page_of(tmp_path, found())
    options = Localization(model="tiny")
    assert f"{options.steps} steps of {options.batch}" in made.settings["Unlearning"]
