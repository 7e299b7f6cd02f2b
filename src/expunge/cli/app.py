"""The command line: one file per command, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

import expunge
from expunge.cli import (
    attack,
    audit,
    calibrate,
    data,
    demo,
    doctor,
    evaluate,
    init,
    list_,
    localize,
    merge,
    report,
    run,
    runs,
    study,
    unlearn,
)
from expunge.cli.common import Command
from expunge.errors import UserError

DONE, BUG, USER_ERROR, INTERRUPTED, TERMINATED, BROKEN_PIPE = 0, 1, 2, 130, 143, 141

app = typer.Typer(
    name="expunge",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_command = partial(app.command, cls=Command)
_command()(demo.demo)
_command()(run.run)
_command()(unlearn.unlearn)
_command("eval")(evaluate.evaluate)
_command()(attack.attack)
_command()(audit.audit)
_command()(localize.localize)
_command()(merge.merge)
_command()(calibrate.calibrate)
app.add_typer(study.app, name="study")
_command()(report.report)
_command()(runs.runs)
_command()(init.init)
app.add_typer(data.app, name="data")
_command("list")(list_.list_)
_command()(doctor.doctor)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it before they kill: ends a run as Ctrl-C does."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expunge {expunge.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="say more; show tracebacks of user errors too")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Remove chosen content from a language model, and measure whether it is gone."""
    context.obj = {"verbose": verbose}
    if verbose:
        import logging

        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("expunge").setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 done, 1 a bug of ours, 2 user error, 130 interrupted, 143 terminated."""
    # set before torch starts its threads: by default they spin for long while they wait, and beside another busy
    # process on the same cores a step then takes up to ten times as long; a short spin costs nothing when alone
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    given = list(sys.argv[1:] if arguments is None else arguments)
    whole = typer.main.get_command(app)
    context: Any = None
    try:
        with _sigterm_interrupts():
            with whole.make_context("expunge", given or ["--help"]) as context:
                whole.invoke(context)
            sys.stdout.flush()
    except typer.Exit as done:
        return int(done.exit_code)
    except BaseException as error:
        return _explain(error, verbose=bool(context is not None and (context.obj or {}).get("verbose")))
    return DONE


def _explain(error: BaseException, verbose: bool) -> int:
    """One sentence and a hint on stderr for what a user can mend, a traceback for what is our bug; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        word = "terminated" if isinstance(error, Terminated) else "interrupted"
        _say(f"\n{word}; run the same command again to go on")
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader (head, less) has gone: nobody is there to be told
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if not isinstance(error, Exception):
        raise error
    sentence = _user_error(error)
    if sentence is None:
        traceback.print_exception(error)
        _say("this is a bug in expunge: please report it with the lines above")
        return BUG
    if verbose:
        traceback.print_exception(error)
    _say(f"error: {sentence.message}")
    if sentence.hint:
        _say(f"hint: {sentence.hint}")
    return USER_ERROR


def _user_error(error: Exception) -> UserError | None:
    """What a user can mend about `error`, or None if nothing."""
    if isinstance(error, UserError):
        return error
    if hasattr(error, "format_message"):  # usage errors of typer, whichever click it is built on
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "expunge"
        return UserError(_one_line(error.format_message()), f"see: {command} --help")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return UserError(
            f"out of memory ({_one_line(str(error)) or 'the machine has no more'})",
            "lower the batch size, raise train.accumulation, or use LoRA; finished stages are kept",
        )
    if isinstance(error, PermissionError):
        return UserError(f"{error.filename or 'a file'}: permission denied", "choose a place that you can write to")
    from expunge.runs.atomic import disk_full

    return disk_full(error, Path.cwd())


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _say(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """While a command runs, SIGTERM unwinds it, so that what was reached is recorded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
