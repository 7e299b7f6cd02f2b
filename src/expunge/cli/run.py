"""`expunge run`: what a recipe says."""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.common import Output, Overrides, close


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file (write one with: expunge init)")],
    output: Output = None,
    set_: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything and say what would be done")] = False,
) -> None:
    """Run a recipe: prepare, unlearn, merge, evaluate, report. Run again, it does only what is not done yet."""
    from expunge import api

    if dry_run:
        for line in api.plan(recipe, output=output, overrides=set_ or []).lines():
            print(line)
        return
    close(api.run(recipe, output=output, overrides=set_ or []))
