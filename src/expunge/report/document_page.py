"""The page of a document: no model, no torch, no JavaScript."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from expunge.report import figures, provenance
from expunge.report.build import MAX_BYTES, incomplete, page, text_of
from expunge.report.document import AUDIT, STUDY, Document, read_document
from expunge.report.drawing import drawn_figures
from expunge.report.records import RunRecord, read_run
from expunge.report.text import plural
from expunge.runs.atomic import write_bytes

NAME = "report.html"
_EYEBROWS = {
    "study": "Study",
    "attack": "Attacks",
    "calibration": "Calibration",
    "evaluation": "Evaluation",
    "audit": "Audit of metrics",
    "search": "Search of a merge",
    "localization": "Localization",
}
_FOOTERS = {
    "study": "the numbers stand in study.json and trials.parquet, every token's in trials/",
    "attack": "the numbers stand in attack.json, every row's in values.parquet, every token's in tables/",
    "calibration": "the numbers stand in calibration.json",
    "evaluation": "the numbers stand in metrics.json, every row's in values.parquet, every token's in scores/",
    "audit": "the numbers stand in audit.json",
    "search": "the numbers stand in search.json, what was written in merge.json",
    "localization": "the numbers stand in the .json beside the mask, the score of every unit in .scores.safetensors",
}


def build_document_report(folder: Path, name: str = STUDY) -> Path:
    """Write `report.html` of a study's or an audit's folder and return its path. Raises UserError."""
    folder = Path(folder)
    document = read_document(folder, name)
    return write_page(folder, document, read_run(folder) if name != AUDIT else told_record(folder, {}))


def told_record(folder: Path, info: dict[str, Any]) -> RunRecord:
    """What a folder says of its making: that of run.json where it has one, and `info` for what that lacks."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        return RunRecord(folder, info, None, "", (), ())
    record = read_run(folder)
    return replace(record, info={**info, **record.info}, recipe_text="")


def write_page(folder: Path, document: Document, record: RunRecord, name: str = NAME) -> Path:
    """Write the page `name` into the folder; what makes the page too large is left out, and that is said."""
    html = render(document, record)
    for leave_out in ("texts", "folded"):
        if len(html) < MAX_BYTES:
            break
        document = _without(document, leave_out)
        html = render(document, record)
    path = Path(folder) / name
    write_bytes(path, html)
    return path


def _without(document: Document, what: str) -> Document:
    """The document without its tables of texts, or without its folded tables."""
    sections = []
    for section in document.sections:
        tables = [table for table in section.tables if not getattr(table, what)]
        gone = len(section.tables) - len(tables)
        words = [*section.words, f"{plural(gone, 'table')} left out: the page would be too large."]
        sections.append(section.model_copy(update={"tables": tables, "words": words if gone else section.words}))
    return document.model_copy(update={"sections": sections})


def render(document: Document, record: RunRecord) -> bytes:
    """The page as UTF-8."""
    return page("document.html.j2", content(document, record))


def content(document: Document, record: RunRecord) -> dict[str, Any]:
    """Everything that the template shows."""
    eyebrow = _EYEBROWS[document.kind]
    # a run directory says how to repeat it; another folder only what it was told
    command = document.command or (provenance.command(record) if record.info.get("command") or record.recipe else "")
    return {
        "page_title": f"{document.name} – {eyebrow.lower()}",
        "eyebrow": eyebrow,
        "document": document,
        "record": record,
        "command": command,
        "incomplete": _unfinished(document, record),
        "facts": _facts(document, record),
        "verdicts": [(verdict, figures.verdict_scale(verdict)) for verdict in document.verdicts],
        "sections": [(section, drawn_figures(section)) for section in document.sections],
        "text_of": text_of,
        "provenance": provenance,
        "settings": _settings(document, record),
        "stages": provenance.timings(record, together="trial"),
        "files": provenance.whole_files(record) if record.recipe_text else [],
        "repeatable": False,
        "footer": _FOOTERS[document.kind],
    }


def _facts(document: Document, record: RunRecord) -> list[tuple[str, str]]:
    named = record.recipe is not None and "Model" not in document.facts
    facts = [("Model", record.recipe.model.id)] if named and record.recipe is not None else []
    if document.planned:
        done = str(document.done) if document.done == document.planned else f"{document.done} of {document.planned}"
        facts.append(("Trials", done))
    facts += list(document.facts.items())
    if "seed" in record.info or record.recipe is not None:
        facts.append(("Seed", str(record.seed)))
    finished = str(record.info.get("finished") or "")
    total = provenance.total_time(record)
    facts += [("Finished", finished[:10])] if finished else []
    return [*facts, ("Time", total)] if total else facts


def _unfinished(document: Document, record: RunRecord) -> str:
    broken, rest = incomplete(record), document.planned - document.done
    if broken or rest <= 0:
        return broken
    verb = "is" if rest == 1 else "are"
    return f"{rest} of {plural(document.planned, 'trial')} {verb} still to be done: run it again to go on."


def _settings(document: Document, record: RunRecord) -> list[tuple[str, str]]:
    """What all trials share, and the document's own words on the rest."""
    shared = [line for line in provenance.in_words(record) if not line[0].startswith("Unlearn")]
    published = [("Published in", document.paper)] if document.paper else []
    return [*shared, *document.settings.items(), *published]
