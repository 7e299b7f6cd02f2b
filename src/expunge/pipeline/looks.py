"""Looks at a model while it is trained: after chosen steps it is scored as if it stood alone, and trained further."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch
from transformers import TrainerCallback

from expunge.pipeline.asked import Rows
from expunge.recipe import EvaluateConfig
from expunge.scoring.scores import score


class Looks(TrainerCallback):
    """Shows the model after certain optimizer steps: `look(step, model)`."""

    def __init__(self, steps: Collection[int], look: Callable[[int, Any], None]) -> None:
        self.steps, self.look = frozenset(steps), look

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look, if it is time."""
        if state.global_step in self.steps:
            self.look(state.global_step, model)


@contextmanager
def as_evaluated(module: Any, dtype: str) -> Iterator[None]:
    """Within it, the forward is the model's own in the evaluation's dtype.

    Training wraps the forward in an autocast of its own, which would flip argmax hits.
    """
    device, chosen = next(module.parameters()).device, getattr(torch, dtype)
    wrapped = module.__dict__.pop("forward", None)
    try:
        with torch.autocast(device.type, chosen, enabled=chosen != torch.float32):
            yield
    finally:
        if wrapped is not None:
            module.forward = wrapped


def score_rows(module: Any, tokenizer: Any, rows: Rows, evaluate: EvaluateConfig) -> dict[str, pa.Table]:
    """The SCORES table of every split, from one pass over all of them; the model stays as it was."""
    whole = [row for split in rows.values() for row in split]
    with as_evaluated(module, evaluate.dtype):
        table = score(module, whole, batch_size=evaluate.batch_size, tokenizer=tokenizer)
    found, start = {}, 0
    for split, chosen in rows.items():
        found[split] = table.slice(start, len(chosen))
        start += len(chosen)
    return found
