"""The page of a folder that `expunge eval -o` wrote: verdicts, tables, distributions, benchmark, leaked words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.recipe.conventions import Convention
from expunge.report.aggregates import benchmark_sections, read_aggregates
from expunge.report.conventions import consequences, convention_named, in_words
from expunge.report.document import Document, Section
from expunge.report.evidence import evidence_section
from expunge.report.leaked import leaked_section
from expunge.report.records import RunRecord, mapping, read_run
from expunge.report.tables import comparison, metric_glossary, row_counts
from expunge.report.text import listed, named
from expunge.report.verdict import fluent, forgotten, kept, kept_unseen, numbers_sentence, outcome

NAME = "evaluation.json"
_HINT = "run the same expunge eval again: it writes the folder anew"


def read_evaluation(folder: Path) -> RunRecord:
    """An evaluation in the terms of a run. Raises UserError where there is none, or where it can't be read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise UserError(
            f"no evaluation at {folder} (no {NAME})", "make one with: expunge eval MODEL --forget FILE -o DIR"
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        info = _info(Path(folder), about)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path} can't be read", _HINT) from None
    return replace(read_run(folder), info=info, recipe=None, recipe_text="", problems=())


def _info(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """evaluation.json in the terms of run.json."""
    models = {name: {"source": str(mapping(model).get("id") or model)} for name, model in about["models"].items()}
    return {
        **{key: about[key] for key in ("command", "environment", "notes", "finished", "seed") if about.get(key)},
        "name": folder.resolve().name,
        "data": mapping(about.get("splits")),
        "models": models,
        "metrics": mapping(about.get("metrics")),
        "result": "model" if "model" in models else next(iter(models), None),
        "evaluation": about,
    }


def evaluation_document(folder: Path) -> Document:
    """The page of an evaluation's folder. Raises UserError."""
    record = read_evaluation(folder)
    about = mapping(record.info["evaluation"])
    convention = convention_named(about.get("convention"))
    numbers = read_aggregates(record.path)
    forget, keep, unseen = forgotten(record), kept(record), kept_unseen(record)
    sections = [
        *benchmark_sections(record, numbers),
        _comparison(record),
        evidence_section(record, convention),
        leaked_section(record),
        _counting(record, convention, about),
    ]
    verdicts = [
        verdict
        for verdict in (forget, keep, unseen, fluent(record))
        if verdict is not None and verdict.value is not None
    ]
    source = named(str(mapping(mapping(record.info["models"]).get(record.result or "")).get("source") or "model"))
    return Document(
        kind="evaluation",
        name=source,
        answer=outcome(record, forget, keep) if verdicts else f"What {source} knows, measured on {_splits(record)}.",
        rule=numbers_sentence(record, forget, keep),
        remarks=[in_words(convention)],
        verdicts=verdicts,
        facts=_facts(record, about, convention),
        settings=_settings(about),
        sections=[section for section in sections if section is not None],
        left_out=_left_out(record.path),
        limits=_limits(record),
        results={"aggregates": {f"{n.variant} {n.name}": n.value for n in numbers}},
    )


def _splits(record: RunRecord) -> str:
    return listed(name.replace("_", " ") for name in record.splits) or "no rows"


def _facts(record: RunRecord, about: Mapping[str, Any], convention: Convention) -> dict[str, str]:
    models = {name.capitalize(): named(part["source"]) for name, part in record.info["models"].items()}
    suite = str(mapping(about.get("evaluate")).get("suite") or "")
    benchmark = str(mapping(about.get("data")).get("benchmark") or "")
    facts = {
        **models,
        "Benchmark": benchmark,
        "Suite": suite,
        "Convention": convention.name,
        "Rows": row_counts(record),
    }
    return {name: words for name, words in facts.items() if words}


def _settings(about: Mapping[str, Any]) -> dict[str, str]:
    evaluate, data = mapping(about.get("evaluate")), mapping(about.get("data"))
    generate = mapping(evaluate.get("generate"))
    files = {name: mapping(data.get(name)).get("path") for name in ("forget", "retain", "holdout")}
    words = {
        "Data": ", ".join(f"{name}: {named(str(path))}" for name, path in files.items() if path),
        "Template": str(data.get("template") or ""),
        "Scores in": str(evaluate.get("dtype") or ""),
        "Answers": f"at most {generate['max_new_tokens']} tokens" if generate.get("max_new_tokens") else "",
        "Bootstrap": f"{evaluate['bootstrap']} resamples" if evaluate.get("bootstrap") else "",
        "expunge": str(about.get("expunge") or ""),
    }
    return {name: said for name, said in words.items() if said}


def _comparison(record: RunRecord) -> Section | None:
    tables = comparison(record)
    if not tables:
        return None
    lead = "Every model on the same rows. Arrows show the better direction; under each value stands its 95% interval."
    if any(measure.anchored is not None for measure in record.measures):
        lead += (
            " a: where a model stands between the reference (0) and the target (1), (value − reference) / (target − "
            "reference); below −0.1 on forget rows it is over-unlearned."
        )
    return Section(title="Comparison", lead=lead, tables=tables)


def _counting(record: RunRecord, convention: Convention, about: Mapping[str, Any]) -> Section:
    """What the convention and the metrics mean."""
    words = consequences(convention) or [
        "Answer tokens count alone, the terminator does not, and every script is read."
    ]
    given = record.info.get("evaluation", {}).get("convention")
    if isinstance(given, Mapping) and given.get("official") is False and convention.name != "expunge":
        words.append("This is not how the source itself computes its numbers.")
    return Section(title="How it was counted", lead=in_words(convention), words=words, glossary=metric_glossary(record))


def _left_out(folder: Path) -> dict[str, str]:
    path = folder / "left_out.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return {str(name): str(reason) for name, reason in mapping(found).items()}


def _limits(record: RunRecord) -> list[str]:
    said = [
        "Evidence of tests, not proof of deletion. The page says what these tests could draw out of the model, not "
        "what is left in its weights.",
        "Whether the knowledge comes back under an attack is not part of this page: expunge attack MODEL … shows it.",
        "The intervals come from drawing rows anew. They say nothing about another training of the model.",
    ]
    if record.reference is None:
        said.append("There is no reference model: how much of the answers can be guessed is unknown.")
    if record.target is None:
        said.append("There is no target model: what was lost and what was kept can't be told.")
    return said
