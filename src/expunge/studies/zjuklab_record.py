"""What the study `zjuklab` measures, before it is put into words: plain numbers by name. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OVER, UNDER = "over", "under"


@dataclass(frozen=True)
class Answer:
    """What a model says to a row: for the samples beside a score."""

    split: str
    task: str
    prompt: str
    wanted: str
    said: str


@dataclass(frozen=True)
class Scores:
    """One model under the official convention of SemEval-2025 Task 4.

    `values`: by name, the twelve ("forget_task1_regurgitation", …; forget values are 1 − mean, as officially),
    `task_aggregate`, `mia_auc`, `mia_score`, `general` (accuracy on general knowledge, in MMLU's place), `final`
    (mean of task aggregate, MIA score and general), and extraction strength: `forget_es`, `retain_es`, `unseen_es`.
    """

    values: Mapping[str, float | None]
    answers: Sequence[Answer] = ()

    def __getitem__(self, name: str) -> float:
        """A value; NaN where it is missing."""
        value = self.values.get(name)
        return float("nan") if value is None else value


@dataclass(frozen=True)
class Look:
    """A specialist after so many steps; `scores` on a part of the rows, the same at every look."""

    step: int
    scores: Scores


@dataclass(frozen=True)
class Dynamics:
    """The loss terms of a training, step by step: "loss", "forget", "retain_nll", "retain_kl"."""

    name: str  # over, under, or "npo" for NPO alone
    steps: Sequence[int]
    terms: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Turn:
    """The angles between the changes of the two phases of a training, and of the whole, in degrees."""

    specialist: str
    inflection: int  # the step that parts the phases
    last: int
    first_later: float  # between the change before and the change after the inflection
    first_whole: float
    later_whole: float
    factors: Mapping[str, float] = field(default_factory=dict)  # the same three over LoRA's A and B instead of ΔW


@dataclass(frozen=True)
class Group:
    """The two task vectors in the modules of one kind in one layer (layer −1: embeddings, last norm, head)."""

    layer: int
    module: str  # q_proj, down_proj, …
    norms: tuple[float, float]  # of over and under
    cosine: float
    overlap: float  # Jaccard index of the largest fifth of each
    conflict: float  # part of the elements changed by both whose signs differ
    rank: tuple[float, float]  # effective rank (exponential of the entropy of the singular values)
    conflict_kept: float = float("nan")  # the same among the elements that are in the largest fifth of both


@dataclass(frozen=True)
class Specialist:
    """One trained specialist of one seed."""

    name: str
    seed: int
    path: str  # folder of the adapter
    steps: int
    scores: Scores
    looks: Sequence[Look] = ()


@dataclass(frozen=True)
class Merged:
    """One merge of the two specialists of a seed."""

    seed: int
    method: str
    density: float
    scope: str
    scale_match: str
    norm: float  # of its difference
    mean_norm: float  # of the specialists'
    scores: Scores
    searched: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Everything, for the page."""

    target: Scores
    specialists: Sequence[Specialist]
    dynamics: Sequence[Dynamics]
    turns: Sequence[Turn]
    groups: Sequence[Group]
    merges: Sequence[Merged]
    collapsed: Scores | None  # gradient ascent far past its end
    tasks: Mapping[str, str]  # task1 → what it is called in the benchmark
    seeds: int = 1
    factor_cosine: float = float("nan")  # of the published merge of the factors and the same merge of the weights
