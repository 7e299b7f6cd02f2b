"""`expunge study`: the published experiments, as programs over many trials."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from expunge.cli.common import Command, Overrides, console, say, table


class Studies(TyperGroup):
    """The studies as commands, each with the flags that it declares; found when they are asked for."""

    def list_commands(self, context: Any) -> list[str]:
        """Names of all studies."""
        from expunge.studies.base import STUDIES

        return STUDIES.names()

    def get_command(self, context: Any, name: str) -> Any:
        """The command of one study. Raises UserError with the near name if there is none."""
        from expunge.studies.base import STUDIES

        chosen = STUDIES.get(name)
        single = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
        single.command(name, cls=Command, help=f"{_sentence(chosen.summary)}\n\nTakes {chosen.estimate}.")(
            command(name)
        )
        return typer.main.get_command(single)


app = typer.Typer(
    cls=Studies, invoke_without_command=True, help="Run a published experiment; without a name: list them."
)


@app.callback()
def study(context: typer.Context) -> None:
    """Run a published experiment over many trials; without a name, list them."""
    if context.invoked_subcommand is None:
        from expunge.studies.base import STUDIES

        rows = [[name, entry.summary, entry.paper] for name, entry in STUDIES.items()]
        console().print(table(["study", "what it asks", "paper"], rows))
        say("flags of one: expunge study NAME --help")


def command(name: str) -> Callable[..., None]:
    """The function behind `expunge study NAME`, with a parameter for each option of the study."""
    from expunge.studies.base import STUDIES, flag, shown

    def run(output: Path, set_: list[str] | None, **given: str | None) -> None:
        from expunge import api
        from expunge.pipeline.processes import process_rank

        chosen: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
        result = api.study(name, output=output, overrides=set_ or [], **chosen)
        if process_rank() == 0:
            close(result)

    parameters = []
    for option, field in STUDIES.get(name).options.model_fields.items():
        absent = field.is_required() or field.default in (None, ())
        about = typer.Option(flag(option), help=field.description, metavar=option.rpartition("_")[2].upper())
        kind: Any = Annotated[str if field.is_required() else str | None, about]
        default = inspect.Parameter.empty if field.is_required() else None if absent else shown(field.default)
        parameters.append(_parameter(option, kind, default))
    folder = Annotated[Path, typer.Option("--output", "-o", help="folder of the study", show_default=False)]
    parameters += [_parameter("output", folder, Path("runs") / name), _parameter("set_", Overrides, None)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def close(result: Any) -> None:
    """The last lines of a study: what it found, and where the page is."""
    if result.skipped_all:
        say(f"everything in {result.path} was done already; nothing was run again")
    document = result.document
    rest = document.planned - document.done
    if rest:
        say(f"{rest} of {document.planned} trials are still to be done; run it again to go on")
    print(document.answer)
    print(f"report: {result.report}")


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")
