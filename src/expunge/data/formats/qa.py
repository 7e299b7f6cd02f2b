"""Question and answer."""

from __future__ import annotations

from expunge.data.cells import optional_text, rest, text
from expunge.data.example import Example
from expunge.data.registry import Row, data_format


@data_format(
    "qa",
    description="question and answer, as TOFU has them",
    columns=(("question", "query"), ("answer",)),
    example={"question": "Where was Orla Venn born?", "answer": "In Tessaly Bay."},
)
def read(row: Row) -> Example:
    """Further columns (paraphrases, wrong answers, levels) stay in `extra`."""
    return Example(
        id=optional_text(row, "id"),
        prompt=text(row, "question", "query"),
        answer=text(row, "answer"),
        task=optional_text(row, "task"),
        source=row.source,
        extra=rest(row, "id", "task", "answer", "question" if "question" in row.values else "query"),
    )
