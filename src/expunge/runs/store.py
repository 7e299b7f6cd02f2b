"""The run directory: stages that appear whole, survive a kill, and are not done twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import expunge
from expunge.errors import UserError
from expunge.recipe import Recipe, digest, dump_yaml
from expunge.runs import atomic, record
from expunge.runs.events import EventLog, now
from expunge.runs.lock import NAME as LOCK
from expunge.runs.lock import FolderLock
from expunge.runs.provenance import command_line, environment
from expunge.runs.record import RunRecord

WORK = ".work"
STAGE = "stage.json"
#: files whose size is checked before a stage is taken as done; others (cards, notes) may be edited afterwards
_BULK = (".safetensors", ".parquet", ".npy", ".bin", ".gguf")

Work = Callable[[Path], Mapping[str, Any] | None]


@dataclass(frozen=True)
class StageResult:
    """Where a stage's product lies, the digest of its inputs, and what its work returned."""

    path: Path
    digest: str
    outputs: dict[str, Any]
    skipped: bool
    seconds: float


class RunDirectory:
    """A run on disk. Use it as a context manager: leaving it records done, failed or interrupted and frees the lock.

    Raises UserError if the folder holds something else, is in use, or can't be written.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = Path(path)
        self._new = not (self.path / record.NAME).exists()
        self._made = not self.path.exists()
        _claim(self.path)
        self._lock = FolderLock(self.path)
        try:
            self._open(recipe)
        except BaseException as error:
            if isinstance(error, UserError) and self._new:
                self._withdraw()
            self._lock.release()
            raise

    def _open(self, recipe: Recipe) -> None:
        self._record = RunRecord(self.path / record.NAME)
        self.events = EventLog(self.path / "events.jsonl")
        self._began = time.monotonic()
        self._stages: dict[str, bool] = {}  # name → skipped, of this process
        self._ended = False
        for left_over in (*self.path.glob(".*.tmp"), *(self.path / WORK).glob("aside-*")):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        recipe_digest = digest(recipe)
        before = self._record.data.get("recipe_digest")
        if before != recipe_digest:  # what another recipe recorded says nothing about this one
            self._record.data.update(stages={}, models={}, data={}, notes=[])
            atomic.write_text(self.path / "recipe.resolved.yaml", dump_yaml(recipe))
        self._record.data.setdefault("created", now())
        self._record.data.pop("error", None)
        self._record.replace(
            name=recipe.name,
            status="running",
            command=command_line(self.path),
            started=now(),
            finished=None,
            recipe_digest=recipe_digest,
            seed=recipe.seed,
            model=recipe.model.id,
            methods=[entry.method for entry in recipe.unlearn],
            result="merged" if recipe.merge else recipe.unlearn[-1].name,
            environment=environment(),
        )
        self.events.write(
            "run", status="start", recipe_digest=recipe_digest, recipe_changed=before not in (None, recipe_digest)
        )

    @property
    def skipped_all(self) -> bool:
        """Whether every stage so far was found done."""
        return bool(self._stages) and all(self._stages.values())

    def record(self, **fields: Any) -> None:
        """Merge `fields` into run.json, mappings key by key."""
        self._record.merge(**fields)

    def note(self, text: str) -> None:
        """A sentence that the report shows; the same one is kept once."""
        notes = self._record.data.get("notes", [])
        if text not in notes:
            self._record.merge(notes=[*notes, text])
            self.events.write("note", text=text)

    def stage(self, name: str, target: str, inputs: Mapping[str, Any], work: Work) -> StageResult:
        """Do `work(folder)` unless `target` stands with equal `inputs`; its product `folder/"out"` becomes `target`.

        The work folder survives a kill and is handed again to the same inputs. Raises UserError on a full disk.
        """
        key = digest(atomic.plain(inputs))
        place = self._place(target)
        finished = _finished(place, key)
        if finished is not None:
            self._mark(name, "skipped", key, target, seconds=finished["seconds"])
            return StageResult(place, key, finished["outputs"], True, finished["seconds"])
        began = time.monotonic()
        folder = self.path / WORK / f"{name.replace('/', '-')}-{key[:12]}"
        try:
            with atomic.disk_errors(self.path):
                folder.mkdir(parents=True, exist_ok=True)
                self._mark(name, "start", key, target, resumed=any(folder.iterdir()))
                made = self._work(name, key, folder, work, began)
                atomic.publish(folder / "out", place, folder.with_name(f"aside-{folder.name}"))
        except BaseException as error:
            self._fail(name, key, target, folder, error, time.monotonic() - began)
            raise
        self._tidy(name)
        self._mark(name, "done", key, target, seconds=made["seconds"])
        return StageResult(place, key, made["outputs"], False, made["seconds"])

    def _work(self, name: str, key: str, folder: Path, work: Work, began: float) -> dict[str, Any]:
        """What stage.json says once `folder/out` is complete."""
        out = folder / "out"
        complete = _finished(out, key)
        if complete is not None:  # killed between the last write and the rename
            return complete
        if out.exists():
            shutil.rmtree(out)
        outputs = atomic.plain(work(folder) or {})
        if not out.is_dir():
            raise RuntimeError(f"stage {name} left no folder 'out' in its work folder")
        files = {path.relative_to(out).as_posix(): path.stat().st_size for path in _files(out)}
        made = {
            "name": name,
            "digest": key,
            "outputs": outputs,
            "seconds": round(time.monotonic() - began, 3),
            "finished": now(),
            "expunge": expunge.__version__,
            "files": files,
        }
        atomic.sync_tree(out)
        atomic.write_json(out / STAGE, made)
        return made

    def _mark(self, name: str, status: str, key: str, target: str, **fields: Any) -> None:
        if status in ("done", "skipped"):
            self._stages[name] = status == "skipped"
        self.events.write("stage", stage=name, status=status, **fields)
        entry = {
            "status": {"start": "running", "skipped": "done"}.get(status, status),
            "seconds": fields.get("seconds"),
            "digest": key,
            "skipped": status == "skipped",
            "target": target,
            "error": fields.get("error"),
        }
        self._record.merge(stages={name: entry})

    def _fail(self, name: str, key: str, target: str, folder: Path, error: BaseException, seconds: float) -> None:
        cause = error.__cause__ or error
        if isinstance(cause, Exception) and atomic.disk_full(cause, self.path):
            shutil.rmtree(folder / "out", ignore_errors=True)  # gives back what the half of a product took
        status = _status_of(error)
        with suppress(UserError, OSError):  # on a full disk the record can't be written either; the error says it
            self._mark(name, status, key, target, seconds=round(seconds, 3), error=_sentence(error))
            self._record.merge(status=status, error=_sentence(error))

    def _tidy(self, name: str) -> None:
        """Remove the work folders of this stage, those of other inputs too."""
        pattern = re.compile(re.escape(name.replace("/", "-")) + r"-[0-9a-f]{12}")
        for folder in (self.path / WORK).iterdir():
            if pattern.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)

    def _place(self, target: str) -> Path:
        parts = PurePosixPath(target).parts
        if not parts or PurePosixPath(target).is_absolute() or ".." in parts or parts[0].startswith("."):
            raise ValueError(f"stage target '{target}' is not inside the run directory")
        return self.path.joinpath(*parts)

    def finish(self, status: str = "done", error: BaseException | None = None) -> None:
        """Record how the run ended; its seconds are those of its stages, whenever they were done."""
        self._ended = True
        work = sum(entry.get("seconds") or 0 for entry in self._record.data.get("stages", {}).values())
        ending = {} if error is None else {"error": _sentence(error)}
        self._record.merge(status=status, finished=now(), seconds=round(work, 3), **ending)
        self.events.write("run", status=status, seconds=round(time.monotonic() - self._began, 3), **ending)
        with suppress(OSError):
            os.rmdir(self.path / WORK)  # only if empty

    def close(self) -> None:
        """Free the lock; the object is of no use afterwards."""
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._ended:
                self.finish()
            elif error is not None:
                with suppress(UserError, OSError):
                    self.finish(_status_of(error), error)
                if isinstance(error, UserError) and self._new and self._nothing_done():
                    self._withdraw()
        finally:
            self.close()

    def _nothing_done(self) -> bool:
        """Whether this run has neither a product nor a beginning of one."""
        if any((self.path / entry["target"]).exists() for entry in self._record.data.get("stages", {}).values()):
            return False
        return not any(any(folder.iterdir()) for folder in (self.path / WORK).glob("*"))

    def _withdraw(self) -> None:
        """A mistake that stopped a new run before it made anything leaves no folder behind."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)
        with suppress(OSError):
            for name in (record.NAME, "events.jsonl", "recipe.resolved.yaml", LOCK):
                (self.path / name).unlink(missing_ok=True)
            if self._made:
                self.path.rmdir()


def _claim(path: Path) -> None:
    """Make the folder, or see that it is a run's. Raises UserError otherwise."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder", "choose another folder with -o")
    try:
        with atomic.disk_errors(path.parent):
            path.mkdir(parents=True, exist_ok=True)
            entries = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise UserError(f"{path} can't be made: {error.strerror}", "choose another folder with -o") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path} can't be written", "choose another folder with -o")
    if record.NAME in entries:
        record.read_record(path / record.NAME)
        return
    foreign = [
        name for name in entries if name not in (LOCK, WORK, "recipe.resolved.yaml") and not name.endswith(".tmp")
    ]
    if foreign:
        raise UserError(f"{path} holds something else ({foreign[0]})", "choose a new or empty folder with -o")


def _finished(place: Path, key: str) -> dict[str, Any] | None:
    """The stage.json of `place` if it was made from these inputs and its files are still there."""
    try:
        made = json.loads((place / STAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(made, dict) or made.get("digest") != key:
        return None
    for name, size in made.get("files", {}).items():
        file = place / name
        if not file.exists() or (file.suffix in _BULK and file.stat().st_size != size):
            return None
    return made


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _status_of(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _sentence(error: BaseException) -> str:
    if isinstance(error, UserError):
        return error.message
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return traceback.format_exception_only(error)[-1].strip()
