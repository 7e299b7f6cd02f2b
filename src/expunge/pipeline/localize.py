"""`expunge localize` and the stage of the same name: a part of a model is chosen, and written with all that is known of
it: mask, scores of every unit, record and page."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import expunge
from expunge.data.encode import Encoded, encode, truncation_note
from expunge.data.load import load_splits
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.localize.evidence import Evidence
from expunge.localize.locate import Located, locate, write_scores
from expunge.localize.masks import Mask, read_mask
from expunge.localize.quality import agreement, auc, inside
from expunge.localize.units import units_of
from expunge.models.forward import unwrap
from expunge.models.load import load_model, resolve_folder
from expunge.pipeline.localize_check import (
    check_architecture,
    check_attribution,
    check_mask_of,
    check_whole,
    digest_of,
    open_attribution,
)
from expunge.pipeline.preflight import check_context, open_candidate
from expunge.pipeline.processes import process_count
from expunge.pipeline.progress import Reporter, quiet_libraries
from expunge.pipeline.resolve import Resolved, rows_digest
from expunge.recipe import DataConfig, LocalizeConfig, ModelConfig
from expunge.report.localization_page import answer_of, write_localization_page
from expunge.report.localization_record import SUFFIX, Agreement, Localization, Place, Rows, beside, holds_localization
from expunge.runs.atomic import disk_errors, write_json
from expunge.runs.lock import FolderLock
from expunge.runs.provenance import typed_command

#: Name of the mask in the folder of a run's stage.
MASK = f"mask{SUFFIX}"
_EXPERT = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Question:
    """Which part of which model is to be chosen, by rows of what; `data` None: no rows are given."""

    model: ModelConfig
    config: LocalizeConfig
    seed: int
    data: DataConfig | None = None
    command: str = ""


@dataclass(frozen=True)
class Source:
    """What a mask is made from, as its record says it: the model by name and digest, and the region by its file."""

    model: ModelConfig
    name: str
    digest: str
    region: Mask | None = None
    notes: Sequence[str] = ()
    command: str = ""


def localize(
    model: ModelConfig | nn.Module,
    rows: Mapping[str, Sequence[Encoded]],
    config: LocalizeConfig,
    seed: int,
    *,
    region: Mask | None = None,
    about: Mapping[str, Any] | None = None,
    tick: Callable[[int], None] = lambda rows: None,
    folder: Path | None = None,
) -> Located:
    """The part of a model that an attribution chooses, with the scores of every unit; nothing is written but what is
    too large for memory, in `folder`. A model in memory stays as it is. Raises UserError."""
    attribution = open_attribution(config)
    loaded = model if isinstance(model, nn.Module) else _on_device(load_model(model).model)
    read = read_rows(config, rows)
    evidence = Evidence(
        loaded,
        read,
        units_of(loaded, config.unit),
        unit=config.unit,
        seed=seed,
        batch_size=config.batch_size,
        region=region,
        folder=folder,
        advance=tick,
    )
    said = {"expunge": expunge.__version__, **(about or {})}
    located = locate(attribution, evidence, config.density, config.strata, said)
    weights, total = located.mask.weights(loaded)
    digests = {name: rows_digest(read[name]) for name in located.mask.about["rows"]}  # of what was read
    mask = Mask(located.mask.inside, {**located.mask.about, "rows": digests, "inside": weights, "weights": total})
    return replace(located, mask=mask)


def read_rows(config: LocalizeConfig, rows: Mapping[str, Sequence[Encoded]]) -> dict[str, Sequence[Encoded]]:
    """The rows that an attribution may read: the first `limit` of each of its splits."""
    return {name: rows[name][: config.limit] for name in ("forget", "retain") if name in rows}


def passed_rows(config: LocalizeConfig, rows: Mapping[str, Sequence[Encoded]]) -> int:
    """Rows that one pass of what the attribution needs takes."""
    needs = open_attribution(config).about.needs
    return sum(len(some) for name, some in read_rows(config, rows).items() if name in needs)


# ---------------------------------------------------------------- the command


def run_localize(question: Question, output: Path, reporter: Reporter) -> Localization:
    """Choose, and write the mask to `output` with scores, record and page beside it.

    Raises UserError for everything that does not fit, before a weight is read and anything is written.
    """
    quiet_libraries()
    if process_count() > 1:
        raise UserError("localization runs in one process", "start it without accelerate launch or torchrun")
    config = question.config
    if config.mask is not None:
        raise UserError("localize.mask reads a mask, and here one is made", "leave it out")
    open_attribution(config)
    check_whole(question.model)
    _check_place(output, question.model)
    rows, notes, candidate = _rows(question)
    check_attribution(config, rows)
    check_architecture(config, candidate.skeleton)
    check_context(candidate, rows)
    region = None if config.against is None else read_mask(config.against)
    digest = digest_of(question.model)
    for note in [*notes, *([f"{output} is written anew"] if output.exists() else [])]:
        reporter.line(f"  note: {note}")
    source = Source(question.model, question.model.id, digest, region, notes, question.command)
    read = read_rows(config, rows)
    with _scratch(output) as work, reporter.bar("localize", passed_rows(config, rows)) as tick:
        return write_localization(source, read, config, question.seed, output, tick, work)


def write_localization(
    source: Source,
    rows: Mapping[str, Sequence[Encoded]],
    config: LocalizeConfig,
    seed: int,
    output: Path,
    tick: Callable[[int], None],
    folder: Path,
) -> Localization:
    """Localize and write all four files; the mask comes last, so that where one stands the others are its own."""
    began = time.monotonic()
    model = _on_device(load_model(source.model).model)
    about = {"model": source.digest, "model_id": source.name}
    options: dict[str, Any] = {"region": source.region, "about": about, "tick": tick, "folder": folder}
    located = localize(model, rows, config, seed, **options)
    record = _record(located, model, rows, config, source, output).model_copy(
        update={"seconds": round(time.monotonic() - began, 3)}
    )
    del model
    output.unlink(missing_ok=True)
    files = beside(output)
    write_scores(files["scores"], located.families, located.scores)
    write_json(files["record"], record.to_json())
    write_localization_page(output, record)
    located.mask.write(output)
    return record


def _record(
    located: Located,
    model: nn.Module,
    rows: Mapping[str, Sequence[Encoded]],
    config: LocalizeConfig,
    source: Source,
    output: Path,
) -> Localization:
    about, declared = located.mask.about, open_attribution(config).about
    against = None if source.region is None else _agreement(located, model, source.region, config)
    record = Localization(
        expunge=expunge.__version__,
        model=source.name,
        model_digest=source.digest,
        mask=output.name,
        mask_digest=located.mask.digest,
        by=config.by,
        control=declared.control,
        paper=declared.paper,
        parameters=dict(about["parameters"]),
        unit=config.unit,
        density=config.density,
        strata=config.strata,
        seed=about["seed"],
        rows={name: _read(rows[name]) for name in about["rows"]},
        weights=about["weights"],
        inside=about["inside"],
        places=places_of(located),
        against=against,
        notes=list(source.notes),
        command=source.command,
        answer="",
    )
    return record.model_copy(update={"answer": answer_of(record)})


def places_of(located: Located) -> list[Place]:
    """Units, chosen ones and their scores by layer and module; experts that stand side by side are counted together."""
    found: dict[tuple[int | None, str], list[tuple[int, int, Tensor | None]]] = {}
    for family, chosen, scores in zip(
        located.families, inside(located.mask, located.families), located.scores, strict=True
    ):
        module = _EXPERT.sub(".*.", family.module)
        found.setdefault((family.layer, module), []).append((family.count, int(chosen.sum()), scores))
    return [_place(layer, module, families) for (layer, module), families in found.items()]


def _place(layer: int | None, module: str, families: Sequence[tuple[int, int, Tensor | None]]) -> Place:
    scored = [scores for _, _, scores in families if scores is not None]
    count = sum(scores.numel() for scores in scored)
    total = sum(float(scores.sum(dtype=torch.float64)) for scores in scored)
    return Place(
        layer=layer,
        module=module,
        units=sum(units for units, _, _ in families),
        chosen=sum(chosen for _, chosen, _ in families),
        score=total / count if count else None,
        highest=max((float(scores.max()) for scores in scored), default=None),
    )


def _agreement(located: Located, model: nn.Module, region: Mask, config: LocalizeConfig) -> Agreement:
    shapes = {name: tuple(parameter.shape) for name, parameter in unwrap(model).named_parameters()}
    found = agreement(located.mask, region, shapes)
    units = sum(int(labels.sum()) for labels in inside(region, located.families))
    return Agreement(
        file=str(config.against),
        units=units,
        precision=found.precision,
        recall=found.recall,
        overlap=found.overlap,
        auc=auc(located.scores, region, located.families),
        chance=units / sum(family.count for family in located.families),
    )


def _read(rows: Sequence[Encoded]) -> Rows:
    return Rows(rows=len(rows), tokens=sum(row.supervised_tokens for row in rows), digest=rows_digest(rows))


def _rows(question: Question) -> tuple[dict[str, list[Encoded]], list[str], Any]:
    """Forget and retain rows in tokens, what a reader should know of them, and the model without its weights."""
    candidate = open_candidate(question.model)
    if question.data is None:
        return {}, [], candidate
    splits = load_splits(question.data, question.seed)
    template = resolve_template(question.data.template, candidate.tokenizer)
    rows = {
        name: encode(splits[name].examples, candidate.tokenizer, template, question.data.max_length)
        for name in ("forget", "retain")
        if name in splits
    }
    noted = ((name, truncation_note(some)) for name, some in rows.items())
    return rows, [*splits.notes, *(f"{name}: {note}" for name, note in noted if note)], candidate


def _on_device(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


# ---------------------------------------------------------------- the stage of a run


def stage_inputs(resolved: Resolved, digest: str) -> dict[str, Any]:
    """What the stage depends on beside its model, whose digest a given mask must name. Raises UserError."""
    config = resolved.recipe.localize
    assert config is not None
    if resolved.mask is not None:
        check_mask_of(resolved.mask, digest, str(config.mask))
        return {"mask": resolved.mask.digest}
    return {
        "localize": config.model_dump(mode="json", exclude={"mask", "against", "batch_size", "limit"}),
        "rows": {name: rows_digest(rows) for name, rows in read_rows(config, resolved.rows).items()},
        "against": None if config.against is None else read_mask(config.against).digest,
        "dtype": resolved.recipe.model.dtype,
        "seed": resolved.recipe.seed,
    }


def write_stage(
    resolved: Resolved, model: ModelConfig, digest: str, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """The mask that the recipe asks for, made or copied, as `folder/out`; an answer in a sentence. Raises UserError."""
    recipe = resolved.recipe
    config, output = recipe.localize, folder / "out" / MASK
    assert config is not None
    if resolved.mask is not None:
        resolved.mask.write(output)
        return {"answer": f"only what is inside the mask {config.mask} may change", "mask": resolved.mask.digest}
    region = None if config.against is None else read_mask(config.against)
    rows = read_rows(config, resolved.rows)
    source = Source(model, model.id, digest, region, command=typed_command())
    with reporter.bar("localize", passed_rows(config, rows)) as tick:
        found = write_localization(source, rows, config, recipe.seed, output, tick, folder)
    return {"answer": found.answer, "mask": found.mask_digest}


# ---------------------------------------------------------------- the place


def _check_place(output: Path, model: ModelConfig) -> None:
    """Raises UserError for a place that is taken by something else, or that would change the model's digest."""
    if output.suffix != SUFFIX:
        raise UserError(f"{output} is no name of a mask", f"let it end in {SUFFIX}: -o mask{SUFFIX}")
    if output.is_dir():
        raise UserError(f"{output} is a folder", f"name a file in it: -o {output / MASK}")
    elsewhere = "choose another name with -o"
    folder = resolve_folder(model.id, model.revision)
    if folder.is_dir() and folder.resolve() in output.absolute().resolve().parents:
        raise UserError(f"{output} lies in the folder of the model, which a mask would change", elsewhere)
    for place in output.absolute().parents:
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, not a folder", elsewhere)
    files = beside(output)
    if output.exists():
        try:
            read_mask(output)
        except UserError:
            raise UserError(f"{output} is there already, and is no mask", elsewhere) from None
    ours = holds_localization(files["record"])
    for file in files.values():
        if file.exists() and not ours:
            raise UserError(f"{file} is there already, and would be written over", elsewhere)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside the mask for what memory does not hold; what a killed process left there is removed."""
    work = output.absolute().with_name(f".{output.name}.partial")
    with disk_errors(output.absolute().parent):
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output} can't be written: {error.strerror}", "choose another name with -o") from None
        lock = FolderLock(work)
        try:
            yield work
        finally:
            lock.release()
            shutil.rmtree(work, ignore_errors=True)
