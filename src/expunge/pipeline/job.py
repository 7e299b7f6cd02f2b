"""A training run before it runs: its rows, its plan, the parameters that it trains, and what can't be combined."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from torch import nn

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.localize.masks import Mask
from expunge.methods.base import Objective, WeightObjective
from expunge.methods.step import ForgetView
from expunge.models.forward import decoder_layers, unwrap
from expunge.models.lora import add_lora
from expunge.models.prefix import frozen_depth
from expunge.models.quantization import linear_weights
from expunge.models.reference import Needs
from expunge.pipeline.masked import adapter_targets
from expunge.pipeline.plan import Plan, Sides, make_plan
from expunge.recipe import LoraConfig, ModelConfig, RelearningConfig, StopRule, TrainConfig


@dataclass(frozen=True)
class Watched:
    """Rows of a split that a stop rule looks at, and the role that gives its metrics a direction."""

    role: str
    rows: Sequence[Encoded]


@dataclass(frozen=True)
class Keep:
    """What an update must leave: a part of the extraction strength on rows that no step sees.

    `forget` are rows that should stay gone if few `rows` leave open how far an update has to be scaled down.
    """

    share: float
    rows: Sequence[Encoded]
    forget: Sequence[Encoded] = ()


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
    lacking: Sequence[np.ndarray] | None = None  # per forget row, log-probs under a model without the knowledge
    view: ForgetView = field(default_factory=ForgetView)
    forget_alternatives: Sequence[Sequence[Encoded]] = ()  # per forget row, other answers to its prompt
    retain_alternatives: Sequence[Sequence[Encoded]] = ()
    anchors: Sequence[Encoded] = ()  # prompts that a model can only decline
    sam: float | None = None  # radius of the sharpness-aware forget gradient
    relearning: RelearningConfig | None = None  # the forget gradient is taken where it leads
    gradient_projection: bool = False
    null_space: float | None = None  # updates keep out of what the inputs of retain rows use
    stop_when: Sequence[StopRule] = ()
    watched: Mapping[str, Watched] = field(default_factory=dict)
    keep: Keep | None = None  # the update is scaled down until it leaves this
    lora: LoraConfig | None = None
    trainable: Sequence[str] | None = None
    mask: Mask | None = None  # nothing outside it is trained
    reset: ModelConfig | None = None  # what is trained starts from this model's weights

    @property
    def term_weights(self) -> Mapping[str, float]:
        """Weights by term; plain fine-tuning is the NLL of the retain side."""
        return self.weights if self.weights is not None else {"nll": 1.0}

    @cached_property
    def rows(self) -> list[Encoded]:
        """Every row that a step can hold, in one list: forget, its alternatives, retain, its alternatives."""
        groups = (self.forget, chain(*self.forget_alternatives), self.retain, chain(*self.retain_alternatives))
        return [row for group in groups for row in group]

    @cached_property
    def sides(self) -> Sides:
        """Where the rows of each side stand in `rows`, and the tokens that the loss sees of each."""
        tokens = [row.supervised_tokens for row in self.rows]
        for row, mask in enumerate(self.selection or ()):
            tokens[row] = int(mask.sum())
        alternatives: dict[int, Sequence[int]] = {}
        start = 0
        places: list[Sequence[int]] = []
        for rows, others in ((self.forget, self.forget_alternatives), (self.retain, self.retain_alternatives)):
            places.append(range(start, start + len(rows)))
            start += len(rows)
            for row, choices in zip(places[-1], others, strict=False):
                alternatives[row] = range(start, start + len(choices))
                start += len(choices)
        return Sides(tokens, places[0], places[1], alternatives)

    def plan(self, world: int = 1) -> Plan:
        """The steps of the run."""
        about = self.objective.about if self.objective is not None else None
        return make_plan(
            self.sides if self.reads_retain else replace(self.sides, retain=()),
            self.train,
            self.seed,
            retain_batch=self.retain_batch,
            retain_ratio=about.retain_ratio if about is not None else 1,
            chunk=self.objective.chunk_rows() if self.objective is not None else None,
            world=world,
            reads_forget=self.reads_forget,
        )

    @property
    def reads_retain(self) -> bool:
        """Whether any term of the loss is about retain rows."""
        return self.objective is None or self.objective.about.retain or self.has_retain_term

    @property
    def reads_forget(self) -> bool:
        """Whether any term of the loss is about forget rows or other answers to their prompts."""
        about = self.objective.about if self.objective is not None else None
        return about is None or about.reads_forget or about.alternatives is not None

    @property
    def has_retain_term(self) -> bool:
        """Whether a retain term is added to the objective."""
        return any(self.term_weights.get(term, 0) > 0 for term in ("nll", "kl"))

    def needs(self, plan: Plan, rank: int = 0, world: int = 1) -> Needs:
        """What the loss needs of the start model, for the rows that a process will see."""

        def seen(*sides: str) -> list[int]:
            return plan.rows(*sides, rank=rank, world=world)

        objective = self.objective
        logprobs: list[int] = []
        distributions = seen("retain") if self.term_weights.get("kl", 0) > 0 else []
        hidden: list[int] = []
        layer = None
        if objective is not None:
            about, layer = objective.about, objective.hidden_layer()
            if about.reference:
                logprobs = seen("forget", "forget_alternatives", "retain_alternatives")
                logprobs += seen("retain") if about.retain_alternatives else []
            distributions += seen("forget") if about.distribution else []
            if layer is not None:
                hidden = seen("retain", "forget") if objective.frozen_forget() else seen("retain")
        return Needs(logprobs, distributions, hidden, layer, self.view.temperature)


def prepare_parameters(model: nn.Module, job: Job) -> nn.Module:
    """Adapters or the chosen parameters; everything else is frozen. Raises UserError."""
    if job.lora is not None:
        if job.trainable is not None:
            raise UserError(
                "`trainable` chooses parameters of the model, `lora` adds others",
                "give one of them; lora.targets chooses modules",
            )
        lora = job.lora
        if job.mask is not None:
            lora = lora.model_copy(update={"targets": adapter_targets(model, job.mask)})
        model = add_lora(model, lora, job.seed)
    else:
        chosen = _chosen(model, job)
        for name, parameter in model.named_parameters() if chosen is not None else ():
            parameter.requires_grad_(chosen is not None and name in chosen)
    _check_reached(model, job)
    config: Any = unwrap(model).config
    config.use_cache = False
    if job.train.gradient_checkpointing:
        unwrap(model).enable_input_require_grads()  # type: ignore[operator]
    return model


def _chosen(model: nn.Module, job: Job) -> set[str] | None:
    """Names of the parameters to train: those of the patterns that have something inside the mask; None for all."""
    patterns = job.trainable
    if patterns is None and job.objective is not None:
        patterns = own_parameters(model, job.objective)
    if patterns is None and job.null_space is not None:
        return set(linear_weights(model))  # nothing that it can't guard
    if patterns is None:
        return None if job.mask is None else set(job.mask.bound(model))
    matching = {name for name, _ in model.named_parameters() if any(re.search(p, name) for p in patterns)}
    if not matching:
        raise UserError(
            f"no parameter matches {', '.join(patterns)}",
            "patterns are regular expressions on names such as model.layers.7.mlp.down_proj.weight",
        )
    if job.null_space is not None:
        guarded = matching & set(linear_weights(model))
        if not guarded:
            raise UserError(
                f"null_space guards weights of linear layers, and none matches {', '.join(patterns)}",
                "leave null_space out: --set unlearn.0.null_space=null",
            )
        return guarded
    chosen = matching if job.mask is None else matching & set(job.mask.bound(model))
    if not chosen and job.trainable is not None:
        raise UserError(
            f"nothing inside the mask matches `trainable`: {', '.join(patterns)}",
            "leave `trainable` out to train all that is inside, or make a mask of these parameters",
        )
    if not chosen and job.objective is not None:
        raise UserError(
            f"method {job.objective.about.name} trains {', '.join(patterns)}, and nothing of that is inside the mask",
            "train all that is inside: --set unlearn.0.trainable=[.]",
        )
    return chosen


def _check_reached(model: nn.Module, job: Job) -> None:
    """Raises UserError if all that is trained lies above the layer that the objective reads."""
    layer = job.objective.hidden_layer() if job.objective is not None else None
    if job.objective is not None and layer is not None and frozen_depth(model) > layer:
        raise UserError(
            f"method {job.objective.about.name} reads the output of layer {layer}, and all that is trained lies above",
            "give it a higher layer, e.g. --set unlearn.0.parameters.layer="
            f"{min(frozen_depth(model), len(decoder_layers(model)) - 1)}, or train lower ones",
        )


def own_parameters(model: nn.Module, objective: Objective) -> list[str] | None:
    """Patterns of the parameters that the objective trains by default; None for all."""
    try:
        depth = len(decoder_layers(model))
    except UserError:
        if objective.hidden_layer() is not None:
            raise
        depth = 0
    return objective.trainable(depth)


def check_terms(job: Job) -> None:
    """Raises UserError for settings that can't be combined."""
    objective = job.objective
    if job.lora is not None and job.lora.targets != "all-linear" and job.mask is not None:
        raise UserError("the mask says which modules get adapters, and so does lora.targets", "leave lora.targets out")
    if job.lora is not None and job.reset is not None:
        raise UserError("`reset` changes whole weights before training, which adapters don't hold", "leave `lora` out")
    if objective is None:
        return
    name = objective.about.name
    if job.train.minutes is not None and objective.chunk_rows() is not None:
        raise UserError(
            f"method {name} takes the forget rows chunk by chunk; a limit in minutes would leave the last chunks out",
            "leave `minutes` out, and lower train.epochs",
        )
    hidden = objective.hidden_layer() is not None
    for setting, given in (
        ("cap", job.view.cap),
        ("quantile", job.view.quantile),
        ("temperature", None if job.view.temperature == 1 else job.view.temperature),
    ):
        if hidden and given is not None:
            raise UserError(
                f"`{setting}` is about log-probs, and method {name} has none: it steers hidden states",
                f"leave `{setting}` out, or choose another method",
            )
    if isinstance(objective, WeightObjective) and job.lora is not None:
        raise UserError(
            f"method {name} changes whole weights after training, which adapters don't hold", "leave `lora` out"
        )
    if isinstance(objective, WeightObjective) and job.has_retain_term:
        raise UserError(
            f"method {name} subtracts what it learns, and would subtract what a retain term taught too",
            "leave the retain terms out: --set unlearn.0.retain=none",
        )
    if job.null_space is not None and not job.retain:
        raise UserError(
            "null_space keeps updates out of the way of the retain rows, and there are none",
            "give some (--retain FILE), or neighbours: --set unlearn.0.neighbours=4",
        )
    if job.null_space is not None and job.mask is not None:
        raise UserError(
            "null_space spreads an update over all inputs of a layer, and a mask keeps it in a part", "give one of them"
        )
    if job.gradient_projection and not job.reads_retain:
        raise UserError(
            "gradient_projection needs a retain term, whose gradient the forget gradient is compared with",
            "give one: --set unlearn.0.retain=nll",
        )
    if isinstance(objective, WeightObjective) and (
        job.sam or job.relearning or job.gradient_projection or job.stop_when
    ):
        raise UserError(
            f"method {name} learns the forget rows first; sam, relearning, gradient_projection and stop_when have no "
            "meaning there",
            "leave them out, or choose another method",
        )
