"""Tensors worked on ahead by threads, and handed over in order: bounded memory, whatever the number of threads."""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Result = TypeVar("Result")

_MANY = 4
_IN_ADVANCE = 4  # results per thread that may wait for their turn
_SMALL = 1 << 18  # bytes below which the allocator does well
_KEPT = 1 << 26  # bytes that `room` keeps
_UNUSED = 3  # references to pages while they are looked at: the list's, the loop's and the count's own

_lock = Lock()
_kept: list[mmap.mmap] = []


def processors() -> int:
    """How many threads merge: one for each processor that this process may use, and few are enough for a disk."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MANY, available)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within, torch uses one thread per call: several calls run at once, and sums don't depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
    work: Callable[[str], Result], names: Sequence[str], *, needs: Callable[[str], int], budget: int, threads: int
) -> Generator[tuple[str, Result], None, None]:
    """(name, work(name)) in the order of `names`, computed ahead by `threads` as long as `needs` adds up to `budget`.

    A name needs its bytes from its start until the next one is asked for. One alone may exceed the budget.
    """
    if threads <= 1:
        for name in names:
            yield name, work(name)
        return
    waiting: deque[tuple[str, Future[Result]]] = deque()
    used, held = 0, ""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
    try:
        for name in names:
            while waiting and (used + needs(name) > budget or len(waiting) >= _IN_ADVANCE * threads):
                held, future = waiting.popleft()
                yield held, future.result()
                del future
                used -= needs(held)
            waiting.append((name, pool.submit(work, name)))
            used += needs(name)
        while waiting:
            held, future = waiting.popleft()
            yield held, future.result()
            del future
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def room(shape: Sequence[int]) -> Float[Tensor, "*shape"]:
    """An uninitialised float32 tensor on the CPU, in memory that was filled before if there is some left.

    Filling fresh memory costs more than the arithmetic on it, because the system first clears it, page by page.
    """
    nbytes = 4 * math.prod(shape)
    if nbytes < _SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=torch.float32)
    with _lock:
        for pages in _kept:
            if len(pages) == nbytes and sys.getrefcount(pages) == _UNUSED:
                return torch.frombuffer(pages, dtype=torch.float32).view(tuple(shape))
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    with _lock:
        if sum(map(len, _kept)) + nbytes <= _KEPT:
            _kept.append(pages)
    return torch.frombuffer(pages, dtype=torch.float32).view(tuple(shape))


def leave_room() -> None:
    """Give back the memory that `room` keeps."""
    with _lock:
        _kept.clear()
