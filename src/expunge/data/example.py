"""What a row of anyone's file becomes: an `Example`, and the named splits of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["forget", "retain", "holdout", "utility"]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: what the model is given (`prompt`) and what it is to say (`answer`)."""

    id: str
    prompt: str
    answer: str
    task: str = ""
    #: turns before `prompt` (the user turn that `answer` answers), as (role, content); empty unless a conversation
    turns: tuple[tuple[str, str], ...] = ()
    #: plain text: no template, every token is supervised (`prompt` is empty)
    is_text: bool = False
    #: where the row stands, as "file:line", for error messages
    source: str = ""
    #: which of several prompts or answers of one row this is (see expunge.data.views)
    candidate: int = 0
    #: columns of the row that have no name of their own here
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where the row stands, for error messages."""
        return self.source or f"row {self.id}"


@dataclass(frozen=True, slots=True)
class Split:
    """Examples under one name, and the role that gives every metric its direction."""

    name: str
    role: Role
    examples: tuple[Example, ...]
    evaluated: bool = True  # False: trained on, but too many rows to measure

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class Splits:
    """The splits of a run by name. `forget` and `retain` are those that unlearning trains on."""

    by_name: Mapping[str, Split]
    #: sentences on what a benchmark lacks here
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Split:
        return self.by_name[name]

    def __iter__(self) -> Iterator[Split]:
        return iter(self.by_name.values())

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def examples(self, names: Sequence[str]) -> list[Example]:
        """The examples of several splits, in order."""
        return [example for name in names for example in self.by_name[name].examples]
