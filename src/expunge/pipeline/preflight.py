"""What can be seen wrong with models before a weight is read: files, tokenizers, lengths, and jobs that can't run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.files import is_adapter
from expunge.models.load import check_vocabulary, load_tokenizer, resolve_folder, skeleton
from expunge.pipeline.processes import process_count
from expunge.recipe import ModelConfig

if TYPE_CHECKING:
    from expunge.pipeline.job import Job


@dataclass(frozen=True)
class Candidate:
    """A model that passed every check that needs no weights."""

    config: ModelConfig
    skeleton: Any  # modules on the meta device; None for GGUF
    tokenizer: Any

    @property
    def parameters(self) -> int:
        """How many it has; of a GGUF file a guess, by its size at about four bits each."""
        if self.skeleton is None:
            return 2 * resolve_folder(self.config.id, self.config.revision).stat().st_size
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @property
    def context(self) -> int | None:
        """Tokens that the model can see at once; None where its config does not say."""
        if self.skeleton is None:
            return None
        length = getattr(self.skeleton.config.get_text_config(), "max_position_embeddings", None)
        return int(length) if isinstance(length, int) and length > 0 else None


def open_candidate(config: ModelConfig) -> Candidate:
    """Files, config and tokenizer of a model. Raises UserError."""
    modules = skeleton(config)
    tokenizer = load_tokenizer(config)
    if modules is not None:
        check_vocabulary(modules, tokenizer, config.id)
    return Candidate(config, modules, tokenizer)


def check_same_tokens(one: Candidate, config: ModelConfig, role: str) -> Candidate:
    """A second model, given the rows in the tokens of the first. Raises UserError if they mean something else to it."""
    two = open_candidate(config)
    token = other_token(one.tokenizer, two.tokenizer)
    if token is not None:
        raise UserError(
            f"{role} {config.id} has another tokenizer than {one.config.id} ({token}): scores can't be compared",
            "give a model of the same family, with the same tokenizer",
        )
    return two


def other_token(one: Any, two: Any) -> str | None:
    """The first token in which two tokenizers differ, in words; None if they are alike."""
    first, second = ({index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (one, two))
    for index in sorted(first.keys() | second.keys()):
        if first.get(index) != second.get(index):
            return f"token {index} is {first.get(index)!r} in one and {second.get(index)!r} in the other"
    return None


def check_context(model: Candidate, rows: Mapping[str, Sequence[Encoded]]) -> None:
    """Raises UserError for rows that are longer than what the model can see at once."""
    context = model.context
    for split, encoded in rows.items():
        too_long = [len(row.input_ids) for row in encoded if context is not None and len(row.input_ids) > context]
        if too_long:
            raise UserError(
                f"{split}: {len(too_long)} of {len(encoded)} rows are longer than the context of {model.config.id} "
                f"({max(too_long)} tokens, but it sees {context})",
                f"cut them: --set data.max_length={context}",
            )


def check_job(job: Job, start: ModelConfig) -> None:
    """Raises UserError for what would stop a training run at its first step; `start` has the architecture."""
    from expunge.pipeline.job import check_terms, prepare_parameters
    from expunge.pipeline.masked import check_reset

    job.plan(process_count())
    folder = resolve_folder(start.id, start.revision)
    if folder.is_dir() and is_adapter(folder):
        raise UserError(
            f"{start.id} is an adapter; training starts from a whole model",
            f"merge it first: expunge merge {start.id} --method linear -o FOLDER",
        )
    check_terms(job)
    modules = skeleton(start)
    if modules is None:
        return
    if job.objective is not None:
        job.objective.check(modules)
    prepared = prepare_parameters(modules, job)
    if job.reset is not None:
        check_reset(prepared, job.reset)
