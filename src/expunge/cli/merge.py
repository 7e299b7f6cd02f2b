"""`expunge merge`: several models that share a base become one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.common import Json, only_stderr, print_json
from expunge.errors import UserError


def merge(
    models: Annotated[list[str], typer.Argument(help="checkpoint folders, adapter folders, hub ids or aliases")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the merged checkpoint")],
    base: Annotated[str | None, typer.Option("--base", help="model that the others were trained from")] = None,
    method: Annotated[str, typer.Option("--method", help="see: expunge list merges")] = "ties",
    density: Annotated[
        str, typer.Option("--density", help="part of each difference that is kept: 0.8 or 0.8,0.6")
    ] = "0.8",
    weights: Annotated[
        str | None, typer.Option("--weights", help="one per model, e.g. 1,0.5; 1 each by default")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a parameter of the method, e.g. scale=0.9")] = None,
    json_: Json = False,
) -> None:
    """Merge checkpoints or LoRA adapters into one checkpoint."""
    from expunge.merging.run import merge_models
    from expunge.recipe import parse_overrides

    with only_stderr(json_), _bar() as progress:
        result = merge_models(
            models,
            output,
            base=base,
            method=method,
            weights=None if weights is None else _numbers(weights, "--weights"),
            density=_one_or_many(_numbers(density, "--density")),
            parameters=parse_overrides(set_ or []),
            progress=progress,
        )
    statistics = result.statistics
    if json_:
        print_json(result)
        return
    typer.echo(f"wrote {result.path}: {result.tensors} tensors in {result.seconds:.1f} s")
    for model, norm in zip(models, statistics["delta_norms"], strict=True):
        typer.echo(f"  norm of the difference {norm:10.4g}  {model}")
    typer.echo(f"  norm of the difference {statistics['merged_norm']:10.4g}  merged")
    if statistics["cosine_to_mean"] is not None:
        typer.echo(f"  cosine of the merged difference to the mean of all: {statistics['cosine_to_mean']:.3f}")
    if statistics["sign_conflict"] is not None and len(models) > 1:
        typer.echo(f"  changed weights that the models pull in opposite directions: {statistics['sign_conflict']:.1%}")


class _bar:
    """Context manager: a progress bar on stderr, as the callback that `merge_models` wants."""

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("merging"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = self._progress.add_task("merging", total=None)
        self._progress.start()

        def advance(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        return advance

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text} is not a list of numbers", f"for instance: {option} 1,0.5") from None


def _one_or_many(numbers: list[float]) -> float | list[float]:
    return numbers[0] if len(numbers) == 1 else numbers
