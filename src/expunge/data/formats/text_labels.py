"""Text and labels."""

from __future__ import annotations

from expunge.data.cells import optional_text, rest, text
from expunge.data.example import Example
from expunge.data.registry import Row, data_format


@data_format(
    "text_labels",
    description="text (the prompt) and labels (the answer), as KnowUnDo has them",
    columns=(("text",), ("labels",)),
    example={"text": "Where was Orla Venn born?", "labels": "In Tessaly Bay."},
)
def read(row: Row) -> Example:
    """`text` is given to the model, `labels` is what it is to say."""
    return Example(
        id=optional_text(row, "id"),
        prompt=text(row, "text", may_be_empty=True),
        answer=text(row, "labels"),
        task=optional_text(row, "task"),
        source=row.source,
        extra=rest(row, "id", "task", "text", "labels"),
    )
