"""docs/objectives.md: its YAML is valid, it knows every switch and objective, and its costs are the measured ones."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from expunge.methods.base import OBJECTIVES, build_objective
from expunge.recipe import UnlearnConfig, load_recipe
from test_setup import docs_tool

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
#: Keys of an entry that are not about what the loss is and sees.
ELSEWHERE = {"name", "trainable", "lora", "seed"}


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    """scripts/generate_docs.py as a module."""
    module: ModuleType = docs_tool()
    return module


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_is_a_valid_recipe(snippet: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    rows = "model: {id: tiny}\nprepare: {}\ndata: {benchmark: fictitious}\n"
    file.write_text(rows + snippet, encoding="utf-8")
    for entry in load_recipe(file).unlearn:
        assert isinstance(build_objective(entry.method, entry.parameters), OBJECTIVES.get(entry.method))


def test_every_switch_is_shown_in_a_snippet() -> None:
    shown = {key for snippet in SNIPPETS for entry in yaml.safe_load(snippet)["unlearn"] for key in entry}
    assert set(UnlearnConfig.model_fields) - ELSEWHERE == shown


def test_every_objective_and_parameter_has_a_row(docs: ModuleType) -> None:
    rows = [line for line in docs.table("objectives").splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == OBJECTIVES.names()
    parameters = re.findall(r"^\| `(\w+)` \| `(\w+)`", docs.table("parameters"), flags=re.MULTILINE)
    declared: list[Any] = [cls for _, cls in OBJECTIVES.items()]
    assert parameters == [(cls.about.name, field.name) for cls in declared for field in dataclasses.fields(cls)]
    assert ("rmu", "layer") in parameters


def cells(table: str, name: str) -> dict[str, str]:
    """The row of an objective by header."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")]
    row = next(line for line in lines if line[0].strip() == f"`{name}`")
    return {header.strip(): cell.strip() for header, cell in zip(lines[0], row, strict=True)}


def test_costs_come_from_the_measured_file(docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {
        "command": "python x",
        "model": "tiny",
        "against": "a step",
        "time": "time",
        "device": "cpu",
        "objectives": {
            "npo": {"ratio": 1.96, "trainings": 1},
            "negmerge": {"ratio": 1.0, "trainings": 3},
        },
    }
    file = tmp_path / "cost.json"
    monkeypatch.setattr(docs, "COSTS", file)
    assert cells(docs.table("objectives"), "npo")["cost"] == "–"
    file.write_text(json.dumps(found), encoding="utf-8")
    table = docs.table("objectives")
    assert cells(table, "npo")["cost"] == "2.0"
    assert cells(table, "npo")["paper"] == "[2404.05868](https://arxiv.org/abs/2404.05868)"
    assert cells(table, "negmerge")["cost"] == "1.0 × 3 trainings"
    assert cells(table, "rmu")["cost"] == "–"
    assert "`python x`" in table


def test_measured_costs_are_of_objectives_that_exist(docs: ModuleType) -> None:
    measured = json.loads(docs.COSTS.read_text(encoding="utf-8"))
    assert set(measured["objectives"]) <= set(OBJECTIVES.names())
    assert all(0 < found["ratio"] < 100 for found in measured["objectives"].values())
