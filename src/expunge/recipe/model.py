"""The Recipe models. Every field says what it is; `expunge init` and the JSON schema print these words."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from expunge.recipe.base import Density, DType, Frozen, Name, NonNegative, Positive
from expunge.recipe.localize import LocalizeConfig
from expunge.recipe.search import SearchConfig


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class ModelConfig(Frozen):
    """A model: an alias (smollm2-135m, tiny), a folder, a hub id, or a .gguf file."""

    id: str = Field(description="alias, folder, hub id or .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: DType = Field("float32", description="dtype of the weights in memory")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")
    allow_pickle: bool = Field(False, description="accept .bin checkpoints, whose unpickling can run code")


def _model_from_string(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


Model = Annotated[ModelConfig, BeforeValidator(_model_from_string)]


class SourceConfig(Frozen):
    """Rows: a file (JSONL, JSON, CSV, Parquet) or a hub dataset as `owner/name[:config][@split]`."""

    path: str
    format: str | None = Field(None, description="name of a data format; sniffed when absent")
    limit: int | None = Field(None, gt=0, description="take only the first rows")


def _source_from_string(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(_source_from_string)]


class ExtraSplit(SourceConfig):
    """A further split that is only evaluated."""

    role: Literal["forget", "retain", "holdout", "utility"] = "utility"


class DataConfig(Frozen):
    """What to forget, what to keep, and how a row becomes tokens."""

    benchmark: str | None = Field(None, description="a built-in benchmark instead of files, e.g. fictitious")
    folder: str | None = Field(None, description="local files of that benchmark; its hub datasets when absent")
    documents: int | None = Field(
        None, gt=0, description="of that benchmark, so many documents of each task and split; all when absent"
    )
    forget: Source | None = Field(None, description="rows to forget")
    retain: Source | None = Field(None, description="rows to keep; unlearning trains on them")
    retain_unseen: Source | None = Field(None, description="rows to keep that unlearning never sees (evaluation only)")
    holdout: Source | None = Field(None, description="rows that no model was trained on")
    splits: dict[Name, ExtraSplit] = Field(default_factory=dict, description="further splits, evaluated only")
    template: str = Field("auto", description="auto, chat, raw, or a format string with {prompt} and {answer}")
    max_length: int = Field(512, ge=8, description="tokens of prompt and answer together; cuts are counted")

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if self.benchmark and (self.forget or self.retain):
            raise ValueError("give either `benchmark` or `forget`/`retain`, not both")
        if self.folder and not self.benchmark:
            raise ValueError("`folder` holds the files of a `benchmark`; name it")
        if self.documents and not self.benchmark:
            raise ValueError("`documents` are those of a `benchmark`; name it")
        if self.template not in ("auto", "chat", "raw") and (
            "{prompt}" not in self.template or "{answer}" not in self.template
        ):
            raise ValueError("a template must contain {prompt} and {answer}, or be one of auto, chat, raw")
        return self


class LoraConfig(Frozen):
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = Field(16, gt=0)
    alpha: Positive | None = Field(None, description="scale × rank; equal to rank when absent")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field("all-linear", description="module name endings, or all-linear")


def _lora_from_rank(value: Any) -> Any:
    return {"rank": value} if isinstance(value, int) and not isinstance(value, bool) else value


Lora = Annotated[LoraConfig, BeforeValidator(_lora_from_rank)]


class TrainConfig(Frozen):
    """How parameters are updated."""

    epochs: Positive = Field(5.0, description="passes over the forget rows (unlearn) or over all rows (prepare)")
    max_steps: int | None = Field(None, gt=0, description="stop after this many optimizer steps")
    minutes: Positive | None = Field(
        None, description="of training at most; where it would take longer, the learning rate falls faster to end there"
    )
    lr: Positive = Field(1e-5, description="learning rate; 1e-4 when adapters are trained and none is given")
    batch_size: int = Field(8, gt=0, description="forget rows (unlearn) or rows (prepare) of one optimizer step")
    accumulation: int = Field(1, gt=0, description="micro-batches that one optimizer step is split into")
    weight_decay: NonNegative = 0.01
    warmup: float = Field(0.0, ge=0, le=1, description="part of the steps over which the learning rate rises")
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: Positive = 1.0
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="autocast dtype of forward and backward")
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(20, gt=0, description="optimizer steps between checkpoints that a killed run resumes")


class PrepareConfig(Frozen):
    """Fine-tune the target (forget + every retain split) and the reference (the same without forget)."""

    train: TrainConfig = TrainConfig(epochs=8, lr=2e-4)
    lora: Lora | None = None
    span: Literal["answer", "sequence"] = Field("answer", description="what is taught: answers, or prompts too")


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
    """Which answer tokens the forget loss sees."""

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
        "until it does. Held out is the split `validation`, else a fifth of the retain rows",
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
