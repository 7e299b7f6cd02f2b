"""The figures and pages of studies: well-formed, escaped, complete, and true to their numbers."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from expunge.cli.app import main
from expunge.errors import UserError
from expunge.report.document import STUDY, read_document
from expunge.report.document_page import build_document_report
from expunge.report.drawing import draw, heat_map, profile
from expunge.report.figure_data import HeatMap, Plane, Profile, Spot
from expunge.report.svg import LogScale, log_ticks
from expunge.studies import rmu_layers_page
from study_fixture import fake_ground, layer_trials, options_and_recipe, write_study

EVIL = "<script>alert(1)</script>]]>&\"'\u202e"


def grid(**changes: object) -> HeatMap:
    given = {
        "title": "Forget",
        "measure": "forget extraction strength",
        "good": "low",
        "row_name": "layer",
        "rows": ["2", "6", "10"],
        "column_name": "coefficient c",
        "columns": ["6.5", "200"],
        "values": [[0.0, 0.25], [0.5, None], [1.0, None]],
        "eligible": [(0, 1), (1, 0)],
        "failed": [(1, 1)],
        "best": (0, 1),
    }
    return HeatMap.model_validate({**given, **changes})


def curves(**changes: object) -> Profile:
    given = {
        "title": "Norms",
        "x_name": "layer",
        "y_name": "norm",
        "x": [0.0, 1.0, 2.0],
        "curves": {"forget": [1.0, 10.0, 100.0], "retain": [2.0, 3.0, 4.0]},
        "levels": {"c 6.5": 6.5},
        "marked": [0.0, 2.0],
    }
    return Profile.model_validate({**given, **changes})


def spots(count: int, **changes: object) -> Plane:
    made = [
        Spot(name=f"method {n}", role="specialist", x=n / count, y=n / count, x_ends=(n / count, n / count))
        for n in range(count)
    ]
    target = Spot(name="target", role="target", x=0.9, y=0.9)
    given = {"title": "Plane", "retain_name": "unseen retain", "spots": [*made, target], "front": ["method 0"]}
    return Plane.model_validate({**given, **changes})


@pytest.mark.parametrize(
    "figure",
    [
        grid(),
        grid(rows=["1"], columns=["1"], values=[[None]], eligible=[], failed=[], best=None),
        grid(title=EVIL, measure=EVIL, row_name=EVIL, column_name=EVIL, rows=[EVIL, "b", "c"], columns=[EVIL, "d"]),
        curves(),
        curves(curves={"forget": [1.0, 1.1, 1.2]}, levels={}),
        curves(title=EVIL, x_name=EVIL, y_name=EVIL, curves={EVIL: [1.0, 2.0, 3.0]}, levels={EVIL: 2.0}),
        curves(x=[3.0], curves={"forget": [5.0]}, marked=[3.0]),
        spots(3),
        spots(30, front=["method 1", "method 2"], retain_at_least=0.7),
        spots(2, retain_name=EVIL, spots=[Spot(name=EVIL, role="result", x=0.5, y=0.5)], front=[EVIL]),
    ],
    ids=str,
)
def test_figures_are_well_formed_named_and_escaped(figure: HeatMap | Profile | Plane) -> None:
    picture = str(draw(figure))
    root = ET.fromstring(picture)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root[0].tag == "title"
    assert "<script" not in picture
    assert "\u202e" not in picture
    assert "nan" not in picture.lower()
    for element in root.iter():
        for name in ("x", "y", "x1", "y1", "cx", "cy", "width", "height"):
            value = element.get(name)
            assert value is None or math.isfinite(float(value))


def test_a_heat_map_says_every_cell() -> None:
    root = ET.fromstring(str(heat_map(grid())))
    titles = [element.findtext("title") for element in root.iter("g")]
    assert titles == [
        "layer 2, coefficient c 6.5: forget extraction strength 0.000",
        "layer 6, coefficient c 6.5: forget extraction strength 0.500, meets the rule",
        "layer 6, coefficient c 200: training broke off",
        "layer 10, coefficient c 6.5: forget extraction strength 1.000",
        "layer 10, coefficient c 200: not measured",
        "layer 2, coefficient c 200: forget extraction strength 0.250, chosen",
    ]
    shades = [element.get("style") for element in root.iter("rect") if element.get("style")]
    assert shades == ["--v:0.000", "--v:0.500", "--v:1.000", "--v:0.250"]
    assert len([element for element in root.iter("rect") if element.get("class") == "chosen"]) == 1


def test_wide_values_are_drawn_on_a_logarithmic_axis() -> None:
    scale = LogScale(1, 100, 200, 0)
    assert [scale(1), scale(10), scale(100), scale(1000), scale(0)] == pytest.approx([200, 100, 0, 0, 200])
    assert log_ticks(4, 120) == [5, 10, 20, 50, 100]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    wide, narrow = str(profile(curves())), str(profile(curves(curves={"forget": [1.0, 2.0, 3.0]}, levels={})))
    assert ">50<" in wide
    assert ">50<" not in narrow
    dots = list(ET.fromstring(wide).iter("circle"))
    assert len(dots) == 4  # two curves at two marked layers


def test_of_many_points_only_the_front_and_the_yardsticks_are_named() -> None:
    texts = [
        element.text for element in ET.fromstring(str(draw(spots(30, front=["method 4", "method 7"])))).iter("text")
    ]
    assert {"method 4", "method 7", "target"} <= set(texts)
    assert "method 5" not in texts
    few = [element.text for element in ET.fromstring(str(draw(spots(4)))).iter("text")]
    assert {f"method {n}" for n in range(4)} <= set(few)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of 32 made-up trials with a hostile model name."""
    options, recipe = options_and_recipe("rmu_layers", layers="2,6,10,14,17,21,25,29")
    options = options.model_copy(update={"model": EVIL})
    strengths = {"rmu": (6.5, 200.0), "adaptive_rmu": options.betas}
    trials = layer_trials(list(options.layers), strengths)
    norms = {"forget": [40 * 1.1**n for n in range(30)], "retain": [35 * 1.11**n for n in range(30)]}
    ground = fake_ground(recipe, trials, planned=len(trials) + 2)
    document = rmu_layers_page.document(
        ground, options, rmu_layers_page.Grid(30, options.layers, strengths, 1e-2), norms
    )
    return write_study(tmp_path / "study", recipe, document)


def test_the_page_is_whole_and_escaped(study: Path) -> None:
    html = build_document_report(study, STUDY).read_text(encoding="utf-8")
    assert len(html.encode()) < 1_000_000
    assert "<script" not in html
    assert "\u202e" not in html
    assert "2 of 34 trials are still to be done" in html
    assert html.count("<svg") == 7  # three maps per method and the profile
    for picture in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ET.fromstring(picture)
    for tag in ("section", "table", "figure", "details", "div", "main"):
        assert html.count(f"<{tag}") == html.count(f"</{tag}>"), tag
    assert not re.search(r"""(?:src|href)=["'](?!#)""", html)
    assert "prefers-color-scheme" in html


def test_the_report_command_knows_a_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(study)]) == 0
    shown = capsys.readouterr().out
    assert "serves best" in shown or "no layer keeps" in shown
    assert (study / "report.html").is_file()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "expunge.study/9"}', '{"schema": "expunge.study/1"}'])
def test_a_broken_study_is_one_sentence(study: Path, text: str) -> None:
    (study / "study.json").write_text(text)
    with pytest.raises(UserError, match=r"study\.json can't be read"):
        read_document(study)
    (study / "study.json").unlink()
    with pytest.raises(UserError, match="no study at"):
        read_document(study)
