"""A folder that one command writes in one go: refused if it holds something else, and there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.runs.atomic import disk_errors, publish, sync_tree, write_json
from expunge.runs.lock import NAME as LOCK
from expunge.runs.lock import FolderLock

#: The page that `expunge report` adds to such a folder.
PAGE = "report.html"
#: File of an unfinished folder that says what is being made.
MADE_OF = ".made-of"

_ELSEWHERE = "choose a new or empty folder with -o"


def check_output(output: Path, record: str) -> None:
    """Raises UserError if `output` is a file, or a folder that holds anything but what an earlier `record` lists."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output} is a file, not a folder", "choose another folder with -o")
    if not output.is_dir():
        return
    present = {entry.name for entry in output.iterdir()}
    listed = _listed(output / record)
    foreign = sorted(present - listed - ({PAGE} if listed else set()))
    if foreign:
        raise UserError(f"{output} holds something else ({foreign[0]})", _ELSEWHERE)


@contextmanager
def whole_folder(output: Path, record: str, about: Mapping[str, Any], made_of: str = "") -> Iterator[Path]:
    """A work folder beside `output` that takes its place at the end, with `about` in the file `record`.

    With `made_of`, a digest of everything that goes into it, what an interrupted process of the same digest left is
    found there again. Raises UserError for a place that is taken or can't be written, and for a full disk; then nothing
    is left.
    """
    check_output(output, record)
    output = Path(os.path.abspath(output))
    work = output.with_name(f".{output.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} can't be made: {error.strerror}", "choose another folder with -o") from None
    lock = FolderLock(work)
    interrupted = False
    try:
        with disk_errors(output.parent):
            _clear(work, made_of)
            yield work
            (work / MADE_OF).unlink()
            entries = sorted({record, *(entry.name for entry in work.iterdir() if entry.name != LOCK)})
            write_json(work / record, {**about, "entries": entries})
            lock.release()
            (work / LOCK).unlink()
            sync_tree(work)
            publish(work, output, output.with_name(f".{output.name}.replaced-{os.getpid()}"))
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        lock.release()
        if not (interrupted and made_of):
            shutil.rmtree(work, ignore_errors=True)


def _clear(work: Path, made_of: str) -> None:
    """Remove what a killed process left, unless it was making the same."""
    note = work / MADE_OF
    if not (made_of and note.is_file() and note.read_text(encoding="utf-8") == made_of):
        for left_over in work.iterdir():
            if left_over.name != LOCK:
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    note.write_text(made_of, encoding="utf-8")


def _listed(record: Path) -> set[str]:
    try:
        entries = json.loads(record.read_text(encoding="utf-8"))["entries"]
        return {str(entry) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
