"""run.json: what this run is and how far it got, merged field by field, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.runs.atomic import plain, write_json

SCHEMA = "expunge.run/1"
NAME = "run.json"
#: what a reader looks for first stands first; everything else follows in the order in which it came
_FIRST = ("schema", "name", "status", "error", "command", "created", "started", "finished", "seconds")


class RunRecord:
    """The content of run.json as `.data`; `merge` writes through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = read_record(path) if path.exists() else {"schema": SCHEMA}

    def merge(self, **fields: Any) -> None:
        """Merge `fields`: mappings key by key, everything else replaced. Raises UserError on a full disk."""
        self._write(_merged(self.data, plain(fields)))

    def replace(self, **fields: Any) -> None:
        """Set whole fields, mappings too."""
        self._write({**self.data, **plain(fields)})

    def _write(self, data: dict[str, Any]) -> None:
        self.data = {key: data[key] for key in (*(key for key in _FIRST if key in data), *data)}
        write_json(self.path, self.data)


def read_record(path: Path) -> dict[str, Any]:
    """The content of a run.json. Raises UserError if it is not one that expunge wrote."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}", "give the folder of a run") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is no JSON", "choose another folder with -o") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        kind = f"of another version ({schema})" if str(schema).startswith("expunge.run/") else "not a run of expunge"
        raise UserError(f"{path} is {kind}", "choose another folder with -o")
    result: dict[str, Any] = data
    return result


def _merged(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged
