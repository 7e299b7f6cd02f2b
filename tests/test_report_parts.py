"""Verdicts, figures, texts and curves of the report: closed forms and oracles."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

from expunge.recipe import Recipe
from expunge.report import figures, svg
from expunge.report.build import limits
from expunge.report.provenance import command, environment
from expunge.report.records import Measure, RunRecord, read_run
from expunge.report.tables import split_tables
from expunge.report.text import clean, coinciding, compact, duration, human, interval, marked, number, shorten
from expunge.report.verdict import fluent, forgotten, kept, kept_unseen, outcome, ratio_interval
from report_fixture import Fixture, write_run

ES = "extraction_strength"


def record(*measures: tuple[str, str, float | None, float | None, float | None]) -> RunRecord:
    """A run without files: (variant, split, value, low, high)."""
    made = tuple(Measure(v, s, ES, value, low, high, 20, 0, "lower") for v, s, value, low, high in measures)
    by_key = {(m.variant, m.split, m.metric): m for m in made}
    return RunRecord(Path("nowhere"), {"result": "merged"}, None, "", made, (), (), by_key)


TARGET = ("target", "forget", 0.9, 0.85, 0.95)


@pytest.mark.parametrize(
    ("value", "low", "high", "reference", "answer"),
    [
        (0.10, 0.08, 0.15, None, "yes"),  # the threshold itself passes
        (0.10, 0.08, 0.1501, None, "not shown"),
        (0.20, 0.15, 0.25, None, "not shown"),
        (0.20, 0.1501, 0.25, None, "no"),
        (0.20, 0.16, 0.25, 0.22, "yes"),  # 0.22 + 0.05 is larger than 0.15
        (0.20, 0.16, 0.25, 0.05, "no"),  # 0.05 + 0.05 is smaller
        (0.0, 0.0, 0.0, None, "yes"),
        (0.1, None, None, None, "not shown"),  # one row has no interval
        (None, None, None, None, "not measured"),
    ],
)
def test_forgotten(
    value: float | None, low: float | None, high: float | None, reference: float | None, answer: str
) -> None:
    found = record(TARGET, ("merged", "forget", value, low, high), ("reference", "forget", reference, None, None))
    verdict = forgotten(found)
    assert verdict.answer == answer
    assert verdict.value == value
    assert verdict.threshold == pytest.approx(max(0.15, (reference or 0) + 0.05) if reference is not None else 0.15)


@pytest.mark.parametrize(("target", "answer"), [(0.9, "yes"), (0.1501, "yes"), (0.15, "not shown"), (0.0, "not shown")])
def test_nobody_forgets_what_was_never_known(target: float, answer: str) -> None:
    found = record(("target", "forget", target, None, None), ("merged", "forget", 0.05, 0.01, 0.08))
    verdict = forgotten(found)
    assert verdict.answer == answer
    vacuous = answer == "not shown"
    assert any("hardly knew" in remark for remark in verdict.remarks) == vacuous
    assert outcome(found, verdict, kept(found)).startswith("The target hardly knew") == vacuous


@pytest.mark.parametrize(
    ("target", "result", "answer", "ratio"),
    [(0.8, 0.76, "yes", 0.95), (0.8, 0.75, "no", 0.9375), (0.8, 0.9, "yes", 1.125), (0.0, 0.5, "not measured", None)],
)
def test_kept(target: float, result: float, answer: str, ratio: float | None) -> None:
    verdict = kept(record(("target", "retain", target, None, None), ("merged", "retain", result, None, None)))
    assert verdict.answer == answer
    assert verdict.value == (None if ratio is None else pytest.approx(ratio))
    assert verdict.ci_low is None


def test_kept_interval_comes_from_the_paired_rows(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path / "run"))
    for verdict, split in ((kept(found), "retain"), (kept_unseen(found), "retain_unseen")):
        assert verdict is not None
        before, after = (np.array(list(found.values(name, split).values())) for name in ("target", "merged"))
        assert verdict.value == pytest.approx(after.mean() / before.mean())
        assert verdict.ci_low is not None
        assert verdict.ci_high is not None
        assert verdict.ci_low <= verdict.value <= verdict.ci_high
        assert [mark.value for mark in verdict.marks] == [1.0]


def test_ratio_interval_agrees_with_scipy() -> None:
    random = np.random.default_rng(3)
    before = random.uniform(0.5, 1.0, 80)
    after = before * random.uniform(0.7, 1.0, 80)
    ours = ratio_interval(before, after, 8000, seed=1)
    oracle = bootstrap(
        (before, after),
        lambda b, a, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=8000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours == pytest.approx((oracle.low, oracle.high), abs=0.003)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0.5, 1.0, 0.25], [0.45, 0.9, 0.225], (0.9, 0.9)),
        ([1.0, 1.0], [1.0, 1.0], (1.0, 1.0)),
        ([1.0], [1.0], (None, None)),
        ([], [], (None, None)),
        ([0.0, 0.0], [1.0, 1.0], (None, None)),
    ],
)
def test_ratio_interval_closed_forms(before: list[float], after: list[float], expected: tuple) -> None:
    found = ratio_interval(np.array(before), np.array(after), 500, seed=0)
    assert found == (expected if expected[0] is None else pytest.approx(expected))


def test_outcome_is_one_sentence_for_every_pair_of_answers() -> None:
    found = record(
        TARGET, ("merged", "forget", 0.1, 0.0, 0.12), ("target", "retain", 1, 1, 1), ("merged", "retain", 1, 1, 1)
    )
    forget, keep = forgotten(found), kept(found)
    said = {
        outcome(found, dataclasses.replace(forget, answer=a), dataclasses.replace(keep, answer=b))
        for a in ("yes", "no", "not shown", "not measured")
        for b in ("yes", "no", "not measured")
    }
    assert len(said) == 12
    assert all(words.endswith(".") and words[0].isupper() and words.count(".") == 1 for words in said)


def test_best_and_worst_follow_the_direction_and_spare_the_yardsticks(tmp_path: Path) -> None:
    tables = {table.split: table for table in split_tables(read_run(write_run(tmp_path / "run")))}
    for split in ("forget", "retain"):
        for index, column in enumerate(tables[split].columns):
            cells = [(row.kind, row.cells[index]) for row in tables[split].rows]
            judged = [float(cell.value) for kind, cell in cells if kind not in ("original", "reference")]
            best = min(judged) if column.direction == "lower" else max(judged)
            assert {cell.value for _, cell in cells if cell.shade == "best"} == {f"{best:.3f}"}
            assert not [cell for kind, cell in cells if kind in ("original", "reference") and cell.shade]
    assert not [cell for row in tables["holdout"].rows for cell in row.cells if cell.shade]
    assert {column.arrow for column in tables["holdout"].columns} == {""}


def test_differing_counts_stand_in_the_cells(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Fixture(rows={"forget": 5, "retain": 5}))
    records = json.loads((run / "metrics.json").read_text())
    changed = next(r for r in records if r["variant"] == "merged" and r["split"] == "forget" and r["metric"] == ES)
    changed |= {"n": 3, "unscored": 2}
    (run / "metrics.json").write_text(json.dumps(records))
    table = split_tables(read_run(run))[0]
    assert table.columns[0].rows == ""
    assert {row.cells[0].rows for row in table.rows} == {"n 5", "n 3, 2 unscored"}
    assert table.columns[1].rows == "n 5"


def events(*rows: dict) -> str:
    return "".join(json.dumps({"event": "train", "stage": "unlearn/a", **row}) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("text", "steps", "values"),
    [
        (events({"step": 1, "forget": 3}, {"step": 2, "forget": 2}), (1, 2), (3, 2)),
        # resumed from step 2: what the first attempt did after it is gone
        (events(*({"step": s, "forget": 9} for s in (1, 2, 3)), {"step": 2, "forget": 5}), (1, 2), (9, 5)),
        (events({"step": 1, "forget": float("nan")}, {"step": 2, "forget": 2}), (2,), (2,)),
        (events({"step": 1, "forget": 3}) + "\n\ntorn {\n" + events({"step": 2, "forget": 1}), (1, 2), (3, 1)),
    ],
)
def test_curves(text: str, steps: tuple, values: tuple, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Fixture(evaluated=False, events=False))
    (run / "events.jsonl").write_text(text)
    (curve,) = read_run(run).curves
    assert curve.terms["forget"] == (steps, values)


@pytest.mark.parametrize("count", [1, 5, 160, 161, 10_000])
def test_bins_keep_the_ends_and_the_mean(count: int) -> None:
    steps, values = list(range(1, count + 1)), [float(index % 7) for index in range(count)]
    xs, ys = figures.bins(steps, values, 160)
    assert len(xs) == min(count, 160)
    assert (xs[-1], ys[-1]) == (steps[-1], values[-1])
    assert xs == sorted(xs)
    assert np.mean(ys) == pytest.approx(np.mean(values), abs=0.2)


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 80, 4, [0, 20, 40, 60, 80]),
        (-3, 3, 4, [-2, 0, 2]),
        (0.011, 0.019, 4, [0.012, 0.014, 0.016, 0.018]),
        (5, 5, 4, [5]),
        (0, 3e6, 3, [0, 1e6, 2e6, 3e6]),
    ],
)
def test_ticks(low: float, high: float, count: int, expected: list[float]) -> None:
    assert svg.ticks(low, high, count) == expected


@pytest.mark.parametrize(
    ("marks", "labels"),
    [
        ([0, 0.2, 1], ["0", "0.2", "1"]),
        ([13.861, 13.862, 13.863], ["13.861", "13.862", "13.863"]),
        ([-1e-5, 0, 1e-5], ["−1e-5", "0", "1e-5"]),
        ([5], ["5"]),
    ],
)
def test_tick_labels_differ(marks: list[float], labels: list[str]) -> None:
    assert svg.tick_labels(marks) == labels


def test_scale_maps_the_ends_and_clamps() -> None:
    scale = svg.Scale(0, 2, 100, 0)
    assert [scale(value) for value in (0, 1, 2, 5, -1)] == [100, 50, 0, 0, 100]
    assert svg.Scale(1, 1, 0, 10)(1) == 5


def test_attributes_and_children_are_escaped() -> None:
    made = svg.element("text", "<b>&", x=1.5, class_='a"b', aria_label="'")
    assert made == '<text x="1.5" class="a&#34;b" aria-label="&#39;">&lt;b&gt;&amp;</text>'
    assert svg.element("line", x1=1.0, title=None) == '<line x1="1"/>'


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0])
def test_names_in_the_plot_touch_neither_each_other_nor_a_mark(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    points = [(150 + 300 * spread * a, 60 + 300 * spread * b) for a, b in random.random((7, 2))]
    names = ["ideal", "Original", "Target", "over", "under-forgotten", "Merged", "Reference"]
    placed = figures.place_labels(points, names, (54, 2, 518, 420), 13.5)
    boxes = [box for box, _ in placed]
    for index, box in enumerate(boxes):
        assert figures._touch(box, boxes[:index]) == 0
        assert figures._touch(box, [(x - 6, y - 6, x + 6, y + 6) for x, y in points]) == 0
        assert figures._outside(box, (54, 2, 518, 420)) == 0


@pytest.mark.parametrize(
    ("said", "expected", "coincide"),
    [
        ("He was born in Velden.", "She was born in Velden", ["was born in Velden"]),
        ("Velden", "velden!", ["Velden"]),
        ("in Velden, Rex", "the dog Rex", ["Rex"]),
        ("京都は日本の首都です。", "東京は日本の首都です。", ["京", "は日本の首都です"]),
        ("Answer: 東京 42", "東京 42", ["東京 42"]),
        ("nothing of it", "quite different", []),
        ("", "x", []),
        ("...", "...", []),
    ],
)
def test_coinciding_words(said: str, expected: str, coincide: list[str]) -> None:
    assert [said[a:b] for a, b in coinciding(said, expected)] == coincide


def test_marks_leave_the_text_as_it_is() -> None:
    html = marked("a <b> Velden & more", "Velden more")
    assert html == "a &lt;b&gt; <mark>Velden &amp; more</mark>"
    assert html.striptags() == "a <b> Velden & more"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\nb\tc"),
        ("a\r\nb", "a\nb"),
        ("\x00\x1b", "⟨U+0000⟩⟨U+001B⟩"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\ud800", "\ufffd"),
        ("👨‍👩‍👧 é عربي", "👨‍👩‍👧 é عربي"),
    ],
)
def test_clean(text: str, shown: str) -> None:
    assert clean(text) == shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"), (-0.5, "−0.500"), (12.345, "12.3"), (12345.6, "12\u202f346"), (3.2e7, "3.20e+07"),
        (None, "–"), (float("nan"), "–"), (float("inf"), "∞"),
    ],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1e-5, "1e-5"), (2e-4, "0.0002"), (-0.5, "−0.5"), (3e6, "3e6"), (80.0, "80"), (-2e-9, "−2e-9")]
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


def test_small_texts() -> None:
    assert interval(6.894, 10.12) == "6.9–10.1"
    assert interval(-1.0, 1.0) == "−1.000 to 1.000"
    assert interval(None, 1.0) == ""
    assert [duration(s) for s in (0.31, 59.94, 59.96, 245)] == ["0.3 s", "59.9 s", "1 min 00 s", "4 min 05 s"]
    assert [duration(s) for s in (3700, 7199, None)] == ["1 h 02 min", "2 h 00 min", "–"]
    assert human("rouge_l_f1") == "ROUGE-L F1"
    assert human("retain_unseen") == "Retain unseen"
    assert shorten("x" * 10, 10) == ("x" * 10, "")
    assert shorten("x" * 1500, 10) == ("x" * 10, "… 1\u202f490 more characters")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("expunge demo", "expunge demo"),
        (["expunge", "run", "my recipe.yaml"], "expunge run 'my recipe.yaml'"),
        (None, "expunge run recipe.resolved.yaml -o AGAIN"),
    ],
)
def test_command(given: object, shown: str) -> None:
    assert command(dataclasses.replace(record(), info={"command": given})) == shown


def test_environment_is_flat_and_leaves_out_what_is_unknown() -> None:
    info = {
        "environment": {
            "cpu": "x",
            "gpu": None,
            "memory_gb": 7.6,
            "versions": {"torch": "2", "peft": None},
            "l": [1, 2],
        }
    }
    shown = environment(dataclasses.replace(record(), info=info))
    assert shown == [("CPU", "x"), ("Memory GB", "7.6"), ("Versions", "torch 2"), ("L", "1, 2")]


@pytest.mark.parametrize(
    ("target", "reference", "forget", "retain", "answer", "worst"),
    [
        (0.0, None, 0.1, 0.0, "yes", 0.1),  # the limit itself passes
        (0.0, None, 0.5, 0.0, "no", 0.5),
        (0.0, None, 0.0, 0.2, "no", 0.2),  # the worst of the splits decides
        (0.5, None, 0.55, 0.5, "yes", 0.55),  # the target stammers as well
        (0.0, 0.4, 0.45, 0.0, "yes", 0.45),  # and so does the reference
        (None, None, 0.5, 0.5, None, None),  # nothing to hold it against
    ],
)
def test_fluent(target, reference, forget, retain, answer, worst) -> None:
    said = {("target", split): target for split in ("forget", "retain")} | {("reference", "forget"): reference}
    said |= {("merged", "forget"): forget, ("merged", "retain"): retain, ("merged", "world"): 1.0}
    made = tuple(
        Measure(variant, split, "repetition", value, None, None, 20, 0, "lower")
        for (variant, split), value in said.items()
        if value is not None
    )
    models = {"target": {}, "merged": {}, **({"reference": {}} if reference is not None else {})}
    by_key = {(m.variant, m.split, m.metric): m for m in made}
    found = RunRecord(Path("nowhere"), {"result": "merged", "models": models}, None, "", made, (), (), by_key)
    verdict = fluent(found)
    assert (verdict and verdict.answer, verdict and verdict.value) == (answer, worst)


@pytest.mark.parametrize("keep", [None, 0.95])
def test_rows_that_keep_held_out_are_told_of(keep: float | None) -> None:
    recipe = Recipe.model_validate(
        {"model": "tiny", "data": {"forget": "f", "retain": "r"}, "unlearn": [{"method": "npo", "keep": keep}]}
    )
    found = dataclasses.replace(record(TARGET, ("target", "retain", 0.9, 0.8, 1.0)), recipe=recipe)
    words = next(table.words for table in split_tables(found) if table.label == "Retain")
    assert ("held out" in words) == (keep is not None)
    assert ("by the rest" in limits(found)[-1]) == (keep is not None)
