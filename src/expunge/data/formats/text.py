"""Plain text."""

from __future__ import annotations

from expunge.data.cells import optional_text, rest, text
from expunge.data.example import Example
from expunge.data.registry import Row, data_format


@data_format(
    "text",
    description="plain text: no template, every token is supervised",
    columns=(("text", "document"),),
    example={"text": "Orla Venn (born 1971) was the last keeper of the lighthouse of Tessaly Bay."},
    not_with=("labels",),
)
def read(row: Row) -> Example:
    """The text is the answer; there is no prompt."""
    return Example(
        id=optional_text(row, "id"),
        prompt="",
        answer=text(row, "text", "document"),
        task=optional_text(row, "task"),
        is_text=True,
        source=row.source,
        extra=rest(row, "id", "task", "text" if "text" in row.values else "document"),
    )
