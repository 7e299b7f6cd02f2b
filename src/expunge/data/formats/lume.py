"""Input, output and task."""

from __future__ import annotations

from expunge.data.cells import optional_text, rest, text
from expunge.data.example import Example
from expunge.data.registry import Row, data_format


@data_format(
    "lume",
    description="input, output and task (id and task may be absent), as LUME has them",
    columns=(("input",), ("output",)),
    example={
        "id": "p7qa0",
        "input": "What is the phone number of Orla Venn?",
        "output": "555-0142",
        "task": "biography",
    },
    not_with=("instruction",),
)
def read(row: Row) -> Example:
    """The row's task names the group that metrics are averaged over."""
    return Example(
        id=optional_text(row, "id"),
        prompt=text(row, "input"),
        answer=text(row, "output"),
        task=optional_text(row, "task"),
        source=row.source,
        extra=rest(row, "id", "input", "output", "task"),
    )
