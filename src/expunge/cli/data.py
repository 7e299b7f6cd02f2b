"""`expunge data check`: is a file of rows usable, and what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.common import Command, Json, only_stderr, print_json, say

if TYPE_CHECKING:
    from expunge.data.check import CheckReport

app = typer.Typer()

_LONGEST = 160  # characters of a prompt or answer that are shown


@app.callback()
def _data() -> None:
    """Look at files of rows before they are used."""


@app.command(cls=Command)
def check(
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="a file, or a hub dataset such as locuslab/TOFU:forget10")
    ],
    format: Annotated[
        str | None, typer.Option("--format", help="see: expunge list formats; sniffed when absent")
    ] = None,
    json_: Json = False,
) -> None:
    """Read every row and say all that is wrong with the file. Exit code 2 if a row can't be used."""
    from expunge.data.check import check as examine

    with only_stderr(json_):
        report = examine(path, format)
    if json_:
        print_json(report.as_dict())
    else:
        for line in _lines(report):
            print(line)
        for problem in report.errors:
            say(f"error: {problem}")
        if report.bad_rows > len(report.errors):
            say(f"error: … and {report.bad_rows - len(report.errors)} further rows")
        if report.errors and report.hint:
            say(f"hint: {report.hint}")
    if not report.ok:
        raise typer.Exit(2)


def _lines(report: CheckReport) -> list[str]:
    usable = f"{report.good_rows} of {report.rows} rows" if report.rows else "no row"
    lines = [f"{report.path}: {usable} can be used"]
    lines.append(f"format: {report.format or 'unknown'} (columns: {', '.join(report.columns) or 'none'})")
    for name, spread in report.lengths.items():
        middle = f"median {spread.median:g}, 95% at most {spread.p95:g}"
        lines.append(f"{name}: {spread.least} to {spread.most} {spread.unit} ({middle})")
    if report.tasks:
        lines.append("tasks: " + ", ".join(f"{name} {count}" for name, count in report.tasks.items()))
    optional = [] if report.entities is None else [f"entities ({report.entities} of {report.good_rows} rows)"]
    optional += [f"{name} (other answers: {rows} rows)" for name, rows in report.alternatives.items()]
    if optional:
        lines.append("optional columns: " + ", ".join(optional))
    if report.duplicates:
        lines.append(f"repeated rows: {report.duplicates} (first: {report.duplicate_places[0]})")
    for example in report.examples:
        lines.append(f"  {example.source}")
        if not example.is_text:
            lines.append(f"    prompt: {_short(example.prompt)}")
        lines.append(f"    {'text' if example.is_text else 'answer'}: {_short(example.answer)}")
    return lines


def _short(text: str) -> str:
    """One line of printable characters: what stands in a file must not steer the terminal."""
    flat = "".join(char if char.isprintable() else " " for char in text)
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"
