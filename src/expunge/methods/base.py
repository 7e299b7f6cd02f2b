"""What an objective is, what it declares about itself, and how it is registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from expunge.registry import Registry
from expunge.settings import build, described_settings, setting, with_settings

if TYPE_CHECKING:
    from expunge.methods.step import Memory, Step
    from expunge.recipe import TrainConfig


#: Where other answers to the same prompts come from: sentences that decline, the rows' own columns, or the start model.
AlternativesFrom = Literal["idk", "given", "sampled"]


@dataclass(frozen=True)
class Declaration:
    """What docs, CLI, trainer and tests need to know of an objective without running it."""

    name: str
    idea: str  # in about ten words
    formula: str
    paper: str  # arXiv id or "-"
    kind: str  # "removes" or "suppresses" the knowledge, as far as its literature shows
    reference: bool = False  # needs log-probs of the start model on the forget rows (and their alternatives)
    distribution: bool = False  # needs the start model's whole distribution at the forget rows' tokens
    retain: bool = False  # can't do without retain rows
    reads_forget: bool = True  # its loss looks at the forget answers themselves; else only at their alternatives
    lacking: bool = False  # uses log-probs of the model without the knowledge, where one chooses the tokens
    alternatives: AlternativesFrom | None = None  # needs other answers to the forget prompts; where from by default
    retain_alternatives: bool = False  # needs them for the retain prompts too
    anchors: bool = False  # needs prompts that a model can only decline
    span: Literal["answer", "sequence"] = "answer"  # what of a forget row its loss is about by default
    nll: float = 0.0  # default weights of the retain terms
    kl: float = 0.0
    retain_ratio: int = 1  # retain rows per forget row in a step
    rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5)  # learning rates of the published runs, full fine-tuning
    documents: Mapping[str, Any] = field(default_factory=dict)  # defaults where documents were learnt whole


class Objective(ABC):
    """Base of every objective: a frozen dataclass of hyper-parameters with a `loss`."""

    about: ClassVar[Declaration]

    @abstractmethod
    def loss(self, step: Step) -> dict[str, Tensor]:
        """The terms of the loss by name, each a scalar; the trainer adds them up.

        Terms called retain… belong to the retain side (for wrappers that treat the two gradients apart); those called
        monitor… are recorded and handed to `after_step`, but not added.
        """

    def check(self, model: nn.Module) -> None:  # noqa: B027  a hook: most objectives need nothing
        """Raise UserError before the first step if the model lacks what the objective needs."""

    def hidden_layer(self) -> int | None:
        """The decoder layer whose output the objective reads instead of logits; None for logits."""
        return None

    def frozen_forget(self) -> bool:
        """Whether `forget.frozen_hidden` is read too (`retain.frozen_hidden` always is)."""
        return False

    def trainable(self, depth: int) -> list[str] | None:
        """Patterns (regular expressions) of the parameters that are trained by default; None for all."""
        return None

    def chunk_rows(self) -> int | None:
        """Forget rows that are trained on together, chunk after chunk, each with a fresh optimizer; None for all."""
        return None

    def after_step(self, memory: Memory, terms: Mapping[str, float]) -> None:  # noqa: B027  a hook
        """Called after each optimizer step with its terms, summed over micro-batches and processes."""

    def variations(self, train: TrainConfig) -> list[TrainConfig]:
        """The trainings that are made; more than one only where their weights are combined in the end."""
        return [train]

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Label → text, for `expunge list methods`, the docs and the report."""
        about = cls.about
        retain = " + ".join(f"{weight:g}·{term}" for term, weight in (("nll", about.nll), ("kl", about.kl)) if weight)
        described = {
            "summary": about.idea,
            "loss": about.formula,
            "retain terms by default": retain or "none",
            "needs": ", ".join(_needs(about)) or "forget rows only",
            "kind": about.kind,
            "learning rates of its papers": ", ".join(f"{rate:g}" for rate in about.rates),
            "paper": about.paper,
        }
        return described | described_settings(cls)


class WeightObjective(Objective):
    """Base of objectives that learn the forget rows better, and make the model out of the weights that came of it."""

    def loss(self, step: Step) -> dict[str, Tensor]:
        """+mean token NLL of the forget answers: the model is fine-tuned on them."""
        return {"forget": step.forget.nll()}

    @abstractmethod
    def combine(self, start: Tensor, trained: Sequence[Tensor]) -> Tensor:
        """A parameter of the unlearned model, out of the start model's and those of the trained ones."""


def _needs(about: Declaration) -> list[str]:
    from_where = {"idk": "answers that decline", "given": "alternative answers", "sampled": "sampled answers"}
    found = (
        ("start model's log-probs", about.reference),
        ("start model's distribution", about.distribution),
        ("retain rows", about.retain),
        (from_where[about.alternatives or "idk"], about.alternatives is not None),
        ("answers that decline retain prompts", about.retain_alternatives),
        ("prompts that can't be answered", about.anchors),
    )
    return [label for label, needed in found if needed]


OBJECTIVES: Registry[type[Objective]] = Registry("method", "expunge.methods")


#: A hyper-parameter: default, bounds that pydantic checks, and the values that papers used.
hyper = setting


def objective(**declared: Any) -> Callable[[type[Any]], type[Objective]]:
    """Class decorator: file a dataclass of hyper-parameters with a `loss` under its name."""

    def register(cls: type[Any]) -> type[Objective]:
        made: Any = with_settings(cls)
        made.about = Declaration(**declared)
        OBJECTIVES.register(made.about.name)(made)
        result: type[Objective] = made
        return result

    return register


def build_objective(name: str, parameters: Mapping[str, Any]) -> Objective:
    """The objective with its hyper-parameters. Raises UserError for an unknown name, key or value."""
    return build("method", name, OBJECTIVES.get(name), parameters)
