"""Multiple choice."""

from __future__ import annotations

from typing import Any

from expunge.data.cells import as_text, cell, entries, optional_text, rest, text
from expunge.data.example import Example
from expunge.data.registry import Row, RowError, data_format

LETTERS = "ABCDEFGHIJ"


@data_format(
    "choices",
    description="question, choices and answer (its number from 0, its letter or its text), as MMLU and WMDP have them",
    columns=(("question",), ("choices",), ("answer",)),
    example={
        "question": "Where was Orla Venn born?",
        "choices": ["Port Maren", "Tessaly Bay", "Ostrel", "Lorn"],
        "answer": 1,
    },
)
def read(row: Row) -> Example:
    """The prompt lists the lettered choices; the answer is a letter, and the wrong letters are `perturbed_answer`."""
    choices = options(row)
    right = right_choice(cell(row, "answer"), choices)
    letters = LETTERS[: len(choices)]
    return Example(
        id=optional_text(row, "id"),
        prompt=lettered(text(row, "question"), choices),
        answer=letters[right],
        task=optional_text(row, "task", "subject"),
        source=row.source,
        extra={
            **rest(row, "id", "task", "question", "answer"),
            "perturbed_answer": [letter for letter in letters if letter != letters[right]],
        },
    )


def lettered(question: str, choices: list[str]) -> str:
    """The question, and a line for each choice: `A. …`."""
    return "\n".join(
        [question.strip(), *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
    )


def options(row: Row) -> list[str]:
    """The texts to choose from. Raises RowError."""
    found = [as_text(choice, "a choice") for choice in entries(cell(row, "choices"))]
    if not 2 <= len(found) <= len(LETTERS):
        raise RowError(f"{len(found)} choices; there must be 2 to {len(LETTERS)}")
    return found


def right_choice(answer: Any, choices: list[str]) -> int:
    """The place of the right choice, by its number from 0, its letter, or its text. Raises RowError."""
    said = str(answer).strip()
    if said.isdecimal():
        place = int(said)
    elif len(said) == 1 and said.isalpha():
        place = LETTERS.find(said.upper())
    else:
        place = choices.index(said) if said in choices else -1
    if not 0 <= place < len(choices):
        raise RowError(f"answer {said!r} is none of the {len(choices)} choices")
    return place
