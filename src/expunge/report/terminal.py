"""The closing table of a run in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from expunge.report.judgement import Verdict
from expunge.report.records import MAIN, Measure, RunRecord, read_run
from expunge.report.robust import attacks_on, robust
from expunge.report.tables import ARROWS, main_columns, variant_label
from expunge.report.text import human, interval, number
from expunge.report.verdict import fluent, forgotten, kept, kept_unseen

_STYLES = {
    "yes": "bold green",
    "no": "bold red",
    "not shown": "bold yellow",
    "not measured": "bold yellow",
    "no evidence": "dim",
}


def closing_table(run: Path) -> Table:
    """Variants × main metrics with 95% intervals, and the verdicts as caption. Raises UserError without a run."""
    record = read_run(run)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("model", no_wrap=True)
    columns = main_columns(record)
    for split, metric in columns:
        table.add_column(_head(record, split, metric), justify="right", no_wrap=True)
    for variant in record.variants:
        style = "bold" if variant == record.result else ""
        cells = [_cell(record.get(variant, split, metric), style) for split, metric in columns]
        table.add_row(Text(variant_label(record, variant), style=style), *cells)
    # verdicts in a row of their own: a caption would be folded to the width of a narrow table
    whole = Table.grid()
    if record.variants:
        whole.add_row(table)
    whole.add_row(_verdict_lines(record))
    return whole


def _head(record: RunRecord, split: str, metric: str) -> Text:
    direction = next(m.direction for m in record.measures if (m.split, m.metric) == (split, metric))
    name = "ES" if metric == MAIN else human(metric).split()[0]
    return Text(f"{human(split).lower().replace(' ', chr(10))}\n{name} {ARROWS.get(direction, '')}".rstrip())


def _cell(measure: Measure | None, style: str) -> Text:
    if measure is None:
        return Text("–")
    cell = Text(number(measure.value), style=style)
    shown = interval(measure.ci_low, measure.ci_high)
    return cell.append(f"\n{shown}", style="dim not bold") if shown else cell


def _verdict_lines(record: RunRecord) -> Text:
    line = Text()
    attacked = [robust(record)] if attacks_on(record) else []
    stammering = [verdict for verdict in (fluent(record),) if verdict is not None and verdict.answer == "no"]
    for verdict in (forgotten(record), kept(record), *stammering, *attacked):
        line.append(f"{verdict.question} ")
        line.append(verdict.answer, style=_STYLES[verdict.answer])
        line.append(f"{_reason(verdict)}\n")
    unseen = kept_unseen(record)
    if unseen is not None:
        line.append(f"{unseen.question}: {unseen.estimate()}\n")
    line.append(
        "ES: extraction strength; intervals: 95%, rows drawn anew. Evidence of tests, not proof of deletion.",
        style="dim",
    )
    return line


def _reason(verdict: Verdict) -> str:
    if verdict.value is None:
        return ""
    side = "at least" if verdict.is_ratio else "at most"
    limit = f"{100 * (verdict.threshold or 0):.0f}%" if verdict.is_ratio else number(verdict.threshold)
    return f": {verdict.estimate()}, wanted {side} {limit}"
