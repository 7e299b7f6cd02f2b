"""`expunge run`: what a recipe says."""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.common import DryRun, Output, Overrides, close, print_plan


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file (write one with: expunge init)")],
    output: Output = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe: prepare, unlearn, merge, evaluate, report. Run again, it does only what is not done yet."""
    from expunge import api

    if dry_run:
        print_plan(api.plan(recipe, output=output, overrides=set_ or []))
        return
    close(api.run(recipe, output=output, overrides=set_ or []))
