"""The page of `zjuklab`: made-up findings from whole to hardly any, and words that follow the numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expunge.report.document import STUDY, Document
from expunge.report.document_page import build_document_report
from expunge.report.figure_data import Curves
from expunge.studies import zjuklab_claims as claims
from expunge.studies.zjuklab_page import document
from expunge.studies.zjuklab_record import (
    OVER,
    UNDER,
    Answer,
    Dynamics,
    Found,
    Group,
    Look,
    Merged,
    Scores,
    Specialist,
    Turn,
)
from expunge.studies.zjuklab_sections import trajectory
from expunge.studies.zjuklab_tables import called
from report_checks import check_figures, check_page
from study_fixture import fake_ground, options_and_recipe, write_study
from zjuklab_found import EVIL, SAYS, TASKS, found, groups, looks


def page_of(tmp_path: Path, given: Found, **changes: Any) -> tuple[Document, str]:
    options, recipe = options_and_recipe("zjuklab", seeds=given.seeds)
    made = document(fake_ground(recipe, [], **changes), options, given)
    folder = write_study(tmp_path / "study", recipe, made)
    json.dumps(made.to_json(), allow_nan=False)
    return made, build_document_report(folder, STUDY).read_text(encoding="utf-8")


# ------------------------------------------------------------ whole pages


def without_values(given: Found) -> Found:
    """Nothing but extraction strengths."""
    bare = Scores({"forget_es": 0.1, "retain_es": 0.9})
    return replace(
        given,
        target=bare,
        specialists=[replace(one, scores=bare, looks=[Look(0, bare), Look(9, bare)]) for one in given.specialists],
        merges=[replace(one, scores=bare, norm=0.0, mean_norm=0.0) for one in given.merges],
        collapsed=bare,
    )


def hostile(given: Found) -> Found:
    said = [Answer("forget", "task1", EVIL, EVIL, EVIL)]
    return replace(
        given,
        target=Scores(given.target.values, said),
        tasks=dict.fromkeys(TASKS, EVIL),
        groups=[Group(0, EVIL, (1.0, 1.0), 0.5, 0.5, 0.5, (1.0, 1.0))],
        merges=[replace(one, method=EVIL) if one.method == "linear" else one for one in given.merges],
    )


CASES = {
    "whole": lambda: found(),
    "one seed": lambda: found(1),
    "no search": lambda: replace(found(), merges=[one for one in found().merges if not one.searched]),
    "no collapsed": lambda: found(collapsed=None),
    "no merges": lambda: found(merges=[]),
    "no weights": lambda: found(turns=[], groups=[]),
    "angles alone": lambda: found(groups=[]),
    "nothing but the target": lambda: found(
        1, merges=[], specialists=[], dynamics=[], turns=[], groups=[], collapsed=None
    ),
    "one specialist": lambda: found(specialists=[one for one in found().specialists if one.name == OVER]),
    "strengths alone": lambda: without_values(found()),
    "nan angles": lambda: found(turns=[Turn(OVER, 1, 2, math.nan, math.nan, math.nan)]),
    "broken loss": lambda: found(dynamics=[Dynamics("npo", [1, 2, 3], {"loss": [1.0, math.nan, math.inf]})]),
    "one layer": lambda: found(groups=groups(1)),
    "hostile": lambda: hostile(found()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_page_of_any_findings_is_whole_and_safe(tmp_path: Path, name: str) -> None:
    made, html = page_of(tmp_path, CASES[name]())
    check_page(html)
    check_figures(html)
    assert len(html.encode()) < 1_000_000
    assert "\u202e" not in html
    assert made.answer.endswith(".")
    words = [made.answer, made.rule, *made.limits]
    for section in made.sections:
        words += [section.lead, *section.words]
        assert section.figures or section.tables or section.words, section.title
    for text in words:
        assert not {"nan", "None", "inf"} & set(text.replace(",", " ").replace(";", " ").split()), text
        assert ".." not in text


def test_the_whole_page_has_its_parts(tmp_path: Path) -> None:
    made, html = page_of(tmp_path, found())
    titles = [section.title for section in made.sections]
    assert titles == [
        "What was found",
        "Trajectory",
        "Loss dynamics",
        "Weight perspective",
        "Merges",
        "What ROUGE and MIA do not tell",
    ]
    kinds = [figure.kind for section in made.sections for figure in section.figures]
    assert {kind: kinds.count(kind) for kind in kinds} == {"forest": 1, "curves": 6 + 6 + 2, "heat": 4}
    for number in ("0.806", "0.939", "0.997", "0.487", "0.944", "0.048", "0.244", "0.440", "0.561", "0.558"):
        assert f">{number}<" in html, number  # what was published
    assert "70–85" in html
    assert SAYS["collapsed"] in html
    assert "confounded by scale" in html


# ------------------------------------------------------------ words and numbers


def final(value: float) -> Scores:
    return Scores({"final": value, "task_aggregate": value})


def small(specialists: list[tuple[float, float]], merges: list[Merged]) -> Found:
    """Findings of these final scores: (over, under) per seed."""
    pairs = [
        Specialist(name, seed, "", 1, final(value))
        for seed, pair in enumerate(specialists)
        for name, value in zip((OVER, UNDER), pair, strict=True)
    ]
    return Found(final(0.3), pairs, [], [], [], merges, None, {}, len(specialists))


def one_merge(seed: int, value: float, method: str = "ties", **changes: Any) -> Merged:
    given = Merged(seed, method, 0.8, "tensor", "none", 1.0, 1.0, final(value))
    return replace(given, **changes)


def test_a_merge_is_held_against_the_better_specialist_of_its_seed() -> None:
    given = small([(0.5, 0.6), (0.7, 0.4), (0.6, 0.6)], [one_merge(0, 0.7), one_merge(1, 0.65), one_merge(2, 0.6)])
    assert claims.gains(given, claims.the_merge(given)[1]) == pytest.approx([0.1, -0.05, 0.0])
    assert claims.wins(given) == (1, 3)


def test_the_searched_merge_stands_for_merging_where_there_is_one() -> None:
    plain, searched = [one_merge(0, 0.9)], [one_merge(0, 0.5, searched=True), one_merge(0, 0.6, searched=True)]
    assert claims.the_merge(small([(0.1, 0.1)], plain))[0] == "TIES at density 0.8"
    words, chosen = claims.the_merge(small([(0.1, 0.1)], plain + searched))
    assert words == "the searched merge"
    assert chosen[0].scores["final"] == 0.6


@pytest.mark.parametrize(
    ("densities", "nearest"),
    [((0.2, 0.6, 1.0), 0.6), ((0.8, 0.7), 0.8), ((1.0,), 1.0), ((0.5, 0.85), 0.85)],
)
def test_methods_are_compared_at_the_density_nearest_to_the_published_one(
    densities: tuple[float, ...], nearest: float
) -> None:
    given = small([(0.1, 0.1)], [one_merge(0, density, density=density) for density in densities])
    assert claims.pick(given, "ties", matched=False)[0].density == nearest
    assert not claims.pick(given, "ties", matched=True)
    assert not claims.pick(given, "ties", matched=False, factor=True)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.2, 0.21, 0.19], "yes"),
        ([-0.2, -0.21, -0.19], "no"),
        ([0.3, -0.1, 0.2], "not shown"),
        ([0.3], "not shown"),
        ([math.nan], "not shown"),
        ([0.1, math.nan, 0.1], "yes"),
    ],
)
def test_a_claim_needs_students_interval_above_zero(values: list[float], shown: str) -> None:
    assert claims.over_seeds("a", "b", "c", values).shown == shown


def test_the_interval_is_students() -> None:
    trend = claims.over_seeds("a", "b", "c", [0.1, 0.2, 0.3])
    half = 4.302652729696142 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5%
    assert (trend.value, trend.low, trend.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))


def test_the_answer_counts_seeds_and_names_the_scale_matched_comparison(tmp_path: Path) -> None:
    made, _ = page_of(tmp_path, found())
    assert made.answer.startswith("The searched merge beats both specialists in 3 of 3 seeds (final score 0.")
    assert "with scale matched TIES is" in made.answer
    assert made.results["wins"] == {"merge": "the searched merge", "seeds_won": 3, "seeds": 3, "judged_by": "final"}
    lost = small([(0.9, 0.8), (0.9, 0.8)], [one_merge(0, 0.2), one_merge(1, 0.3)])
    options, recipe = options_and_recipe("zjuklab", seeds=2)
    assert "in 0 of 2 seeds" in document(fake_ground(recipe, []), options, lost).answer
    alone = small([(0.9, 0.8)], [one_merge(0, 0.2)])
    assert "does not beat both specialists in the one seed" in document(fake_ground(recipe, []), options, alone).answer


def test_forget_curves_show_what_is_still_said() -> None:
    given = found(1)
    figure = trajectory(given).figures[0]
    assert isinstance(figure, Curves)
    by_name = {line.name: line for line in figure.lines}
    first = given.specialists[0].looks[0].scores
    assert by_name["forget, regurgitation"].y[0] == pytest.approx(1 - first["forget_task1_regurgitation"])
    assert by_name["retain, knowledge"].y[0] == pytest.approx(first["retain_task1_knowledge"])
    assert by_name["forget, regurgitation"].x == [float(look.step) for look in given.specialists[0].looks]


def test_seeds_are_averaged_where_all_have_a_look() -> None:
    given = found(2)
    later = replace(given.specialists[2], looks=looks(True, 0.1)[:-1])
    figure = trajectory(replace(given, specialists=[given.specialists[0], later])).figures[0]
    assert isinstance(figure, Curves)
    line = figure.lines[0]
    assert len(line.x) == 7  # one has no last look
    pair = [1 - one.looks[3].scores["forget_task1_regurgitation"] for one in (given.specialists[0], later)]
    assert line.y[3] == pytest.approx(sum(pair) / 2)
    assert line.high[3] == pytest.approx(sum(pair) / 2 + abs(pair[0] - pair[1]) / math.sqrt(2))


def test_a_missing_task_leaves_its_curves_out() -> None:
    given = found(1)
    bare = [
        Look(look.step, Scores({k: v for k, v in look.scores.values.items() if "knowledge" not in k}))
        for look in given.specialists[0].looks
    ]
    section = trajectory(replace(given, specialists=[replace(given.specialists[0], looks=bare)]))
    assert len(section.figures) == 3
    for figure in section.figures:
        assert isinstance(figure, Curves)
        assert [line.name for line in figure.lines] == ["forget, regurgitation", "retain, regurgitation"]


@pytest.mark.parametrize(
    ("method", "name"),
    [("dare_ties", "DARE-TIES"), ("linear", "linear"), ("magnitude_prune", "magnitude prune"), ("sce", "SCE")],
)
def test_methods_have_the_names_of_their_papers(method: str, name: str) -> None:
    assert called(method) == name
