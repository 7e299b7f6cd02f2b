"""What the README tells people to type is valid, and its Python runs."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import typer

from expunge.cli.app import app
from expunge.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_in(text: str) -> list[str]:
    """The commands of a page that call expunge, over lines that end in a backslash, without comments behind them."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return sorted(set(re.findall(r"^expunge (?:.*?)(?=\s+#|$)", joined, flags=re.MULTILINE)))


def blocks_in(text: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def parse(command: str) -> Any:
    """What a command would call, parsed down to its leaf and not run. Raises what the command line would."""
    arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    context = group.make_context("expunge", arguments)  # type: ignore[attr-defined]
    while context._protected_args or context.args:
        name, found, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None, name
        context = found.make_context(name, rest, parent=context)
        if not hasattr(context.command, "resolve_command"):
            break
    return context.command.callback


@contextmanager
def imported(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *registries: Registry[Any]) -> Iterator[None]:
    """Within it, `code` is an imported module, as that of a plugin; afterwards what it filed is gone."""
    before = [set(registry.names()) for registry in registries]
    name = f"page_{sha256(code.encode()).hexdigest()[:12]}"
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    try:
        importlib.import_module(name)
        yield
    finally:
        sys.modules.pop(name, None)
        for registry, known in zip(registries, before, strict=True):
            for added in set(registry.names()) - known:
                del registry._entries[added]


@pytest.mark.parametrize(
    ("page", "command"),
    [(page.name, command) for page in PAGES for command in commands_in(page.read_text(encoding="utf-8"))],
)
def test_every_command_of_every_page_parses(page: str, command: str) -> None:
    assert callable(parse(command)), page


def test_the_python_runs_in_eight_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in blocks_in(TEXT, "python") if "expunge.api" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def snippet(word: str) -> str:
    """The Python of the README that has a word in it."""
    return next(block for block in blocks_in(TEXT, "python") if word in block)


def test_the_method_of_one_file_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.methods.base import OBJECTIVES, build_objective
    from expunge.pipeline.training import Job, train
    from expunge.recipe import ModelConfig, TrainConfig
    from training_rows import rows

    with imported(snippet("@objective"), tmp_path, monkeypatch, OBJECTIVES):
        settings = TrainConfig(max_steps=3, lr=1e-3, batch_size=4, precision="float32")
        losses: list[float] = []
        objective = build_objective("weighted_ascent", {"beta": 0.0})  # plain ascent
        job = Job(ModelConfig(id="tiny"), rows(4, 1), settings, 0, forget=rows(4, 2), objective=objective)
        train(job, tmp_path, on_step=lambda step, terms: losses.append(terms["forget"]))
        assert losses[-1] < losses[0]


def test_the_metric_of_one_file_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.metrics.base import METRICS, Resampling, evaluate_metrics
    from metric_tables import scores_table, shelf

    with imported(snippet("@metric"), tmp_path, monkeypatch, METRICS):
        table = scores_table(("11", [-1.0, -3.0]), ("1", [-2.0]), ("", []))
        (record,), _ = evaluate_metrics(shelf(scores=table), "forget", ["surprise"], Resampling(100), "v", "s")
        assert (record["value"], record["n"], record["unscored"], record["direction"]) == (2.5, 2, 1, "higher")


def test_the_attack_of_one_file_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.attacks.base import ATTACKS, build_attack
    from expunge.data.example import Example

    with imported(snippet("@attack"), tmp_path, monkeypatch, ATTACKS):
        please: Any = build_attack("please", {})
        once, twice = please.points()
        (asked,) = please.rewrite(Example("a", "Who paints?", "Orla."), twice, None)
        assert (asked.prompt, asked.answer) == ("Please. Please. Who paints?", "Orla.")
        assert once.budget < twice.budget
