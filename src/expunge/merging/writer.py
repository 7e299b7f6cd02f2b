"""Writing a checkpoint tensor by tensor: shards and index in a folder beside, which takes its name when it is whole.

Whenever a shard is finished, its sha256 is noted in that folder. After a kill or Ctrl-C the same merge keeps the shards
that still have it, and writes the others; any other merge clears them away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.checkpoint import CODES, INDEX, SINGLE, TensorInfo
from expunge.runs.atomic import disk_errors, publish, sync_tree, write_json
from expunge.runs.lock import FolderLock

RECORD = "merge.json"
MADE_BY = "expunge merge"
SHARD_BYTES = 5 * 10**9
_SLACK = 1 << 20  # bytes for index, card and the file system's own bookkeeping


class CheckpointWriter:
    """Context manager: `write` each tensor of `order`, then `publish`.

    A mistake leaves nothing behind; Ctrl-C and a kill leave the finished shards. `order` lacks what those hold.
    """

    def __init__(
        self,
        output: Path,
        tensors: Mapping[str, TensorInfo],
        *,
        beside: Sequence[Path] = (),
        shard_bytes: int = SHARD_BYTES,
        key: str = "",
    ) -> None:
        """Check the place and the free disk space; `beside` are small files that are copied. Raises UserError.

        `key` stands for all that decides what is written: shards are kept for the same key only, and never without.
        """
        check_output(output)
        self.output = output = Path(os.path.abspath(output))  # "." has no name that .partial could be added to
        self.partial = output.with_name(f"{output.name}.partial")
        self.rows: dict[str, Any] = {}
        """What was given to `write` beside each tensor of a finished shard, also of those that were kept."""
        self._key = key
        self._finished: dict[str, dict[str, Any]] = {}  # shard → sha256 and rows
        # wide dtypes first, so that every tensor begins at a multiple of its element size and can be memory-mapped
        self._tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        self.order = list(self._tensors)
        self._shards = plan_shards(self._tensors, shard_bytes)
        self._beside = list(beside)
        needed = sum(info.nbytes for info in tensors.values()) + sum(file.stat().st_size for file in beside)
        check_room(output, needed - _occupied(self.partial))  # what is there is kept or makes room
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._coming: list[int] = []
        self._shard = -1
        self._waiting: list[str] = []
        self._published = False

    def __enter__(self) -> CheckpointWriter:
        with disk_errors(self.output.parent):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            if self.partial.exists() and not _is_ours(self.partial, finished=False):
                raise UserError(f"{self.partial} is in the way", "move it, or choose another folder with -o")
            self.partial.mkdir(exist_ok=True)
        self._lock = FolderLock(self.partial)
        try:
            with disk_errors(self.output.parent):
                self._finished = self._kept()
                _empty(self.partial, but=self._finished)
                self._note()
                for file in self._beside:
                    shutil.copyfile(file, self.partial / file.name)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self._coming = [shard for shard in range(len(self._shards)) if self._name(shard) not in self._finished]
        self.order = [name for shard in self._coming for name in self._shards[shard]]
        for shard in self._finished.values():
            self.rows.update(shard["rows"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        interrupted = error is not None and not isinstance(error, Exception)
        if not self._published and not (interrupted and self._finished and self._key):
            shutil.rmtree(self.partial, ignore_errors=True)
        elif self._file is not None:
            (self.partial / self._name(self._shard)).unlink(missing_ok=True)
        self._lock.release()

    @property
    def digests(self) -> dict[str, str]:
        """Shard → sha256 of what is finished, in order."""
        names = map(self._name, range(len(self._shards)))
        return {name: self._finished[name]["sha256"] for name in names if name in self._finished}

    def write(self, name: str, tensor: Tensor, row: Any = None) -> None:
        """Append a tensor to its shard; `row` is JSON data that is remembered with it."""
        if not self._waiting:
            self._next_shard()
        expected, info = self._waiting.pop(0), self._tensors[name]
        if name != expected or tensor.shape != info.shape or tensor.dtype != info.dtype:
            raise AssertionError(f"{name} {tensor.dtype} {tuple(tensor.shape)} where {expected} {info} was announced")
        if tensor.numel():
            data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            self._append(memoryview(data))
        self.rows[name] = row
        if not self._waiting:
            self._end_shard()

    def publish(self, record: Mapping[str, Any], card: str) -> None:
        """Write index, record and card, make all of it durable, and rename the folder to its final name."""
        if self._waiting or self._coming:
            raise AssertionError("tensors are missing")
        with disk_errors(self.output.parent):
            if len(self._shards) > 1:
                write_json(self.partial / INDEX, self._index())
            (self.partial / "README.md").write_text(card, encoding="utf-8")
            files = sorted({entry.name for entry in self.partial.iterdir() if not entry.name.startswith(".")})
            whole = {**record, "weights_sha256": self.digests, "files": files}
            write_json(self.partial / RECORD, {"made_by": MADE_BY, "finished": True, **whole})
            sync_tree(self.partial)
            publish(self.partial, self.output, self.output.with_name(f".{self.output.name}.replaced-{os.getpid()}"))
            self._published = True
            (self.output / ".lock").unlink(missing_ok=True)  # held until here, so that nobody else took the folder

    def _next_shard(self) -> None:
        self._shard = self._coming.pop(0)
        self._waiting = list(self._shards[self._shard])
        header = _header({name: self._tensors[name] for name in self._waiting})
        with disk_errors(self.output.parent):
            self._file = (self.partial / self._name(self._shard)).open("wb")
        self._hash = hashlib.sha256()
        self._append(memoryview(header))

    def _append(self, data: memoryview) -> None:
        assert self._file is not None
        with disk_errors(self.output.parent):
            self._file.write(data)
        self._hash.update(data)

    def _end_shard(self) -> None:
        assert self._file is not None
        with disk_errors(self.output.parent):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        rows = {name: self.rows[name] for name in self._shards[self._shard]}
        self._finished[self._name(self._shard)] = {"sha256": self._hash.hexdigest(), "rows": rows}
        with disk_errors(self.output.parent):
            self._note()

    def _note(self) -> None:
        write_json(
            self.partial / RECORD,
            {"made_by": MADE_BY, "finished": False, "key": self._key, "shards": self._finished},
        )

    def _kept(self) -> dict[str, dict[str, Any]]:
        """The finished shards of an interrupted merge of the same, each with the sha256 that was noted then."""
        record = _read_record(self.partial)
        if not self._key or record.get("key") != self._key:
            return {}
        shards = [self._name(shard) for shard in range(len(self._shards))]
        noted = {name: record["shards"][name] for name in shards if name in record["shards"]}
        return {name: shard for name, shard in noted.items() if _sha256(self.partial / name) == shard["sha256"]}

    def _name(self, shard: int) -> str:
        total = len(self._shards)
        return SINGLE if total == 1 else f"model-{shard + 1:05d}-of-{total:05d}.safetensors"

    def _index(self) -> dict[str, Any]:
        total = sum(info.nbytes for info in self._tensors.values())
        placed = {name: self._name(i) for i, names in enumerate(self._shards) for name in names}
        return {"metadata": {"total_size": total}, "weight_map": placed}


def plan_shards(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds `shard_bytes` unless a single tensor does."""
    shards: list[list[str]] = []
    room = -1
    for name, info in tensors.items():
        if not shards or info.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= info.nbytes
    return shards


def check_output(output: Path) -> bool:
    """Whether `output` holds an earlier merge of ours, which is replaced.

    Raises UserError if it is a file, or a folder that holds anything else.
    """
    if output.is_file() or output.is_symlink():
        raise UserError(f"{output} is not a folder", "choose another folder with -o")
    occupied = output.is_dir() and any(output.iterdir())
    if occupied and not _is_ours(output, finished=True):
        raise UserError(f"{output} holds something else", "choose a new or empty folder with -o")
    return occupied


def _is_ours(folder: Path, *, finished: bool) -> bool:
    """Whether all that `folder` holds was written by a merge."""
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(f".{RECORD}.")}
    record = _read_record(folder)
    if not record:
        return not finished and present <= {".lock"}
    return not finished or present <= {".lock", *record.get("files", [])}


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of a merge, finished or not; empty where there is none of ours."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("made_by") == MADE_BY else {}


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _occupied(partial: Path) -> int:
    """Bytes that an unfinished merge left in a folder."""
    return sum(file.stat().st_size for file in partial.iterdir()) if _read_record(partial) else 0


def check_room(output: Path, needed: int) -> None:
    """Raises UserError if the disk that is to hold `output` has fewer free bytes than needed."""
    place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed + _SLACK:
        raise UserError(
            f"not enough disk for {output}: {(needed + _SLACK) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            "free some space, or choose a folder on another disk with -o",
        )


def _empty(folder: Path, but: Container[str]) -> None:
    for entry in folder.iterdir():
        if entry.name in but:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The head of a safetensors file: its length, then JSON padded so that the data begin at a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        end = offset + info.nbytes
        entries[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
