"""Records out of files, one at a time: JSONL, JSON array, CSV and Parquet."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, Literal

from expunge.errors import UserError

Container = Literal["jsonl", "json", "csv", "parquet"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
KINDS = "JSONL, a JSON array of rows, CSV or Parquet"
_BOM = codecs.BOM_UTF8
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One record, or what is wrong with it."""

    file: str
    unit: Literal["line", "row"]
    number: int  # from 1
    values: dict[str, Any] | None
    problem: str = ""

    @property
    def place(self) -> str:
        """`file:line`, or `file row n` where lines mean nothing."""
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file} row {self.number}"


def read_file(path: str) -> Iterator[Record]:
    """Records of a file, in order. Raises UserError if the file as a whole cannot be read."""
    kind = container_of(path)
    if kind == "parquet":
        return _parquet(path)
    return {"jsonl": _jsonl, "json": _json_array, "csv": _csv}[kind](path)


def container_of(path: str) -> Container:
    """What a file is, by its extension, then by its content. Raises UserError if it is none of them."""
    file, suffix = Path(path), Path(path).suffix.lower()
    if not file.is_file():
        raise UserError(f"{path}: no such file", _near_file(file))
    try:
        with file.open("rb") as handle:
            head = handle.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check the permissions of the file") from None
    if head.startswith(b"PAR1"):
        return "parquet"
    if suffix == ".parquet":
        raise UserError(f"{path} is not a Parquet file", "its name ends in .parquet, but its content is something else")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}:1: not UTF-8 text but UTF-16", f"convert it: iconv -f UTF-16 -t UTF-8 {path}")
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed", f"unpack it first: gunzip {path}")
    body = head.removeprefix(_BOM).lstrip()
    if not body:
        raise UserError(f"{path} is empty", f"a data file is {KINDS}")
    if suffix in (".csv", ".tsv"):
        return "csv"
    if body[:1] == b"[":
        return "json"
    if body[:1] == b"{" or suffix in SUFFIXES:
        return "jsonl"
    if any(delimiter in body.splitlines()[0] for delimiter in (b",", b";", b"\t")):
        return "csv"
    raise UserError(f"{path}:1: neither JSON nor a CSV header", f"a data file is {KINDS}")


def _jsonl(path: str) -> Iterator[Record]:
    with open(path, "rb") as handle:
        begun = False
        for number, raw in enumerate(handle, start=1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if not line.strip():
                continue
            try:
                yield _record(path, "line", number, json.loads(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield Record(path, "line", number, None, _not_utf8(error))
            except json.JSONDecodeError as error:
                if not begun and line.strip() == b"{":
                    yield Record(path, "line", number, None, "broken JSON: the object goes over several lines")
                    return
                yield Record(path, "line", number, None, f"broken JSON: {error.msg} at column {error.colno}")
            except RecursionError:
                yield Record(path, "line", number, None, "broken JSON: nested too deeply")
            begun = True


def _json_array(path: str) -> Iterator[Record]:
    with open(path, "rb") as handle:
        stream = _JsonStream(handle)
        number = 0
        try:
            stream.take("[")
            while stream.peek() != "]":
                if number:
                    stream.take(",")
                number += 1
                yield _record(path, "row", number, stream.value())
            stream.take("]")
            if stream.peek():
                yield Record(path, "line", stream.line(), None, "broken JSON: text after the array's closing bracket")
        except json.JSONDecodeError as error:
            yield Record(path, "line", stream.line() + error.lineno - 1, None, f"broken JSON: {error.msg}")
        except UnicodeDecodeError as error:
            yield Record(path, "line", stream.undecoded_line(error), None, _not_utf8(error))
        except RecursionError:
            yield Record(path, "line", stream.line(), None, "broken JSON: nested too deeply")


class _JsonStream:
    """Values out of JSON text of which only a window is in memory."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.parse = json.JSONDecoder().raw_decode
        self.text, self.at, self.lines = "", 0, 1  # window, place in it, line on which the window begins
        self.ended = False

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self._fill(_BLOCK):
                return ""

    def take(self, char: str) -> None:
        if self.peek() != char:
            raise json.JSONDecodeError(f"Expecting '{char}'", self.text[self.at : self.at + 1], 0)
        self.at += 1

    def value(self) -> Any:
        """The next value. Raises JSONDecodeError, whose line counts from where the value begins."""
        self.peek()
        size = _BLOCK
        while True:
            try:
                value, self.at = self.parse(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                # Either broken, or its end is not in the window yet: only the end of the file tells.
                if not self._fill(size):
                    raise json.JSONDecodeError(error.msg, self.text[self.at :], error.pos - self.at) from None
                size *= 2

    def line(self) -> int:
        """The line on which the stream stands."""
        return self.lines + self.text.count("\n", 0, self.at)

    def undecoded_line(self, error: UnicodeDecodeError) -> int:
        """The line of the byte that is not UTF-8."""
        return self.lines + self.text.count("\n") + error.object[: error.start].count(b"\n")

    def _fill(self, size: int) -> bool:
        if self.ended:
            return False
        self.lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        raw = self.handle.read(size)
        self.ended = not raw
        self.text += self.decode(raw, final=self.ended)
        return True


def _csv(path: str) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, "rb") as handle:
        first = handle.readline().removeprefix(_BOM).decode("utf-8", errors="replace")
        handle.seek(0)
        lines = _Lines(handle)
        rows = csv.reader(lines, delimiter=_delimiter(path, first), strict=True)
        header: list[str] | None = None
        while True:
            start = rows.line_num + 1
            try:
                fields = next(rows, None)
            except csv.Error as error:
                yield Record(path, "line", start, None, f"broken CSV: {error}")
                return
            if fields is None:
                return
            broken = lines.problem_since(start)
            if header is None:
                header = [name.strip() for name in fields]
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice and not broken:
                    broken = (start, f"two columns are called '{twice[0]}'")
                if broken:
                    yield Record(path, "line", broken[0], None, broken[1])
                    return
            elif broken:
                yield Record(path, "line", broken[0], None, broken[1])
            elif fields and len(fields) != len(header):
                yield Record(path, "line", start, None, f"{len(fields)} fields, but the header has {len(header)}")
            elif fields:
                yield Record(path, "line", start, dict(zip(header, fields, strict=True)))


class _Lines:
    """Decoded lines of a file, which remembers those that were not UTF-8."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.number = 0
        self.problems: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[str]:
        for raw in self.handle:
            self.number += 1
            line = raw.removeprefix(_BOM) if self.number == 1 else raw
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                self.problems.append((self.number, _not_utf8(error)))
                yield line.decode("utf-8", errors="replace")

    def problem_since(self, number: int) -> tuple[int, str] | None:
        found = [problem for problem in self.problems if problem[0] >= number]
        return found[0] if found else None


def _parquet(path: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(path, "row", number, values)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is a broken Parquet file: {reason}", "write the file again") from None


def _record(path: str, unit: Literal["line", "row"], number: int, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(path, unit, number, value)
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return Record(path, unit, number, None, f"the row is {names.get(type(value), 'a number')}, not a JSON object")


def _delimiter(path: str, header: str) -> str:
    if Path(path).suffix.lower() == ".tsv":
        return "\t"
    counts = {delimiter: header.count(delimiter) for delimiter in (",", ";", "\t")}
    return max(counts, key=lambda delimiter: counts[delimiter])


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte 0x{error.object[error.start]:02x})"


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = [entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES]
    near = get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"did you mean '{folder / near[0]}'?" if near else f"give {KINDS}, or a hub dataset as owner/name"
