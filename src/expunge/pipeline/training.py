"""One training run: model in, rows in, a trained model out; killed and called again, it goes on."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from expunge.data.collate import pad_right
from expunge.errors import UserError
from expunge.methods.base import WeightObjective
from expunge.methods.step import Memory
from expunge.models.load import Loaded, load_model
from expunge.models.packing import supports_packing
from expunge.models.passes import Forward
from expunge.models.prefix import Prefix, open_prefix
from expunge.models.reference import build_reference
from expunge.models.save import save_model
from expunge.pipeline.clock import Clock
from expunge.pipeline.job import Job, check_terms, prepare_parameters
from expunge.pipeline.keeping import scale_down
from expunge.pipeline.masked import Masked, reset_weights
from expunge.pipeline.null_space import NullSpace
from expunge.pipeline.plan import Plan
from expunge.pipeline.processes import process_count, process_rank
from expunge.pipeline.stopping import OnLook, Stopping, load_trained_state, trained_state
from expunge.pipeline.trainer import Loss, MicroBatches, OnStep, UnlearnTrainer, remembered, training_arguments
from expunge.recipe import TrainConfig
from expunge.runs.atomic import disk_errors


@dataclass
class Fitted:
    """A trained model in memory, in evaluation mode."""

    model: Any
    tokenizer: Any
    folder: Path  # of the model that training started from
    steps: int  # optimizer steps that were made
    seconds: float
    note: str | None = None  # on stop rules, time and what was kept
    scale: float | None = None  # of the update, where something had to stay


@dataclass(frozen=True)
class Watchers:
    """Who is told what while a training runs."""

    on_step: OnStep = lambda step, terms: None
    on_reference: Callable[[int], None] = lambda rows: None
    on_look: OnLook = lambda step, values: None
    #: further callbacks of the trainer, which see the model after each step
    callbacks: Sequence[TrainerCallback] = ()


def train(job: Job, work: Path, **watchers: Any) -> dict[str, Any]:
    """Train and write `work/out`; checkpoints in `work/checkpoints` are resumed. Returns steps and notes."""
    with fit(job, work, **watchers) as fitted:
        if process_rank() == 0:
            trained = fitted.model
            if job.objective is None and job.lora is not None:  # what was taught becomes a whole model to unlearn from
                trained = trained.merge_and_unload()
            save_model(trained, fitted.tokenizer, work / "out", base=str(fitted.folder))
        said = {"note": fitted.note or None, "scale": fitted.scale}
        return {"steps": fitted.steps, **{name: value for name, value in said.items() if value is not None}}


@contextmanager
def fit(job: Job, work: Path, **watchers: Any) -> Iterator[Fitted]:
    """The trained model in memory; checkpoints in `work/checkpoints` are resumed. `watchers`: see `Watchers`."""
    torch.manual_seed(job.seed)
    check_terms(job)
    work.mkdir(parents=True, exist_ok=True)
    loaded = load_model(job.model)
    model: nn.Module = loaded.model
    if hasattr(model, "peft_config"):
        raise UserError(
            f"{job.model.id} is an adapter; training starts from a whole model",
            "merge it first: expunge merge ADAPTER --method linear -o FOLDER",
        )
    if job.objective is not None:
        job.objective.check(model)
    fitted = _combined if isinstance(job.objective, WeightObjective) else _fit
    model = prepare_parameters(model, job)
    if job.reset is not None:
        reset_weights(model, job.reset, job.mask)
    result = fitted(job, model, loaded, work, Watchers(**watchers))
    del model
    if job.keep is not None:
        gc.collect()  # the optimizer's states make room for a copy of what was trained
        result.scale, said = scale_down(result.model, job.model, job.keep)
        result.note = f"{result.note}; {said}" if result.note else said
    yield result
    # a trainer and its model refer to each other: without this, the next stage's model would stand beside this one
    del result, loaded
    gc.collect()


def fit_further(job: Job, fitted: Fitted, work: Path, **watchers: Any) -> Fitted:
    """Train a model that is in memory on, with all that `job` trains; nothing is loaded. See `fit`."""
    torch.manual_seed(job.seed)
    check_terms(job)
    work.mkdir(parents=True, exist_ok=True)
    model: nn.Module = fitted.model.requires_grad_(True)
    loaded = Loaded(model, fitted.tokenizer, fitted.folder, job.model.id)
    return _fit(job, prepare_parameters(model, job), loaded, work, Watchers(**watchers))


def _fit(job: Job, model: nn.Module, loaded: Loaded, work: Path, watchers: Watchers) -> Fitted:
    began = time.monotonic()
    world, rank = process_count(), process_rank()
    plan = job.plan(world)
    arguments = training_arguments(job.train, work / "checkpoints", plan.steps, job.seed)
    model.to(arguments.device)
    half = job.train.precision == "bfloat16"
    memory = Memory()
    prefix = _prefix(job, model, plan, work / f"prefix-{rank}.bin")
    with torch.autocast(arguments.device.type, torch.bfloat16, enabled=half):
        packs = supports_packing(model)
        needs = job.needs(plan, rank, world)
        file, progress = work / f"reference-{rank}", watchers.on_reference
        cache = build_reference(model, job.rows, needs, packs=packs, prefix=prefix, file=file, progress=progress)
        if job.objective is not None and job.objective.about.anchors:
            memory.means = _prompt_means(job, model)
    kept = (cache, job.view, memory, packs, prefix)
    loss = Loss(job.objective, job.term_weights, *kept, job.sam, job.gradient_projection, job.relearning)
    stopping = Stopping(job.stop_when, job.watched, work, half, watchers.on_look)
    left_out = ["forget"] if job.objective is not None and not job.objective.about.reads_forget else []
    data = MicroBatches(plan, job.rows, job.selection, left_out, job.lacking)
    masked = Masked(model, job.mask) if job.mask is not None and job.lora is None else None
    checkpoint = _last_checkpoint(work / "checkpoints")
    if checkpoint is not None:
        memory.numbers.update(remembered(Path(checkpoint)))
    null_space = _null_space(job, model, half)
    clock = Clock(60 * job.train.minutes if job.train.minutes else None, memory.numbers, began)
    callbacks = [stopping, *watchers.callbacks]
    trainer = UnlearnTrainer(model, data, arguments, loss, watchers.on_step, callbacks, masked, clock, null_space)
    _check_sharding(job, trainer.accelerator.distributed_type.value)
    try:
        with disk_errors(work):
            if checkpoint is not None or not stopping.holds(model):
                trainer.train(resume_from_checkpoint=checkpoint)
    except Exception:
        if rank == 0:
            _remove_half_checkpoints(work / "checkpoints")  # what a full disk left takes the room of the next try
        raise
    trained: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trained._is_accelerate_prepared = False  # or a further trainer would take its autocast for granted
    steps = trainer.state.global_step
    said = (
        [f"stopped after {steps} of {plan.steps} steps: the time was over"] if steps < plan.steps and clock.over else []
    )
    note = "; ".join([*([stopping.note] if stopping.note else []), *said]) or None
    return Fitted(trained.eval(), loaded.tokenizer, loaded.folder, steps, time.monotonic() - began, note)


def _combined(job: Job, model: nn.Module, loaded: Loaded, work: Path, watchers: Watchers) -> Fitted:
    """Train each variation of the job from the same start, and put the model together from what they became."""
    assert isinstance(job.objective, WeightObjective)
    began = time.monotonic()
    start = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    variations = job.objective.variations(job.train)
    files = [work / f"trained-{number}.safetensors" for number in range(len(variations))]
    steps = 0
    for number, (variation, file) in enumerate(zip(variations, files, strict=True)):
        made = dataclasses.replace(job, train=_part_of_time(variation, len(variations)))
        total = made.plan(process_count()).steps
        if not file.is_file():
            load_trained_state(model, start)
            shifted = _shifted(watchers, steps)
            fitted = _fit(made, model, loaded, work / f"variation-{number}", shifted)
            model = fitted.model
            if process_rank() == 0:
                part = file.with_suffix(".part")
                save_file(trained_state(model), part)
                part.rename(file)
                shutil.rmtree(work / f"variation-{number}", ignore_errors=True)
        steps += total
    if process_rank() == 0:
        with ExitStack() as stack, torch.no_grad():
            trained = [stack.enter_context(safe_open(file, "pt")) for file in files]
            for name, parameter in model.named_parameters():
                if name in start:  # one parameter at a time: the trained models are never in memory together
                    parts = [opened.get_tensor(name) for opened in trained]
                    parameter.copy_(job.objective.combine(start[name], parts))
    return Fitted(model.eval(), loaded.tokenizer, loaded.folder, steps, time.monotonic() - began)


def _part_of_time(train: TrainConfig, parts: int) -> TrainConfig:
    """Settings of one of several trainings that share the minutes."""
    return train.model_copy(update={"minutes": train.minutes / parts}) if train.minutes else train


def _shifted(watchers: Watchers, before: int) -> Watchers:
    def on_step(step: int, terms: Mapping[str, float]) -> None:
        watchers.on_step(before + step, terms)

    return dataclasses.replace(watchers, on_step=on_step)


def _null_space(job: Job, model: nn.Module, half: bool) -> NullSpace | None:
    """What keeps updates out of the way of the retain rows, from the start model; None where it is not asked for."""
    if job.null_space is None:
        return None
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=half):
        made = NullSpace(model, job.retain, job.null_space)
    made.begin(model)
    return made


def _check_sharding(job: Job, kind: str) -> None:
    """Raises UserError for what needs whole parameters or gradients where each process holds a part of them."""
    weights = isinstance(job.objective, WeightObjective)
    asked = {
        "sam": job.sam,
        "relearning": job.relearning,
        "gradient_projection": job.gradient_projection,
        "stop_when": job.stop_when,
        "null_space": job.null_space,
        "keep": job.keep is not None,
        "a mask": job.mask is not None and job.lora is None,  # with adapters it only says where they go
        "it": weights,
    }
    found = [name for name, given in asked.items() if given]
    if kind in ("FSDP", "DEEPSPEED") and found:
        what = f"method {job.objective.about.name}" if found == ["it"] and job.objective else found[0]
        raise UserError(
            f"{what} needs whole parameters, of which sharded training holds a part on each process",
            "train without FSDP or DeepSpeed, e.g. with lora",
        )


def _prefix(job: Job, model: nn.Module, plan: Plan, file: Path) -> Prefix | None:
    """States below the first trained layer, if rows are met often enough to make keeping them worth it."""
    world, rank = process_count(), process_rank()
    if job.train.gradient_checkpointing or plan.uses(rank, world) <= len(job.rows):
        return None
    return open_prefix(model, [len(row.input_ids) for row in job.rows], file)


@torch.no_grad()
def _prompt_means(job: Job, model: nn.Module) -> dict[str, torch.Tensor]:
    """Mean state [d] of the objective's layer at the last prompt token, of the forget rows and of the anchors."""
    assert job.objective is not None
    model.eval()
    device = next(model.parameters()).device
    means = {}
    for name, rows in (("forget", job.forget), ("anchors", job.anchors)):
        total = torch.zeros(())
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            batch = pad_right(part, range(len(part)), 0).to(device)
            hidden = Forward(model, batch, job.objective.hidden_layer(), logits=False).hidden
            total = total + hidden[batch.lengths.cumsum(0) - batch.lengths].double().sum(0).cpu()
        means[name] = (total / len(rows)).float().to(device)
    return means


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
