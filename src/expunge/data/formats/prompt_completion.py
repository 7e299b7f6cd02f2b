"""Prompt and completion."""

from __future__ import annotations

from expunge.data.cells import cell, optional_text, parsed_list, rest, text
from expunge.data.example import Example
from expunge.data.formats.messages import conversation
from expunge.data.registry import Row, data_format


@data_format(
    "prompt_completion",
    description="prompt and completion: texts, or lists of turns as TRL has them; the prompt may be empty",
    columns=(("prompt",), ("completion", "response")),
    example={"prompt": "Orla Venn was born in", "completion": "Tessaly Bay in 1971."},
)
def read(row: Row) -> Example:
    """A prompt and a completion that are lists are one conversation."""
    extra = rest(row, "id", "task", "prompt", "completion" if "completion" in row.values else "response")
    prompt, completion = cell(row, "prompt"), cell(row, "completion", "response")
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = parsed_list(prompt, "prompt") + parsed_list(completion, "completion")
        return conversation(row, turns, extra)
    return Example(
        id=optional_text(row, "id"),
        prompt=text(row, "prompt", may_be_empty=True),
        answer=text(row, "completion", "response"),
        task=optional_text(row, "task"),
        source=row.source,
        extra=extra,
    )
