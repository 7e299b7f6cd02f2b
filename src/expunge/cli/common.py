"""What several commands share: options, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from expunge.api import Plan
    from expunge.pipeline.run import RunResult

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="change one field of the recipe; may be given several times"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything and say what would be done; train nothing")]
Json = Annotated[bool, typer.Option("--json", help="print JSON on stdout, and nothing else there")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="folder of the run", show_default=False)]
Template = Annotated[str, typer.Option("--template", help="auto, chat, raw, or text with {prompt} and {answer}")]
Reference = Annotated[str | None, typer.Option("--reference", help="a model that never saw the forget rows")]
Retain = Annotated[str | None, typer.Option("--retain", help="rows to keep", show_default=False)]
Forget = Annotated[str | None, typer.Option("--forget", help="rows that the model should not know")]
Holdout = Annotated[str | None, typer.Option("--holdout", help="rows that no model was trained on")]
Target = Annotated[str | None, typer.Option("--target", help="the model before unlearning")]
Attacks = Annotated[str | None, typer.Option("--attacks", help="names, e.g. relearn,quantize (expunge list attacks)")]
AttackSuite = Annotated[
    str | None, typer.Option("--suite", help="quick, standard or full: which attacks; standard when absent")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="rows of each split but forget that are measured under attack")
]
Benchmark = Annotated[
    str | None, typer.Option("--benchmark", help="rows of a benchmark, e.g. tofu:forget10 (expunge list benchmarks)")
]
DataFolder = Annotated[
    str | None, typer.Option("--data-dir", help="local files of the benchmark; its hub datasets when absent")
]
Suite = Annotated[str | None, typer.Option("--suite", help="quick, standard or full: how many passes are made")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="accept .bin weights, which can run code")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the checkpoint")]

_WIDE = 160  # columns where no terminal says how many it has: tables in files and pipes are not squeezed


class Command(TyperCommand):
    """A command that says when an option was given twice: the last value counts, and the others are lost."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, with a note on stderr."""
        given = self.make_parser(ctx).parse_args(args=list(args))[2]
        for option in dict.fromkeys(given):
            may_repeat = option.param_type_name == "argument" or option.multiple or getattr(option, "is_flag", False)
            if not may_repeat and given.count(option) > 1:
                say(f"note: {option.opts[0]} is given {given.count(option)} times; the last one counts")
        return super().parse_args(ctx, args)


def listed(names: str | None) -> list[str] | None:
    """Names that are parted by commas; None where none are given."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def console(stderr: bool = False) -> Console:
    """A rich console that takes text as it is (no markup, no colouring of numbers)."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _WIDE, markup=False, highlight=False, emoji=False)


def say(text: str) -> None:
    """A note for people, on stderr."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """`value` as the only thing on stdout; NaN becomes null."""
    from expunge.runs.atomic import plain

    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


@contextmanager
def only_stderr(active: bool = True) -> Iterator[None]:
    """While work is done for --json, whatever libraries print goes to stderr."""
    if not active:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """A plain table; columns named in `right` are aligned right. Cells are text, never markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        drawn.add_column(Text(header), justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def records_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Records of metrics.json as a table: a row per split and metric, a column per model."""
    arrows = {"lower": "↓", "higher": "↑"}
    variants = list(dict.fromkeys(entry["variant"] for entry in records))
    found = {(entry["split"], entry["metric"], entry["variant"]): entry for entry in records}
    rows = []
    for split, metric in dict.fromkeys((split, metric) for split, metric, _ in found):
        mine = [found.get((split, metric, variant)) for variant in variants]
        known = [entry for entry in mine if entry is not None]
        counts = dict.fromkeys(f"{e['n']}" + (f" (+{e['unscored']} unscored)" if e["unscored"] else "") for e in known)
        cells = [split, metric, arrows.get(known[0]["direction"], "")]
        rows.append([*cells, *map(_measured, mine), " / ".join(counts)])
    return table(["split", "metric", "", *variants, "n"], rows, right=[*variants, "n"])


def _measured(entry: Mapping[str, Any] | None) -> str:
    """Value and interval, and where it stands between reference (0) and target (1) if it is far below the reference."""
    if entry is None or entry["value"] is None:
        return "–"
    interval = "" if entry["ci_low"] is None else f" [{number(entry['ci_low'])}, {number(entry['ci_high'])}]"
    over = f" over-unlearned ({number(entry['anchored'], 2)})" if entry.get("over_unlearned") else ""
    return f"{number(entry['value'])}{interval}{over}"


def aggregates_table(aggregates: Sequence[Mapping[str, Any]]) -> Table:
    """The official numbers of a benchmark as a table."""
    rows = []
    for entry in aggregates:
        whose = entry["convention"] if entry["official"] else f"{entry['convention']}, not official"
        rows.append([entry["variant"], entry["benchmark"], entry["name"], number(entry["value"]), whose, entry["note"]])
    return table(["variant", "benchmark", "number", "value", "convention", "note"], rows, right=["value"])


def print_plan(plan: Plan) -> None:
    """What a run would do, a line per stage."""
    for line in plan.lines():
        print(line)


def close(result: RunResult) -> None:
    """The last lines of a run: the table, whether anything had to be done, and where the report is."""
    from expunge.pipeline.processes import process_rank

    if process_rank() != 0:  # one process speaks
        return
    from expunge.report.terminal import closing_table

    if result.skipped_all:
        say(f"everything in {result.path} was done already; nothing was run again")
    out = console()
    out.print(closing_table(result.path))
    print(f"report: {result.report}")
