"""`expunge report RUN`: write the page of a run anew from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="run directory (expunge runs lists them)")]) -> None:
    """Write report.html from the files of a run directory; no model is loaded."""
    from rich.console import Console

    from expunge.report.build import build_report
    from expunge.report.terminal import closing_table

    path = build_report(run)
    Console().print(closing_table(run))
    typer.echo(f"report: {path}")
