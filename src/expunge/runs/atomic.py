"""Files that are either there whole or not there: temp file in the same folder, fsync, rename."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from expunge.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = ("no space left on device", "os error 28", "disk quota exceeded", "os error 122")
_NEARLY_NOTHING = 1 << 20  # bytes


def write_bytes(path: Path, data: bytes) -> None:
    """`data` under the name `path`, whole or not at all. Raises UserError on a full disk."""
    with replacing(path) as work, work.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """UTF-8 `text` under the name `path`, whole or not at all. Raises UserError on a full disk."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON that every parser reads (NaN and infinities become null), whole or not at all."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name `path` at the end, and is removed if anything fails."""
    work = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield work
            _sync(work)
            os.replace(work, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            work.unlink()


def sync_tree(folder: Path) -> None:
    """Make every file below `folder` durable (fsync), so that a rename never publishes names without content."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def publish(source: Path, target: Path, aside: Path) -> None:
    """Rename the folder `source` to `target`; what stood there goes to `aside` first and is then removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.exists()
    if old:
        os.replace(target, aside)
    try:
        os.replace(source, target)
    except BaseException:
        if old:
            os.replace(aside, target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns "no space left" into a UserError that names `folder`."""
    try:
        yield
    except Exception as error:
        full = disk_full(error, folder)
        if full is None:
            raise
        raise full from error


def disk_full(error: BaseException, folder: Path) -> UserError | None:
    """The sentence for a full disk if that is what `error` is about, else None."""
    if isinstance(error, UserError) or not _means_full(error, folder):
        return None
    return UserError(
        f"no space left on the disk that holds {folder}",
        "free some space, then run the same command again: finished stages are kept",
    )


def _means_full(error: BaseException, folder: Path) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(words in str(seen).lower() for words in _FULL_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    # torch's zip writer says "unexpected pos" and loses the errno; what the disk says is then the only witness
    silent = isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is None)
    return silent and 0 <= _free(folder) < _NEARLY_NOTHING


def _free(folder: Path) -> int:
    """Free bytes of the disk that holds `folder`; -1 if nobody knows."""
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            with suppress(OSError):
                return shutil.disk_usage(place).free
            return -1
    return -1


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # folders can't be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (*_FULL, errno.EIO):
            raise  # others: a file system that can't fsync
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """`value` as JSON data: models and dataclasses as mappings, paths as text, NaN and infinities as None.

    Raises TypeError for anything whose text would differ from process to process.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(entry) for entry in value)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy and torch scalars
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} is not plain data")
