"""Stop rules: a cheap scoring pass every few steps, and the best model that was looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from expunge.metrics.base import METRICS, Statistic, mean
from expunge.pipeline.job import Watched
from expunge.pipeline.processes import barrier, process_rank
from expunge.recipe import StopRule
from expunge.runs.atomic import write_json
from expunge.scoring.distributed import over_ranks
from expunge.scoring.scores import score

#: Called with the step and the value by rule of each look.
OnLook = Callable[[int, Mapping[str, float]], None]


class Stopping(TrainerCallback):
    """Ends a training when a rule fires.

    On a forget split a rule is a goal: the model at the crossing or the one looked at before it is kept, whichever is
    nearer to the threshold. Elsewhere it is a guard: the model before the crossing is kept.
    """

    def __init__(
        self, rules: Sequence[StopRule], watched: Mapping[str, Watched], work: Path, autocast: bool, on_look: OnLook
    ) -> None:
        self.rules, self.watched, self.autocast, self.on_look = rules, watched, autocast, on_look
        self.kept = work / "kept.safetensors"
        self.last: Path = work / "kept.json"
        self.note = "no stop rule fired" if rules else None

    def holds(self, model: nn.Module) -> bool:
        """Look before the first step: whether a rule holds already, so that there is nothing to train for."""
        return bool(self.rules) and self._stops(model, 0, self.rules)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look, where a rule wants it; stop, where one fires."""
        step = state.global_step
        due = [rule for rule in self.rules if step % rule.every == 0 or step == state.max_steps]
        if due and self._stops(model, step, due):
            control.should_training_stop, control.should_save = True, False

    def _stops(self, model: nn.Module, step: int, due: Sequence[StopRule]) -> bool:
        """Whether one of the rules fires; if so, the model to keep is in `model`, else this one is kept for later."""
        distances = self._look(model, due)
        self.on_look(step, {str(rule): distances[i][0] for i, rule in enumerate(due)})
        fired = [i for i, (_, distance) in enumerate(distances) if distance >= 0]
        if not fired:
            self._keep(model, step, {str(rule): distances[i][1] for i, rule in enumerate(due)})
            return False
        self._choose(model, step, due, distances, fired)
        return True

    def _look(self, model: nn.Module, rules: Sequence[StopRule]) -> list[tuple[float, float]]:
        """Per rule its value, and how far the value is beyond the threshold (negative: not there yet)."""
        tables: dict[tuple[str, int | None], Any] = {}

        def value(metric: str, split: str, limit: int | None) -> float:
            if (split, limit) not in tables:
                rows = self.watched[split].rows[:limit]
                device = next(model.parameters()).device
                with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                    tables[split, limit] = over_ranks(rows, lambda part: score(model, part, batch_size=16))
            entry = METRICS.get(metric)
            values = entry.compute([tables[split, limit]])
            assert not isinstance(values, Statistic)
            found = mean(values[~np.isnan(values)], entry.average)
            return float("nan") if found is None else found

        found = []
        for rule in rules:
            now = value(rule.metric, rule.split, rule.limit)
            threshold = rule.above if rule.above is not None else rule.below
            goal = value(rule.metric, threshold, rule.limit) if isinstance(threshold, str) else float(threshold or 0)
            found.append((now, now - goal if rule.above is not None else goal - now))
        return found

    def _keep(self, model: nn.Module, step: int, distances: Mapping[str, float]) -> None:
        if process_rank() == 0:
            save_file(trained_state(model), self.kept)
            write_json(self.last, {"step": step, "distances": dict(distances)})
        barrier()

    def _choose(
        self,
        model: nn.Module,
        step: int,
        due: Sequence[StopRule],
        distances: Sequence[tuple[float, float]],
        fired: Sequence[int],
    ) -> None:
        first = due[fired[0]]
        if step == 0:
            self.note = f"not trained: {first} holds already"
            return
        before = json.loads(self.last.read_text(encoding="utf-8")) if self.last.is_file() else None
        guards = [i for i in fired if self.watched[due[i].split].role != "forget"]
        first = due[(guards or fired)[0]]
        back = bool(guards)
        if not guards and before is not None:
            past = before["distances"].get(str(first))
            back = past is not None and -past < distances[fired[0]][1]
        self.note = f"stopped at step {step}: {first}"
        if back and before is not None:
            load_trained_state(model, load_file(self.kept))
            self.note += f"; the model of step {before['step']} is kept"


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put kept parameters back."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.copy_(state[name])
