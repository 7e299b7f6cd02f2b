"""Does localization inform unlearning? The controlled test of arXiv 2505.16252, and the same after relearning.

A reference is taught the retain rows alone. Per seed, the forget rows are taught to it through a random part of its
value vectors, so that it is known where they are kept. They are then unlearned with updates that may touch that very
part (oracle), as many other vectors drawn at random, or those that an attribution points at.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from expunge.recipe import Unit
from expunge.studies.base import Names, StudyOptions, study
from expunge.studies.localization_record import ORACLE, RANDOM

if TYPE_CHECKING:
    from expunge.report.document import Document
    from expunge.studies.ground import Ground

SUMMARY = "unlearning inside the part of a model that holds the rows, beside random and attributed parts"
PAPER = "2505.16252"
SMALLER = "fictitious:80"
UNIT: Unit = "value_vector"
PUBLISHED_DENSITY = 0.1
METHODS = ("wga", "npo", "dpo", "rmu")
FIRST = "wagle"
ATTRIBUTIONS = ("gradient", "gradient_times_weight", "activations", "wagle", "memflex")
#: Teaching and unlearning by value vectors alone need this rate on a model of this many parameters, and less on a
#: larger one: Adam's best rate falls with width (arXiv 2203.03466).
RATE, RATE_SIZE = 1e-3, 1.35e8
#: RMU in few steps: the retain term weighs less than in the published runs, as in the study `rmu_layers`; tiny has no
#: layer at a quarter of its depth whose vectors could part the rows.
OWN: dict[str, dict[str, Any]] = {"rmu": {"alpha": 100.0}}
OWN_TINY: dict[str, dict[str, Any]] = {"rmu": {"layer": 1, "alpha": 1.0}}


class Localization(StudyOptions):
    """Options of `localization`."""

    forget: str | None = Field(
        None, description="rows to forget, which the model does not know yet: a region learns them"
    )
    seeds: int = Field(5, gt=0, description="regions that are drawn and taught; every region and method on each")
    density: float | None = Field(
        None,
        gt=0,
        le=0.5,
        description="part of the value vectors that holds the forget rows; 0.1 as published, and "
        "0.25 on tiny, when absent",
    )
    methods: Names = Field(METHODS, min_length=1, description="objectives, each in every region")
    attributions: Names = Field(ATTRIBUTIONS, description="attributions that are to find the region")
    regions: Names | None = Field(
        None,
        description=f"where is unlearned: {ORACLE}, {RANDOM}, attributions; when absent in all of them, and on tiny in "
        f"the first two and {FIRST}",
    )
    steps: int = Field(30, gt=1, description="optimizer steps of unlearning")
    looks: int = Field(5, gt=0, description="of these steps, so many after which a model is measured, early ones first")
    batch: int = Field(8, gt=0, description="forget rows of a step, and as many retain rows")
    rate: float | None = Field(None, gt=0, description="learning rate of unlearning; by the model's size when absent")
    inject_epochs: float | None = Field(
        None,
        gt=0,
        description="passes that teach the forget rows to the region; 24, and 40 on tiny, when absent",
    )
    inject_rate: float | None = Field(None, gt=0, description="learning rate of that; by the model's size when absent")
    inject_retain: float | None = Field(
        None, ge=0, description="retain rows taught beside each forget row; 0 as published, and 2 on tiny, when absent"
    )
    relearn: int = Field(8, ge=0, description="optimizer steps of relearning after each unlearning; 0: none")
    relearn_looks: int = Field(2, gt=0, description="of these, so many are measured: the last, its half, a quarter, …")
    relearn_rate: float | None = Field(None, gt=0, description="learning rate of relearning, with all weights")
    ridge: float = Field(1e-4, gt=0, description="of the closed-form match of MLP outputs, times the mean square input")
    limit: int | None = Field(None, gt=0, description="rows of each split that a model is measured on; all when absent")
    parameters: Names = Field((), description="hyper-parameters of methods, e.g. npo.beta=0.5,rmu.layer=3")

    @model_validator(mode="after")
    def _regions_known(self) -> Localization:
        known = (ORACLE, RANDOM, *self.attributions)
        for name in self.regions or ():
            if name not in known:
                raise ValueError(f"--regions: '{name}' is none of {', '.join(known)}")
        return self

    @property
    def where(self) -> tuple[str, ...]:
        """The regions that are unlearned in, true and random ones first."""
        known = tuple(dict.fromkeys((ORACLE, RANDOM, *self.attributions)))
        wanted = self.regions if self.regions is not None else ((ORACLE, RANDOM, FIRST) if self.tiny else known)
        return tuple(name for name in known if name in wanted)

    @property
    def tiny(self) -> bool:
        """Whether the model is the built-in one that was never trained, which needs larger steps than a real one."""
        return self.model == "tiny"

    @property
    def kept_rows(self) -> float:
        """Retain rows per forget row that the region is taught too: tiny has nothing else that would hold them."""
        return (2.0 if self.tiny else 0.0) if self.inject_retain is None else self.inject_retain

    @property
    def part(self) -> float:
        """The density."""
        return self.density or (0.25 if self.tiny else PUBLISHED_DENSITY)


def region_rate(options: Localization, parameters: int) -> float:
    """The learning rate of value vectors for a model of a size, to two digits."""
    if options.tiny:
        return 5e-3
    return float(f"{min(RATE, RATE * math.sqrt(RATE_SIZE / parameters)):.1e}")


def injection(options: Localization, parameters: int) -> dict[str, Any]:
    """How the forget rows are taught to a region, where that differs from unlearning."""
    shape = {"schedule": "cosine", "warmup": 0.05} if options.tiny else {"schedule": "constant"}
    return {
        "epochs": options.inject_epochs or (40.0 if options.tiny else 24.0),
        "max_steps": None,
        "lr": options.inject_rate or (2e-2 if options.tiny else region_rate(options, parameters)),
        "batch_size": 2 * options.batch,
        **shape,
    }


def look_steps(steps: int, looks: int) -> list[int]:
    """`looks` steps up to the last one, closer together at the beginning, where most is lost: 2, 4, 7, 11, 16."""
    return sorted({max(1, round(steps * (place / looks) ** 1.5)) for place in range(1, looks + 1)})


def relearn_steps(steps: int, looks: int) -> list[int]:
    """The last step, its half, a quarter, …"""
    return sorted({max(1, round(steps / 2**back)) for back in range(looks)}) if steps else []


def entry(options: Localization) -> dict[str, Any]:
    """What all trials share; nothing but the objective pulls at the weights, so there is no weight decay."""
    train: dict[str, Any] = {
        "epochs": 100_000,
        "max_steps": options.steps,
        "batch_size": options.batch,
        "weight_decay": 0.0,
        "schedule": "constant",
        "checkpoint_every": 100_000,
    }
    if options.tiny:
        train["precision"] = "float32"
    return {"method": "npo", "retain_batch": options.batch, "train": train}


def recipe(options: Localization, tree: dict[str, Any]) -> None:
    """Rows of one's own are taught too, and rows with wrong answers are asked for them."""
    from expunge.recipe import load_recipe

    if options.tiny and tree["data"].get("benchmark") == "fictitious":
        tree["data"]["benchmark"] = SMALLER  # what a quarter of its value vectors can hold
    tree["evaluate"]["metrics"] = ["extraction_strength", "forget_quality_log10"]
    if options.reference is not None:
        tree["prepare"] = None
    elif tree["prepare"] is None:
        preset = load_recipe(preset="demo-tiny" if options.tiny else "demo").prepare
        assert preset is not None
        tree["prepare"] = preset.model_dump(mode="json")


@study(
    "localization",
    summary=SUMMARY,
    paper=PAPER,
    estimate="minutes on tiny; hours on a model of 135M parameters and two cores, and less than one with "
    "--methods wga,npo --regions oracle,random --steps 16",
    options=Localization,
    entry=entry,
    fixed=("method", "parameters", "train.lr", "train.max_steps", "train.epochs", "trainable", "lora", "reset", "seed"),
    target=False,
    recipe=recipe,
)
def localization(ground: Ground, options: Localization) -> Document:
    """Teach, inject, attribute, unlearn, relearn, seed by seed; then say what was found."""
    from expunge.studies.localization_page import document
    from expunge.studies.localizing.run import Pieces

    return document(ground, options, Pieces(ground, options).found())
