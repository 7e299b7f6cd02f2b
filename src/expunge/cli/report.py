"""`expunge report RUN`: write the page of a run anew from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="run directory (expunge runs lists them)")]) -> None:
    """Write report.html from the files of a run directory; no model is loaded."""
    from rich.console import Console

    from expunge.report.build import build_report
    from expunge.report.studies import build_study_report
    from expunge.report.study_document import holds_study, read_study
    from expunge.report.terminal import closing_table

    if holds_study(run):
        path = build_study_report(run)
        typer.echo(read_study(run).answer)
    else:
        path = build_report(run)
        Console().print(closing_table(run))
    typer.echo(f"report: {path}")
