"""The page of a study, from study.json and run.json alone: no model, no torch, no JavaScript."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from expunge.report import provenance
from expunge.report.build import incomplete, page
from expunge.report.records import RunRecord, read_run
from expunge.report.study_document import Plane, Section, StudyDocument, read_study
from expunge.report.study_figures import draw
from expunge.report.text import plural
from expunge.runs.atomic import write_bytes


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure as the template shows it."""

    kind: str
    title: str
    picture: Markup
    words: tuple[str, ...] = ()


def build_study_report(folder: Path) -> Path:
    """Write `report.html` of a study and return its path. Raises UserError where there is no readable study."""
    folder = Path(folder)
    study, record = read_study(folder), read_run(folder)
    path = folder / "report.html"
    write_bytes(path, page("study.html.j2", content(study, record)))
    return path


def content(study: StudyDocument, record: RunRecord) -> dict[str, Any]:
    """Everything that the template shows."""
    return {
        "page_title": f"{study.study} – study",
        "study": study,
        "record": record,
        "incomplete": _unfinished(study, record),
        "facts": _facts(study, record),
        "sections": [(section, _figures(section)) for section in study.sections],
        "provenance": provenance,
        "settings": _settings(study, record),
        "stages": provenance.timings(record, together="trial"),
        "repeatable": False,
    }


def _figures(section: Section) -> list[Drawn]:
    return [
        Drawn(figure.kind, figure.title, draw(figure), tuple(figure.words) if isinstance(figure, Plane) else ())
        for figure in section.figures
    ]


def _facts(study: StudyDocument, record: RunRecord) -> list[tuple[str, str]]:
    trials = str(study.done) if study.done == study.planned else f"{study.done} of {study.planned}"
    facts = [("Model", record.recipe.model.id)] if record.recipe is not None else []
    facts += [("Trials", trials), *study.facts.items(), ("Seed", str(record.seed))]
    finished = str(record.info.get("finished") or "")
    total = provenance.total_time(record)
    facts += [("Finished", finished[:10])] if finished else []
    return [*facts, ("Time", total)] if total else facts


def _unfinished(study: StudyDocument, record: RunRecord) -> str:
    broken, rest = incomplete(record), study.planned - study.done
    if broken or not rest:
        return broken
    verb = "is" if rest == 1 else "are"
    return f"{rest} of {plural(study.planned, 'trial')} {verb} still to be done: run it again to go on."


def _settings(study: StudyDocument, record: RunRecord) -> list[tuple[str, str]]:
    """What all trials share, and the study's own words on the rest."""
    shared = [line for line in provenance.in_words(record) if not line[0].startswith("Unlearn")]
    published = [("Published in", study.paper)] if study.paper else []
    return [*shared, *study.settings.items(), *published]
