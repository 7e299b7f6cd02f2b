"""The search of a merge over a function that measures one: the line between two models, then Optuna, then the choice.

Nothing here runs a model. docs/design/search.md says why it is done this way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expunge.errors import UserError
from expunge.metrics.base import METRICS
from expunge.numbers import HARDLY
from expunge.pipeline.merge_search_rows import SearchRows
from expunge.pipeline.merge_search_space import Setting, Space
from expunge.report.search_record import Estimate, Line, Tried

#: Halvings of the line between two models: with both ends eight passes, to a width of 1/64.
HALVINGS = 6
#: A distance or shortfall below this is none: sums of the same numbers differ in the last digits.
TIE = 1e-9


@dataclass(frozen=True)
class Measured:
    """What a model scored, by split:metric; or why nothing could be measured."""

    values: Mapping[str, Estimate]
    seconds: float = 0.0
    failed: str = ""


#: Measures the merge of a setting; of None, the target itself.
Measure = Callable[[Setting | None], Measured]


@dataclass(frozen=True)
class Goal:
    """Aims and constraints in numbers."""

    rows: SearchRows
    wanted: Mapping[str, float]  # split:metric → number that is aimed at
    whole: Mapping[str, Estimate]  # what the target has

    @classmethod
    def of(cls, rows: SearchRows, target: Measured, reference: Measured | None) -> Goal:
        """Raises UserError where the target has nothing to keep, or the reference gives no number to aim at."""
        wanted = {}
        for aim in rows.aims:
            if aim.value == "reference":
                assert reference is not None
                found = reference.values[named(aim)].value
                if found is None:
                    raise UserError(f"{named(aim)} of the reference can't be measured", "aim at a number instead")
                wanted[named(aim)] = found
            else:
                wanted[named(aim)] = aim.value
        for entry in (*rows.aims, *rows.keep):
            if target.failed or target.values[named(entry)].value is None:
                raise UserError(
                    f"{named(entry)} of the base can't be measured", "give rows with answers, or check --base"
                )
        for keep in rows.keep:
            whole = target.values[named(keep)].value
            if not whole or whole <= 0:
                raise UserError(
                    f"{named(keep)} of the base is {whole or 0:g}: there is nothing to keep",
                    "is --base the model before unlearning? If so, give rows that it has learnt",
                )
        return cls(rows, wanted, target.values)

    @property
    def least(self) -> dict[str, float]:
        """What every constraint wants at least."""
        return {named(keep): keep.part * (self.whole[named(keep)].value or 0.0) for keep in self.rows.keep}

    def unknown(self) -> list[str]:
        """A sentence per extraction strength of rows to keep that the base hardly has: a part of it says little."""
        found = {named(keep): self.whole[named(keep)].value or 0.0 for keep in self.rows.keep}
        return [
            f"the base's {name} is only {value:.3f}, of which a part says little; was it taught these rows, and with "
            "this template (--template)?"
            for name, value in found.items()
            if name.endswith(":extraction_strength") and value < HARDLY
        ]

    def judged(self, kind: Any, setting: Setting | None, measured: Measured, at: float | None = None) -> Tried:
        """A measured model with its distance from the aims and what it keeps."""
        options = {} if setting is None else setting.options
        tried = Tried(
            kind=kind, at=at, values=dict(measured.values), failed=measured.failed, seconds=measured.seconds, **options
        )
        failed = tried.failed or self._broken(measured.values)
        if failed:
            return tried.model_copy(update={"failed": failed})
        found = {name: estimate.value or 0.0 for name, estimate in tried.values.items()}
        distance = sum(aim.weight * aim.distance(found[named(aim)], self.wanted[named(aim)]) for aim in self.rows.aims)
        kept = {named(keep): found[named(keep)] / (self.whole[named(keep)].value or 1.0) for keep in self.rows.keep}
        lacking = [max(0.0, 1 - found[name] / least) for name, least in self.least.items()]
        shortfall = sum(part for part in lacking if part > TIE)
        return tried.model_copy(update={"distance": distance, "kept": kept, "shortfall": shortfall})

    def _broken(self, values: Mapping[str, Estimate]) -> str:
        """Why the numbers say nothing: a model that computes NaN leaves rows unscored that the target could score."""
        for name, whole in self.whole.items():
            found = values.get(name)
            if found is None or found.value is None:
                return f"{name}: no row could be scored"
            if found.unscored > whole.unscored:
                return f"{name}: {found.unscored} rows could not be scored"
        return ""


def named(entry: Any) -> str:
    """split:metric of an aim or a constraint."""
    return f"{entry.split}:{entry.metric}"


def order(tried: Tried) -> tuple[Any, ...]:
    """Sorts the better merge first: what keeps enough, then what is nearer to the aims, then what keeps more."""
    if tried.distance is None:
        return (2, 0.0, 0.0, 0.0)
    nearness = (round(tried.shortfall, 9), round(tried.distance, 9))
    return (int(not tried.met), *nearness, -round(sum(tried.kept.values()), 9))


@dataclass
class Found:
    """A finished search."""

    tried: list[Tried]
    chosen: int
    line: Line | None
    goal: Goal
    notes: list[str] = field(default_factory=list)


class Searching:
    """One search: every measured merge in order, none measured twice."""

    def __init__(self, space: Space, rows: SearchRows, measure: Measure, reference: Measured | None = None) -> None:
        self.space, self.measure = space, measure
        self.tried: list[Tried] = []
        self.notes: list[str] = []
        self._places: dict[str, int] = {}
        target = measure(None)
        self.goal = Goal.of(rows, target, reference)
        self.tried.append(self.goal.judged("target", None, target))
        if reference is not None:
            self.tried.append(self.goal.judged("reference", None, reference))
        self._spent = sum(one.seconds for one in self.tried)
        self.notes += self.goal.unknown()

    def run(self) -> Found:
        """The inputs alone, the line, the trials. Raises UserError if optuna is wanted and missing."""
        if self.space.search.trials:
            _optuna()  # before anything is measured
        ends = [self._try("input", self.space.alone(number)) for number in range(self.space.models)]
        for end in ends:
            if not self.tried[end].values:  # weights that can't be used; what merely computes NaN was measured
                raise UserError(self.tried[end].failed, "that model is broken; leave it out")
        line = self._line(ends) if self.space.has_line else None
        if self.space.search.trials:
            self._trials(line, ends)
        if self.space.line_counts:
            candidates = [place for place, one in enumerate(self.tried) if one.method]
        else:
            candidates = [place for place, one in enumerate(self.tried) if one.kind == "trial"]
        candidates = [place for place in candidates if self.tried[place].distance is not None]
        if not candidates:
            reasons = next((one.failed for one in self.tried if one.failed), "none was tried")
            raise UserError(
                f"no merge could be measured ({reasons})", "search other methods, or a smaller --range scale"
            )
        chosen = min(candidates, key=lambda place: (order(self.tried[place]), place))
        return Found(self.tried, chosen, line, self.goal, self.notes)

    def _try(self, kind: Any, setting: Setting, at: float | None = None) -> int:
        """The place of a merge among the tried; what was tried before is not tried again."""
        if setting.key not in self._places:
            self._places[setting.key] = len(self.tried)
            self.tried.append(self.goal.judged(kind, setting, self.measure(setting), at))
            self._spent += self.tried[-1].seconds
        return self._places[setting.key]

    @property
    def _late(self) -> bool:
        limit = self.space.search.minutes
        return limit is not None and self._spent >= 60 * limit

    # ------------------------------------------------------------ the line

    def _line(self, ends: Sequence[int]) -> Line | None:
        """Bisection to where the first aim is met, then back to where enough is kept."""
        aim = self.goal.rows.aims[0]
        values = [self.tried[end].values.get(named(aim)) for end in ends]
        numbers = [None if value is None else value.value for value in values]
        if numbers[0] is None or numbers[1] is None or any(self.tried[end].failed for end in ends):
            self.notes.append("one of the two models could not be measured: there is no line between them")
            return None
        high_is_known = METRICS.get(aim.metric).learnt != "low"
        under = 0 if (numbers[0] >= numbers[1]) == high_is_known else 1
        places = {0.0: ends[under], 1.0: ends[1 - under]}
        for at, end in places.items():
            self.tried[end] = self.tried[end].model_copy(update={"at": at})
        wanted = self.goal.wanted[named(aim)]
        away = [float(numbers[place] or 0.0) - wanted for place in (under, 1 - under)]
        bracketed = away[0] * away[1] < 0 or (abs(away[1]) <= TIE < abs(away[0]))
        if bracketed:
            self._bisect(places, under, lambda one: (one.values[named(aim)].value - wanted) * away[0] <= TIE)
            self._keep_enough(places, under)
        else:
            self.notes.append(
                f"the first aim is not bracketed: {named(aim)} is {numbers[under]:.3f} of one model and "
                f"{numbers[1 - under]:.3f} of the other, and {wanted:g} does not lie between; the better end is taken"
            )
        best = min(places, key=lambda at: (order(self.tried[places[at]]), at))
        return Line(under=under, over=1 - under, at=best, bracketed=bracketed, tried=places[best])

    def _point(self, places: dict[float, int], under: int, at: float) -> Tried:
        if at not in places:
            places[at] = self._try("line", self.space.between(under, at), at)
        return self.tried[places[at]]

    def _bisect(self, places: dict[float, int], under: int, reached: Callable[[Any], bool]) -> None:
        """Halve to the smallest t that reaches the aim; a model that can't be measured has gone too far."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            if self._late:
                return
            middle = self.space.halfway(low, high)
            one = self._point(places, under, middle)
            if one.distance is None or reached(one):
                high = middle
            else:
                low = middle

    def _keep_enough(self, places: dict[float, int], under: int) -> None:
        """If the point nearest to the aim keeps too little: halve between it and the nearest one that keeps enough."""
        measured = [at for at in places if self.tried[places[at]].distance is not None]
        nearest = min(measured, key=lambda at: (self.tried[places[at]].distance, at))
        enough = [at for at in measured if self.tried[places[at]].met]
        if not enough or nearest in enough:
            return
        good, bad = min(enough, key=lambda at: abs(at - nearest)), nearest
        while abs(good - bad) > 1 / 2**HALVINGS + 1e-3 and not self._late:
            middle = self.space.halfway(good, bad)
            if self._point(places, under, middle).met:
                good = middle
            else:
                bad = middle

    # ------------------------------------------------------------ the trials

    def _trials(self, line: Line | None, ends: Sequence[int]) -> None:
        optuna, space = _optuna(), self.space
        shares = [[1 / space.models] * space.models]
        if line is not None:
            shares.insert(0, [float(weight) for weight in self.tried[line.tried].weights])
        elif space.models > 1:
            shares.append([float(w) for w in self.tried[min(ends, key=lambda end: order(self.tried[end]))].weights])
        study = _study(optuna, space.search.seed)
        for numbers in space.starts(shares)[: space.search.trials]:
            study.enqueue_trial(numbers)
        for _ in range(space.search.trials):
            if self._late:
                self.notes.append(f"the time was up after {sum(one.kind == 'trial' for one in self.tried)} trials")
                return
            trial = study.ask()
            one = self.tried[self._try("trial", space.drawn(trial))]
            trial.set_user_attr("constraints", [one.shortfall])
            if one.distance is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, one.distance)


def _study(optuna: Any, seed: int) -> Any:
    """A study in memory: it is made anew from the journal, so that a killed search goes on as it would have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options that optuna may yet rename
        sampler = optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=8,
            multivariate=True,
            group=True,
            constraints_func=lambda trial: trial.user_attrs.get("constraints", [1.0]),
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="minimize", sampler=sampler)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError(
            "a search needs optuna, which is not installed", "pip install 'expunge[sweep]', or --line without --search"
        ) from None
    return optuna
