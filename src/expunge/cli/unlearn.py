"""`expunge unlearn`: one's own model and files, without writing a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import (
    AllowPickle,
    DryRun,
    Overrides,
    Reference,
    Retain,
    Template,
    TrustRemoteCode,
    close,
    print_plan,
)
from expunge.errors import UserError


def unlearn(
    model: Annotated[str, typer.Option("--model", help="folder, hub id, .gguf file or alias")],
    forget: Annotated[str, typer.Option("--forget", help="rows to forget: a file or a hub dataset")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the run; the new model is in OUT/model")],
    retain: Retain = None,
    method: Annotated[str, typer.Option("--method", help="auto, or see: expunge list methods")] = "auto",
    lora: Annotated[int | None, typer.Option("--lora", metavar="RANK", help="train adapters of this rank")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="passes over the forget rows")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="learning rate")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="forget rows of one step")] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="part of the strength on held-out retain rows that must stay, e.g. 0.95"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="of training at most; measuring comes on top")
    ] = None,
    template: Template = "auto",
    reference: Reference = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="change only what is inside this mask (expunge localize)")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    set_: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Remove the forget rows from a model, and write the new model, the measurements and a report."""
    from expunge import api

    options: dict[str, tuple[str, object]] = {
        "unlearn.0.train.epochs": ("--epochs", epochs),
        "unlearn.0.train.lr": ("--lr", lr),
        "unlearn.0.train.batch_size": ("--batch-size", batch_size),
        "unlearn.0.train.minutes": ("--minutes", minutes),
        "unlearn.0.keep": ("--keep", keep),
    }
    fields: dict[str, object] = {
        **{field: value for field, (_, value) in options.items()},
        "data.template": template,
        "localize.mask": None if mask is None else str(mask),
        "seed": seed,
    }
    for flag, given in (("allow_pickle", allow_pickle), ("trust_remote_code", trust_remote_code)):
        for part in ("model", "reference") if reference else ("model",):
            fields[f"{part}.{flag}"] = given or None
    # JSON is YAML in which nothing is guessed: the text "chat" stays text, whatever it contains
    overrides = [f"{key}={json.dumps(value)}" for key, value in fields.items() if value is not None]
    try:
        recipe = api.unlearning(
            model,
            forget,
            retain,
            method=method,
            lora=lora,
            reference=reference,
            overrides=[*overrides, *(set_ or [])],
        )
    except UserError as error:
        typed = {field: option for field, (option, value) in options.items() if value is not None}
        raise _of_options(error, typed) from None
    if dry_run:
        print_plan(api.plan(recipe, output=output))
        return
    close(api.run(recipe, output=output))


def _of_options(error: UserError, typed: Mapping[str, str]) -> UserError:
    """The same mistake, said of the option that was typed and not of the field that it sets."""
    for field, option in typed.items():
        if error.message.startswith(f"recipe: {field}:"):
            told = error.message.removeprefix(f"recipe: {field}:")
            return UserError(f"{option}:{told}", "what each option takes: expunge unlearn --help")
    return error
