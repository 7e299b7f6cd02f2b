"""Conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.data.cells import as_text, cell, optional_text, parsed_list, rest
from expunge.data.example import Example
from expunge.data.registry import Row, RowError, data_format


@data_format(
    "messages",
    description="a conversation of turns with role and content; the last assistant turn is the answer",
    columns=(("messages",),),
    example={
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "Where was Orla Venn born?"},
            {"role": "assistant", "content": "In Tessaly Bay."},
        ]
    },
)
def read(row: Row) -> Example:
    """Turns before the question are kept in `turns`, those after the answer in `extra`."""
    return conversation(row, parsed_list(cell(row, "messages"), "messages"), rest(row, "id", "task", "messages"))


def conversation(row: Row, turns: list[Any], extra: Mapping[str, Any]) -> Example:
    """The example in a list of turns. Raises RowError if no assistant turn answers a user turn."""
    spoken = [_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    answers = [place for place, (role, _) in enumerate(spoken) if role == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    last = answers[-1]
    if last == 0 or spoken[last - 1][0] != "user":
        raise RowError("the last assistant turn does not answer a user turn")
    answer = spoken[last][1]
    if not answer.strip():
        raise RowError("empty answer (the last assistant turn)")
    after = [{"role": role, "content": content} for role, content in spoken[last + 1 :]]
    return Example(
        id=optional_text(row, "id"),
        prompt=spoken[last - 1][1],
        answer=answer,
        task=optional_text(row, "task"),
        turns=tuple(spoken[: last - 1]),
        source=row.source,
        extra={**extra, "turns_after": after} if after else extra,
    )


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise RowError(f"turn {number} has no role and content")
    content = turn["content"]
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    return as_text(turn["role"], f"role of turn {number}"), as_text(content, f"content of turn {number}")


def _part(part: Any, number: int) -> str:
    said = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(said, str):
        raise RowError(f"turn {number} holds something other than text")
    return said
