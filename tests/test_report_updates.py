"""Where the update landed, on the page of a run: maps, words and tables from the records alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expunge.errors import UserError
from expunge.report.build import MAX_BYTES, build_report
from expunge.report.figure_data import Heat
from expunge.report.records import read_run
from expunge.report.update_page import TITLE, in_words, update_section
from expunge.report.update_record import FOLDER, NAME, InsideMask, TensorUpdate, Updates, read_updates
from report_checks import Nesting, check_figures, check_page
from report_fixture import Fixture, write_run
from zjuklab_found import EVIL

MODULES = ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")


def tensor(module: str, layer: int | None, energy: float | None, inside: float | None = None) -> TensorUpdate:
    """100 weights of norm 10, of which every second one changed if any did."""
    changed = 0 if energy == 0 else 50
    within = None
    if inside is not None:
        within = InsideMask(weights=20, energy=inside, changed=changed if inside == energy else min(changed, 10))
    name = f"model.{'' if layer is None else f'layers.{layer}.'}{module}.weight"
    return TensorUpdate(
        tensor=name, layer=layer, module=module, weights=100, energy=energy, before=100.0, changed=changed,
        inside=within,
    )  # fmt: skip


def updates(layers: int = 4, outside: float = 0.0, mask: str | None = None, leak: bool = False) -> Updates:
    """Layer l holds l + 1 parts in each projection and nothing in its norm; the embedding holds `outside`."""
    found = [tensor("embed_tokens", None, outside, 0.0 if mask else None)]
    for layer in range(layers):
        for module in MODULES:
            energy = 0.0 if module == "input_layernorm" else (layer + 1.0) * (3 if module == "mlp.down_proj" else 1)
            part = energy / 2 if leak else energy
            found.append(tensor(module, layer, energy, part if mask else None))
    return Updates(tensors=found, mask=mask)


def write(run: Path, **found: Updates) -> Path:
    for name, each in found.items():
        (run / FOLDER / name).mkdir(parents=True)
        (run / FOLDER / name / NAME).write_text(json.dumps(each.model_dump(mode="json", by_alias=True)))
    return run


def words_of(html: str) -> str:
    return " ".join("".join(Nesting(html).text).split())


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    made = {"a": updates(mask="ab"), "b": updates(outside=1.0), "c": Updates(problem="a has no tensor x")}
    assert read_updates(write(tmp_path, **made)) == made
    assert read_updates(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize("content", ["", "[]", "{}x", '{"schema": "other/1"}', '{"tensors": [{"tensor": "x"}]}'])
def test_a_broken_record_is_one_sentence(content: str, tmp_path: Path) -> None:
    run = write(write_run(tmp_path / "run"), over=updates())
    (run / FOLDER / "over" / NAME).write_text(content)
    with pytest.raises(UserError, match=r"updates.json can't be read"):
        build_report(run)


def test_the_map_holds_the_parts_of_the_energy(tmp_path: Path) -> None:
    run = write(write_run(tmp_path / "run"), over=updates(), merged=updates(outside=10.0))
    section = update_section(read_run(run))
    assert section is not None
    merged, over = section.figures
    assert isinstance(merged, Heat)
    assert isinstance(over, Heat)
    assert (merged.title, over.title) == ("Merged", "over")  # the result comes first
    assert over.rows == list(MODULES)
    assert over.columns == ["0", "1", "2", "3"]
    assert over.values == [[2.5, 5.0, 7.5, 10.0], [7.5, 15.0, 22.5, 30.0], [0.0] * 4]
    assert merged.values[1] == [pytest.approx(0.8 * value) for value in over.values[1]]
    assert (over.high, merged.high) == (30.0, 24.0)
    table = section.tables[0]
    cells = [[cell.text for cell in row.cells] for row in table.rows]
    # ‖Δ‖² 50 and 40 over ‖θ‖² 13 × 100; of 1300 weights 450 and 400 changed
    assert cells[0] == ["Merged", "20%", "34.6%", "80.0%", "20.0%"]
    assert cells[1] == ["over", "18%", "30.8%", "100%", "0%"]
    modules = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in section.tables[1].rows}
    assert modules["mlp.down_proj"] == ["60.0%", "27%", "50.0%", "400"]
    assert modules["embed_tokens"] == ["20.0%", "32%", "50.0%", "100"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            updates(outside=10.0),
            [
                "The change is 20% of the weights' norm (‖Δ‖/‖θ‖); 34.6% of the weights changed at all.",
                "Layer 3 holds the largest part of its energy, 32.0% (an even spread over 4 layers would give 20.0%); "
                "of the modules, mlp.down_proj holds most: 60.0%.",
                "Outside the decoder layers: embed_tokens 20.0%.",
            ],
        ),
        (updates(), ["Nothing outside the decoder layers changed."]),
        (updates(outside=1e-9), ["Outside the decoder layers: embed_tokens < 0.1%."]),
        (
            updates(mask="ab"),
            ["All of it lies inside the mask, which holds 20.0% of the weights: none outside it changed."],
        ),
        (
            updates(mask="ab", leak=True),
            [
                "Only 50.0% of its energy lies inside the mask, which holds 20.0% of the weights: 320 weights outside "
                "it changed too."
            ],
        ),
        (Updates(tensors=[tensor("embed_tokens", None, 0.0), tensor("norm", None, 0.0)]), ["No weight changed."]),
        (
            Updates(tensors=[*updates().tensors, tensor("norm", None, None)]),
            ["1 tensor holds numbers that are not finite and is left out: model.norm.weight."],
        ),
        (
            Updates(tensors=[tensor("norm", None, None), tensor("lm_head", None, None)]),
            ["2 tensors hold numbers that are not finite and are left out, model.norm.weight first."],
        ),
        (Updates(tensors=[tensor("embed_tokens", None, 1.0)]), ["Outside the decoder layers: embed_tokens 100%."]),
    ],
)
def test_the_map_in_words(found: Updates, words: list[str]) -> None:
    said = in_words(found)
    for sentence in words:
        assert sentence in said


#: what a run recorded → words that its page must have, and must not have
PAGES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "none": ({}, ["Where the update landed was not recorded."], ["Model by model", "nan"]),
    "some": ({"over": updates(), "merged": updates(outside=1.0)}, ["Model by model"], ["not recorded", "Inside the"]),
    "mask": ({"over": updates(mask="ab"), "merged": updates(mask="ab", leak=True)}, ["Inside the mask", "all"], []),
    "problem": (
        {"over": updates(), "under": Updates(problem="under has no tensor x")},
        ["under could not be compared: under has no tensor x."],
        [],
    ),
    "only problems": ({"over": Updates(problem="no")}, ["over could not be compared: no."], ["Model by model"]),
    "unchanged": ({"over": Updates(tensors=[tensor("mlp.down_proj", 0, 0.0)])}, ["No weight changed."], []),
    "not finite": ({"over": Updates(tensors=[tensor("mlp.down_proj", 0, None)])}, ["not finite"], ["could not"]),
    "no layers": (
        {"over": Updates(tensors=[tensor("embed_tokens", None, 1.0)])},
        ["over: The change is 10% of", "Outside the decoder layers: embed_tokens 100%."],
        [],
    ),
    "evil": ({"over": Updates(tensors=[tensor(EVIL, 0, 1.0), tensor(EVIL, None, 1.0)])}, ["Model by model"], []),
    "evil problem": ({"over": Updates(problem=EVIL)}, ["could not be compared"], []),
}


@pytest.mark.parametrize("case", PAGES)
def test_pages(case: str, tmp_path: Path) -> None:
    found, words, absent = PAGES[case]
    html = build_report(write(write_run(tmp_path / "run", Fixture(generations=False)), **found)).read_text("utf-8")
    check_page(html)
    check_figures(html)
    text = words_of(html)
    assert (TITLE in text.replace(f"{TITLE} was not", "")) == bool(found)
    for word in words:
        assert word in text
    for word in absent:
        assert word not in text


@pytest.mark.parametrize(("layers", "drawn"), [(2, 4), (126, 4), (800, 1)])
def test_a_page_of_many_models_and_layers_stays_small(layers: int, drawn: int, tmp_path: Path) -> None:
    names = [f"m{index}" for index in range(6)]
    run = write_run(tmp_path / "run", Fixture(specialists=names, generations=False, rows={"forget": 3, "retain": 3}))
    path = build_report(write(run, **dict.fromkeys(names, updates(layers))))
    section = update_section(read_run(run))
    assert section is not None
    assert len(section.figures) == drawn
    assert len(section.tables[0].rows) == len(names)  # all of them stand in the table
    assert path.stat().st_size < MAX_BYTES
