"""Trends as parts of a study's page: a figure of estimates and intervals, and a table."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.report.document import Column, Table, TableCell, TableRow
from expunge.report.figure_data import Forest, Stretch
from expunge.report.text import interval, number
from expunge.studies.trends import Trend


def forest(claims: Sequence[Trend]) -> Forest:
    """The estimates with their intervals; those that could not be measured are left to the table."""
    rows = [
        Stretch(name=one.label, value=one.value, low=one.low, high=one.high, state=one.shown, hint=one.claim)
        for one in claims
        if one.value is not None
    ]
    return Forest(
        title="Trends",
        x_name="estimate; above 0 as expected",
        rows=rows,
        threshold=0.0,
        threshold_name="no effect",
        above=True,
    )


def table(claims: Sequence[Trend]) -> Table:
    """What is expected, how it was measured, and what came out."""
    columns = [
        Column(label="Expected", number=False),
        Column(label="Measured as", number=False),
        Column(label="Estimate"),
        Column(label="Shown", number=False),
    ]
    rows = [
        TableRow(
            cells=[
                TableCell(text=one.claim),
                TableCell(text=one.measured),
                TableCell(text=number(one.value), under=interval(one.low, one.high)),
                TableCell(text=one.shown),
            ]
        )
        for one in claims
    ]
    return Table(columns=columns, rows=rows)


def deviating(over: tuple[float, float | None]) -> TableCell:
    """A mean over seeds with its standard deviation beneath."""
    mean, deviation = over
    return TableCell(text=number(mean), under="" if deviation is None else f"± {number(deviation)}")
