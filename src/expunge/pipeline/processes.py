"""The processes of one run: how many, which one this is, and how they wait for each other."""

from __future__ import annotations

import os
from typing import Any


def process_count() -> int:
    """Processes that a launcher (accelerate, torchrun) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Number of this process, 0 for the one that writes files."""
    return int(os.environ.get("RANK", "0"))


def broadcast(value: Any) -> Any:
    """The value that process 0 has, on every process."""
    if process_count() == 1:
        return value
    import torch.distributed as dist

    _start()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        import torch.distributed as dist

        _start()
        dist.barrier()


def _start() -> None:
    """Open the process group through accelerate, so that its settings (backend, device) hold."""
    from accelerate import PartialState

    PartialState()
