"""What entries of a recipe are made of: models, rows, adapters, and how parameters are updated."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from expunge.recipe.base import DType, Frozen, Name, NonNegative, Positive


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
