"""Steps of training for the benchmarks: what both sides start from, this project's loss, and an optimizer step."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from common import Side, agree, autocast, build_model, free, peaks, print_peak, synchronize
from expunge.data.collate import Batch, pad_right
from expunge.data.encode import Encoded
from expunge.methods.base import Objective
from expunge.methods.step import Memory, Step
from expunge.models.packing import supports_packing
from expunge.models.passes import Forward
from expunge.models.prefix import open_prefix
from expunge.models.reference import build_reference
from expunge.pipeline.job import Job, prepare_parameters
from expunge.pipeline.trainer import Loss, MicroBatches
from expunge.recipe import LoraConfig, ModelConfig, TrainConfig


@dataclass(frozen=True)
class Setting:
    """What a training is made of, whichever side makes it."""

    model: str
    device: torch.device
    weights: torch.dtype  # in memory
    template: str
    objective: Objective | None  # None: fine-tuning
    terms: Mapping[str, float]  # weights of the retain terms
    half: bool = True  # bfloat16 autocast
    rows: int = 32  # forget rows, and as many retain rows
    batch: int = 8  # rows of each side in a step
    lora: int = 0
    rate: float = 1e-5
    checkpointing: bool = False
    trainable: tuple[str, ...] | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, **given: Any) -> Setting:
        """From the options that every benchmark has, and what is particular."""
        return cls(options.model, options.device, options.weights, options.template, **given)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each forget row is met once."""
        return -(-self.rows // self.batch)


class Training:
    """A model whose trained parameters are chosen, and the rows of each step: what both sides start from."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, setting.device
        model, rows = self.start(2 * setting.rows)
        fine_tuning = setting.objective is None
        self.job = Job(
            ModelConfig(id=setting.model),
            rows if fine_tuning else rows[setting.rows :],
            TrainConfig(
                epochs=2,
                lr=setting.rate,
                batch_size=setting.batch * (2 if fine_tuning else 1),
                gradient_checkpointing=setting.checkpointing,
            ),
            seed=0,
            forget=() if fine_tuning else rows[: setting.rows],
            objective=setting.objective,
            weights=setting.terms,
            lora=LoraConfig(rank=setting.lora) if setting.lora else None,
            trainable=setting.trainable,
        )
        self.plan = self.job.plan()
        self.model: Any = prepare_parameters(model, self.job)
        if setting.checkpointing:
            cast(Any, self.model).gradient_checkpointing_enable()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._batches = MicroBatches(self.plan, self.job.rows, None)

    def start(self, rows: int = 0) -> tuple[Any, list[Encoded]]:
        """The model as it is before training, a new one at each call, and that many rows."""
        setting = self.setting
        return build_model(setting.model, rows, device=self.device, dtype=setting.weights, template=setting.template)

    def micro_batch(self, number: int) -> dict[str, Any]:
        """Rows of a step by side, and the same as a batch on the device; two epochs come again and again."""
        made = self._batches[number % len(self._batches)]
        made["batch"] = made["batch"].to(self.device)
        return made

    def side(self, number: int, side: str) -> Batch:
        """The rows of one side of a step, padded apart."""
        rows = self._batches[number % len(self._batches)]["sides"][side]
        return pad_right([self.job.rows[row] for row in rows], rows, 0).to(self.device)

    def lengths(self, number: int) -> list[int]:
        """Real tokens of each row of a step, prompts included."""
        lengths: list[int] = self._batches[number % len(self._batches)]["batch"].attention_mask.sum(1).tolist()
        return lengths

    def step(self, loss: Callable[[int], Tensor]) -> Side:
        """Forward, backward, clipping and update; gives the loss."""
        model, half = self.model, self.setting.half
        optimizer = torch.optim.AdamW(self.trained, lr=self.setting.rate, fused=True)

        def step(number: int) -> float:
            model.train()
            with autocast(self.device, half):
                value = loss(number)
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return value.item()

        return step


class Ours:
    """The loss of a step, put together as the trainer does it; the pass of the start model is made at once."""

    def __init__(self, training: Training, *, packs: bool = True) -> None:
        self.training, job, model = training, training.job, training.model
        self._folder = tempfile.TemporaryDirectory()  # for what does not fit into RAM
        folder = Path(self._folder.name)
        self.packs = packs and supports_packing(model)
        lengths = [len(row.input_ids) for row in job.rows]
        self.prefix = None if job.train.gradient_checkpointing else open_prefix(model, lengths, folder / "prefix")
        began = time.perf_counter()
        with autocast(training.device, training.setting.half):
            needs = job.needs(training.plan)
            cache = build_reference(
                model, job.rows, needs, packs=self.packs, prefix=self.prefix, file=folder / "reference"
            )
        synchronize(training.device)
        self.reference_seconds = time.perf_counter() - began
        self.loss = Loss(job.objective, job.term_weights, cache, job.view, Memory(), self.packs, self.prefix)

    def forward(self, batch: Batch) -> Forward:
        """The pass that the loss asks for."""
        layer = self.loss.objective.hidden_layer() if self.loss.objective is not None else None
        logits = layer is None or any(self.loss.weights.values())
        return Forward(self.training.model, batch, layer, logits, self.packs, self.prefix)

    def __call__(self, number: int) -> Tensor:
        """The loss of a step."""
        given = self.training.micro_batch(number)
        counts = {side: len(rows) for side, rows in given["sides"].items()}
        step = Step(self.forward(given["batch"]), counts, self.loss.cache, None, given["totals"], 1.0)
        return torch.stack([value.float() for value in self.loss.terms(step).values()]).sum()

    def fill(self) -> None:
        """Run every row through the frozen layers, as the first epoch does."""
        if self.prefix is None:
            return
        for number in range(self.training.setting.steps_per_epoch):
            with autocast(self.training.device, self.training.setting.half):
                self.prefix.states(self.training.model, self.training.micro_batch(number)["batch"], self.packs)


#: One side's training, and its loss.
Make = Callable[[Training], Callable[[int], Tensor]]


def check_losses(setting: Setting, makes: Mapping[str, Make], tolerance: float = 0.01) -> dict[str, list[float]]:
    """Losses of three steps with updates (the last in the second epoch) in float32, two rows a side; they must agree.

    They are made on a few rows, for they cost as much as the steps that are timed.
    """
    small = replace(setting, half=False, weights=torch.float32, rows=4, batch=2)
    losses: dict[str, list[float]] = {}
    for name, make in makes.items():
        training = Training(small)
        step = training.step(make(training))
        losses[name] = [step(number) for number in range(3)]
        del training, step
        free()
    agree(losses, tolerance)
    print("losses of three steps in float32: " + "; ".join(f"{name} {values}" for name, values in losses.items()))
    return losses


def peak_memory(options: argparse.Namespace, setting: Setting, makes: Mapping[str, Make]) -> dict[str, int] | None:
    """Peaks by side. In a child process it prints the peak of three steps of one side, and gives None."""
    if not options.side:
        return peaks(tuple(makes))

    def work() -> None:
        training = Training(setting)
        step = training.step(makes[options.side](training))
        for number in range(3):
            step(number)

    print_peak(work, options.device)
    return None
