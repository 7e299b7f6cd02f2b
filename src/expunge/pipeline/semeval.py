"""The official scores of SemEval-2025 Task 4 (arXiv:2502.15097) of one model after another, on rows given once.

General knowledge (the benchmark `general`) stands in MMLU's place, so the final score is like the official one in form
and not in value; nor is it official where rows are asked in another template than raw, or only a part of them is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from expunge.data.benchmarks.general import CONVENTION as RUNNING_TEXT
from expunge.data.benchmarks.general import METRIC as CHOICE
from expunge.data.benchmarks.general import NAME as GENERAL
from expunge.data.benchmarks.general import accuracy, general_knowledge
from expunge.data.benchmarks.semeval import KINDS, MEMBERS, NONMEMBERS, SPLITS, official_numbers, official_task
from expunge.data.encode import Encoded, encode
from expunge.data.example import Example, Splits
from expunge.data.template import Template, resolve_template
from expunge.data.views import viewed
from expunge.errors import UserError
from expunge.metrics.base import METRICS, Resampling, Statistic, example_ids
from expunge.pipeline.aggregates import MeasuredModel
from expunge.pipeline.evaluate import MAIN, LazyModel
from expunge.pipeline.resolve import rows_digest
from expunge.recipe import EvaluateConfig, ModelConfig
from expunge.recipe.conventions import Convention, convention_of
from expunge.scoring.generate import generate
from expunge.scoring.scores import score

#: Tokens that the official script generates.
NEW_TOKENS = 256
UNSEEN = "retain_unseen"
_WRONG = f"{GENERAL}@perturbed_answer"
#: split → what its extraction strength is called
_STRENGTHS = {"forget": "forget_es", "retain": "retain_es", UNSEEN: "unseen_es"}


class Said(NamedTuple):
    """What a model says to a row."""

    split: str
    task: str
    prompt: str
    wanted: str
    said: str


@dataclass(frozen=True)
class Measurement:
    """Scores of a model by name, None where nothing could be measured, and what it said.

    The twelve (`forget_task1_regurgitation`, …; forget values are 1 − mean), `task_aggregate`, `mia_auc`, `mia_score`,
    `general`, `final` (mean of task aggregate, MIA score and general), `forget_es`, `retain_es`, `unseen_es`.
    """

    values: dict[str, float | None]
    answers: list[Said]


class Official:
    """Rows in one tokenizer's tokens, as SemEval's script asks them; `score` is for models that share it.

    Members are whole documents where there are any (`mia_member` against `holdout`), else the forget rows, prompts
    included, against the holdout rows. `notes` says so, and what else makes the scores other than official.
    """

    def __init__(
        self,
        splits: Splits,
        rows: Mapping[str, Sequence[Encoded]],
        tokenizer: Any,
        template: Template,
        evaluate: EvaluateConfig,
        *,
        limit: int | None = None,
        new_tokens: int = NEW_TOKENS,
        general: Sequence[Example] | None = None,
        max_length: int = 512,
    ) -> None:
        """Of `rows` (else of `splits`), at most `limit` of each split and task are asked; `general` is all of the
        benchmark when None. Raises UserError for rows that are not of LUME's shape."""
        self.tokenizer, self.evaluate, self.new_tokens = tokenizer, evaluate, new_tokens
        self.convention, self.running_text = convention_of("semeval"), convention_of(RUNNING_TEXT)
        whole = {split.name: list(split.examples) for split in splits}
        whole |= {name: [row.example for row in chosen] for name, chosen in rows.items()}
        asked = {name: _labelled(name, whole[name], limit) for name in (*SPLITS, UNSEEN) if whole.get(name)}
        _check(asked)
        self.rows: dict[str, list[Encoded]] = {
            name: encode(examples, tokenizer, template, max_length, self.convention) for name, examples in asked.items()
        }
        members = encode(whole.get(MEMBERS) or whole["forget"], tokenizer, template, max_length, self.convention)
        others = encode(whole.get(NONMEMBERS, ()), tokenizer, template, max_length, self.convention)
        if others:
            # documents are supervised whole as they are; of rows, prompts count as well
            self.rows |= {MEMBERS: [row.whole() for row in members], NONMEMBERS: [row.whole() for row in others]}
        facts = general_knowledge() if general is None else list(general)
        plain = resolve_template("raw", tokenizer)
        for name, examples in ((GENERAL, facts), (_WRONG, viewed(facts, "perturbed_answer"))):
            self.rows[name] = encode(examples, tokenizer, plain, max_length, self.running_text)
        self.notes = self._notes(template, limit)

    @property
    def digest(self) -> str:
        """Of all that the scores depend on but for the model."""
        generation = self.evaluate.generate
        about = (self.evaluate.dtype, self.new_tokens, generation and generation.batch_size, self.evaluate.batch_size)
        whole = hashlib.sha256(repr(about).encode())
        for name, rows in self.rows.items():
            tasks = ",".join(row.example.task for row in rows)
            whole.update(f"{name} {rows_digest(rows)} {tasks}".encode())
        return whole.hexdigest()

    def score(self, model: Any, *, generate: bool = True) -> Measurement:
        """The scores of a model in memory, or of a ModelConfig. Without `generate` the twelve are missing, and with
        them the aggregate and the final score: one pass instead of many."""
        module = LazyModel(model, self.evaluate.dtype).loaded.model if isinstance(model, ModelConfig) else model
        tables = self._scores(module)
        measured = _Measured(self.rows)
        for split in _STRENGTHS:
            if split in tables:
                measured.add(split, MAIN, [tables[split]], self.convention)
        if MEMBERS in tables:
            measured.add(MEMBERS, "mia_loss", [tables[MEMBERS], tables[NONMEMBERS]], self.convention)
        if self.rows[GENERAL]:
            choices = [tables[GENERAL], tables[GENERAL].slice(0, 0), tables[_WRONG]]
            measured.add(GENERAL, CHOICE, choices, self.running_text)
        answers = self._generations(module, tables, measured) if generate else []
        return Measurement(_values(measured.of_model()), answers)

    def _scores(self, module: Any) -> dict[str, pa.Table]:
        """One teacher-forced pass over everything."""
        together = [row for rows in self.rows.values() for row in rows]
        table = score(module, together, batch_size=self.evaluate.batch_size)
        tables, start = {}, 0
        for name, rows in self.rows.items():
            tables[name] = table.slice(start, len(rows))
            start += len(rows)
        return tables

    def _generations(self, module: Any, tables: Mapping[str, pa.Table], measured: _Measured) -> list[Said]:
        """Greedy texts of the rows of forget and retain; what scoring shows to be said is not decoded again."""
        settings = self.evaluate.generate
        together = [row for name in SPLITS for row in self.rows[name]]
        table = generate(
            module,
            self.tokenizer,
            together,
            max_new_tokens=self.new_tokens,
            batch_size=32 if settings is None else settings.batch_size,
            known=pa.concat_tables([tables[name] for name in SPLITS]),
        )
        answers, start = [], 0
        for split in SPLITS:
            part = table.slice(start, len(self.rows[split]))
            start += len(part)
            for _, metric in KINDS.values():
                measured.add(split, metric, [part], self.convention)
            columns = (part.column(name).to_pylist() for name in ("task", "prompt", "answer", "generated"))
            answers += [Said(split, *cells) for cells in zip(*columns, strict=True)]
        return answers

    def _notes(self, template: Template, limit: int | None) -> list[str]:
        said = ["General knowledge stands in MMLU's place, so the final score is not SemEval's own."]
        if template.name != "raw":
            said.append(f"Rows are asked in the template {template.name}, not as SemEval asks them.")
        if self.new_tokens != NEW_TOKENS:
            said.append(f"Models say at most {self.new_tokens} tokens; officially {NEW_TOKENS}.")
        if limit is not None:
            said.append(f"At most {limit} rows of each split and task are asked.")
        if MEMBERS not in self.rows:
            said.append("There are no rows that nobody learnt, so that membership can't be tested.")
        elif not self.rows[MEMBERS][0].example.is_text:
            said.append("There are no member documents: membership is that of the forget rows against holdout rows.")
        return said


class _Measured:
    """Values of metrics as they are found."""

    def __init__(self, rows: Mapping[str, Sequence[Encoded]]) -> None:
        self.tasks = {name: {row.example.id: row.example.task for row in chosen} for name, chosen in rows.items()}
        self.records: dict[tuple[str, str], dict[str, Any]] = {}
        self.scored: dict[tuple[str, str], dict[str, float]] = {}

    def add(self, split: str, metric: str, tables: Sequence[pa.Table], convention: Convention) -> None:
        """A metric's mean over the rows of a split and its values, or its number about the split as a whole."""
        found = METRICS.get(metric).compute(tables, convention, Resampling(0))
        if isinstance(found, Statistic):
            self.records[split, metric] = {"value": found.value}
            return
        pairs = zip(example_ids(tables[0]), found.tolist(), strict=True)
        self.scored[split, metric] = {name: value for name, value in pairs if value == value}
        known = found[~np.isnan(found)]
        self.records[split, metric] = {"value": float(known.mean()) if len(known) else None}

    def of_model(self) -> MeasuredModel:
        """As the benchmarks' formulas read it."""
        return MeasuredModel(self.records, self.scored, self.tasks)


def _values(measured: MeasuredModel) -> dict[str, float | None]:
    numbers = {number.name: number.value for number in official_numbers(measured, accuracy(measured))}
    numbers["final"] = numbers.pop("final_score")
    del numbers["final_without_mmlu"]
    return numbers | {name: measured.mean(split, MAIN) for split, name in _STRENGTHS.items()}


def _labelled(split: str, examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The first so many rows of each task and kind, which are their tasks from here on."""
    kept: list[Example] = []
    counts: dict[str, int] = {}
    for row in examples:
        task = official_task(row)
        if task is None:
            raise UserError(
                f"{row.place}: SemEval's scores are of LUME's three tasks, and this {split} row is of none",
                "use rows that have them: --benchmark lume, or fictitious",
            )
        counts[task] = counts.get(task, 0) + 1
        if limit is None or counts[task] <= limit:
            kept.append(replace(row, task=task))
    return kept


def _check(asked: Mapping[str, Sequence[Example]]) -> None:
    """Raises UserError where a split is missing that the twelve values are made of."""
    lacking = [name for name in SPLITS if not asked.get(name)]
    if lacking:
        raise UserError(
            f"SemEval's scores need {' and '.join(lacking)} rows, and there are none", "use --benchmark lume"
        )
