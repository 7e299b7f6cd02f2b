"""What an attack is, what it may use, what it declares about itself, and how it is registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.registry import Registry
from expunge.settings import build, described_settings, setting, with_settings

#: behaviour: the weights stay, only how they are asked changes. knowledge: the weights change by data.
#: weights: they change without any data.
AttackKind = Literal["behaviour", "knowledge", "weights"]


@dataclass(frozen=True)
class AttackDeclaration:
    """What docs, CLI, runner and audit need to know of an attack without running it."""

    name: str
    idea: str  # in about ten words
    paper: str  # arXiv id or "-"
    kind: AttackKind
    budget: str  # what a point's budget counts: "optimizer steps", "bits per weight", "tokens replaced"
    needs: tuple[str, ...] = ()  # of `World`: target, reference, retain, holdout, forget
    outputs: tuple[str, ...] = ("scores",)  # tables that are worth making: scores, generations
    suite: Literal["quick", "standard", "full"] = "standard"


@dataclass(frozen=True)
class Point:
    """One strength of an attack. `label` is short and fit for a file's name; `budget` is its place on the x-axis."""

    label: str
    budget: float
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """What an attacker may use. Rows are those of the evaluation; no prompt may be given its own answer."""

    examples: Mapping[str, Sequence[Example]]  # by split: forget, retain, …
    rows: Mapping[str, Sequence[Encoded]]  # the same in tokens
    tokenizer: Any
    seed: int
    encode: Callable[[Sequence[Example]], list[Encoded]]  # with the evaluation's template
    #: tensors of the target / the reference by name, read one at a time; None where there is no such model
    target: Callable[[str], Tensor] | None = None
    reference: Callable[[str], Tensor] | None = None
    #: the reference model in memory for as long as the context lasts, for attacks that compare hidden states
    open_reference: Callable[[], AbstractContextManager[nn.Module]] | None = None

    def has(self, name: str) -> bool:
        """Whether something that an attack `needs` is there."""
        if name in ("target", "reference"):
            return getattr(self, name) is not None
        return bool(self.rows.get(name))


class Attack(ABC):
    """Base of every attack: a frozen dataclass of settings, with the points of its budget."""

    about: ClassVar[AttackDeclaration]

    @abstractmethod
    def points(self) -> list[Point]:
        """The strengths to try, weakest first."""

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Label → text, for `expunge list attacks` and the generated tables."""
        about = cls.about
        described = {
            "summary": about.idea,
            "kind": about.kind,
            "budget": about.budget,
            "needs": ", ".join(about.needs) or "the model alone",
            "suite": about.suite,
            "paper": about.paper,
        }
        return described | described_settings(cls)


class ModelAttack(Attack):
    """Changes the model in memory, and takes the change back: quantization, pruning, ablation, probes."""

    @abstractmethod
    def applied(self, model: nn.Module, point: Point, world: World) -> AbstractContextManager[nn.Module]:
        """Within the context, the attacked model; afterwards `model` is bit by bit as it was.

        Raises UserError where the architecture does not allow it.
        """


class PromptAttack(Attack):
    """Asks differently. The worst candidate (from which most is extracted) counts."""

    @abstractmethod
    def rewrite(self, example: Example, point: Point, world: World) -> list[Example]:
        """Candidates with other prompts, the same id and the same answer; empty where the row does not allow it."""


@dataclass(frozen=True)
class Lesson:
    """What a training attack trains on, and how; `measured` are the forget examples that it never saw."""

    rows: Sequence[Encoded]
    steps: int
    lr: float
    batch_size: int
    lora_rank: int | None = None
    weight_decay: float = 0.0
    warmup: float = 0.0
    #: ids of forget rows on which the attack is measured; None: on all
    measured: frozenset[str] | None = None


class TrainingAttack(Attack):
    """Trains the model a little. All points of one `lesson` are looked at in one training."""

    @abstractmethod
    def lesson(self, world: World) -> Lesson:
        """The training with the largest budget; `points` are optimizer steps of it. Raises UserError."""


class SamplingAttack(Attack):
    """Draws several answers instead of the likeliest one."""

    @abstractmethod
    def sampling(self, point: Point) -> dict[str, Any]:
        """temperature and count of the samples."""


ATTACKS: Registry[type[Attack]] = Registry("attack", "expunge.attacks")


def attack(**declared: Any) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: file a dataclass of settings with `points` under its name."""

    def register(cls: type[Any]) -> type[Any]:
        made: Any = with_settings(cls)
        made.about = AttackDeclaration(**declared)
        ATTACKS.register(made.about.name)(made)
        return made

    return register


def build_attack(name: str, parameters: Mapping[str, Any]) -> Attack:
    """The attack with its settings. Raises UserError for an unknown name, key or value."""
    return build("attack", name, ATTACKS.get(name), parameters)


@contextmanager
def restored(parameters: Mapping[str, Tensor], device: str | None = None) -> Iterator[dict[str, Tensor]]:
    """Copies of the given tensors, on `device` or beside them; at the end the tensors hold again what these say."""
    import torch

    kept = {name: tensor.detach().to(device or tensor.device, copy=True) for name, tensor in parameters.items()}
    try:
        yield kept
    finally:
        with torch.no_grad():
            for name, tensor in parameters.items():
                tensor.copy_(kept[name])


__all__ = [
    "ATTACKS",
    "Attack",
    "AttackDeclaration",
    "Lesson",
    "ModelAttack",
    "Point",
    "PromptAttack",
    "SamplingAttack",
    "TrainingAttack",
    "World",
    "attack",
    "build_attack",
    "restored",
    "setting",
]
