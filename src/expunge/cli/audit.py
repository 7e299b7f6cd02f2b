"""`expunge audit`: which metrics can be trusted, over a zoo of checkpoints under attack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.common import (
    Attacks,
    AttackSuite,
    Benchmark,
    DataFolder,
    Forget,
    Holdout,
    Json,
    Limit,
    Overrides,
    Retain,
    Template,
    console,
    listed,
    number,
    only_stderr,
    print_json,
    say,
    table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.report.document import Document


def audit(
    zoo: Annotated[list[str], typer.Argument(metavar="MODEL...", help="unlearned checkpoints, or NAME=MODEL")],
    target: Annotated[str, typer.Option("--target", help="the model before unlearning")],
    reference: Annotated[str, typer.Option("--reference", help="a model that never saw the forget rows")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the audit; resumed if it was begun")],
    knows: Annotated[
        list[str] | None, typer.Option("--knows", help="a further model that holds the knowledge; several times")
    ] = None,
    lacks: Annotated[
        list[str] | None, typer.Option("--lacks", help="a further model that never did; several times")
    ] = None,
    forget: Forget = None,
    retain: Retain = None,
    holdout: Holdout = None,
    attacks: Attacks = None,
    benchmark: Benchmark = None,
    folder: DataFolder = None,
    suite: AttackSuite = None,
    limit: Limit = None,
    template: Template = "auto",
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Rank metrics: what does each say of many checkpoints before and after attacks, and does it see the knowledge?"""
    from expunge import api

    with only_stderr(json_):
        document = api.audit(
            zoo,
            target=target,
            reference=reference,
            output=output,
            knows=knows or [],
            lacks=lacks or [],
            forget=forget,
            retain=retain,
            holdout=holdout,
            attacks=listed(attacks),
            benchmark=benchmark,
            folder=folder,
            suite=suite,
            limit=limit,
            template=template,
            overrides=set_ or [],
        )
    if json_:
        print_json(document.results)
        return
    console().print(ranking(document))
    for remark in document.remarks:
        say(f"note: {remark}")
    for what, reason in document.left_out.items():
        say(f"left out: {what}: {reason}")
    print(document.answer)
    print(f"report: {output / 'report.html'}")


def ranking(document: Document) -> Table:
    """Metrics, best first."""
    columns = ("order", "worst", "faithfulness", "relearning_symmetric", "quantization_symmetric", "overall")
    rows = [
        [entry["metric"], *(number(entry[name]) for name in columns), entry["worst_attack"]]
        for entry in document.results["ranking"]
    ]
    headers = ["metric", "order", "worst", "faithful", "relearning", "quantization", "overall", "worst under"]
    return table(headers, rows, right=headers[1:-1])
