"""`expunge report FOLDER`: write the page of a run, study, evaluation, attack, calibration, audit or mask again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="what a command wrote with -o (expunge runs lists the runs)")],
) -> None:
    """Write report.html from the files of a folder; no model is loaded."""
    from rich.console import Console

    from expunge.report.pages import build_page

    path, answer = build_page(folder)
    if answer:
        typer.echo(answer)
    else:
        from expunge.report.terminal import closing_table

        Console().print(closing_table(folder))
    typer.echo(f"report: {path}")
