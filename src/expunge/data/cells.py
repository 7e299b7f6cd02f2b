"""Cells of a record as text, for the readers of formats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, time
from decimal import Decimal
from numbers import Number
from typing import Any

from expunge.data.registry import Row, RowError
from expunge.errors import did_you_mean


def cell(row: Row, *names: str) -> Any:
    """The value under the first of `names` that the row has. Raises RowError if it has none of them."""
    for name in names:
        if name in row.values:
            return row.values[name]
    near = did_you_mean(names[0], row.values)
    hint = near if near.startswith("did you mean") else f"it has {', '.join(row.values) or 'no columns'}"
    raise RowError(f"no column '{names[0]}' ({hint})")


def text(row: Row, *names: str, may_be_empty: bool = False) -> str:
    """A cell as text; numbers become text. Raises RowError on null, lists, and blank text."""
    value = as_text(cell(row, *names), names[0])
    if not may_be_empty and not value.strip():
        raise RowError(f"empty {names[0]}")
    return value


def as_text(value: Any, name: str) -> str:
    """A value as text. Raises RowError on null and on what is neither text nor a number."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError(f"{name} is null")
    if isinstance(value, Number | Decimal | date | time) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"{name} is {_kind(value)}, not text")


def optional_text(row: Row, *names: str) -> str:
    """A cell as text, or "" where there is none."""
    for name in names:
        value = row.values.get(name)
        if value is not None and not isinstance(value, list | dict):
            return str(value)
    return ""


def parsed_list(value: Any, name: str) -> list[Any]:
    """A list, or the JSON text of one (as CSV has it). Raises RowError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise RowError(f"{name} is text that is no JSON list") from None
    if not isinstance(value, list):
        raise RowError(f"{name} is {_kind(value)}, not a list of turns")
    return value


def entries(value: Any) -> list[Any]:
    """What an optional cell holds, one by one: nothing, a value, a list, or the JSON text of a list (as CSV has it)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(json.JSONDecodeError, RecursionError):  # else it is a text that begins with a bracket
            value = json.loads(value)
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def rest(row: Row, *used: str) -> Mapping[str, Any]:
    """The columns that have no name of their own in an Example."""
    return {key: value for key, value in row.values.items() if key not in used}


def _kind(value: Any) -> str:
    names = {bool: "true/false", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
