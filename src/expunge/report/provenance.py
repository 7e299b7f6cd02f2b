"""How a run was made, for reading: recipe in words, timing, data, models, environment, command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.recipe import STRANGERS, LoraConfig, TokenSelection, TrainConfig, UnlearnConfig
from expunge.recipe.localize import LocalizeConfig
from expunge.report.records import RunRecord, mapping
from expunge.report.tables import variant_label
from expunge.report.text import compact, duration, grouped, human, listed, named, percent, plural

#: Characters of a file that is shown whole inside the page.
_WHOLE = 40_000
_DIGEST = 16


@dataclass(frozen=True, slots=True)
class Timing:
    """One stage: how long, and which part of the longest it is."""

    stage: str
    seconds: str
    share: float
    status: str


@dataclass(frozen=True, slots=True)
class DataRow:
    """One split: rows, cut rows, digest."""

    split: str
    role: str
    rows: str
    truncated: str
    digest: str


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One variant: where its weights are, and their digest."""

    variant: str
    source: str
    digest: str


def command(record: RunRecord) -> str:
    """The command that was typed, else the one that repeats the resolved recipe."""
    given = record.info.get("command")
    if isinstance(given, list | tuple):
        return shlex.join(str(part) for part in given)
    return str(given) if given else repeat_command()


def repeat_command() -> str:
    """The command that repeats a run from its resolved recipe."""
    return "expunge run recipe.resolved.yaml -o AGAIN"


def in_words(record: RunRecord) -> list[tuple[str, str]]:
    """The recipe as (stage, sentence)."""
    recipe = record.recipe
    if recipe is None:
        return []
    revision = f" @ {recipe.model.revision}" if recipe.model.revision else ""
    lines = [("Model", f"{recipe.model.id}{revision}, weights in {recipe.model.dtype}")]
    data = f"benchmark {recipe.data.benchmark}" if recipe.data.benchmark else "own files"
    lines.append(
        ("Data", f"{data}; template {recipe.data.template}; at most {grouped(recipe.data.max_length)} tokens a row")
    )
    if recipe.prepare:
        words = "target taught forget and retain rows, reference the retain rows alone: "
        lines.append(("Prepare", words + _training(recipe.prepare.train, recipe.prepare.lora)))
    if recipe.localize:
        lines.append(("Localize", localized(recipe.localize)))
    lines += [(f"Unlearn: {entry.name}", _objective(entry)) for entry in recipe.unlearn]
    if recipe.merge:
        merge = recipe.merge
        names = merge.models or [entry.name for entry in recipe.unlearn]
        density = merge.density if isinstance(merge.density, list) else [merge.density]
        words = f"{merge.method} of {listed(names)}, density {', '.join(map(_per_tensor, density))}"
        words += f", weights {', '.join(map(_per_tensor, merge.weights))}" if merge.weights else ""
        words += _parameters(merge.parameters)
        if merge.search:
            among = merge.search.methods or list(dict.fromkeys([merge.method, "linear"]))
            words = f"{listed(names)} by {listed(among)}: {', '.join(merge.search.over)} chosen in "
            words += f"{plural(merge.search.trials, 'trial')} (model/search.html), seed {merge.search.seed}"
        lines.append(("Merge", words))
    measured = f"scores in {recipe.evaluate.dtype}; {grouped(recipe.evaluate.bootstrap)} bootstrap resamples"
    generate = recipe.evaluate.generate
    measured += (
        f"; greedy answers of at most {plural(generate.max_new_tokens, 'token')}"
        if generate
        else "; no generation pass"
    )
    measured += f", first {plural(generate.limit, 'row')} of a split" if generate and generate.limit else ""
    lines.append(("Evaluate", measured))
    return lines


def localized(config: LocalizeConfig) -> str:
    """Which part of the model unlearning may change, in words."""
    if config.mask is not None:
        return f"only what is inside the mask {named(config.mask)} is changed"
    where = {"model": "over the whole model", "layer": "in each layer", "tensor": "in each tensor"}[config.strata]
    read = f", the first {plural(config.limit, 'row')} of a split" if config.limit else ""
    against = f", beside the region {named(config.against)}" if config.against else ""
    by = f"{config.by}{_parameters(config.parameters)}"
    units = f"{percent(config.density)} of the {config.unit} units {where}"
    return f"{units} by {by}{read}{against}; the rest stays as it is"


def _objective(entry: UnlearnConfig) -> str:
    terms = [f"{compact(entry.forget_weight)} × {entry.method}{_parameters(entry.parameters)}"]
    for name, weight in (("retain NLL", entry.retain.nll), ("retain KL", entry.retain.kl)):
        if weight:
            terms.append(f"{compact(weight)} × {name}")
    if entry.retain.nll is None and entry.retain.kl is None:
        terms.append("retain terms as the method sets them")
    asked = "".join(f", {switch}" for switch in switches(entry))
    asked += f", training {listed(entry.trainable)}" if entry.trainable else ""
    seed = f", seed {entry.seed}" if entry.seed is not None else ""
    return f"{' + '.join(terms)}{asked}; {_training(entry.train, entry.lora)}{seed}"


def switches(entry: UnlearnConfig) -> list[str]:
    """What is set beside the objective of an unlearn entry, each in words."""
    found = [_tokens(entry.tokens)] if entry.tokens.by != "all" else []
    if entry.span is not None:
        found.append("forget loss on the answer" if entry.span == "answer" else "forget loss on prompt and answer")
    if entry.cap is not None:
        found.append(f"rows beyond a mean token NLL of {compact(entry.cap)} left alone")
    if entry.quantile is not None:
        found.append(f"forget loss on the {percent(entry.quantile)} of tokens with the lowest loss")
    if entry.temperature != 1:
        found.append(f"forget logits at temperature {compact(entry.temperature)}")
    if entry.neighbours is not None:
        found.append(f"{plural(entry.neighbours, 'stranger')} beside each forget row answered as before")
    if entry.alternatives.by is not None:
        found.append(f"alternatives: {entry.alternatives.by}")
    if entry.reset is not None:
        found.append(f"starts from the weights of {entry.reset.id} in what is trained")
    if entry.sam is not None:
        found.append(f"sharpness-aware forget gradient (radius {compact(entry.sam)})")
    if entry.relearning is not None:
        ahead = f"{plural(entry.relearning.steps, 'step')} at {compact(entry.relearning.lr)}"
        found.append(f"forget gradient taken where a relearning of {ahead} leads")
    if entry.gradient_projection:
        found.append("forget gradient without what opposes the retain gradient")
    if entry.null_space is not None:
        found.append(f"updates outside the directions that retain rows use (null space, {compact(entry.null_space)})")
    if entry.keep is not None:
        found.append(f"scaled down until held-out retain rows keep {percent(entry.keep)} of their strength")
    found += [f"stops when {rule} (looked at every {plural(rule.every, 'step')})" for rule in entry.stop_when]
    return found


def _tokens(tokens: TokenSelection) -> str:
    if tokens.by == "entity":
        return "forget loss on the entities that rows name"
    if tokens.fall is not None:
        part = f"the {percent(tokens.fall)} that fall most from target to {_named(tokens.model)}"
        return f"forget loss on knowledge tokens ({part})"
    below = f"log-prob of {_named(tokens.model)} below {compact(tokens.threshold)}"
    return f"forget loss on knowledge tokens ({below})"


def _named(model: str) -> str:
    """A variant, hub id or alias as it is; of a path the last part: where it stands is nobody's business."""
    if model == STRANGERS:
        return "the target, asked about strangers,"
    return Path(model).name if Path(model).is_absolute() or model.startswith((".", "~")) else model


def _per_tensor(value: Any) -> str:
    """A number, or what stands for numbers that differ between tensors."""
    return compact(value) if isinstance(value, int | float) else str(value)


def _parameters(parameters: Mapping[str, Any]) -> str:
    inner = ", ".join(
        f"{key} {compact(value) if isinstance(value, float) else value}" for key, value in parameters.items()
    )
    return f" ({inner})" if inner else ""


def _training(train: TrainConfig, lora: LoraConfig | None) -> str:
    length = plural(train.max_steps, "step") if train.max_steps else f"{compact(train.epochs)} epochs"
    length += f" or {compact(train.minutes)} minutes" if train.minutes else ""
    how = "full fine-tuning"
    if lora is not None:
        targets = lora.targets if isinstance(lora.targets, str) else listed(lora.targets)
        how = f"LoRA rank {lora.rank} on {targets}"
    return f"{how}, {length}, lr {compact(train.lr)}, batch {train.batch_size}, {train.precision}"


def timings(record: RunRecord, together: str = "") -> list[Timing]:
    """Stages in the order of the run; those below `together/` as one line."""
    stages = dict(mapping(record.info.get("stages")))
    below = [name for name in stages if together and str(name).startswith(f"{together}/")]
    if below:
        known = [_seconds(mapping(stages.pop(name)).get("seconds")) or 0.0 for name in below]
        stages[plural(len(below), together)] = {"seconds": sum(known), "status": "done"}
    seconds = {name: _seconds(mapping(stage).get("seconds")) for name, stage in stages.items()}
    longest = max((value for value in seconds.values() if value is not None), default=0.0) or 1.0
    found = []
    for name, value in seconds.items():
        stage = mapping(stages[name])
        status = str(stage.get("status") or "")
        status = "taken from an earlier start" if stage.get("skipped") else "" if status == "done" else status
        found.append(Timing(str(name), duration(value), (value or 0.0) / longest, status))
    return found


def total_time(record: RunRecord) -> str:
    """Sum over the stages, or ""."""
    stages = mapping(record.info.get("stages")).values()
    known = [value for stage in stages if (value := _seconds(mapping(stage).get("seconds"))) is not None]
    return duration(sum(known)) if known else ""


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def data_rows(record: RunRecord) -> list[DataRow]:
    """Splits with their digests."""
    rows = []
    for name, part in mapping(record.info.get("data")).items():
        part = mapping(part)
        count, cut = part.get("rows"), part.get("truncated")
        shown = grouped(count) if isinstance(count, int) else "–"
        truncated = grouped(cut) if isinstance(cut, int) else "–"
        rows.append(DataRow(human(str(name)), record.role(str(name)), shown, truncated, short(part.get("digest"))))
    return rows


def model_rows(record: RunRecord) -> list[ModelRow]:
    """Variants with where their weights are."""
    rows = []
    for name, part in mapping(record.info.get("models")).items():
        part = mapping(part)
        label = variant_label(record, str(name))
        rows.append(ModelRow(label, _inside(record, str(part.get("source") or "–")), short(part.get("digest"))))
    return rows


def _inside(record: RunRecord, source: str) -> str:
    """A path inside the run directory relative to it: where the directory stands is no part of the record."""
    return source.removeprefix(f"{record.path.absolute()}/")


def short(digest: Any) -> str:
    """The first digits of a sha256; the whole stands in run.json."""
    return str(digest)[:_DIGEST] if digest else "–"


def environment(record: RunRecord) -> list[tuple[str, str]]:
    """Hardware and versions as (name, value), nested parts in one line."""
    return list(_flat(mapping(record.info.get("environment"))))


def _flat(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in part.items():
        if value is None or value == "" or value == {} or value == []:
            continue
        if isinstance(value, Mapping):
            words = ", ".join(f"{name} {inner}" for name, inner in value.items() if inner not in (None, "", False))
        elif isinstance(value, list):
            words = ", ".join(map(str, value))
        else:
            words = "yes" if value is True else "no" if value is False else str(value)
        if words:
            yield human(str(key)), words[:2000]


def notes(record: RunRecord) -> list[str]:
    """Notes of the run, for instance on truncated rows."""
    given = record.info.get("notes")
    return [str(note)[:600] for note in given[:40]] if isinstance(given, list) else []


def whole_files(record: RunRecord) -> list[tuple[str, str]]:
    """The resolved recipe and run.json as text, cut where they are very long."""
    files = [("recipe.resolved.yaml", record.recipe_text)] if record.recipe_text else []
    if record.info:
        files.append(("run.json", json.dumps(record.info, indent=2, ensure_ascii=False, default=str)))
    return [(name, text if len(text) <= _WHOLE else f"{text[:_WHOLE]}\n… cut here") for name, text in files]
