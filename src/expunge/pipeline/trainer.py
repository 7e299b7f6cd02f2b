"""The trainer: a transformers.Trainer whose loss is an objective's, on a plan made before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from expunge.data.collate import Batch, pad_right
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.methods.base import Objective
from expunge.methods.step import Forward, Step
from expunge.models.packing import supports_packing
from expunge.models.reference import ReferenceCache
from expunge.pipeline.plan import MicroBatch, Plan
from expunge.recipe import TrainConfig

#: Called after each optimizer step with the step, and the terms of its loss by name.
OnStep = Callable[[int, Mapping[str, float]], None]


class MicroBatches(Dataset[dict[str, Any]]):
    """The plan's micro-batches as tensors, built when they are asked for."""

    def __init__(
        self, plan: Plan, forget: Sequence[Encoded], retain: Sequence[Encoded], selection: Sequence[np.ndarray] | None
    ) -> None:
        self.plan, self.forget, self.retain, self.selection = plan, forget, retain, selection

    def __len__(self) -> int:
        return len(self.plan.micro_batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        micro: MicroBatch = self.plan.micro_batches[number]
        rows = [self.forget[i] for i in micro.forget] + [self.retain[i] for i in micro.retain]
        chosen = None
        if self.selection is not None and micro.forget:
            chosen = torch.from_numpy(np.concatenate([self.selection[i] for i in micro.forget]))
        batch = pad_right(rows, [*micro.forget, *micro.retain], 0)
        return {"batch": batch, "forget_rows": len(micro.forget), "selected": chosen, "totals": micro.totals}


class UnlearnTrainer(Trainer):
    """Objective + retain terms; with no objective it fine-tunes on the retain side."""

    # the plan's totals already normalise over micro-batches
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        data: MicroBatches,
        arguments: TrainingArguments,
        *,
        objective: Objective | None,
        weights: Mapping[str, float],
        forget_cache: ReferenceCache,
        retain_cache: ReferenceCache,
        on_step: OnStep,
    ) -> None:
        self.objective, self.weights = objective, weights
        self.forget_cache, self.retain_cache = forget_cache, retain_cache
        self.sums: dict[str, Tensor] = {}
        self.packs = supports_packing(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=lambda items: items[0],
            callbacks=[_Report(self, on_step)],
        )
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """This micro-batch's part of the step's loss; parts over micro-batches and processes add up to it."""
        batch: Batch = inputs["batch"]
        layer = self.objective.hidden_layer() if self.objective is not None else None
        logits = layer is None or any(self.weights.get(term, 0) > 0 for term in ("nll", "kl"))
        forward = Forward(model, batch, layer, logits, self.packs)
        scale = float(self.accelerator.num_processes)  # gradients are averaged over processes
        caches = self.forget_cache, self.retain_cache
        step = Step(forward, inputs["forget_rows"], *caches, inputs["selected"], inputs["totals"], scale)
        terms = self._terms(step)
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            raise self._non_finite("loss")
        return loss

    def _terms(self, step: Step) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.objective is not None:
            weight = self.weights.get("forget", 1.0)
            for name, value in self.objective.loss(step).items():
                terms[name] = value * weight if name == "forget" else value
        for name in ("nll", "kl"):
            weight = self.weights.get(name, 0.0)
            if weight > 0:
                terms[f"retain_{name}"] = weight * getattr(step.retain, name)()
        return terms

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not torch.isfinite(torch.as_tensor(float(norm))):
            raise self._non_finite("gradient")
        return norm

    def _non_finite(self, what: str) -> UserError:
        step = self.state.global_step + 1
        last = step - 1 - (step - 1) % self.args.save_steps
        kept = f"the checkpoint of step {last} is kept" if last else "no checkpoint had been written yet"
        return UserError(
            f"the {what} is not finite at step {step}; training has stopped, {kept}",
            "lower train.lr, or set train.precision=float32",
        )

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the plan's batches are not the inputs that transformers counts."""
        return 0


class _Report(TrainerCallback):
    """Hands the terms of each step, added up over processes, to `on_step`."""

    def __init__(self, trainer: UnlearnTrainer, on_step: OnStep) -> None:
        self.trainer, self.on_step = trainer, on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = sorted(self.trainer.sums)
        values = torch.stack([self.trainer.sums[name].float() for name in names])
        values = self.trainer.accelerator.reduce(values, "mean")
        self.trainer.sums = {}
        terms = dict(zip(names, values.tolist(), strict=True))
        if state.global_step >= state.max_steps:
            control.should_save = False  # the product is written next; a last checkpoint would be written twice
        self.on_step(state.global_step, {"loss": sum(terms.values()), **terms})


def training_arguments(train: TrainConfig, folder: Path, steps: int, seed: int) -> TrainingArguments:
    """What the recipe says, in transformers' words."""
    cuda = torch.cuda.is_available()
    half = train.precision == "bfloat16"
    # the option was renamed within the supported range of transformers
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the dataset is a micro-batch
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        lr_scheduler_type={"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}[train.schedule],
        warmup_steps=round(train.warmup * steps),
        max_grad_norm=train.max_grad_norm,
        bf16=half,
        use_cpu=not cuda,
        optim="adamw_torch_fused",  # on a CPU too: one pass over the weights instead of a dozen
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        save_steps=train.checkpoint_every,
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
        **{checkpointing: True} if train.gradient_checkpointing else {},
    )
