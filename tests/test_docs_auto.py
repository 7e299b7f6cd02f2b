"""docs/auto.md: its commands parse, and its example is the recipe that it says."""

from __future__ import annotations

from expunge.methods.base import OBJECTIVES
from expunge.pipeline.auto import NAME
from expunge.recipe import load_recipe
from test_readme import ROOT

TEXT = (ROOT / "docs" / "auto.md").read_text(encoding="utf-8")


def test_the_example_says_auto_and_nothing_else() -> None:
    (entry,) = load_recipe(ROOT / "examples" / "auto.yaml").unlearn
    assert entry.model_dump(exclude_unset=True) == {"method": NAME}


def test_every_published_objective_stands_in_the_table() -> None:
    rows = {line.split("|")[1].strip().strip("`") for line in TEXT.splitlines() if line.startswith("| `")}
    published = {name for name, _ in OBJECTIVES.items()} - {"erase"}
    assert published <= rows, sorted(published - rows)
