"""What a training leaves beside its model: the adapter at chosen steps, and the terms of its loss step by step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from expunge.errors import UserError
from expunge.models.load import resolve_folder
from expunge.pipeline.processes import process_rank
from expunge.recipe import ModelConfig
from expunge.runs.atomic import write_json

#: Inside the folder of a trained adapter.
SNAPSHOTS, TERMS = "snapshots", "terms.json"
_LINES = "terms.jsonl"


class Recorder:
    """Keeps the adapter after chosen optimizer steps (0: as it begins), and the loss terms of every step.

    Both lie in the training's work folder until it is done, so that a killed training goes on with them: a snapshot is
    written before the checkpoint of its step, and a step that is made again writes the same again.
    """

    def __init__(self, steps: Iterable[int] = ()) -> None:
        self.steps = sorted(set(steps))

    def inputs(self) -> dict[str, Any]:
        """What the training's product depends on beside the training."""
        return {"recorded": self.steps}

    def callbacks(self, work: Path, base: ModelConfig) -> list[TrainerCallback]:
        """What the trainer tells of its steps; `base` is the model that the adapters are for."""
        return [_Snapshots(work / SNAPSHOTS, self.steps, str(resolve_folder(base.id, base.revision)))]

    def write(self, work: Path, step: int, terms: Mapping[str, float]) -> None:
        """Add the terms of a step."""
        if process_rank() == 0:
            with (work / _LINES).open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps({'step': step, **terms})}")  # a line that a kill cut short ends here

    def finish(self, work: Path) -> None:
        """Put what was kept beside the trained adapter, in `work/out`.

        Raises RuntimeError if a snapshot is missing.
        """
        if process_rank() != 0:
            return
        for step in self.steps:
            source = _place(work / SNAPSHOTS, step)
            if not source.is_dir():
                raise RuntimeError(f"the training made no step {step}, whose adapter was to be kept")
            # a second name, not a move: whoever is killed here finds the work folder as it was
            shutil.copytree(source, _place(work / "out" / SNAPSHOTS, step), copy_function=_link)
        write_json(work / "out" / TERMS, _read_lines(work / _LINES))


class _Snapshots(TrainerCallback):
    """Writes the adapter after the steps that are wanted, each folder whole or not at all."""

    def __init__(self, folder: Path, steps: Iterable[int], base: str) -> None:
        self.folder, self.steps, self.base = folder, set(steps), base

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The adapter before the first step; a resumed training is beyond it."""
        if state.global_step == 0:
            self._keep(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The adapter after a step that is wanted."""
        self._keep(model, state.global_step)

    def _keep(self, model: Any, step: int) -> None:
        if step not in self.steps or process_rank() != 0:
            return
        if not hasattr(model, "peft_config"):
            raise UserError("snapshots are of adapters, and this training has none", "give `lora`")
        place = _place(self.folder, step)
        part = place.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        for config in model.peft_config.values():
            config.base_model_name_or_path = self.base
        model.save_pretrained(part, safe_serialization=True)
        (part / "README.md").unlink(missing_ok=True)
        part.rename(place)


def read_snapshots(folder: Path) -> dict[int, Path]:
    """The kept adapters of a trained one by step, in order."""
    found = {int(path.name.rpartition("-")[2]): path for path in (folder / SNAPSHOTS).glob("step-*")}
    return dict(sorted(found.items()))


def read_terms(folder: Path) -> list[dict[str, float]]:
    """The loss terms of each step of a trained adapter; "step" is among them."""
    found: list[dict[str, float]] = json.loads((folder / TERMS).read_text(encoding="utf-8"))
    return found


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _read_lines(file: Path) -> list[dict[str, float]]:
    """The last that was written of each step; lines that a kill cut short are left out, their step is made again."""
    found: dict[int, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            terms = json.loads(line)
        except ValueError:
            continue
        found[int(terms["step"])] = terms
    return [found[step] for step in sorted(found)]


def _link(source: str, target: str) -> str:
    """A second name of a file, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
