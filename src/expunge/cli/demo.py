"""`expunge demo`: the whole way on a small model and invented people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import Output, Overrides, close


def demo(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="a random 2-layer model instead of SmolLM2: about a minute")
    ] = False,
    output: Output = None,
    set_: Overrides = None,
) -> None:
    """Teach a small language model invented people, remove some, and examine what is left.

    Takes minutes on a laptop without a GPU, writes runs/demo (or runs/demo-tiny), and goes on if it was interrupted.
    """
    from expunge import api

    folder = output or Path("runs/demo-tiny" if tiny else "runs/demo")
    close(api.demo(tiny=tiny, output=folder, overrides=set_ or []))
