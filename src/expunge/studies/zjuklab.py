"""ZJUKLAB's unlearning by merging (arXiv 2503.21088), with its three analyses, and its comparison made without bias.

Per seed two specialists are trained on one target with the published loss: one forgets too much, one too little. Both,
and every merge of them, are scored as SemEval-2025 Task 4 does. On the first seed the trainings are looked at as they
go on (trajectory, loss terms, angles between their phases), beside NPO alone and a model that gradient ascent broke.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from expunge.studies.base import Names, Numbers, StudyOptions, study
from expunge.studies.zjuklab_training import RATE

if TYPE_CHECKING:
    from expunge.report.document import Document
    from expunge.studies.ground import Ground

SUMMARY = (
    "unlearning by merging an over- and an under-forgetting specialist: trajectory, weights, and a fair comparison"
)
PAPER = "2503.21088"
#: The benchmark whose documents are taught whole; of it, the part that has rows which unlearning never sees.
LUME, FOLDS = "lume", "lume:folds"
MERGES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


#: Terms of a specialist's loss, and the forget rows of a step.
TERMS = ("npo", "kl", "nll", "rows")


def _check_weights(given: tuple[str, ...]) -> tuple[str, ...]:
    for part in given:
        name, _, value = part.partition("=")
        try:
            fits = name in TERMS and float(value) >= 0 and (name != "rows" or int(value) > 0)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"'{part}' is no weight; for instance npo=0.4,kl=0.4,nll=0.2,rows=4")
    return given


LossWeights = Annotated[Names, AfterValidator(_check_weights)]


class Zjuklab(StudyOptions):
    """Options of `zjuklab`."""

    seeds: int = Field(3, gt=0, description="pairs of specialists, each merged on its own")
    rate: float = Field(RATE, gt=0, description="learning rate of the specialists (published)")
    epochs: float = Field(5.0, gt=0, description="passes over the forget rows (published); the first is warm-up")
    rank: int = Field(32, gt=0, description="of the adapters (published)")
    alpha: float = Field(32.0, gt=0, description="scale of the adapters times their rank (published)")
    over: LossWeights = Field(
        (), description="of the over-forgetter, where not published: npo=0.4,kl=0.4,nll=0.2,rows=4"
    )
    under: LossWeights = Field((), description="of the under-forgetter: npo=0.3,kl=0.3,nll=0.4,rows=8")
    looks: int = Field(8, ge=2, description="points of the trajectory of each specialist of the first seed")
    look_limit: int = Field(8, gt=0, description="rows per split, task and kind that are asked at each of those points")
    methods: Names = Field(MERGES, description="merge methods of the comparison (expunge list merges)")
    densities: Numbers = Field((0.6, 0.8, 1.0), description="parts of each difference that methods with a trim keep")
    limit: int | None = Field(16, gt=0, description="rows per split, task and kind that a model's scores are of")
    new_tokens: int = Field(256, gt=0, description="length of an answer (256 officially)")
    data_dir: str | None = Field(None, description="folder of the benchmark's files; its hub datasets when absent")
    documents: int | None = Field(None, gt=0, description="of the benchmark, so many documents of each task and split")
    trials: int = Field(30, ge=0, description="of the search for weights, density and scale on each seed; 0: none")
    keep: float = Field(
        0.95, gt=0, le=1, description="part of the target's extraction strength on retain rows that a search keeps"
    )
    teach_epochs: float | None = Field(None, gt=0, description="passes over all rows that teach the target")
    teach_rate: float | None = Field(None, gt=0, description="learning rate that teaches the target")
    taught: bool = Field(False, description="true: the model knows the benchmark's rows already")

    @model_validator(mode="after")
    def _consistent(self) -> Zjuklab:
        if self.reference is not None:
            raise ValueError("zjuklab compares with the target, and has no use for --reference")
        if self.forget is not None and (self.data_dir or self.documents):
            raise ValueError("--data-dir and --documents are about a --benchmark, and --forget names rows")
        if any(density > 1 for density in self.densities):
            raise ValueError("--densities are parts of a whole: above 0, at most 1")
        return self


def entry(options: Zjuklab) -> dict[str, Any]:
    """What both specialists share, as published; the schedule after warm-up is not stated, and is linear here."""
    train = {
        "epochs": options.epochs,
        "lr": options.rate,
        "batch_size": 4,
        "weight_decay": 0.01,
        "warmup": min(1.0, 1 / options.epochs),
        "schedule": "linear",
        "checkpoint_every": 50,
    }
    if options.model == "tiny":
        train["precision"] = "float32"
    adapters = {"rank": options.rank, "alpha": options.alpha, "dropout": 0.05, "targets": "all-linear"}
    return {"method": "npo", "parameters": {"beta": 0.1, "level": "mean"}, "lora": adapters, "train": train}


def recipe(options: Zjuklab, tree: dict[str, Any]) -> None:
    """Folder and size of the benchmark, and how the target is taught: LUME with its prompts, which are documents."""
    data, prepare = tree["data"], tree["prepare"]
    lume = str(data.get("benchmark") or "").partition(":")[0] == LUME
    if data.get("benchmark") == LUME:
        data["benchmark"] = FOLDS
    if lume:
        data["max_length"] = 512  # the longest prompts are above 1,100 characters
    if options.data_dir is not None:
        data["folder"] = options.data_dir
    if options.documents is not None:
        data["documents"] = options.documents
    if options.taught:
        tree["prepare"] = None
    elif prepare is not None:
        given = {"epochs": options.teach_epochs, "lr": options.teach_rate}
        train = prepare["train"] | {name: value for name, value in given.items() if value is not None}
        tree["prepare"] = {**prepare, "train": train, "span": "sequence" if lume else prepare["span"]}


@study(
    "zjuklab",
    summary=SUMMARY,
    paper=PAPER,
    estimate="hours on two CPU cores, most of them in the answers: fewer with --limit, --new-tokens and --methods",
    options=Zjuklab,
    entry=entry,
    fixed=("method", "forget_weight", "retain", "lora", "train.lr", "train.epochs", "train.batch_size", "seed"),
    reference=False,
    recipe=recipe,
)
def zjuklab(ground: Ground, options: Zjuklab) -> Document:
    """Train, look, score and merge, seed by seed; then say what was found."""
    from expunge.studies.zjuklab_page import document
    from expunge.studies.zjuklab_run import Run

    return document(ground, options, Run(ground, options).found())
