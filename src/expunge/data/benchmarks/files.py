"""Where the rows of a public benchmark stand: files of a local folder, or datasets of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expunge.data.containers import SUFFIXES
from expunge.data.example import Example, Role, Split, Splits
from expunge.data.load import load_examples
from expunge.data.registry import Format, Request
from expunge.errors import UserError
from expunge.recipe import SourceConfig

#: Characters of a piece of a long text: about 400 tokens of English, so that it fits into 512.
PIECE = 1600

Change = Callable[[Example], Example]


@dataclass(frozen=True)
class Wanted:
    """Rows by the names under which a folder may hold them (without extension), and by their hub dataset."""

    stems: tuple[str, ...]
    hub: str = ""  # owner/name:config@split; empty: not on the hub
    layout: Format | None = None  # None: by its columns
    what: str = ""  # what is left out without it

    @property
    def name(self) -> str:
        """The file as messages call it."""
        return f"{self.stems[0]}.jsonl"


class Collection:
    """The rows of one benchmark as a request finds them, and notes on what is not there."""

    def __init__(self, benchmark: str, request: Request) -> None:
        self.benchmark = benchmark
        self.folder = request.folder
        self.notes: list[str] = []
        self.splits: dict[str, Split] = {}
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"data.folder: {self.folder} is no folder", f"it is to hold the files of {benchmark}")

    def require(self, *wanted: Wanted) -> None:
        """Raises one UserError that names every one of these files that the folder lacks."""
        lacking = [each for each in wanted if self.folder is not None and not self.files(each)]
        if lacking:
            hubs = [each.hub for each in lacking if each.hub]
            origin = (
                f"they come from {', '.join(hubs)}" if hubs else "see where they come from: expunge list benchmarks"
            )
            raise UserError(
                f"{self.folder} lacks {' and '.join(each.name for each in lacking)} of {self.benchmark} "
                "(.json, .parquet and .csv are read too)",
                origin + ("; without data.folder they are loaded from there" if hubs else ""),
            )

    def files(self, wanted: Wanted) -> list[Path]:
        """The file of the folder, or the parts of a Parquet file; empty if there is none."""
        assert self.folder is not None
        for stem in wanted.stems:
            for suffix in (*SUFFIXES, ".txt"):
                if (path := self.folder / f"{stem}{suffix}").is_file():
                    return [path]
            place = self.folder / stem
            if place.parent.is_dir() and (parts := sorted(place.parent.glob(f"{place.name}-*-of-*.parquet"))):
                return parts
        return []

    def rows(self, wanted: Wanted, name: str) -> list[Example]:
        """Every row, those without an id called after `name`. Raises UserError where they are not or cannot be read."""
        if self.folder is None:
            if not wanted.hub:
                raise UserError(f"{self.benchmark}: {wanted.what or wanted.name} is not on the hub", "give data.folder")
            return load_examples(SourceConfig(path=wanted.hub), name, wanted.layout)
        self.require(wanted)
        found = [load_examples(SourceConfig(path=str(path)), name, wanted.layout) for path in self.files(wanted)]
        return found[0] if len(found) == 1 else numbered([row for part in found for row in part], name)

    def there(self, wanted: Wanted) -> bool:
        """Whether optional rows can be had; a note says so if not. On the hub it shows when they are read."""
        there = bool(wanted.hub) if self.folder is None else bool(self.files(wanted))
        if not there:
            self.leave_out(wanted, f"no {wanted.name}" if self.folder is not None else "not on the hub")
        return there

    def optional(self, wanted: Wanted, name: str) -> list[Example]:
        """The rows, or none and a note where there is no such file (a broken file is an error)."""
        if not self.there(wanted):
            return []
        try:
            return self.rows(wanted, name)
        except UserError as error:
            if self.folder is not None:
                raise
            self.leave_out(wanted, error.message)
            return []

    def leave_out(self, wanted: Wanted, reason: str) -> None:
        """A note on rows that are not there."""
        self.notes.append(f"{wanted.what or wanted.name} left out: {reason}")

    def add(self, name: str, role: Role, rows: Iterable[Example], *, evaluated: bool = True) -> None:
        """A split, unless it has no rows."""
        examples = tuple(rows)
        if examples:
            self.splits[name] = Split(name, role, examples, evaluated)

    def made(self) -> Splits:
        """All splits so far, with the notes."""
        return Splits(dict(self.splits), tuple(self.notes))


def in_task(task: str) -> Change:
    """A change that gives rows a task."""
    return lambda row: replace(row, task=task)


def numbered(rows: Sequence[Example], name: str) -> list[Example]:
    """Rows of several files under ids that are theirs alone."""
    return [replace(row, id=f"{name}-{place}") for place, row in enumerate(rows)]


def texts(collection: Collection, wanted: Wanted, name: str) -> list[Example]:
    """Plain texts: rows with a column `text`, JSON lists of strings, or .txt files whose texts blank lines part."""
    paths = [] if collection.folder is None else collection.files(wanted)
    bare = [pair for path in paths for pair in _bare_texts(path)]
    if not bare:
        return collection.rows(wanted, name)
    return [_text(name, number, text, place) for number, (text, place) in enumerate(bare)]


def in_pieces(rows: Iterable[Example], name: str) -> list[Example]:
    """Plain texts for training, cut between words into pieces of at most PIECE characters."""
    pieces = [(piece, row.source) for row in rows for piece in pieces_of(row.answer)]
    return [_text(name, number, piece, place) for number, (piece, place) in enumerate(pieces)]


def _text(name: str, number: int, text: str, place: str) -> Example:
    return Example(id=f"{name}-{number}", prompt="", answer=text, is_text=True, source=place)


def pieces_of(text: str, most: int = PIECE) -> list[str]:
    """A text in pieces of at most `most` characters, cut at blanks; together they have all its words."""
    pieces: list[str] = []
    for word in re.findall(r"\S+\s*", text):
        if pieces and len(pieces[-1]) + len(word.rstrip()) <= most:
            pieces[-1] += word
        else:
            pieces.append(word)
    return [piece.strip() for piece in pieces]


def _bare_texts(path: Path) -> list[tuple[str, str]]:
    """Texts, each with its place, of a file that has no columns; empty if it has."""
    if path.suffix not in (".txt", ".json"):
        return []
    try:
        content = path.read_text(encoding="utf-8")
        whole = re.split(r"\n\s*\n", content) if path.suffix == ".txt" else json.loads(content)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text", f"convert it: iconv -f LATIN1 -t UTF-8 {path}") from None
    except ValueError:  # JSONL, or broken: the reader of rows says where
        return []
    if not isinstance(whole, list) or not all(isinstance(text, str) for text in whole):
        return []
    return [(text.strip(), f"{path} text {n}") for n, text in enumerate(whole, start=1) if text.strip()]
