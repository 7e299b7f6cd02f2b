"""What `localization` can claim: each region against the random one, seed by seed, and what that says in words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from expunge.report.text import interval, number, plural
from expunge.studies.localization_record import ORACLE, RANDOM, Found, Look, Run
from expunge.studies.localization_stats import LEVEL, SHARE, Paired, State, holm, matched_quality, paired, run_aues

#: A difference of AUES or of strength below this is none: twice the deviation over seeds that the paper prints for
#: AUES (median 0.016 of sixteen), and what five seeds of that deviation can find.
MARGIN = 0.03
#: Unlearning that lowers forget strength by less, in the mean of the runs, leaves AUES no room to differ.
MOVED = 0.2
#: Relearning that brings the mean of the runs this near to 1 leaves strengths no room to differ; at 0 likewise.
ENDS = (0.05, 0.95)


@dataclass(frozen=True)
class Measure:
    """A number of each run, and how a difference of it reads."""

    name: str
    label: str
    words: str
    higher_is_better: bool
    margin: float | None

    @property
    def sign(self) -> int:
        """1 where region − random above 0 is for the better, else −1."""
        return 1 if self.higher_is_better else -1

    def difference(self, region: str = "region") -> str:
        """What is subtracted from what, so that a number above 0 speaks for the region."""
        return f"{region} − random" if self.higher_is_better else f"random − {region}"


AUES = Measure("aues", "AUES", "area under forgetting against retain strength", True, MARGIN)
UNSEEN = Measure("aues_unseen", "AUES, unseen", "the same against retain rows that no training saw", True, MARGIN)
MATCHED = Measure(
    "mu95", "MU95", f"log10 p of forget quality where {SHARE:.0%} of the start's retain strength is left", True, None
)
RELEARNED = Measure("relearned", "strength after relearning", "on the forget rows, mean over its looks", False, MARGIN)
#: What relearning starts from: regions that differ here are not at equal footing after it.
LEFT = Measure("left", "strength before relearning", "on the forget rows, at the last look", False, None)
MEASURES = (AUES, UNSEEN, MATCHED, RELEARNED, LEFT)
#: The two axes of the answer.
AXES = {AUES: "for the trade-off", RELEARNED: "for robustness to relearning"}

#: State → what localization does, with the place of the axis.
SAYS: Mapping[State, str] = {
    "better": "informs unlearning {axis}",
    "worse": "misleads unlearning {axis}",
    "slight": f"makes a difference {{axis}}, but one below {MARGIN:g}",
    "alike": f"makes no difference of {MARGIN:g} or more {{axis}}",
    "open": "is neither shown to matter nor shown not to {axis}",
    "none": "can't be judged {axis}",
}


def method_name(name: str) -> str:
    """A method as papers write it."""
    return name.upper() if len(name) <= 4 else name.replace("_", " ")


def region_name(name: str) -> str:
    """A region as words."""
    return name.replace("_", " ")


class Claims:
    """Values of the runs of `found` by measure, and their paired differences from the random region."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.came = [run for run in found.runs if not run.failed and run.looks]
        self._compared: dict[tuple[str, str | None, str], Paired] = {}

    # ------------------------------------------------------------ values

    @functools.cached_property
    def budgets(self) -> list[int]:
        """Steps after which everything that was relearned was looked at, the start left out."""
        every = [{look.step for look in run.relearned} for run in self.came if run.relearned]
        every += [{look.step for look in control.looks} for control in self.found.controls if control.looks]
        return sorted(set.intersection(*every) - {0}) if every else []

    def mean_strength(self, looks: Sequence[Look]) -> float | None:
        """Forget strength, mean over `budgets`; None where they were not all reached."""
        values = [look.forget for look in looks if look.step in self.budgets and math.isfinite(look.forget)]
        return sum(values) / len(values) if values and len(values) == len(self.budgets) else None

    def value(self, run: Run, measure: Measure) -> float | None:
        """The measure of a run; None where it can't be had."""
        found: Mapping[str, Callable[[], float | None]] = {
            "aues": lambda: run_aues(run.looks),
            "aues_unseen": lambda: run_aues(run.looks, lambda look: look.unseen),
            "mu95": lambda: matched_quality(run.looks),
            "relearned": lambda: self.mean_strength(run.relearned),
            "left": lambda: run.looks[-1].forget if run.relearned else None,
        }
        return found[measure.name]()

    def values(self, measure: Measure, method: str, region: str) -> dict[int, float]:
        """Seed → value; the mean where a seed has several such runs (random regions drawn anew)."""
        known: dict[int, list[float]] = {}
        for run in self.came:
            if (run.method, run.region) == (method, region) and (value := self.value(run, measure)) is not None:
                known.setdefault(run.seed, []).append(value)
        return {seed: sum(values) / len(values) for seed, values in sorted(known.items())}

    def above_control(self, method: str, region: str) -> dict[int, float]:
        """Seed → strength after relearning minus that of the reference which was taught likewise."""
        controls = {one.seed: self.mean_strength(one.looks) for one in self.found.controls}
        values = self.values(RELEARNED, method, region)
        return {seed: value - control for seed, value in values.items() if (control := controls.get(seed)) is not None}

    # ------------------------------------------------------------ comparisons

    def compared(self, measure: Measure, method: str | None, region: str = ORACLE) -> Paired:
        """The region against the random one, above 0 for the better; method None: mean over methods, seed by seed."""
        key = measure.name, method, region
        if key not in self._compared:
            gains = self._pooled(measure, region) if method is None else self._gains(measure, method, region)
            self._compared[key] = paired(gains, measure.margin)
        return self._compared[key]

    def _gains(self, measure: Measure, method: str, region: str) -> dict[int, float]:
        # a control's strength would be subtracted from both sides of a pair
        own, chance = (self.values(measure, method, name) for name in (region, RANDOM))
        return {seed: measure.sign * (own[seed] - chance[seed]) for seed in own if seed in chance}

    def pooled_methods(self, measure: Measure, region: str = ORACLE) -> list[str]:
        """The methods whose mean is judged: those with a pair in more than half of the seeds that have any."""
        gains = {method: self._gains(measure, method, region) for method in self.found.methods}
        seeds = {seed for values in gains.values() for seed in values}
        return [method for method, values in gains.items() if 2 * len(values) > len(seeds)]

    def _pooled(self, measure: Measure, region: str) -> dict[int, float]:
        """Mean over the pooled methods of the seeds that have them all."""
        gains = [self._gains(measure, method, region) for method in self.pooled_methods(measure, region)]
        seeds = sorted(set.intersection(*map(set, gains))) if gains else []
        return {seed: sum(values[seed] for values in gains) / len(gains) for seed in seeds}

    def corrected(self, measure: Measure, method: str | None, region: str = ORACLE) -> float | None:
        """p by Holm over its family: attributions among each other, methods among each other in one region.

        The answer's own test, the oracle's over all methods, stands alone.
        """
        if method is not None:
            return holm({name: self.compared(measure, name, region).p for name in self.found.methods})[method]
        if region not in self.attributions:
            return self.compared(measure, None, region).p
        return holm({name: self.compared(measure, None, name).p for name in self.attributions})[region]

    def level(self, measure: Measure, region: str) -> list[float]:
        """The region's value of each seed, mean over methods, for the seeds and methods that are compared."""
        beside = ORACLE if region == RANDOM else region
        methods = self.pooled_methods(measure, beside)
        columns = [self.values(measure, method, region) for method in methods]
        seeds = self.compared(measure, None, beside).differences
        return [sum(column[seed] for column in columns) / len(columns) for seed in seeds]

    @property
    def attributions(self) -> list[str]:
        """Attributions with runs."""
        return [name for name in self.found.regions() if name not in (ORACLE, RANDOM)]

    # ------------------------------------------------------------ whether a measure can tell anything

    def no_room(self, measure: Measure) -> str:
        """Why regions could not differ whatever they are; "" where they could."""
        judged = [run for run in self.came if run.region in (ORACLE, RANDOM)]
        if measure is RELEARNED:
            values = [value for run in judged if (value := self.value(run, measure)) is not None]
            if values and not ENDS[0] < (mean := sum(values) / len(values)) < ENDS[1]:
                what = "everything" if mean >= ENDS[1] else "nothing"
                return f"relearning brought {what} back in every region (mean forget strength {number(mean)})"
            return ""
        falls = [run.looks[0].forget - min(look.forget for look in run.looks) for run in judged]
        if falls and (mean := sum(falls) / len(falls)) < MOVED:
            return f"unlearning hardly moved (forget strength fell by {number(mean)} in the mean)"
        return ""

    def state(self, measure: Measure, method: str | None = None, region: str = ORACLE) -> State:
        """What is shown after Holm's correction; equality is not, where there was no room for a difference."""
        found, p = self.compared(measure, method, region), self.corrected(measure, method, region)
        state = found.state
        if state in ("better", "worse", "slight") and p is not None and p >= LEVEL:
            state = "alike" if found.equivalent else "open"
        return "open" if state == "alike" and self.no_room(measure) else state

    def said(self, measure: Measure) -> str:
        """`makes no difference of 0.03 or more for the trade-off (AUES oracle − random …)`."""
        if measure is RELEARNED and not self.budgets:
            return f"was not tried {AXES[measure]}"
        says = SAYS[self.state(measure)].format(axis=AXES[measure])
        return f"{says} ({self._because(measure, self.compared(measure, None))})"

    def _because(self, measure: Measure, found: Paired) -> str:
        what = f"{measure.label} {measure.difference(ORACLE)}"
        if found.mean is None:
            return "no pair of oracle and random came through"
        if found.n < 2:
            return f"{what} {number(found.mean)} in the one seed that has both"
        if found.tied:
            return f"{what} is {number(found.mean)} in each of {found.n} seeds, so that nothing can be tested"
        reason = self.no_room(measure)
        said = f"{what} {number(found.mean)}, 95% CI {interval(found.low, found.high)}, {plural(found.n, 'seed')}"
        if self.state(measure) == "open":
            said += f"; {reason}" if reason else f", which could have found {number(found.detectable)}"
        return said
