"""One training run: model in, rows in, a trained model on disk out; killed and called again, it goes on."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.methods.base import Objective
from expunge.models.forward import unwrap
from expunge.models.load import load_model
from expunge.models.lora import add_lora
from expunge.models.reference import ReferenceCache, build_reference
from expunge.models.save import save_model
from expunge.pipeline.plan import Plan, make_plan
from expunge.pipeline.processes import process_count, process_rank
from expunge.pipeline.trainer import MicroBatches, OnStep, UnlearnTrainer, training_arguments
from expunge.recipe import LoraConfig, ModelConfig, TrainConfig
from expunge.runs.atomic import disk_errors


@dataclass(frozen=True)
class Job:
    """Everything that a training run is."""

    model: ModelConfig
    retain: Sequence[Encoded]
    train: TrainConfig
    seed: int
    forget: Sequence[Encoded] = ()
    objective: Objective | None = None  # None: plain fine-tuning on the retain side
    weights: Mapping[str, float] | None = None  # of the terms forget, nll and kl
    retain_batch: int | None = None
    selection: Sequence[np.ndarray] | None = None  # per forget row, bool over its supervised tokens
    lora: LoraConfig | None = None
    trainable: Sequence[str] | None = None

    @property
    def term_weights(self) -> Mapping[str, float]:
        """Weights by term; plain fine-tuning is the NLL of the retain side."""
        return self.weights if self.weights is not None else {"nll": 1.0}

    def plan(self, world: int = 1) -> Plan:
        """The steps of the run."""
        seen = self.selection if self.selection is not None else None
        forget = (
            [int(mask.sum()) for mask in seen] if seen is not None else [row.supervised_tokens for row in self.forget]
        )
        retain = [row.supervised_tokens for row in self.retain]
        return make_plan(forget, retain, self.train, self.retain_batch, self.seed, world)


def train(
    job: Job,
    work: Path,
    *,
    on_step: OnStep = lambda step, terms: None,
    on_reference: Callable[[int], None] = lambda rows: None,
) -> Path:
    """Train and write `work/out`; checkpoints in `work/checkpoints` are resumed. Returns the folder of the model."""
    torch.manual_seed(job.seed)
    loaded = load_model(job.model)
    model: nn.Module = loaded.model
    if hasattr(model, "peft_config"):
        raise UserError(
            f"{job.model.id} is an adapter; training starts from a whole model",
            "merge it first: expunge merge ADAPTER --method linear -o FOLDER",
        )
    if job.objective is not None:
        job.objective.check(model)
    world, rank = process_count(), process_rank()
    plan = job.plan(world)
    arguments = training_arguments(job.train, work / "checkpoints", plan.steps, job.seed)
    model = prepare_parameters(model, job)
    model.to(arguments.device)
    with torch.autocast(arguments.device.type, torch.bfloat16, enabled=job.train.precision == "bfloat16"):
        forget_cache, retain_cache = _references(model, job, plan, work, rank, world, on_reference)
    trainer = UnlearnTrainer(
        model,
        MicroBatches(plan, job.forget, job.retain, job.selection),
        arguments,
        objective=job.objective,
        weights=job.term_weights,
        forget_cache=forget_cache,
        retain_cache=retain_cache,
        on_step=on_step,
    )
    try:
        with disk_errors(work):
            trainer.train(resume_from_checkpoint=_last_checkpoint(work / "checkpoints"))
    except Exception:
        if rank == 0:
            _remove_half_checkpoints(work / "checkpoints")  # what a full disk left takes the room of the next try
        raise
    out = work / "out"
    if rank == 0:
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        if job.objective is None and job.lora is not None:  # what was taught becomes a whole model to unlearn from
            trained = trained.merge_and_unload()
        save_model(trained.eval(), loaded.tokenizer, out, base=str(loaded.folder))
        del trained
    # a trainer and its model refer to each other: without this, the next stage's model would stand beside this one
    del trainer, model, loaded
    gc.collect()
    return out


def prepare_parameters(model: nn.Module, job: Job) -> nn.Module:
    """Adapters or the chosen parameters; everything else is frozen."""
    patterns = job.trainable
    if patterns is None and job.objective is not None:
        patterns = job.objective.trainable()
    if job.lora is not None:
        if job.trainable is not None:
            raise UserError(
                "`trainable` chooses parameters of the model, `lora` adds others",
                "give one of them; lora.targets chooses modules",
            )
        model = add_lora(model, job.lora, job.seed)
    elif patterns is not None:
        chosen = [name for name, _ in model.named_parameters() if any(re.search(p, name) for p in patterns)]
        if not chosen:
            raise UserError(
                f"no parameter matches {', '.join(patterns)}",
                "patterns are regular expressions on names such as model.layers.7.mlp.down_proj.weight",
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in set(chosen))
    config: Any = unwrap(model).config
    config.use_cache = False
    if job.train.gradient_checkpointing:
        unwrap(model).enable_input_require_grads()  # type: ignore[operator]
    return model


def _references(
    model: nn.Module, job: Job, plan: Plan, work: Path, rank: int, world: int, progress: Callable[[int], None]
) -> tuple[ReferenceCache, ReferenceCache]:
    """What the loss needs of the start model, for the rows that this process will see."""
    check_terms(job)
    layer = job.objective.hidden_layer() if job.objective is not None else None
    needs_logprobs = job.objective is not None and job.objective.about.reference
    forget = build_reference(
        model, job.forget, plan.rows("forget", rank, world), logprobs=needs_logprobs, progress=progress
    )
    needs_kl = job.term_weights.get("kl", 0) > 0
    retain = build_reference(
        model,
        job.retain,
        plan.rows("retain", rank, world) if needs_kl or layer is not None else [],
        head=needs_kl,
        layer=layer,
        file=work / f"reference-{rank}.bin",
        progress=progress,
    )
    return forget, retain


def check_terms(job: Job) -> None:
    """Raises UserError for loss terms that can't be combined."""
    hidden = job.objective is not None and job.objective.hidden_layer() is not None
    if hidden and job.term_weights.get("kl", 0) > 0:
        raise UserError(
            "a KL term and a hidden-state objective at once are not supported", "use --set unlearn.0.retain.kl=0"
        )


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole, if any."""
    found = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _remove_half_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        if not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer's state is there, which is written last."""
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
