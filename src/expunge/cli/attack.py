"""`expunge attack`: what comes back when somebody tries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.common import (
    AllowPickle,
    Attacks,
    AttackSuite,
    Benchmark,
    DataFolder,
    Forget,
    Holdout,
    Json,
    Limit,
    Overrides,
    Reference,
    Retain,
    Target,
    Template,
    TrustRemoteCode,
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

    from expunge.report.attack_record import AttackRecord, Estimate


def attack(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder, hub id, .gguf file or alias")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder of the tables and of attack.json; resumed if it was begun")
    ],
    forget: Forget = None,
    retain: Retain = None,
    holdout: Holdout = None,
    target: Target = None,
    reference: Reference = None,
    attacks: Attacks = None,
    benchmark: Benchmark = None,
    folder: DataFolder = None,
    suite: AttackSuite = None,
    limit: Limit = None,
    template: Template = "auto",
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Attack a model, and a reference beside it: what comes back beyond what the reference shows too?

    Settings of attacks: --set attacks.relearn.steps=80
    """
    from expunge import api

    flags = {"model.allow_pickle": allow_pickle, "model.trust_remote_code": trust_remote_code}
    overrides = [f"{key}=true" for key, given in flags.items() if given]
    with only_stderr(json_):
        record = api.attack(
            model,
            output=output,
            forget=forget,
            retain=retain,
            holdout=holdout,
            target=target,
            reference=reference,
            attacks=listed(attacks),
            benchmark=benchmark,
            folder=folder,
            suite=suite,
            template=template,
            limit=limit,
            overrides=[*overrides, *(set_ or [])],
        )
    if json_:
        print_json(record.to_json())
        return
    console().print(points_table(record))
    for entry in record.left_out:
        place = "".join(f" {part}" for part in (entry.point, entry.subject and f"({entry.subject})") if part)
        say(f"left out: {entry.attack}{place}: {entry.reason}")
    for note in record.notes:
        say(f"note: {note}")
    for result in record.attacks:
        say(f"{result.name}: robust: {result.verdict} ({result.reason})")
    print(f"robust: {record.verdict} ({record.reason})")
    say(f"report: {output / 'report.html'}")


def points_table(record: AttackRecord) -> Table:
    """Strength of every subject at every point, and the margin over the reference."""
    subjects = list(record.subjects)
    rows = []
    for result in record.attacks:
        for point in (result.before, *result.points):
            strengths = [number(point.strengths[name].value if name in point.strengths else None) for name in subjects]
            said = "" if point is result.before else f"{point.verdict}"
            said += " (uninformative)" if point.informative is False else ""
            margin = number(None if point.margin is None else point.margin.value)
            cells = [result.name, point.label, f"{point.budget:g}", *strengths, margin, _interval(point.margin)]
            rows.append([*cells, str(point.rows.get("forget", 0)), said])
    headers = ["attack", "point", "budget", *subjects, "margin", "95% CI", "rows", "robust"]
    return table(headers, rows, right=["budget", *subjects, "margin", "95% CI", "rows"])


def _interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.3f} … {estimate.high:.3f}"
