"""One process per run directory: a lock that dies with its process, so that a kill leaves nothing to clean up."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import IO

from expunge.errors import UserError

NAME = ".lock"
_PATIENCE = 5  # tries, 0.1 s apart: `is_running` of another process holds the lock for an instant


class FolderLock:
    """An exclusive lock on `folder` for as long as this object lives. Raises UserError if another process has it."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] = (folder / NAME).open("a+", encoding="utf-8")
        for left in reversed(range(_PATIENCE)):
            if _try_lock(self._file):
                break
            if left:
                time.sleep(0.1)
        else:
            self._file.seek(0)
            owner = self._file.read().strip()
            self._file.close()
            raise UserError(
                f"{folder} is in use by another expunge process" + (f" (pid {owner})" if owner else ""),
                "wait until it is done, or choose another folder with -o",
            )
        self._file.seek(0)
        self._file.truncate()
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Give the lock back."""
        self._file.close()


def is_running(folder: Path) -> bool:
    """Whether a living process holds the lock of `folder`."""
    try:
        with (folder / NAME).open("r+", encoding="utf-8") as file:
            return not _try_lock(file)
    except OSError:
        return False


def _try_lock(file: IO[str]) -> bool:
    """True if the lock is ours now, or if this file system has no locks at all."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # far behind the pid: Windows locks are mandatory, and the pid is to be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
    return True
