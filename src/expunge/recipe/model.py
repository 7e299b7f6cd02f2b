"""The Recipe. Every field says what it is; `expunge init` and the JSON schema print these words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from expunge.recipe.base import Density, DType, Frozen, Name, NonNegative
from expunge.recipe.localize import LocalizeConfig
from expunge.recipe.parts import DataConfig, Lora, Model, TrainConfig
from expunge.recipe.search import SearchConfig
from expunge.recipe.unlearn import UnlearnConfig


class PrepareConfig(Frozen):
    """Fine-tune the target (forget + every retain split) and the reference (the same without forget)."""

    train: TrainConfig = TrainConfig(epochs=8, lr=2e-4)
    lora: Lora | None = None
    span: Literal["answer", "sequence"] = Field("answer", description="what is taught: answers, or prompts too")
    views: list[Literal["paraphrase", "related"]] = Field(
        default_factory=list, description="other questions that rows bring, taught beside them"
    )


#: A number, numbers over the layers, or {pattern of parameter names: one of these, default: …}.
PerTensor = float | list[float] | dict[str, float | list[float]]


class MergeConfig(Frozen):
    """Merge of models that share a base, in the space of weight differences."""

    method: str = Field("ties", description="a merge method (expunge list merges)")
    models: list[Name] = Field(default_factory=list, description="names of unlearn entries; all when absent")
    weights: list[PerTensor] | None = Field(
        None, description="one per model: a number, a list over the layers, or {pattern: …, default: …}; 1 when absent"
    )
    density: Density | list[PerTensor] = Field(
        0.8, description="part of each difference that is kept; or one per model"
    )
    parameters: dict[str, Any] = Field(default_factory=dict, description="further parameters of the method")
    search: SearchConfig | None = Field(None, description="choose weights, density, scale and method on rows instead")


class GenerateConfig(Frozen):
    """The generation pass."""

    max_new_tokens: int = Field(64, gt=0)
    batch_size: int = Field(32, gt=0)
    limit: int | None = Field(None, gt=0, description="rows per split; all when absent")


class EvaluateConfig(Frozen):
    """What is measured, and how."""

    suite: Literal["quick", "standard", "full"] = Field(
        "quick", description="quick: scores and texts; standard: paraphrases and drift too; full: samples and depth"
    )
    metrics: list[str] | None = Field(None, description="names (expunge list metrics); the suite's when absent")
    convention: str = Field(
        "auto", description="how scorers count (expunge list conventions); auto: the benchmark's own, else expunge"
    )
    lm_eval: list[str] = Field(
        default_factory=list, description="tasks of lm-evaluation-harness, e.g. mmlu (pip install 'expunge[eval]')"
    )
    samples: int = Field(32, gt=0, description="sampled answers per row in the full suite")
    batch_size: int = Field(16, gt=0)
    dtype: DType = Field("float32", description="bfloat16 is faster, but ties flip argmax hits")
    generate: GenerateConfig | None = GenerateConfig()
    bootstrap: int = Field(2000, ge=100, description="resamples behind each confidence interval")


class Thresholds(Frozen):
    """The verdicts of the report, fixed beforehand."""

    forget_extraction: NonNegative = Field(0.15, description="Forgotten: forget extraction strength at most this …")
    reference_margin: NonNegative = Field(0.05, description="… or within this of the reference, whichever is larger")
    retain_kept: NonNegative = Field(0.95, description="Kept: part of the target's retain extraction strength")
    repetition_margin: NonNegative = Field(
        0.1, description="Fluent: outputs repeat themselves at most this much more than the target's or the reference's"
    )
    robust_margin: NonNegative = Field(
        0.1, description="Robust: under an attack, strength on the forget rows at most this above the reference's"
    )


class Recipe(Frozen):
    """Everything that a run is."""

    version: Literal[1] = 1
    name: Name = "run"
    seed: int = Field(42, ge=0)
    model: Model
    reference: Model | None = Field(None, description="a model that never saw the forget rows, if there is one")
    data: DataConfig
    prepare: PrepareConfig | None = Field(None, description="first teach the model the data (for experiments)")
    localize: LocalizeConfig | None = Field(
        None, description="unlearning changes only this part of the model; all of it when absent"
    )
    unlearn: list[UnlearnConfig] = Field(min_length=1)
    merge: MergeConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    thresholds: Thresholds = Thresholds()

    @model_validator(mode="after")
    def _names_agree(self) -> Recipe:
        names = [entry.name for entry in self.unlearn]
        reserved = {"original", "target", "reference", "merged"}
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"unlearn: two entries are called '{name}'; give each its own `name`")
            if name in reserved:
                raise ValueError(f"unlearn: '{name}' is the name of another variant; choose another `name`")
        if len(names) > 1 and self.merge is None:
            raise ValueError("unlearn: several entries need a `merge` that says how they become one model")
        if self.merge is not None:
            for name in self.merge.models:
                if name not in names:
                    raise ValueError(f"merge.models: '{name}' is not the name of an unlearn entry ({', '.join(names)})")
            count = len(self.merge.models or names)
            if self.merge.weights is not None and len(self.merge.weights) != count:
                raise ValueError(f"merge.weights: {len(self.merge.weights)} weights for {count} models")
            if isinstance(self.merge.density, list) and len(self.merge.density) != count:
                raise ValueError(f"merge.density: {len(self.merge.density)} densities for {count} models")
        available = {"original": self.prepare, "reference": self.prepare or self.reference}
        for entry in self.unlearn:
            if entry.reset is not None and entry.reset.id == "original" and self.prepare is None:
                raise ValueError(
                    f"unlearn.{entry.name}.reset: there is no 'original' model here; name the base that was fine-tuned"
                )
            if entry.tokens.by == "knowledge" and available.get(entry.tokens.model, True) is None:
                raise ValueError(
                    f"unlearn.{entry.name}.tokens.model: there is no '{entry.tokens.model}' model here; "
                    "name a model that lacks the knowledge, e.g. the base that was fine-tuned"
                )
        return self
