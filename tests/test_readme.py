"""What the README tells people to type is valid, and its Python runs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from expunge.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^expunge (?:.*?)(?=\s+#|$)", TEXT, flags=re.MULTILINE)))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    context = group.make_context("expunge", arguments)  # type: ignore[attr-defined]
    while context._protected_args or context.args:
        name, found, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None, name
        context = found.make_context(name, rest, parent=context)
        if not hasattr(context.command, "resolve_command"):
            break
    assert context.command.callback is not None


def test_the_python_runs_in_eight_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in blocks("python") if "expunge.api" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_the_method_of_one_file_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.methods.base import OBJECTIVES, build_objective
    from expunge.pipeline.training import Job, train
    from expunge.recipe import ModelConfig, TrainConfig
    from training_rows import rows

    code = next(block for block in blocks("python") if "@objective" in block)
    try:
        (tmp_path / "method_of_the_readme.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.import_module("method_of_the_readme")
        settings = TrainConfig(max_steps=3, lr=1e-3, batch_size=4, precision="float32")
        losses: list[float] = []
        objective = build_objective("weighted_ascent", {"beta": 0.0})  # plain ascent
        job = Job(ModelConfig(id="tiny"), rows(4, 1), settings, 0, forget=rows(4, 2), objective=objective)
        train(job, tmp_path, on_step=lambda step, terms: losses.append(terms["forget"]))
        assert losses[-1] < losses[0]
    finally:
        OBJECTIVES._entries.pop("weighted_ascent", None)
