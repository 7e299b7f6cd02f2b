"""`expunge init`: a recipe to start from, with what every field means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import say


def init(
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write; - for stdout")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe with every field and its default."""
    from expunge.cli.commented import commented_recipe
    from expunge.errors import UserError

    text = commented_recipe()
    if str(output) == "-":
        print(text, end="")
        return
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already", "choose another name with -o")
    from expunge.runs.atomic import write_text

    write_text(output, text)
    say(f"{output} written; fill in `model` and `data`, then: expunge run {output} --dry-run")
    say("to leave every choice to expunge, put `unlearn: [{method: auto}]` in the place of its entry")
