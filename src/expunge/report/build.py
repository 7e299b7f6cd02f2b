"""The page: one HTML file from the files of a run directory, without a model, without torch, without JavaScript."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from expunge.report import figures, provenance
from expunge.report.aggregates import benchmark_sections, read_aggregates
from expunge.report.answers import answers
from expunge.report.conventions import consequences, convention_named
from expunge.report.document import TableCell
from expunge.report.drawing import drawn_figures
from expunge.report.evidence import evidence_section
from expunge.report.records import MAIN, Curve, RunRecord, read_run
from expunge.report.robust import attack_sections, attacks_on, command
from expunge.report.samples import sample_tables
from expunge.report.svg import domain
from expunge.report.tables import comparison, metric_glossary, row_counts, shown_variants, variant_label
from expunge.report.text import clean, human, marked_spans, plural
from expunge.report.update_page import update_section
from expunge.report.update_record import read_updates
from expunge.report.verdict import (
    forget_threshold,
    forgotten,
    kept,
    numbers_sentence,
    outcome,
    split_of_role,
)
from expunge.runs.atomic import write_bytes

#: The page stays below this; samples are what gives way.
MAX_BYTES = 1_000_000
_SAMPLES = (10, 5, 2, 0)
#: Training stages that get panels of their own.
_STAGES = 12


@dataclass(frozen=True, slots=True)
class Panel:
    """One curve with its caption."""

    name: str
    picture: Markup


@dataclass(frozen=True, slots=True)
class StagePanels:
    """The curves of one training stage."""

    stage: str
    panels: tuple[Panel, ...]


def build_report(run: Path) -> Path:
    """Write `report.html` into a run directory and return its path. Raises UserError where there is no readable run."""
    run = Path(run)
    record = read_run(run)
    html = b""
    for samples in _SAMPLES:
        html = render(record, samples)
        if len(html) < MAX_BYTES:
            break
    path = run / "report.html"
    write_bytes(path, html)
    return path


def render(record: RunRecord, samples: int) -> bytes:
    """The page as UTF-8, with at most `samples` rows in the longest table of samples."""
    return page("report.html.j2", content(record, samples))


def page(template: str, shown: Mapping[str, Any]) -> bytes:
    """A filled template as UTF-8; every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader("expunge.report"),
        autoescape=True,
        finalize=clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(shown).encode("utf-8", errors="replace")


def content(record: RunRecord, samples: int) -> dict[str, Any]:
    """Everything that the template shows."""
    forget, keep = forgotten(record), kept(record)
    tables = comparison(record)
    numbers = read_aggregates(record.path)
    asked = record.recipe.evaluate.convention if record.recipe else None
    convention = convention_named(numbers[0].convention if numbers else asked)
    evidence = evidence_section(record, convention)
    landed = update_section(record)
    further = [*attack_sections(record), *benchmark_sections(record, numbers)]
    further += [section for section in (evidence, landed) if section is not None]
    return {
        "record": record,
        "page_title": f"{record.name} – unlearning report",
        "outcome": outcome(record, forget, keep),
        "incomplete": incomplete(record),
        "shaded": any(cell.shade for table in tables for row in table.rows for cell in row.cells),
        "anchored": any(measure.anchored is not None for measure in record.measures),
        "text_of": text_of,
        "numbers": numbers_sentence(record, forget, keep),
        "verdicts": [(verdict, figures.verdict_scale(verdict)) for verdict in answers(record)],
        "tables": tables,
        "glossary": metric_glossary(record),
        "trade_off": trade_off(record),
        "convention": convention if convention.name != "expunge" else None,
        "consequences": consequences(convention),
        "further": [(section, drawn_figures(section)) for section in further],
        "curves": curve_panels(record.curves),
        "samples": sample_tables(record, samples),
        "variant_label": lambda name: variant_label(record, name),
        "row_counts": row_counts(record),
        "provenance": provenance,
        "settings": provenance.in_words(record),
        "stages": provenance.timings(record),
        "command": provenance.command(record),
        "files": provenance.whole_files(record),
        "repeatable": True,
        "limits": limits(record),
        "absent": absent(record),
    }


def text_of(cell: TableCell, limit: int = 1200) -> Markup:
    """A cell's text, escaped and cut, with its spans marked."""
    return marked_spans(cell.text, cell.marked, limit)


def trade_off(record: RunRecord) -> Markup:
    """The forget–retain plot, or nothing where no variant has both measures."""
    forget, retain = split_of_role(record, "forget"), split_of_role(record, "retain")
    points = []
    for variant in shown_variants(record):
        x, y = record.get(variant, forget or ""), record.get(variant, retain or "")
        if x is not None and y is not None and x.value is not None and y.value is not None:
            name, kind = variant_label(record, variant), record.kind(variant)
            points.append(figures.Point(name, kind, x.value, y.value, x.ci_low, x.ci_high, y.ci_low, y.ci_high))
    if not points:
        return Markup("")
    target = record.get(record.target, retain or "")
    floor = target.value * record.thresholds.retain_kept if target is not None and target.value else None
    return figures.trade_off(points, min(1.0, forget_threshold(record)[0]), floor)


def curve_panels(curves: tuple[Curve, ...]) -> list[StagePanels]:
    """Small multiples: stages of one kind share the axes of each term, so that they can be compared by eye."""
    shown = sorted(curves, key=lambda curve: not curve.stage.startswith("unlearn"))[:_STAGES]
    kinds = dict.fromkeys(curve.stage.partition("/")[0] for curve in shown)
    groups = []
    for kind in kinds:
        alike = [curve for curve in shown if curve.stage.partition("/")[0] == kind]
        rows = [StagePanels(curve.stage, tuple(_panels(curve, alike))) for curve in alike]
        if all(len(row.panels) == 1 for row in rows):  # one panel each: side by side in one row
            together = (
                Panel(f"{row.stage.partition('/')[2] or row.stage}: {row.panels[0].name}", row.panels[0].picture)
                for row in rows
            )
            rows = [StagePanels(kind, tuple(together))]
        groups += [row for row in rows if row.panels]
    return groups


def _panels(curve: Curve, alike: list[Curve]) -> Iterator[Panel]:
    for term, (steps, values) in curve.terms.items():
        if steps:
            both = [other.terms[term] for other in alike if term in other.terms]
            span = domain([value for _, column in both for value in column])
            last = max(column[-1] for column, _ in both if column)
            yield Panel(human(term), figures.curve(steps, values, term, span, last))


def limits(record: RunRecord) -> list[str]:
    """What these numbers do not say."""
    said = [
        "Evidence of tests, not proof of deletion. The page says what these tests could still draw out of the model, "
        "not what is left in its weights.",
        "Extraction strength is read with the wording that was trained on and with greedy choices. Other wordings, "
        "sampling, other languages or hints may draw out more; a little further training or quantization may bring "
        f"back what seems gone. {_attacked(record)}",
        "The intervals come from drawing rows anew. They say nothing about another seed, and little when rows are few.",
        f"One training run with seed {record.seed} was measured."
        + (" Its data are made up." if _made_up(record) else ""),
        "The samples are the worst rows by design, not typical ones.",
    ]
    if record.reference is None:
        said.append(
            "There is no reference model, one that never saw the forget rows. How much of the answers can be guessed "
            "without having learnt them is therefore unknown."
        )
    if "retain_unseen" not in record.splits:
        said.append(
            "Keeping was measured on retain rows of which unlearning trained on most, and by the rest of which it "
            "scaled its update, which flatters it."
            if record.holds_out
            else "Keeping was measured only on rows that unlearning itself trained on, which flatters it."
        )
    return said


def _attacked(record: RunRecord) -> str:
    if attacks_on(record):
        return "Only the attacks that stand on this page were tried."
    return f"None of that was tried here; to try it: {command(record)}"


def _made_up(record: RunRecord) -> bool:
    return bool(record.recipe and record.recipe.data.benchmark == "fictitious")


def incomplete(record: RunRecord) -> str:
    """One sentence if the run broke off, else ""."""
    if record.status not in ("failed", "interrupted"):
        return ""
    error = str(record.info.get("error") or "").strip().rstrip(".")
    return f"This run is not complete: it {'failed' if record.status == 'failed' else 'was interrupted'}" + (
        f" ({error})." if error else "."
    )


def absent(record: RunRecord) -> list[str]:
    """What this page could show but this run does not have."""
    said = list(record.problems)
    if not record.measures:
        said.append("Nothing was evaluated.")
    elif MAIN not in record.metrics:
        said.append("Extraction strength was not measured: verdicts and plot rest on it.")
    if record.measures and record.reference is None:
        said.append("No reference model was measured.")
    if record.measures and not (record.path / "values.parquet").is_file():
        said.append("values.parquet is missing: there are no values per row.")
    if not any(record.generated_ids(record.result, split) for split in record.splits):
        said.append("No answers were generated: there are no samples to read.")
    if record.measures and not read_updates(record.path):
        said.append("Where the update landed was not recorded.")
    if record.recipe is not None and record.recipe.prepare is None:
        said.append("The target was not trained here: what it was taught, and how, is not part of this record.")
    if not record.curves and (record.path / "events.jsonl").is_file():
        said.append("events.jsonl holds no training steps.")
    hidden = len(record.variants) - len(shown_variants(record))
    if hidden:
        said.append(f"{plural(hidden, 'further model')} stand in metrics.json alone.")
    return said
