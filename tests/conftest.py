"""One thread for torch: many small tensors, and two busy processes on two cores wait for each other."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# shapes and types of the tensor rooms are checked at run time, in tests alone
_hook = install_import_hook(
    [
        "expunge.methods.step",
        "expunge.models.forward",
        "expunge.models.reference",
        "expunge.models.packing",
        "expunge.merging",
    ],
    "beartype.beartype",
)
_hook.__enter__()
