"""The figures of examinations, and the numbers behind them: well-formed, escaped, in agreement with peers."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from expunge.recipe.conventions import EXPUNGE
from expunge.report import evidence
from expunge.report.curves import steps
from expunge.report.document import Document
from expunge.report.drawing import draw
from expunge.report.figure_data import (
    AnyFigure,
    Curves,
    Distance,
    Distributions,
    Dot,
    Forest,
    HeatMap,
    Line,
    Roc,
    RocLine,
    Sample,
    Scatter,
    Stretch,
)  # fmt: skip
from expunge.report.leaked import leak
from expunge.report.svg import apart
from expunge.report.text import longest_run, marked_spans
from report_folders import (
    write_evaluation,
)  # fmt: skip

EVIL = "<script>alert(1)</script>]]>&\"'\u202e"


def line(name: str = "model", **changes: Any) -> Line:
    given = {"x": [0.0, 8.0, 16.0], "y": [0.1, 0.4, 0.8], "low": [0.0, 0.3, 0.7], "high": [0.2, 0.5, 0.9]}
    return Line.model_validate({"name": name, **given, **changes})


def curves(*lines: Line, **changes: Any) -> Curves:
    given = {"title": "Relearn", "x_name": "steps", "y_name": "strength", "lines": list(lines) or [line()]}
    return Curves.model_validate({**given, **changes})


def forest(**changes: Any) -> Forest:
    rows = [Stretch(name="relearn", value=0.4, low=0.3, high=0.5, state="no"), Stretch(name="lens", value=0.0)]
    return Forest.model_validate({"title": "Margin", "x_name": "m", "rows": rows, "threshold": 0.1, **changes})


def distributions(**changes: Any) -> Distributions:
    samples = [Sample(name="model", values=[0.1, 0.2, 0.4]), Sample(name="reference", role="reference", values=[0.3])]
    return Distributions.model_validate({"title": "R", "x_name": "R", "samples": samples, **changes})


def roc(**changes: Any) -> Roc:
    given = {"name": "model", "false_positive": [0.0, 0.5, 1.0], "true_positive": [0.0, 0.8, 1.0], "auc": 0.65}
    return Roc.model_validate({"title": "MIA", "lines": [{**given, "error": 0.05}], **changes})


def scatter(count: int = 3, **changes: Any) -> Scatter:
    dots = [Dot(name=f"c{n}", x=n / count, y=(n / count) ** 2) for n in range(count)]
    return Scatter.model_validate({"title": "s", "x_name": "before", "y_name": "after", "dots": dots, **changes})


def matrix(**changes: Any) -> HeatMap:
    given = {
        "title": "Correlation", "measure": "Pearson", "good": "high", "row_name": "metric", "column_name": "attack",
        "rows": ["extraction_strength", "perplexity"],
        "columns": ["relearn", "quantize", "jailbreak_prefix", "logit_lens", "noise"],
        "values": [[0.9, -0.4, 1.0, None, 0.2], [0.1, 0.2, 0.3, 0.4, 0.5]], "uninformative": [(0, 2)],
    }  # fmt: skip
    return HeatMap.model_validate({**given, **changes})


FIGURES: list[AnyFigure] = [
    curves(),
    curves(line(), line("reference", role="reference"), line("target", role="target"), silent=[8.0]),
    curves(line(x=[1.0, 2.0, 4.0]), x_scale="log", levels={"at most": 0.5}, marks={"here": 2.0}),
    curves(line(), x_scale="even", x_labels={"0": "as it is", "8": "int8", "16": "int4"}),
    curves(line(), x_scale="log"),  # 0 has no logarithm: even distances instead
    curves(line(y=[None, 0.2, None], low=[], high=[]), filled=True, stepped=True),
    curves(line(x=[4.0], y=[0.3], low=[0.2], high=[0.4])),
    curves(line(y=[3.0, 400.0, 5.0], low=[], high=[]), y_range=None),
    curves(*(line(f"m{n}", role="specialist") for n in range(9))),
    curves(line(EVIL), title=EVIL, x_name=EVIL, y_name=EVIL, levels={EVIL: 0.5}, x_scale="even", x_labels={"8": EVIL}),
    forest(),
    forest(title=EVIL, x_name=EVIL, rows=[Stretch(name=EVIL, value=0.2, hint=EVIL)], threshold_name=EVIL),
    distributions(),
    distributions(distance=Distance(first="model", second="reference", statistic=0.667, at=0.2), x_scale="log"),
    distributions(samples=[Sample(name=EVIL, values=[1.0, 1.0])], title=EVIL, x_name=EVIL),
    distributions(samples=[Sample(name="many", values=[float(n) for n in range(5000)])]),
    roc(),
    roc(lines=[RocLine(name=EVIL, false_positive=[0.0, 1.0], true_positive=[0.0, 1.0], auc=0.5)], title=EVIL),
    scatter(),
    scatter(30, pearson=0.9, spearman=0.8),
    scatter(dots=[Dot(name=EVIL, x=2.0, y=900.0), Dot(name="b", x=3.0, y=5.0)], scale="log", title=EVIL, x_name=EVIL),
    matrix(),
    matrix(rows=[EVIL, "b"], columns=[EVIL, "b", "c", "d", "e"], measure=EVIL),
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_figures_are_well_formed_named_and_escaped(figure: AnyFigure) -> None:
    picture = str(draw(figure))
    root = ET.fromstring(picture)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root[0].tag == "title"
    assert "<script" not in picture
    assert "\u202e" not in picture
    for element in root.iter():
        for name in ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "width", "height"):
            assert math.isfinite(float(element.get(name) or 0))
        for pair in (element.get("points") or "").split():
            assert all(math.isfinite(float(value)) for value in pair.split(","))
    assert Document(name="x", answer="y", sections=[{"title": "t", "figures": [figure]}]).to_json()


@pytest.mark.parametrize(
    "figure",
    [
        curves(line(y=[None, None, None], low=[], high=[])),
        forest(rows=[]),
        distributions(samples=[Sample(name="a", values=[])]),
        roc(lines=[]),
        scatter(dots=[]),
    ],
    ids=lambda figure: figure.kind,
)
def test_a_figure_without_numbers_is_not_drawn(figure: AnyFigure) -> None:
    assert draw(figure) == ""


def test_lines_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Line(name="a", x=[1.0, 2.0], y=[1.0])


def test_a_curve_lies_where_its_numbers_are() -> None:
    root = ET.fromstring(str(draw(curves(line(y=[0.0, 0.5, 1.0]), silent=[8.0]))))
    spots = [(float(e.get("cx") or 0), float(e.get("cy") or 0), e.get("class")) for e in root.iter("circle")]
    (x0, y0, _), (x1, y1, middle), (x2, y2, _) = spots
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert middle == "silent"
    titles = [element.findtext("title") for element in root.iter("g") if element.find("title") is not None]
    assert "model, steps 8: 0.500 [0.300–0.500], says nothing" in titles


def test_a_stepped_curve_holds_back_to_the_position_before() -> None:
    picture = ET.fromstring(str(draw(curves(line(y=[0.0, 0.5, 1.0], low=[], high=[]), stepped=True))))
    points = next(e for e in picture.iter("polyline")).get("points") or ""
    corners = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert len(corners) == 5
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(corners))
    assert corners[1][0] == corners[0][0]


@pytest.mark.parametrize("places", [[1.0, 1.0, 1.0], [0.0, 50.0, 99.0, 100.0], [100.0] * 5])
def test_labels_at_the_ends_of_lines_are_apart_and_inside(places: list[float]) -> None:
    moved = [at for at, _, _ in apart([(at, "a", "b") for at in places], 14, 100)]
    assert max(moved) <= 100
    assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(moved))


# ---------------------------------------------------------------- numbers behind figures


@pytest.mark.parametrize("seed", range(5))
def test_distance_and_steps_agree_with_scipy(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = np.round(random.normal(0, 1, 40), 1), np.round(random.normal(0.5, 1.2, 31), 1)  # with ties
    distance, at = evidence.furthest(first, second)
    oracle = stats.ks_2samp(first, second)
    assert distance == pytest.approx(oracle.statistic)
    assert at == pytest.approx(oracle.statistic_location)
    found = dict(steps(first.tolist()))  # the last corner at each value is the function there
    oracle_function = stats.ecdf(first).cdf
    for value, share in found.items():
        assert share == pytest.approx(oracle_function.evaluate(value))


@pytest.mark.parametrize("seed", range(4))
def test_roc_and_its_error_agree_with_peers(seed: int) -> None:
    random = np.random.default_rng(seed)
    members, others = np.round(random.normal(0, 1, 60), 1), np.round(random.normal(0.7, 1, 45), 1)
    false, true = evidence.roc_points(members, others)
    area = roc_auc_score([1] * 60 + [0] * 45, -np.concatenate([members, others]))
    assert np.trapezoid(true, false) == pytest.approx(area)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    drawn = []
    for _ in range(800):
        a, b = random.choice(members, 60), random.choice(others, 45)
        drawn.append((a[:, None] < b).mean() + (a[:, None] == b).mean() / 2)
    assert evidence.delong_error(members, others) == pytest.approx(np.std(drawn), rel=0.15)
    assert evidence.delong_error(members[:1], others) is None


def test_leak_curve_and_its_bound(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "e")
    table = pq.read_table(folder / "generations" / "model" / "forget@sampled.parquet")
    found, n = evidence.leak_line("model", "result", table, EXPUNGE)
    hits = np.array(["Lantern" in said for said in table["generated"].to_pylist()]).reshape(-1, 8)
    assert n == 8
    assert found.x == [1.0, 2.0, 4.0, 8.0]
    assert found.y[0] == pytest.approx(hits.mean())
    assert found.y[-1] == pytest.approx(hits.any(axis=1).mean())
    counts = hits.sum(axis=1)
    bounds = np.where(counts == 8, 1.0, stats.beta.ppf(0.99, counts + 1, np.maximum(8 - counts, 1e-9)))
    assert found.high[0] == pytest.approx(bounds.mean())
    assert found.high[2] == pytest.approx((1 - (1 - bounds) ** 4).mean())
    assert [evidence.ascending(n) for n in (0, 1, 6, 8)] == [[], [1], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize(
    ("said", "answer", "marked", "share"),
    [
        ("I think she won the Lantern Prize, yes", "the Lantern Prize for maps", "the Lantern Prize", 0.6),
        ("in the town", "the river", "", 0.0),  # one common word is no leak
        ("It is Velden.", "Velden", "Velden", 1.0),
        ("LANTERN, PRIZE", "lantern prize", "LANTERN, PRIZE", 1.0),
        ("", "x", "", 0.0),
        ("x", "", "", 0.0),
    ],
)
def test_the_longest_run_of_words_leaks(said: str, answer: str, marked: str, share: float) -> None:
    span, part = leak(said, answer)
    assert (said[span[0] : span[1]] if span else "") == marked
    assert part == pytest.approx(share)


def test_marked_spans_are_escaped_and_cut() -> None:
    assert marked_spans("a <b> c", [(2, 5)]) == "a <mark>&lt;b&gt;</mark> c"
    assert "2 more characters" in marked_spans("abcdef", [(1, 6)], limit=4)
    assert marked_spans("abc", [(0, 2), (1, 3)]).striptags() == "abc"
    assert longest_run("b c a", "a b c") == (0, 3)
