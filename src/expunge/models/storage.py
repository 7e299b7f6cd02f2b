"""Large tensors that are written once and read row by row: in RAM, or past a limit in a memory-mapped file."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

#: Tensors beyond this many bytes go to a file.
RAM_LIMIT = 1 << 30
#: Part of the free disk that one file may take.
DISK_PART = 0.5


def allocate(shape: Sequence[int], dtype: torch.dtype, file: Path | None) -> Tensor:
    """An uninitialised tensor; beyond RAM_LIMIT it lives in `file`, if there is one."""
    count = math.prod(shape)
    if file is None or count * dtype.itemsize <= RAM_LIMIT:
        return torch.empty(*shape, dtype=dtype)
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(*shape)


def has_room(size: int, file: Path | None) -> bool:
    """Whether a tensor of this many bytes has a place: in RAM, or in part of the disk that `file` is on."""
    return size <= RAM_LIMIT or (file is not None and size <= DISK_PART * shutil.disk_usage(file.parent).free)
