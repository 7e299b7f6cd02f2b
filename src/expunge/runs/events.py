"""events.jsonl: what happened, one JSON object per line, appended as it happens."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from expunge.runs.atomic import disk_errors, plain


def now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class EventLog:
    """Appends whole lines to `path`; a line that a kill or a full disk tore is closed before the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the current time. Raises UserError on a full disk."""
        line = json.dumps({"time": now(), "event": event, **plain(fields)}, ensure_ascii=False) + "\n"
        with disk_errors(self.path.parent):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                if size and _last_byte(descriptor, size) != b"\n":
                    line = "\n" + line
                _write_all(descriptor, line.encode(), size)
            finally:
                os.close(descriptor)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run in order; torn lines are left out, and no file is no events."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _last_byte(descriptor: int, size: int) -> bytes:
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1)


def _write_all(descriptor: int, data: bytes, size: int) -> None:
    """The whole line, or the file as long as it was."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
