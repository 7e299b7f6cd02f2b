"""`expunge runs`: many runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import Json, console, number, print_json, say, table


def runs(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="FOLDER", help="default: runs")] = None,
    metric: Annotated[str, typer.Option("--metric", help="the number that is shown")] = "extraction_strength",
    json_: Json = False,
) -> None:
    """List runs, newest first, with one metric on forget and retain rows before and after."""
    from expunge.runs.catalogue import main_numbers

    places = folders or [Path("runs")]
    rows = main_numbers(places, metric)
    if json_:
        print_json([{**row, "started": row["started"] and f"{row['started'].isoformat()}Z"} for row in rows])
        return
    if not rows:
        say(f"no runs in {', '.join(map(str, places))}")
        return
    headers = ["run", "status", "started (UTC)", "model", "method", "forget ↓", "reference", "retain ↑"]
    console().print(table(headers, [_cells(row) for row in rows], right=headers[5:]))
    say(f"{metric}: target → result")


def _cells(row: dict[str, object]) -> list[str]:
    def change(split: str) -> str:
        before, after = row[f"{split}_before"], row[f"{split}_after"]
        return number(after) if before is None else f"{number(before)} → {number(after)}"  # type: ignore[arg-type]

    started = str(row["started"] or "–")[:16]
    methods = ", ".join(dict.fromkeys(row["methods"] or []))  # type: ignore[call-overload]
    shown = [str(row["path"]), str(row["status"]), started, str(row["model"] or "–"), methods]
    return [*shown, change("forget"), number(row["forget_reference"]), change("retain")]  # type: ignore[arg-type]
