"""What the study `localization` measures, before it is put into words: plain numbers by name. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: Where an update was allowed: the vectors that hold the forget rows, as many disjoint from them drawn at random, or
#: those that an attribution chose (its registered name).
ORACLE, RANDOM = "oracle", "random"


@dataclass(frozen=True)
class Look:
    """A model after so many optimizer steps.

    `forget`, `retain`, `unseen`: mean extraction strength (0 to 1; `unseen`: retain rows that no training of the study
    saw, None without such rows). `forget_quality`: log10 p of a two-sample KS test between the forget rows' values
    under this model and under the reference; 0: they can't be told apart.
    """

    step: int
    forget: float
    retain: float
    unseen: float | None
    forget_quality: float


@dataclass(frozen=True)
class Run:
    """One unlearning of a seed's injected model, with updates in one region. Without looks if its training broke off.

    `looks` begin with the injected model itself (step 0). `relearned`: the last of them after so many further steps on
    the forget rows with all weights free (step 0: before them); empty where that was not asked for.
    """

    seed: int
    method: str
    region: str
    looks: Sequence[Look]
    relearned: Sequence[Look] = ()
    energy_inside: float = float("nan")  # part of the squared norm of the update that lies in the true region
    update_norm: float = float("nan")  # norm of the update over the norm of the weights that may change
    steps: int = 0
    seconds: float = 0.0
    note: str = ""  # on stop rules
    failed: str = ""  # why the training broke off


@dataclass(frozen=True)
class Attributed:
    """How well an attribution found the true region of a seed.

    `precision`: part of its units that are true ones (`chance`: what a random choice of as many reaches on average);
    `auc`: that a true unit's score is above another unit's (0.5: chance; NaN for controls without scores).
    """

    seed: int
    name: str
    precision: float
    auc: float
    chance: float
    overlap: float = float("nan")  # Jaccard index
    seconds: float = 0.0


@dataclass(frozen=True)
class Matching:
    """The objective-free check: MLP outputs of the reference fitted by the value vectors of a region alone.

    `residual`: what is left of Σ over layers and tokens of ‖MLP(θ) − MLP(reference)‖², over what it was before.
    """

    seed: int
    region: str
    look: Look
    residual: float
    norm: float = float("nan")  # of the change, over the norm of the weights that may change
    seconds: float = 0.0


@dataclass(frozen=True)
class Injected:
    """A seed's start: the reference, taught the forget rows through the vectors of its region alone."""

    seed: int
    before: Look  # the reference
    after: Look
    units: int  # vectors of the region
    weights: int
    steps: int
    seconds: float = 0.0
    failed: str = ""  # why its training broke off: there is nothing else of this seed then


@dataclass(frozen=True)
class Relearning:
    """The control of a seed's relearning: the reference, taught in the same way."""

    seed: int
    looks: Sequence[Look]


@dataclass(frozen=True)
class Found:
    """Everything that there was time for, for the page."""

    reference: Look
    injected: Sequence[Injected]
    runs: Sequence[Run]
    matchings: Sequence[Matching]
    attributed: Sequence[Attributed]
    controls: Sequence[Relearning]
    seeds: Sequence[int]  # that were asked for
    methods: Sequence[str]
    attributions: Sequence[str]
    unit: str
    density: float
    pool: int  # units of the model
    forget_rows: int
    #: what forget quality compares: "truth ratio", or "probability" where rows have no wrong answers
    compared: str = "probability"
    #: kinds of pieces that were planned and that were done: {"training": (40, 12), …}
    progress: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    target: Look | None = None  # a model that was taught all rows with all weights, where the study has one

    def regions(self) -> list[str]:
        """The regions of the runs, in order: the true one, the random one, then attributions."""
        found = dict.fromkeys(run.region for run in self.runs)
        return [name for name in (ORACLE, RANDOM, *self.attributions) if name in found]
