"""`expunge calibrate`: how much of an unlearning can be kept while the model keeps what it should."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import (
    Benchmark,
    DataFolder,
    Json,
    Overrides,
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

    from expunge.report.calibration_record import Calibration

#: τ of the printed curve; the record has more.
_TAUS = (0.4, 0.6, 0.8, 0.9, 0.95, 1.0)


def calibrate(
    unlearned: Annotated[str, typer.Argument(metavar="UNLEARNED", help="checkpoint, adapter or run folder, or hub id")],
    target: Annotated[str, typer.Option("--target", help="the model before unlearning")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the record; the new model is in OUT/model")],
    forget: Annotated[str | None, typer.Option("--forget", help="rows that the model should not know")] = None,
    retain: Annotated[
        str | None, typer.Option("--retain", help="rows to keep that unlearning never saw", show_default=False)
    ] = None,
    benchmark: Benchmark = None,
    folder: DataFolder = None,
    keep: Annotated[float, typer.Option("--keep", help="part of the target's retain strength to be kept")] = 0.95,
    epsilon: Annotated[float, typer.Option("--epsilon", help="width to which α is searched")] = 0.01,
    tau_curve: Annotated[
        bool, typer.Option("--tau-curve/--no-curve", help="also what is left at every other demand")
    ] = True,
    template: Template = "auto",
    trust_remote_code: TrustRemoteCode = False,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Mix an unlearned model back towards its target until it keeps enough, and say what it still knows then."""
    from expunge import api

    flags = ["model.trust_remote_code=true"] if trust_remote_code else []
    with only_stderr(json_):
        found = api.calibrate(
            unlearned,
            target=target,
            forget=forget,
            retain=retain,
            benchmark=benchmark,
            folder=folder,
            keep=keep,
            epsilon=epsilon,
            curve=tau_curve,
            template=template,
            overrides=[*flags, *(set_ or [])],
            output=output,
        )
    if json_:
        print_json(found.to_json())
        return
    out = console()
    out.print(_models(found))
    if found.curve:
        out.print(_curve(found))
    print(found.answer)
    print(_passes(found))
    say(
        f"report: {output / 'report.html'}"
        + ("" if found.model else "; no model was written, for it would be the target")
    )


def _passes(found: Calibration) -> str:
    """How many passes it took."""
    passes = found.passes
    more = f"; with the τ-curve {passes.retain}" if found.curve else ""
    again = f"; {passes.reused} passes were made before" if passes.reused else ""
    return f"retain passes of mixed models to find α* within {found.epsilon:g}: {passes.search}{more}{again}"


def _models(found: Calibration) -> Table:
    """Strengths of target, calibrated and unlearned model with their intervals."""
    by_place = {(entry["variant"], entry["split"]): entry for entry in found.records}
    kinds = [kind for kind in ("retain", "forget", "forget@paraphrase") if ("target", kind) in by_place]
    rows = []
    for variant, alpha in (("target", 0.0), ("calibrated", found.alpha), ("unlearned", 1.0)):
        rows.append([variant, number(alpha), *(_estimate(by_place[variant, kind]) for kind in kinds)])
    heads = {"retain": "retain ↑", "forget": "forget ↓", "forget@paraphrase": "forget, paraphrased ↓"}
    return table(["extraction strength of", "α", *(heads[kind] for kind in kinds)], rows, right=["α"])


def _estimate(entry: Mapping[str, Any]) -> str:
    interval = "" if entry["ci_low"] is None else f" [{entry['ci_low']:.3f}, {entry['ci_high']:.3f}]"
    return f"{number(entry['value'])}{interval}"


def _curve(found: Calibration) -> Table:
    """The τ-curve at some τ, its area and AUES."""
    chosen = [point for point in found.curve if any(abs(point.tau - tau) < 1e-9 for tau in _TAUS)]
    heads = ["τ", *(f"{point.tau:.2f}" for point in chosen), "area ↓", "AUES ↑"]
    rows = [
        ["least forget", *(number(point.forget) for point in chosen), number(found.area), number(found.aues)],
        ["at α", *(number(point.alpha) for point in chosen), "", ""],
    ]
    return table(heads, rows, right=heads[1:])
