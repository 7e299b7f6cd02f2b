"""docs/localization.md: its commands parse, its tables are whole, its recipe is valid, its attribution runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from expunge import api
from expunge.localize.base import ATTRIBUTIONS
from expunge.recipe import Unit, load_recipe
from test_readme import ROOT, blocks_in, imported
from test_setup import docs_tool

pytestmark = pytest.mark.usefixtures("quick_disk")

TEXT = (ROOT / "docs" / "localization.md").read_text(encoding="utf-8")
ROWS = {name: str(ROOT / "examples" / f"{name}.jsonl") for name in ("forget", "retain")}


def test_the_tables_are_those_of_the_registry() -> None:
    assert docs_tool().filled(TEXT) == TEXT
    declared = [
        (name, label.removeprefix("parameter "))
        for name, entry in ATTRIBUTIONS.items()
        for label in entry.describe()
        if label.startswith("parameter ")
    ]
    assert re.findall(r"^\| `(\w+)` \| `(\w+)` \|", TEXT, flags=re.MULTILINE) == declared
    assert set(ATTRIBUTIONS.names()) <= set(re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE))
    assert set(get_args(Unit)) <= set(re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE))


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    (snippet,) = blocks_in(TEXT, "yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: tiny\ndata: {{benchmark: fictitious}}\nunlearn: [{{}}]\n{snippet}", encoding="utf-8")
    localize = load_recipe(file).localize
    assert localize is not None
    assert ATTRIBUTIONS.get(localize.by).about.needs == ("forget",)


def test_the_attribution_of_one_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks_in(TEXT, "python")
    with imported(code, tmp_path, monkeypatch, ATTRIBUTIONS):
        made = api.localize("tiny", **ROWS, by="steepness", limit=2, output=tmp_path / "m.safetensors", quiet=True)
        assert made.parameters == {"epsilon": 1e-3}
        assert made.rows["forget"].rows == 2
        assert set(made.rows) == {"forget"}
