"""From the entries of a recipe to training runs: weights, alternatives, token selection, what stop rules look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from expunge.data.alternatives import anchors, declining, given, needs_given
from expunge.data.aside import put_aside
from expunge.data.encode import Encoded, encode
from expunge.data.example import Example
from expunge.data.spans import entity_masks
from expunge.data.views import viewed
from expunge.errors import UserError
from expunge.localize.masks import Mask
from expunge.methods.base import Objective, build_objective
from expunge.methods.step import ForgetView
from expunge.metrics.base import METRICS
from expunge.pipeline.job import Job, Keep, Watched
from expunge.pipeline.masked import WHOLE_MODULES, parts_of_modules
from expunge.recipe import ModelConfig, Recipe, StopRule, UnlearnConfig

if TYPE_CHECKING:
    from pathlib import Path

    from expunge.pipeline.resolve import Resolved

#: The split that `keep` is measured on; where there is none, this part of the retain rows, and so many at most (of the
#: forget rows too).
VALIDATION = "validation"
HELD_OUT, HELD_OUT_ROWS = 0.2, 256
#: Nats by which a token of a document is expected more by a model that learnt it than by one that did not.
_TAUGHT = 0.1
#: Other answers to each row's prompt.
Others = Sequence[Sequence[Encoded]]


@dataclass(frozen=True)
class Beside:
    """What an unlearn entry needs beside its rows, and that no model has to make."""

    forget: Others = ()
    retain: Others = ()
    anchors: Sequence[Encoded] = ()
    selection: Sequence[np.ndarray] | None = None


@dataclass
class Made:
    """What models had to say first: what the stages before a training made for it."""

    selection: Sequence[np.ndarray] | None = None  # the tokens that carry the knowledge
    lacking: Sequence[np.ndarray] | None = None  # log-probs of the forget rows under a model without it
    whole: bool = False  # both are of prompt and answer, since prompts were learnt too
    sampled: Others | None = None  # other answers
    strangers: Sequence[Encoded] | None = None  # neighbours of the forget rows


def unlearn_job(
    resolved: Resolved,
    entry: UnlearnConfig,
    model: ModelConfig,
    made: Made | None = None,
    mask: Mask | None = None,
) -> Job:
    """The training run of one unlearn entry; `made` and `mask` are what stages made for it, if any.

    Raises UserError for adapters in a recipe that localizes less than whole modules.
    """
    localize = resolved.recipe.localize
    if entry.lora is not None and localize is not None and not localize.mask and localize.unit not in WHOLE_MODULES:
        raise parts_of_modules(f"localize.unit: {localize.unit} is less")
    made = made or Made()
    objective, beside = resolved.objectives[entry.name], resolved.beside[entry.name]
    if made.whole:
        objective = build_objective(entry.method, {**objective.about.documents, **entry.parameters})
    forget = resolved.rows["forget"]
    kept, held = held_out(entry, resolved.rows)
    retain = [*kept, *_strangers(entry, forget, made.strangers)]
    if made.whole:
        retain = [row.whole() for row in retain]
    others: Others = beside.forget
    if alternatives_of(entry, objective) == "sampled":
        others = made.sampled if made.sampled is not None else [[row] for row in forget]
    return Job(
        model=model,
        forget=[row.whole() for row in forget] if made.whole or span_of(entry, objective) == "sequence" else forget,
        retain=retain,
        train=entry.train,
        seed=resolved.recipe.seed if entry.seed is None else entry.seed,
        objective=objective,
        weights=retain_weights(entry, objective, bool(retain)),
        retain_batch=entry.retain_batch,
        selection=beside.selection if made.selection is None else made.selection,
        lacking=made.lacking,
        view=ForgetView(entry.temperature, entry.cap, entry.quantile),
        forget_alternatives=others,
        retain_alternatives=beside.retain,
        anchors=beside.anchors,
        sam=entry.sam,
        relearning=entry.relearning,
        gradient_projection=entry.gradient_projection,
        null_space=entry.null_space,
        stop_when=entry.stop_when,
        watched=_watched(resolved, entry.stop_when),
        keep=None if entry.keep is None else Keep(entry.keep, held, forget[:: ceil(len(forget) / HELD_OUT_ROWS) or 1]),
        lora=entry.lora,
        trainable=entry.trainable,
        mask=mask,
        reset=_reset(entry, resolved.recipe),
    )


def held_out(
    entry: UnlearnConfig, rows: Mapping[str, Sequence[Encoded]]
) -> tuple[Sequence[Encoded], Sequence[Encoded]]:
    """(Retain rows that an entry trains on, rows that it holds out to see what its update leaves)."""
    retain = rows.get("retain", ())
    if entry.keep is None:
        return retain, ()
    if VALIDATION in rows:
        return retain, rows[VALIDATION]
    return put_aside(retain, min(HELD_OUT, HELD_OUT_ROWS / max(len(retain), 1)))


def _strangers(entry: UnlearnConfig, forget: Sequence[Encoded], made: Sequence[Encoded] | None) -> Sequence[Encoded]:
    """Neighbours of the forget rows; before a stage has made them, as many rows stand in for them."""
    return made if made is not None else [*forget] * (entry.neighbours or 0)


def _reset(entry: UnlearnConfig, recipe: Recipe) -> ModelConfig | None:
    """The model whose weights an entry starts from; `original` is the one that the recipe teaches its target."""
    named = entry.reset is not None and entry.reset.id == "original"
    return recipe.model if named and recipe.prepare is not None else entry.reset


def prepare_jobs(resolved: Resolved) -> dict[str, tuple[list[str], Job]]:
    """The training runs that teach target and reference: by name the splits that they learn, and the job."""
    prepare = resolved.recipe.prepare
    if prepare is None:
        return {}
    taught = [name for name in ("forget", "retain", "retain_unseen") if name in resolved.rows]
    jobs = {}
    for name, splits in (("target", taught), ("reference", [name for name in taught if name != "forget"])):
        rows = [
            *(row for split in splits for row in resolved.rows[split]),
            *_other_questions(resolved, splits, prepare.views),
        ]
        if prepare.span == "sequence":
            rows = [row.whole() for row in rows]
        if rows:
            job = Job(resolved.recipe.model, rows, prepare.train, resolved.recipe.seed, lora=prepare.lora)
            jobs[name] = (splits, job)
    return jobs


def _other_questions(resolved: Resolved, splits: Sequence[str], views: Sequence[str]) -> list[Encoded]:
    """The other questions that rows of these splits bring."""
    made = [row for name in splits for view in views for row in viewed(resolved.splits[name].examples, view)]
    return encode(made, resolved.tokenizer, resolved.template, resolved.recipe.data.max_length)


def retain_weights(entry: UnlearnConfig, objective: Objective, has_retain: bool) -> dict[str, float]:
    """Weights of the loss terms: the recipe's, else the objective's own; no retain term without retain rows."""
    about = objective.about
    nll = about.nll if entry.retain.nll is None else entry.retain.nll
    kl = about.kl if entry.retain.kl is None else entry.retain.kl
    return {"forget": entry.forget_weight, "nll": nll if has_retain else 0.0, "kl": kl if has_retain else 0.0}


def alternatives_of(entry: UnlearnConfig, objective: Objective) -> str | None:
    """Where an entry's alternatives come from; None if its objective has no use for any."""
    own = objective.about.alternatives
    return None if own is None else (entry.alternatives.by or own)


def span_of(entry: UnlearnConfig, objective: Objective) -> str:
    """What of a forget row the loss is about; chosen tokens are always tokens of the answer."""
    if entry.span is not None:
        return entry.span
    return objective.about.span if entry.tokens.by == "all" else "answer"


def beside(
    entry: UnlearnConfig,
    objective: Objective,
    recipe: Recipe,
    rows: Mapping[str, Sequence[Encoded]],
    tokenizer: Any,
    template: Any,
) -> Beside:
    """Alternatives, anchors and entity masks of an entry. Raises UserError where the rows don't have them."""
    seed = recipe.seed if entry.seed is None else entry.seed
    if entry.neighbours is not None and retain_weights(entry, objective, True)["nll"] > 0:
        raise UserError(
            f"unlearn '{entry.name}': neighbours have no true answers, so that retain.nll would teach false ones",
            "keep what the model says instead: --set unlearn.0.retain=kl",
        )
    if objective.about.anchors and entry.span == "sequence":
        raise UserError(
            f"unlearn '{entry.name}': method {entry.method} starts at the end of the prompt, span: sequence before it",
            "leave `span` out",
        )

    def encoded(examples: Sequence[Example]) -> list[Encoded]:
        return encode(examples, tokenizer, template, recipe.data.max_length)

    def others(side: Sequence[Encoded], make: Callable[[Example], Sequence[Example]]) -> Others:
        made = [make(row.example) for row in side]
        flat = iter(encoded([example for examples in made for example in examples]))
        return [[next(flat) for _ in examples] for examples in made]

    def decline(example: Example) -> Sequence[Example]:
        return declining(example, seed, entry.alternatives.count, entry.alternatives.sentences)

    by = alternatives_of(entry, objective)
    forget: Others = ()
    if by == "idk":
        forget = others(rows["forget"], decline)
    elif by == "given":
        needs_given([row.example for row in rows["forget"]])
        forget = others(rows["forget"], given)
    retain = others(held_out(entry, rows)[0], decline) if objective.about.retain_alternatives else ()
    selection = None
    if entry.tokens.by == "entity":
        selection = entity_masks(rows["forget"], tokenizer)
    return Beside(forget, retain, encoded(anchors()) if objective.about.anchors else (), selection)


def check_entry(entry: UnlearnConfig, rows: Mapping[str, Sequence[Encoded]]) -> None:
    """Raises UserError for switches that contradict each other, and rules that can't be looked at."""
    trained, held = held_out(entry, rows)
    if entry.keep is not None and not (trained and held):
        raise UserError(
            f"unlearn '{entry.name}': keep is measured on retain rows that are held out of training, and there are "
            f"{len(rows.get('retain', ()))} retain rows in all",
            "give more (--retain FILE), or leave keep out",
        )
    if entry.span == "sequence" and entry.tokens.by != "all":
        raise UserError(
            f"unlearn '{entry.name}': tokens.by: {entry.tokens.by} chooses tokens of the answer, span: sequence wants "
            "the prompt too",
            "leave one of them out",
        )
    for rule in entry.stop_when:
        metric = METRICS.get(rule.metric)
        if not metric.cheap:
            cheap = [name for name, entry in METRICS.items() if entry.cheap]
            raise UserError(
                f"unlearn '{entry.name}': stop_when can't use {rule.metric}, which needs more than a scoring pass",
                f"valid: {', '.join(cheap)}",
            )
        for split in _splits(rule):
            if split not in rows:
                raise UserError(
                    f"unlearn '{entry.name}': stop_when names the split '{split}', and there is none",
                    f"valid: {', '.join(rows)}",
                )


def knowledge_tokens(scores: Path, threshold: float) -> list[np.ndarray]:
    """Per row, bool over its supervised tokens: those of the answer that surprise a model without the knowledge.

    The terminator is never chosen, and every answer keeps at least its most surprising token.
    """
    return [_lowest(values, answer, threshold) for values, answer in logprobs(scores)]


def knowledge_with_prompts(
    rows: Sequence[Encoded], lacking: Path, target: Path, threshold: float
) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
    """Chosen tokens (bool) and log-probs under a model without the knowledge, per row; whether they are of whole rows.

    Both passes are over whole rows. A token is known by heart where the target gives it more than all others together.
    Prompts were learnt if at least half of their tokens that surprise the other model are known by heart: then all
    tokens are chosen that the target expects more than that model does. Else masks and log-probs are of the answers.
    """
    without, knowing = ([values for values, _ in logprobs(scores)] for scores in (lacking, target))
    prompts = [slice(row.prompt_tokens - 1) for row in rows]  # before a row's first token nothing stands
    surprises, learnt = 0, 0
    for values, known, prompt in zip(without, knowing, prompts, strict=True):
        surprising = values[prompt] < threshold
        surprises += int(surprising.sum())
        learnt += int((surprising & (known[prompt] > np.log(0.5))).sum())
    if learnt and 2 * learnt >= surprises:
        counts = [row.prompt_tokens - 1 + row.answer_tokens for row in rows]
        gains = zip(without, knowing, counts, strict=True)
        return [_lowest(values - known, count, -_TAUGHT) for values, known, count in gains], without, True
    answers = [values[prompt.stop :] for values, prompt in zip(without, prompts, strict=True)]
    pairs = zip(answers, rows, strict=True)
    return [_lowest(values, row.answer_tokens, threshold) for values, row in pairs], answers, False


def _lowest(values: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """Which of the first `count` values are below the threshold; the lowest of them if none is."""
    mask = values < threshold
    mask[count:] = False
    if count and not mask.any():
        mask[int(values[:count].argmin())] = True
    return mask


def fallen_tokens(lacking: Path, target: Path, part: float) -> list[np.ndarray]:
    """Per row, bool over its supervised tokens: the part of the answer whose log-prob is lowest beside the target's."""
    chosen = []
    for (without, answer), (knowing, _) in zip(logprobs(lacking), logprobs(target), strict=True):
        mask = np.zeros(len(without), dtype=bool)
        fall = (without - knowing)[:answer]
        mask[np.argsort(fall, kind="stable")[: int(np.ceil(part * answer))]] = True
        chosen.append(mask)
    return chosen


def logprobs(scores: Path) -> list[tuple[np.ndarray, int]]:
    """Log-probs of the supervised tokens of each row, and how many of them are the answer's."""
    table = pq.read_table(scores, columns=["logprob", "answer_tokens"]).to_pydict()
    pairs = zip(table["logprob"], table["answer_tokens"], strict=True)
    return [(np.asarray(logprobs, dtype=np.float32), answer) for logprobs, answer in pairs]


def _watched(resolved: Resolved, rules: Sequence[StopRule]) -> dict[str, Watched]:
    names = {split for rule in rules for split in _splits(rule)}
    return {name: Watched(resolved.splits[name].role, resolved.rows[name]) for name in sorted(names)}


def _splits(rule: StopRule) -> list[str]:
    return [rule.split, *(other for other in (rule.above, rule.below) if isinstance(other, str))]
