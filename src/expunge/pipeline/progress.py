"""Progress on stderr: one bar with time left per long stage, and a line when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Called with the units just finished, and a short note to show beside the bar.
Tick = Callable[..., None]


class Reporter:
    """Shows stages to a person; `quiet` shows nothing (other processes, libraries)."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Tick]:
        """A bar over `total` units; yields the function that moves it."""
        if self.quiet:
            yield lambda count=1, note="": None
            return
        began = time.monotonic()
        columns = (
            TextColumn("  {task.description:<28}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        drawn = self.console.is_terminal or self.console.is_jupyter
        with Progress(*columns, console=self.console, transient=True, disable=not drawn) as progress:
            task = progress.add_task(label, total=total, note="")

            def tick(count: int = 1, note: str | None = None) -> None:
                progress.advance(task, count)
                if note is not None:
                    progress.update(task, note=note)

            yield tick
        self.line(f"  {label:<28} {time.monotonic() - began:6.1f} s")

    def line(self, text: str) -> None:
        """One line that stays."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Silence transformers' own bars and notices: this page is where progress is shown."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
