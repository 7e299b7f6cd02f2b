"""One entry of `unlearn`: the objective, what it sees of the forget rows, what holds it back, and what trains it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from expunge.recipe.base import Density, Frozen, Name, NonNegative, Positive
from expunge.recipe.parts import Lora, Model, Pattern, TrainConfig


class RetainTerms(Frozen):
    """Weights of the retain terms that are added to the objective; absent = the objective's own default."""

    nll: NonNegative | None = Field(None, description="negative log-likelihood of the retain answers")
    kl: NonNegative | None = Field(None, description="KL(start model ‖ model) on the retain answers' tokens")


def _retain_from_string(value: Any) -> Any:
    weights = {"none": {"nll": 0.0, "kl": 0.0}, "nll": {"nll": 1.0, "kl": 0.0}, "kl": {"nll": 0.0, "kl": 1.0}}
    return weights.get(value, value) if isinstance(value, str) else value


#: What lacks the knowledge where no model does: the target, asked the same about names that nobody has.
STRANGERS = "strangers"


class TokenSelection(Frozen):
    """Which tokens the forget loss sees: of the answers, and of prompts where these were learnt too."""

    by: Literal["all", "knowledge", "entity"] = Field(
        "all", description="knowledge: tokens that surprise `model`; entity: the parts of answers that rows name"
    )
    model: str = Field(
        "original",
        description="what lacks the knowledge: original, reference, a model of yours, or strangers: "
        "the target itself, asked about names that nobody has",
    )
    threshold: float = Field(-2.0, lt=0, description="a token carries knowledge when its log-prob is below this …")
    fall: Density | None = Field(
        None, description="… or, if given, when it is in this part of its answer that falls most from target to `model`"
    )
    prompts: bool = Field(
        False,
        description="by knowledge: where prompts were learnt too (the target knows half of what surprises `model` by "
        "heart), choose of their tokens as well, and keep retain rows with their prompts",
    )

    @model_validator(mode="after")
    def _by_a_model(self) -> TokenSelection:
        if self.prompts and (self.by != "knowledge" or self.model == STRANGERS or self.fall is not None):
            raise ValueError("`prompts` goes with `by: knowledge`, a model that lacks the knowledge, and no `fall`")
        return self


def _tokens_from_string(value: Any) -> Any:
    return {"by": value} if isinstance(value, str) else value


class AlternativesConfig(Frozen):
    """Other answers to the same prompts, for objectives that prefer them (dpo, altpo, idk_nll, …)."""

    by: Literal["idk", "given", "sampled"] | None = Field(
        None, description="sentences that decline, columns of the rows, or samples; the objective's own when absent"
    )
    sentences: list[Annotated[str, Field(pattern=r"\S")]] | None = Field(
        None, min_length=1, description="sentences of yours that decline, instead of the built-in ones"
    )
    count: int = Field(5, gt=0, description="samples per row")
    temperature: Positive = Field(1.0, description="of the sampling")
    max_new_tokens: int = Field(64, gt=0, description="length of a sample")


def _alternatives_from_string(value: Any) -> Any:
    return {"by": value} if isinstance(value, str) else value


class RelearningConfig(Frozen):
    """A relearning of a step's forget rows that the step looks ahead to."""

    steps: int = Field(1, gt=0, description="of relearning, each by `lr` times the sign of the gradient")
    lr: Positive = Field(1e-4, description="how far a step of relearning moves each parameter")


class StopRule(Frozen):
    """Ends the training when a metric of a split crosses a number, or the same metric of another split."""

    metric: str = Field(description="made from the scoring pass (expunge list metrics)")
    split: Name = Field("forget", description="where it is measured")
    above: float | Name | None = Field(None, description="stop at or above this number, or this split's value")
    below: float | Name | None = Field(None, description="stop at or below it")
    every: int = Field(10, gt=0, description="optimizer steps between two looks")
    limit: int | None = Field(None, gt=0, description="rows of each split that are looked at; all when absent")

    @model_validator(mode="after")
    def _one_side(self) -> StopRule:
        if (self.above is None) == (self.below is None):
            raise ValueError("give either `above` or `below`")
        return self

    def __str__(self) -> str:
        """The rule in words."""
        side, threshold = ("above", self.above) if self.above is not None else ("below", self.below)
        shown = threshold if isinstance(threshold, str) else f"{threshold:g}"
        return f"{self.metric} of {self.split} {side} {shown}"


def _rules_from_one(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class UnlearnConfig(Frozen):
    """One unlearning run; several make the specialists that are merged."""

    name: Name = "unlearned"
    method: str = Field("npo", description="an objective (expunge list methods), or auto: chosen from what is there")
    parameters: dict[str, Any] = Field(default_factory=dict, description="the objective's hyper-parameters")
    forget_weight: NonNegative = Field(1.0, description="weight of the forget loss")
    retain: Annotated[RetainTerms, BeforeValidator(_retain_from_string)] = RetainTerms()
    retain_batch: int | None = Field(None, gt=0, description="retain rows of one step; the objective's own when absent")
    tokens: Annotated[TokenSelection, BeforeValidator(_tokens_from_string)] = TokenSelection()
    span: Literal["answer", "sequence"] | None = Field(
        None, description="what the forget loss is about: the answer, or prompt and answer; the objective's when absent"
    )
    cap: Positive | None = Field(None, description="rows whose mean token NLL has passed this no longer count")
    temperature: Positive = Field(1.0, description="the forget loss sees logits divided by this")
    quantile: Density | None = Field(None, description="part of each answer's tokens, of lowest loss, that counts")
    neighbours: int | None = Field(
        None,
        gt=0,
        description="retain rows made of each forget row by renaming: strangers, of whom the same is said as before",
    )
    alternatives: Annotated[AlternativesConfig, BeforeValidator(_alternatives_from_string)] = AlternativesConfig()
    sam: Positive | None = Field(
        None, description="sharpness-aware: the forget gradient is taken this far up its own direction, e.g. 0.01"
    )
    relearning: RelearningConfig | None = Field(
        None, description="relearning-aware: the forget gradient is taken where a short relearning leads"
    )
    gradient_projection: bool = Field(
        False, description="the forget gradient loses what points against the retain gradient"
    )
    null_space: Positive | None = Field(
        None,
        description="updates of linear layers keep out of input directions that retain rows use; one that is used this "
        "many times the usual is moved half as far, e.g. 3",
    )
    stop_when: Annotated[list[StopRule], BeforeValidator(_rules_from_one)] = Field(
        default_factory=list,
        description="rules such as {metric: perplexity, above: holdout} that end training; the best look is kept",
    )
    keep: Density | None = Field(
        None,
        description="part of the extraction strength on held-out retain rows that must stay: the update is scaled down "
        "until it does, or, within the standard error of these rows, until forget rows would stand again. Held out "
        "is the split `validation`, else a fifth of the retain rows",
    )
    trainable: list[Pattern] | None = Field(
        None, description="patterns of parameter names to train; the objective's own when absent"
    )
    reset: Model | None = Field(
        None,
        description="the part that is trained starts from this model's weights: the base before fine-tuning, "
        "`original` where `prepare` taught it",
    )
    lora: Lora | None = None
    train: TrainConfig = TrainConfig()
    seed: int | None = Field(None, description="the recipe's seed when absent")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_adapters(cls, data: Any) -> Any:
        """Adapters start at zero and need a higher rate than weights: 1e-4, as in the published LoRA runs."""
        if isinstance(data, dict) and data.get("lora") is not None and data.get("method") != "auto":
            train = data.get("train") or {}
            if isinstance(train, dict) and "lr" not in train:
                return {**data, "train": {**train, "lr": 1e-4}}
        return data
