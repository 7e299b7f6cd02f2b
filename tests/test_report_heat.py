"""Heat maps of many small cells: colours, legend, names that do not touch."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from expunge.report.drawing import draw
from expunge.report.figure_data import Heat
from zjuklab_found import EVIL


def heat(**changes: Any) -> Heat:
    given = {
        "title": "Cosine", "measure": "cosine", "row_name": "module", "rows": ["q_proj", "v_proj"],
        "column_name": "layer", "columns": ["0", "1", "2"], "values": [[-1.0, 0.0, 0.5], [1.0, None, 2.0]],
        "low": -1.0, "high": 1.0, "middle": 0.0,
    }  # fmt: skip
    return Heat.model_validate({**given, **changes})


def cells(picture: str) -> list[tuple[str, str | None, str | None]]:
    """(What the pointer is told, class, shade) of each cell; the legend is left out."""
    found = []
    for group in ElementTree.fromstring(picture).iter("g"):
        told, shapes = group.findtext("title"), group.findall("rect")
        if told and len(shapes) == 1:
            found.append((told, shapes[0].get("class"), shapes[0].get("style")))
    return found


def test_a_heat_map_parts_its_colours_at_the_middle() -> None:
    assert cells(str(draw(heat()))) == [
        ("layer 0, q_proj: cosine −1.000", "cell low", "--v:1.000"),
        ("layer 1, q_proj: cosine 0.000", "cell high", "--v:0.000"),
        ("layer 2, q_proj: cosine 0.500", "cell high", "--v:0.500"),
        ("layer 0, v_proj: cosine 1.000", "cell high", "--v:1.000"),
        ("layer 1, v_proj: not measured", "band", None),
        ("layer 2, v_proj: cosine 2.000", "cell high", "--v:1.000"),  # beyond the scale: its last shade
    ]


def test_colours_change_sides_where_low_is_better() -> None:
    ways = [[kind for _, kind, _ in cells(str(draw(heat(turned=turned))))] for turned in (False, True)]
    swapped = {"cell low": "cell high", "cell high": "cell low", "band": "band"}
    assert ways[1] == [swapped[kind or ""] for kind in ways[0]]


def test_a_heat_map_without_a_middle_runs_from_low_to_high() -> None:
    shades = [
        shade for _, _, shade in cells(str(draw(heat(values=[[0.0, 5.0, 10.0]] * 2, low=0, high=10, middle=None))))
    ]
    assert shades == ["--v:0.000", "--v:0.500", "--v:1.000"] * 2


@pytest.mark.parametrize("layers", [1, 2, 30, 80, 126])
def test_a_heat_map_of_any_depth_names_columns_that_do_not_touch(layers: int) -> None:
    picture = str(draw(heat(columns=[str(n) for n in range(layers)], values=[[0.1] * layers] * 2)))
    assert len(cells(picture)) == 2 * layers
    root = ElementTree.fromstring(picture)
    ends = [
        (float(text.get("x") or 0), text.text or "")
        for text in root.iter("text")
        if text.get("class") == "tick" and (text.text or "").isdigit() and float(text.get("y") or 0) > 60
    ]
    assert ends
    for (left, one), (right, two) in itertools.pairwise(ends):
        assert right - left >= 12 * 0.58 * (len(one) + len(two)) / 2


def test_a_heat_map_is_escaped_and_empty_ones_are_not_drawn() -> None:
    picture = str(draw(heat(title=EVIL, measure=EVIL, row_name=EVIL, rows=[EVIL, "b"], column_name=EVIL)))
    ElementTree.fromstring(picture)
    assert "<script" not in picture
    assert "\u202e" not in picture
    assert not draw(heat(values=[[None] * 3] * 2))


@pytest.mark.parametrize("changes", [{"values": [[0.1]]}, {"middle": 3.0}, {"low": 2.0}])
def test_a_heat_map_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="heat map Cosine"):
        heat(**changes)
