"""`expunge localize`: which part of a model has most to do with the rows to forget, as a mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.common import (
    AllowPickle,
    Benchmark,
    DataFolder,
    Forget,
    Json,
    Overrides,
    Retain,
    Template,
    TrustRemoteCode,
    console,
    number,
    only_stderr,
    print_json,
    say,
    table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.report.localization_record import Agreement, Localization


By = Annotated[str | None, typer.Option("--by", help="an attribution (expunge list attributions); wagle when absent")]
Unit = Annotated[
    str | None,
    typer.Option("--unit", help="weight, value_vector, neuron, head, module or layer; value_vector when absent"),
]
Density = Annotated[float | None, typer.Option("--density", help="part of the units that is chosen; 0.1 when absent")]
Strata = Annotated[
    str | None, typer.Option("--strata", help="model, layer or tensor: where the density holds; model when absent")
]
Limit = Annotated[int | None, typer.Option("--limit", help="rows of each split that are read; all when absent")]
Against = Annotated[
    Path | None, typer.Option("--against", help="a mask of the known region, to compare with; oracle's answer")
]


def localize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder, hub id, .gguf file or alias")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="the mask, a .safetensors file; scores, record and page lie beside it"),
    ],
    forget: Forget = None,
    retain: Retain = None,
    by: By = None,
    unit: Unit = None,
    density: Density = None,
    strata: Strata = None,
    limit: Limit = None,
    against: Against = None,
    benchmark: Benchmark = None,
    folder: DataFolder = None,
    template: Template = "auto",
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Choose the part of a model that has most to do with the forget rows, and write it as a mask.

    Settings of the attribution: --set localize.parameters.KEY=VALUE. Unlearn inside it: expunge unlearn --mask MASK
    """
    from expunge import api
    from expunge.runs.provenance import typed_command

    flags = {"model.allow_pickle": allow_pickle or None, "model.trust_remote_code": trust_remote_code or None}
    given = {**flags, "seed": seed}.items()
    with only_stderr(json_):
        found = api.localize(
            model,
            output=output,
            forget=forget,
            retain=retain,
            benchmark=benchmark,
            folder=folder,
            template=template,
            overrides=[*(f"{key}={json.dumps(value)}" for key, value in given if value is not None), *(set_ or [])],
            command=typed_command(),
            by=by,
            unit=unit,
            density=density,
            strata=strata,
            limit=limit,
            against=None if against is None else str(against),
        )
    _told(found, output, json_)


def _told(found: Localization, output: Path, json_: bool) -> None:
    """The last lines: how it agrees with a known region, the answer, and where mask and page are; or all as JSON."""
    if json_:
        print_json(found.to_json())
        return
    if found.against is not None:
        console().print(_compared(found, found.against))
    print(found.answer)
    say(f"mask: {output}")
    say(f"report: {output.with_suffix('.html')}")


def _compared(found: Localization, region: Agreement) -> Table:
    """How well the choice agrees with the known region, and what a random one would have."""
    from expunge.report.localization_page import compared

    rows = [[name.lower(), number(value), number(chance)] for name, _, value, chance in compared(region, found)]
    return table(["against the region", found.by, "by chance"], rows, right=[found.by, "by chance"])
