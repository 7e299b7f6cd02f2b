"""One thread for torch: many small tensors, and two busy processes on two cores wait for each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

# shapes and types of the tensor rooms are checked at run time, in tests alone
_hook = install_import_hook(
    ["expunge.methods", "expunge.models", "expunge.merging", "expunge.pipeline.gradients"], "beartype.beartype"
)
_hook.__enter__()


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug in a test: waiting for the disk only costs time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def three(tmp_path: Path) -> Any:
    """A base and two specialists in `base`, `a` and `b`."""
    from merging_models import write_three

    return write_three(tmp_path)
