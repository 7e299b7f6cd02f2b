"""The commented recipe: it loads as it stands, and every line of it can be switched on."""

from __future__ import annotations

from pathlib import Path

import pytest

from expunge.cli.app import main
from expunge.cli.commented import commented_recipe
from expunge.recipe import Recipe, load_recipe

TEXT = commented_recipe()
LINES = TEXT.splitlines()
#: what the file says besides fields
PROSE = [number for number, line in enumerate(LINES) if line.startswith(("# A recipe", "# Check it"))]
#: number → the comment that would become YAML
OFF = {n: line for n, line in enumerate(LINES) if line.lstrip().startswith("#") and n not in PROSE}


def switched_on(numbers) -> str:
    """The file without the first "# " of these lines."""
    return "\n".join(line.replace("# ", "", 1) if n in numbers else line for n, line in enumerate(LINES))


def load(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml")


def indent(line: str) -> int:
    """Column of the key behind "# "."""
    return len(line) - len(line.lstrip("# "))


def block(number: int) -> list[int]:
    """A switched-off line, and those below it that belong to it."""
    inner = []
    for n in range(number + 1, len(LINES)):
        if n not in OFF or indent(LINES[n]) <= indent(LINES[number]):
            break
        inner.append(n)
    return [number, *inner]


def test_it_loads_as_it_stands_and_is_the_default(tmp_path):
    recipe = load(tmp_path, TEXT)
    small = {"name": "my-run", "model": "smollm2-135m", "data": {"forget": "forget.jsonl", "retain": "retain.jsonl"}}
    assert recipe == load_recipe({**small, "unlearn": [{"lora": 16}]})


def test_every_field_of_the_recipe_is_in_it():
    def names(model):
        for name, field in model.model_fields.items():
            yield name, field.description

    for name, description in names(Recipe):
        assert f"{name}:" in TEXT
        assert not description or description in TEXT


@pytest.mark.parametrize("number", [n for n, line in OFF.items() if not line.startswith("#   ")])
def test_every_comment_becomes_yaml(tmp_path, number):
    """One comment at a time (with the lines that belong to it) gives another recipe that is valid."""
    key = LINES[number].split("#")[1].split(":")[0].strip()
    parent = [n for n in OFF if n < number and number in block(n)]
    text = switched_on({*block(number), *(n for n in parent if indent(LINES[n]) < indent(LINES[number]))})
    if key in ("folder", "documents"):  # they are about a benchmark
        text = text.replace("  # benchmark: ", "  benchmark: ")
    if key in ("benchmark", "folder", "documents"):  # it stands instead of files
        text = text.replace("  forget: forget.jsonl", "").replace("  retain: retain.jsonl", "")
    recipe = load(tmp_path, text)
    assert recipe != load(tmp_path, TEXT) or key in ("retain",)


def test_init_writes_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert Path("recipe.yaml").read_text() == TEXT
    assert "expunge run recipe.yaml --dry-run" in capsys.readouterr().err
    Path("recipe.yaml").write_text("mine")
    assert main(["init"]) == 2
    assert "recipe.yaml exists already" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == "mine"
    assert main(["init", "-o", "other.yaml"]) == 0
    assert main(["init", "-o", "-"]) == 0
    assert capsys.readouterr().out == TEXT
