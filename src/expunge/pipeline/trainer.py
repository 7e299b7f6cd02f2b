"""The trainer: a transformers.Trainer whose loss is an objective's, on a plan made before the first step."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_callback import ExportableState

from expunge.data.collate import Batch, pad_right
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.methods.base import Objective
from expunge.methods.step import SIDES, ForgetView, Memory, Step, Totals
from expunge.models.passes import Forward
from expunge.models.prefix import Prefix
from expunge.models.reference import ReferenceCache
from expunge.pipeline.clock import Clock
from expunge.pipeline.gradients import RELEARN, two_sided
from expunge.pipeline.masked import Masked
from expunge.pipeline.null_space import NullSpace, ProjectedAdamW
from expunge.pipeline.plan import MicroBatch, Plan
from expunge.recipe import RelearningConfig, TrainConfig

#: Called after each optimizer step with the step, and the terms of its loss by name.
OnStep = Callable[[int, Mapping[str, float]], None]


class DivergedError(UserError):
    """A loss or a gradient is not finite any more."""


class MicroBatches(Dataset[dict[str, Any]]):
    """The plan's micro-batches as tensors, built when they are asked for."""

    def __init__(
        self,
        plan: Plan,
        rows: Sequence[Encoded],
        selection: Sequence[np.ndarray] | None = None,
        left_out: Collection[str] = (),
        lacking: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.plan, self.rows, self.selection, self.lacking = plan, rows, selection, lacking
        self.left_out = left_out  # sides that the loss does not look at

    def __len__(self) -> int:
        return len(self.plan.micro_batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        micro: MicroBatch = self.plan.micro_batches[number]
        return self.tensors(micro.rows, micro.totals)

    def tensors(self, sides: Mapping[str, Sequence[int]], totals: Totals) -> dict[str, Any]:
        """A micro-batch of these rows by side; sides that are left out are empty."""
        sides = {side: rows for side, rows in sides.items() if side not in self.left_out}
        numbers = [row for side in SIDES for row in sides.get(side, ())]
        forget = sides.get("forget", ())

        def of_forget(values: Sequence[np.ndarray] | None) -> Tensor | None:
            return torch.from_numpy(np.concatenate([values[row] for row in forget])) if values and forget else None

        return {
            "batch": pad_right([self.rows[row] for row in numbers], numbers, 0) if numbers else None,
            "sides": {side: tuple(rows) for side, rows in sides.items()},
            "selected": of_forget(self.selection),
            "lacking": of_forget(self.lacking),
            "totals": totals,
        }


@dataclass(frozen=True)
class Loss:
    """What a step's loss is made of, beside its rows."""

    objective: Objective | None
    weights: Mapping[str, float]
    cache: ReferenceCache
    view: ForgetView
    memory: Memory
    packs: bool = False  # the model keeps packed rows apart
    prefix: Prefix | None = None
    sam: float | None = None
    projection: bool = False
    relearning: RelearningConfig | None = None

    @property
    def two_sided(self) -> bool:
        """Whether the forget gradient is changed before the retain gradient is added."""
        return self.sam is not None or self.projection or self.relearning is not None

    def terms(self, step: Step, side: str = "") -> dict[str, Tensor]:
        """The weighted terms by name; of the side that relearns, the NLL of the forget answers alone."""
        if side == RELEARN:
            return {RELEARN: step.forget.nll()}
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


class UnlearnTrainer(Trainer):
    """Objective + retain terms; with no objective it fine-tunes on the retain side."""

    optimizer: Any
    # the plan's totals already normalise over micro-batches
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        data: MicroBatches,
        arguments: TrainingArguments,
        loss: Loss,
        on_step: OnStep,
        callbacks: Sequence[TrainerCallback] = (),
        masked: Masked | None = None,
        clock: Clock | None = None,
        null_space: NullSpace | None = None,
    ) -> None:
        self.loss, self.masked, self.null_space = loss, masked, null_space
        self.clock = clock or Clock(None, loss.memory.numbers)
        self.data = data
        self.sums: dict[str, Tensor] = {}
        self.held: list[dict[str, Any]] = []
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=lambda items: items[0],
            callbacks=[_Report(self, on_step), _Restart(data.plan.restarts), *callbacks],
        )
        self.remove_callback(PrinterCallback)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch; of a whole step at its last one where the two sides are kept apart."""
        if not self.loss.two_sided:
            result: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return result
        self.held.append(inputs)
        zero = torch.zeros((), device=self.args.device)
        if not self.accelerator.gradient_state.sync_gradients:
            return zero
        held, self.held = self.held, []
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        passes: dict[str, int] = {}

        def backward(side: str) -> None:
            passes[side] = passes.get(side, 0) + 1
            with self.accelerator.no_sync(model):
                for inputs in held:
                    self._backward_side(model, inputs, side, record=side != RELEARN and passes[side] == 1)
            self._average(trained)
            if self.masked is not None:  # before a gradient's length or direction is looked at
                self.masked.keep_gradients_inside()

        loss = self.loss
        two_sided(trained, backward, rho=loss.sam, project=loss.projection, relearning=loss.relearning)
        return zero

    def _backward_side(self, model: nn.Module, inputs: dict[str, Any], side: str, record: bool) -> None:
        """Backward of the terms of one side, over its rows alone."""
        read = "forget" if side == RELEARN else side
        sides = {name: rows for name, rows in inputs["sides"].items() if name.startswith(read)}
        made = self._prepare_inputs(self.data.tensors(sides, inputs["totals"]))
        if made["batch"] is None:
            return
        with self.compute_loss_context_manager():
            terms = self.loss.terms(self._step(model, made, side), side)
        mine = {name: value for name, value in terms.items() if name.startswith("retain") == (side == "retain")}
        loss = self._total(mine, record)
        if loss.requires_grad:
            self.accelerator.backward(loss)

    def _average(self, parameters: Sequence[Tensor]) -> None:
        """Gradients as the mean over processes; they were made without synchronisation."""
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.accelerator.num_processes

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """This micro-batch's part of the step's loss; parts over micro-batches and processes add up to it."""
        return self._total(self.loss.terms(self._step(model, inputs)), record=True)

    def _step(self, model: nn.Module, inputs: dict[str, Any], side: str = "") -> Step:
        batch: Batch = inputs["batch"]
        loss, again = self.loss, side == RELEARN  # what relearns reads logits, and all of the answer
        layer = loss.objective.hidden_layer() if loss.objective is not None and not again else None
        logits = layer is None or any(loss.weights.get(term, 0) > 0 for term in ("nll", "kl"))
        forward = Forward(model, batch, layer, logits, loss.packs, loss.prefix)
        scale = float(self.accelerator.num_processes)  # gradients are averaged over processes
        counts = {side: len(rows) for side, rows in inputs["sides"].items()}
        selected = None if again else inputs["selected"]
        given = (counts, loss.cache, selected, inputs["totals"], scale, loss.view, loss.memory)
        return Step(forward, *given, lacking=inputs["lacking"])

    def _total(self, terms: Mapping[str, Tensor], record: bool) -> Tensor:
        """The sum of the terms that are no monitors."""
        if record:
            for name, value in terms.items():
                self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach().float()
        added = [value for name, value in terms.items() if not name.startswith("monitor")]
        loss = torch.stack([value.float() for value in added]).sum()
        if not torch.isfinite(loss):
            raise self._non_finite("loss")
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the recipe, begun again with every chunk; it runs on the clock where that is ahead."""
        restarts = self.data.plan.restarts
        if len(restarts) < 2 and self.clock.limit is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if getattr(self, "lr_scheduler", None) is None:
            lengths = [end - start for start, end in zip(restarts, [*restarts[1:], num_training_steps], strict=True)]
            single = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
                num_warmup_steps=round(self.args.get_warmup_steps(num_training_steps) / len(restarts)),
                num_training_steps=lengths[0],
            )
            rate = single.lr_lambdas[0]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: rate(
                    max(step - restarts[bisect_right(restarts, step) - 1], self.clock.share * lengths[0])
                ),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer(self, *given: Any) -> Any:
        """AdamW; with a mask, its weight decay acts inside alone; with a null space, its steps stay in there."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*given)
        if fresh and self.null_space is not None:
            kept = ("params", "weight_decay", "lr", "betas", "eps")
            groups = [{name: group[name] for name in kept} for group in optimizer.param_groups]
            optimizer = self.optimizer = ProjectedAdamW(groups, self.null_space)
        if fresh and self.masked is not None:
            self.masked.take_over_decay(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.masked is not None:
            self.masked.keep_gradients_inside()
        norm = super()._clip_grad_norm(model)
        if norm is not None and not torch.isfinite(torch.as_tensor(float(norm))):
            raise self._non_finite("gradient")
        return norm

    def _non_finite(self, what: str) -> DivergedError:
        step = self.state.global_step + 1
        last = step - 1 - (step - 1) % self.args.save_steps
        kept = f"the checkpoint of step {last} is kept" if last else "no checkpoint had been written yet"
        return DivergedError(
            f"the {what} is not finite at step {step}; training has stopped, {kept}",
            "lower train.lr, or set train.precision=float32",
        )

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the plan's batches are not the inputs that transformers counts."""
        return 0


class _Report(TrainerCallback, ExportableState):
    """Hands the terms of each step, added up over processes, to the objective and to `on_step`."""

    def __init__(self, trainer: UnlearnTrainer, on_step: OnStep) -> None:
        self.trainer, self.on_step = trainer, on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = sorted(self.trainer.sums)
        values = torch.stack([self.trainer.sums[name] for name in names])
        values = torch.cat([values, values.new_tensor([self.trainer.clock.read()])])
        values = self.trainer.accelerator.reduce(values, "mean")
        self.trainer.sums = {}
        *found, seconds = values.tolist()
        terms = dict(zip(names, found, strict=True))
        loss = self.trainer.loss
        if loss.objective is not None:
            loss.objective.after_step(loss.memory, terms)
        self.trainer.clock.agree(seconds)
        if self.trainer.clock.over:
            control.should_training_stop = True
        if state.global_step >= state.max_steps or self.trainer.clock.over:
            control.should_save = False  # the product is written next; a last checkpoint would be written twice
        total = sum(value for name, value in terms.items() if not name.startswith("monitor"))
        self.on_step(state.global_step, {"loss": total, **terms})

    def state(self) -> dict[str, Any]:
        """What the objective remembers, saved with each checkpoint."""
        return {"args": {}, "attributes": dict(self.trainer.loss.memory.numbers)}


class _Restart(TrainerCallback):
    """A fresh optimizer at the first step of each chunk."""

    def __init__(self, restarts: Sequence[int]) -> None:
        self.restarts = set(restarts[1:])

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.restarts:
            optimizer.state.clear()


def remembered(checkpoint: Path) -> dict[str, float]:
    """What the objective remembered when the checkpoint was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    numbers: dict[str, float] = state.get("stateful_callbacks", {}).get("_Report", {}).get("attributes", {})
    return numbers


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
