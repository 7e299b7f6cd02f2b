"""docs/merging.md: its commands parse, its recipes are valid, its method merges, and what it says to set exists."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch

from expunge.merging.plan import plan_merge
from expunge.merging.registry import MERGES
from expunge.merging.values import Values
from expunge.recipe import load_recipe, parse_overrides
from test_readme import blocks_in, commands_in, imported

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "merging.md").read_text(encoding="utf-8")
COMMANDS = commands_in(TEXT)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--method" in command])
def test_every_merge_has_a_valid_plan(command: str) -> None:
    words = shlex.split(command)[2:]
    models = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    given = dict(zip(words[len(models) :: 2], words[len(models) + 1 :: 2], strict=True))
    weights = [float(part) for part in given["--weights"].split(",")] if "--weights" in given else None
    parameters = parse_overrides([given["--set"]]) if "--set" in given else {}
    plan = plan_merge(given["--method"], len(models), weights, float(given.get("--density", 0.8)), parameters)
    assert parameters.items() <= dict(plan.parameters).items()
    assert weights is None or plan.weights.uniform == weights


@pytest.mark.parametrize("snippet", blocks_in(TEXT, "yaml"))
def test_every_snippet_is_a_valid_recipe(snippet: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    entries = "[{name: over, method: npo}, {name: under, method: grad_diff}]"
    rows = f"model: {{id: tiny}}\nprepare: {{}}\ndata: {{benchmark: fictitious}}\nunlearn: {entries}\n"
    file.write_text(rows + snippet, encoding="utf-8")
    merge = load_recipe(file).merge
    assert merge is not None
    plan_merge(merge.method, 2, merge.weights, merge.density, merge.parameters)


def test_the_values_of_the_python_fit_a_model_of_four_layers() -> None:
    (code,) = [block for block in blocks_in(TEXT, "python") if "merge_models" in block]
    found = re.search(r"weights=(\[.*\]),\n", code)
    assert found is not None
    values = Values.of("weights", ast.literal_eval(found[1]), 2, 1.0)
    names = [
        f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    values.check(names)
    assert values.at("model.layers.2.mlp.up_proj.weight", 4) == [1.0, 0.6]


def test_the_method_of_one_file_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in blocks_in(TEXT, "python") if "@merge" in block]
    with imported(code, tmp_path, monkeypatch, MERGES):
        plan = plan_merge("shrunk_mean", 2, parameters={"below": 0.5})
        merged = plan.merged([torch.tensor([1.0, 0.25]), torch.tensor([3.0, 0.25])], [1.0, 1.0], [1.0, 1.0])
        assert merged.tolist() == [2.0, 0.0]
        assert MERGES.get("shrunk_mean").describe()["parameters"] == "below=0.0001"
    assert "shrunk_mean" not in MERGES.names()


def test_what_peers_call_otherwise_can_be_set() -> None:
    rows = re.findall(r"^\| (?:mergekit|PEFT) .*? \| `(\w+)`(.*) \|$", TEXT, flags=re.MULTILINE)
    assert len(rows) >= 8
    for method, rest in rows:
        settings = [word for cell in re.findall(r"`([^`]*=[^`]*)`", rest) for word in cell.split()]
        MERGES.get(method).check(parse_overrides(settings))


def test_every_method_and_parameter_stands_in_a_table() -> None:
    for name, entry in MERGES.items():
        assert f"\n| `{name}` |" in TEXT
        for parameter in entry.parameters.model_fields:
            assert f"\n| `{parameter}` |" in TEXT
