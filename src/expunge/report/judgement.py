"""A verdict: an answer with the estimate, the interval and the threshold that it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expunge.report.text import number, percent

#: "no evidence": the probe could not even read the knowledge from the target, so that it passes nobody.
Answer = Literal["yes", "no", "not shown", "not measured", "no evidence"]


@dataclass(frozen=True, slots=True)
class Mark:
    """A value on a verdict's scale: the result, the target, the reference."""

    name: str
    kind: str
    value: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer with the point estimate, the 95% interval and the threshold that it rests on."""

    question: str
    answer: Answer
    value: float | None
    ci_low: float | None
    ci_high: float | None
    threshold: float | None
    measured: str  # what `value` is, in words
    rule: str
    remarks: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()
    is_ratio: bool = False
    informs: bool = False  # a number to look at, judged by nobody

    @property
    def is_firm(self) -> bool:
        """Whether the whole interval lies on the answer's side of the threshold."""
        if self.threshold is None or self.ci_low is None or self.ci_high is None:
            return False
        return not self.ci_low < self.threshold <= self.ci_high

    def shown(self, value: float | None) -> str:
        """A value in the verdict's unit."""
        return percent(value) if self.is_ratio else number(value)

    def interval(self) -> str:
        """The 95% interval, or nothing."""
        if self.ci_low is None or self.ci_high is None:
            return ""
        return f"{self.shown(self.ci_low)} to {self.shown(self.ci_high)}"

    def estimate(self) -> str:
        """The point estimate with its interval, for one line of text."""
        if self.value is None:
            return "not measured"
        return self.shown(self.value) + (f" (95% CI {self.interval()})" if self.interval() else "")
