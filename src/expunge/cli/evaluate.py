"""`expunge eval`: what a model still knows of some rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import (
    AllowPickle,
    Benchmark,
    DataFolder,
    Forget,
    Holdout,
    Json,
    Overrides,
    Reference,
    Retain,
    Suite,
    Target,
    Template,
    TrustRemoteCode,
    aggregates_table,
    console,
    only_stderr,
    print_json,
    records_table,
    say,
)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder, hub id, .gguf file or alias")],
    forget: Forget = None,
    retain: Retain = None,
    holdout: Holdout = None,
    reference: Reference = None,
    target: Target = None,
    benchmark: Benchmark = None,
    folder: DataFolder = None,
    suite: Suite = None,
    convention: Annotated[
        str | None, typer.Option("--convention", help="how public scorers count (expunge list conventions)")
    ] = None,
    template: Template = "auto",
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    set_: Overrides = None,
    json_: Json = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="keep scores and metrics in this folder", show_default=False)
    ] = None,
) -> None:
    """Measure what a model knows of forget and retain rows, beside other models if they are given."""
    from expunge import api

    flags = {"model.allow_pickle": allow_pickle, "model.trust_remote_code": trust_remote_code}
    overrides = [f"{key}=true" for key, given in flags.items() if given]
    overrides += [f"evaluate.convention={convention}"] if convention else []
    with only_stderr(json_):
        found = api.evaluate(
            model,
            forget=forget,
            retain=retain,
            holdout=holdout,
            reference=reference,
            target=target,
            benchmark=benchmark,
            folder=folder,
            suite=suite,
            template=template,
            overrides=[*overrides, *(set_ or [])],
            output=output,
        )
    from expunge.pipeline.processes import process_rank

    if process_rank() != 0:  # one process speaks
        return
    if json_:
        print_json(vars(found))
        return
    console().print(records_table(found.records))
    if found.aggregates:
        console().print(aggregates_table(found.aggregates))
    for name, reason in found.left_out.items():
        say(f"left out: {name} ({reason})")
    if output is not None:
        say(f"report: {output / 'report.html'}")
