"""docs/metrics.md, attacks.md, benchmarks.md and the design pages: commands parse, snippets run, tables are whole."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from expunge import api
from expunge.attacks.base import ATTACKS, build_attack
from expunge.data.registry import BENCHMARKS
from expunge.metrics.base import METRICS
from expunge.recipe import load_recipe, parse_overrides
from expunge.recipe.conventions import CONVENTIONS, EXPUNGE
from expunge.scoring.tables import RECORD_KEYS, TABLES
from test_readme import ROOT, blocks_in, commands_in, imported
from test_setup import docs_tool

pytestmark = pytest.mark.usefixtures("quick_disk")

PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in (
        "metrics",
        "attacks",
        "benchmarks",
        "design/examination",
        "design/calibration",
        "design/search",
    )
}
ROWS = {name: str(ROOT / "examples" / f"{name}.jsonl") for name in ("forget", "retain")}


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    """scripts/generate_docs.py as a module."""
    module: ModuleType = docs_tool()
    return module


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    here = ROOT / "docs" / f"{page}.md"
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[\w-]+)?\)", PAGES[page]):
        assert not target or (here.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([\w-]+)\)", PAGES[page]):
        text = (here.parent / target if target else here).read_text(encoding="utf-8")
        heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads], anchor


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page: str) -> None:
    for path in re.findall(r"\b(?:tests|src/expunge)/[\w/]+(?:\.py)?", PAGES[page].replace("NAME.py", "")):
        assert (ROOT / path).exists(), path


def test_the_pages_know_every_leaf() -> None:
    assert [name for name in METRICS.names() if f"| `{name}` |" not in PAGES["metrics"]] == []
    assert [name for name in CONVENTIONS if f"**`{name}`**" not in PAGES["metrics"]] == [EXPUNGE.name]
    assert [key for key in RECORD_KEYS[3:] if f"`{key}`" not in PAGES["metrics"]] == []
    text = PAGES["attacks"].partition("## What each one does")[2]
    told = [*re.findall(r"`(\w+)`", text), *re.findall(r"^- `(\w+)`", PAGES["attacks"], flags=re.MULTILINE)]
    assert set(ATTACKS.names()) <= set(told)
    headings = re.findall(r"^## (\w+)", PAGES["benchmarks"], flags=re.MULTILINE)
    assert {name.lower() for name in BENCHMARKS.names()} <= {heading.lower() for heading in headings}


def test_every_metric_stands_behind_one_table(docs: ModuleType) -> None:
    rows = [line.split("|")[1:-1] for line in docs.table("tables").splitlines()[2:]]
    assert {row[0].strip(" `"): row[1].strip() for row in rows} == TABLES
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[2])) == METRICS.names()
    assert all(METRICS.get(name).suite == row[1].strip() for row in rows for name in re.findall(r"`(\w+)`", row[2]))


@pytest.mark.parametrize("kind", ["conventions", "tables", "choices", "attack-parameters", "studies"])
def test_every_row_of_a_table_has_every_column(docs: ModuleType, kind: str) -> None:
    assert len({len(split_cells(line)) for line in docs.table(kind).splitlines()}) == 1


def test_choices_are_bold_where_they_are_not_the_default(docs: ModuleType) -> None:
    rows = {cells[1].strip(" `"): cells[2:-1] for cells in map(split_cells, docs.table("choices").splitlines()[2:])}
    for name, cells in rows.items():
        for convention, cell in zip(CONVENTIONS.values(), cells, strict=True):
            assert ("**" in cell) == (getattr(convention, name) != getattr(EXPUNGE, name)), (name, convention.name)


def split_cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)


def test_every_setting_of_an_attack_has_a_row(docs: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`", docs.table("attack-parameters"), flags=re.MULTILINE)
    declared = [
        (name, label.removeprefix("parameter "))
        for name, entry in ATTACKS.items()
        for label in entry.describe()
        if label.startswith("parameter ")
    ]
    assert rows == declared


def test_the_metric_of_one_file_reads_tables_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metric, reader = blocks_in(PAGES["metrics"], "python")
    small = ["evaluate.generate=null", "evaluate.bootstrap=100"]
    api.evaluate("tiny", **ROWS, overrides=small, output=tmp_path / "exam", quiet=True)
    monkeypatch.chdir(tmp_path)
    with imported(metric, tmp_path, monkeypatch, METRICS):
        capsys.readouterr()
        exec(compile(reader, "docs/metrics.md", "exec"), {})
        value, low, high, n = map(float, capsys.readouterr().out.split())
    assert 0 <= low <= value <= high <= 1
    assert n == 10


def test_the_attack_of_one_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks_in(PAGES["attacks"], "python")
    with imported(code, tmp_path, monkeypatch, ATTACKS):
        record = api.attack(
            "tiny",
            **ROWS,
            reference="tiny",
            attacks=["shout"],
            limit=2,
            overrides=["attacks.shout.marks=[1,9]", "evaluate.bootstrap=100", "evaluate.metrics=[extraction_strength]"],
            output=tmp_path / "attacked",
            quiet=True,
        )
    (result,) = record.attacks
    assert [(point.label, point.budget) for point in result.points] == [("1marks", 1), ("9marks", 9)]
    assert all(point.margin is not None and point.margin.value == 0 for point in result.points)  # the same model twice
    assert all(point.rows["forget"] == 10 for point in result.points)


def overrides_in(command: str) -> list[str]:
    words = shlex.split(command)
    return [after for word, after in pairwise(words) if word == "--set"]


@pytest.mark.parametrize("command", [c for text in PAGES.values() for c in commands_in(text) if overrides_in(c)])
def test_every_setting_of_a_command_is_one(command: str) -> None:
    of_attacks = [given for given in overrides_in(command) if given.startswith("attacks.")]
    others = [given for given in overrides_in(command) if given not in of_attacks]
    whole = {"name": "x", "model": "tiny", "data": {"benchmark": "fictitious"}, "unlearn": [{}]}
    assert not others or load_recipe(whole, overrides=others) != load_recipe(whole)
    for key, value in parse_overrides(of_attacks).items():
        _, name, setting = key.split(".")
        if name in ATTACKS:  # the others are the reader's own
            assert setting in vars(build_attack(name, {setting: value}))


@pytest.mark.parametrize("name", [name for name in BENCHMARKS.names() if name != "fictitious"])
def test_every_benchmark_has_a_command(name: str) -> None:
    assert re.search(rf"^expunge eval .*--benchmark \"?{name}[: ]", PAGES["benchmarks"], flags=re.MULTILINE)
