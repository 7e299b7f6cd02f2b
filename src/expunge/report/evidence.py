"""Figures from the tables of single rows: distributions, ROC of membership inference, leak@k, leaked words.

They are read from a run's or an evaluation's folder: `KIND/VARIANT/SPLIT[@VIEW].parquet`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from expunge.recipe.conventions import Convention
from expunge.report.document import Section
from expunge.report.figure_data import Curves, Distance, Distributions, Line, Roc, RocLine, Sample
from expunge.report.records import MAIN, RunRecord
from expunge.report.tables import variant_label
from expunge.report.text import human, number, plural

Numbers = NDArray[np.float64]
#: Truth ratios beyond this are drawn at the edge: their order still counts, their size says nothing.
_EDGE = 1e4
_OTHERS = 3  # variants beside target, result and reference


def evidence_section(record: RunRecord, convention: Convention) -> Section | None:
    """All figures that the folder's tables allow, or None."""
    figures = [*_strengths(record), *_truth_ratios(record, convention), *_rocs(record, convention)]
    figures += _leaks(record, convention)
    if not figures:
        return None
    lead = (
        "Behind the means stand rows. Two models that can't be told apart have one distribution, not the same mean "
        "alone; D is the Kolmogorov–Smirnov distance, the largest vertical gap between two curves."
    )
    return Section(title="Row by row", lead=lead, figures=figures)


def pictured(record: RunRecord) -> list[str]:
    """The variants that figures show: those that play a part, and the first others."""
    parts = [name for name in record.variants if name in (record.target, record.result, record.reference)]
    others = [name for name in record.variants if name not in parts and name != "original"][:_OTHERS]
    return [name for name in record.variants if name in parts or name in others]


def furthest(first: Numbers, second: Numbers) -> tuple[float, float]:
    """(D, where): the largest distance between two empirical distribution functions, and the value at which it lies."""
    places = np.unique(np.concatenate([first, second]))
    shares = [np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (first, second)]
    gaps = np.abs(shares[0] - shares[1])
    index = int(np.argmax(gaps))
    return float(gaps[index]), float(places[index])


def delong_error(members: Numbers, others: Numbers) -> float | None:
    """Standard error of an AUC from the spread of both sides' placements (DeLong et al. 1988); None below two rows."""
    if min(len(members), len(others)) < 2:
        return None
    from expunge.metrics.auc import placements

    spread = placements(members, others).var(ddof=1) / len(members)
    spread += placements(others, members).var(ddof=1) / len(others)
    return math.sqrt(float(spread))


def roc_points(members: Numbers, others: Numbers) -> tuple[list[float], list[float]]:
    """False and true positive rates when whatever scores at or below a threshold is called a member."""
    places = np.unique(np.concatenate([members, others]))
    columns = [np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (others, members)]
    return [0.0, *columns[0].tolist()], [0.0, *columns[1].tolist()]


def _of_role(record: RunRecord, role: str) -> list[str]:
    return [split for split in record.splits if split != "model" and record.role(split) == role]


def _table(folder: Path, kind: str, variant: str, split: str, view: str = "") -> pa.Table | None:
    path = folder / kind / variant / f"{split}{'@' + view if view else ''}.parquet"
    try:
        return pq.read_table(path) if path.is_file() else None
    except (pa.ArrowInvalid, OSError):
        return None


def _strengths(record: RunRecord) -> Iterator[Distributions]:
    """Extraction strength of the forget rows, with the distance to the reference (else to the target)."""
    for split in _of_role(record, "forget")[:2]:
        found = {name: np.array(list(record.values(name, split).values())) for name in pictured(record)}
        title = f"{human(MAIN)}, {human(split).lower()} rows"
        figure = _distributions(record, title, human(MAIN).lower(), found)
        if figure is not None:
            yield figure


def _truth_ratios(record: RunRecord, convention: Convention) -> Iterator[Distributions]:
    for split in _of_role(record, "forget")[:2]:
        found = {}
        for name in pictured(record):
            views = ("", "paraphrased_answer", "perturbed_answer")
            tables = [
                table for view in views if (table := _table(record.path, "scores", name, split, view)) is not None
            ]
            if len(tables) == len(views):
                from expunge.metrics.truth_ratio import truth_ratio

                ratio = truth_ratio(*tables, convention)
                found[name] = np.clip(ratio[np.isfinite(ratio)], 1 / _EDGE, _EDGE)
        figure = _distributions(record, f"Truth ratio, {human(split).lower()} rows", "truth ratio R", found, log=True)
        if figure is not None:
            yield figure


def _distributions(
    record: RunRecord, title: str, x_name: str, found: dict[str, Numbers], log: bool = False
) -> Distributions | None:
    found = {name: values for name, values in found.items() if len(values) > 1}
    if len(found) < 2:
        return None
    samples = [
        Sample(name=variant_label(record, name), role=record.kind(name), values=values.tolist())
        for name, values in found.items()
    ]
    distance, words = None, []
    yardstick = next((name for name in (record.reference, record.target) if name in found), None)
    if record.result in found and yardstick is not None and yardstick != record.result:
        gap, at = furthest(found[record.result], found[yardstick])
        names = [variant_label(record, name) for name in (record.result, yardstick)]
        distance = Distance(first=names[0], second=names[1], statistic=gap, at=at)
        n = min(len(found[record.result]), len(found[yardstick]))
        chance = 1.36 * math.sqrt(2 / n)  # the 95% quantile for two samples of n of one distribution
        words.append(
            f"{names[0]} against {names[1].lower()}: D = {number(gap)} on {plural(n, 'row')}. Two models that are "
            f"alike stay below about {number(chance)} in 95% of cases."
        )
    scale = "log" if log else "linear"
    return Distributions(title=title, x_name=x_name, samples=samples, distance=distance, x_scale=scale, words=words)


def _rocs(record: RunRecord, convention: Convention) -> Iterator[Roc]:
    holdouts, names = _of_role(record, "holdout"), pictured(record)
    holdout = "holdout" if "holdout" in holdouts else next(iter(holdouts), None)
    for split in _of_role(record, "forget")[:2] if holdout else []:
        tables = {name: [_table(record.path, "scores", name, one) for one in (split, holdout or "")] for name in names}
        if not any(all(table is not None for table in pair) for pair in tables.values()):
            continue
        from expunge.metrics.auc import chance_note
        from expunge.metrics.membership import SCORES

        for attack in ("loss", "min_k"):
            lines, counts = [], (0, 0)
            for name, (mine, theirs) in tables.items():
                if mine is None or theirs is None:
                    continue
                members, others = (_scored(SCORES[attack](table, convention)) for table in (mine, theirs))
                if len(members) and len(others):
                    lines.append(_roc_line(variant_label(record, name), record.kind(name), members, others))
                    counts = (len(members), len(others))
            if lines:
                note = chance_note(*counts)
                words = [f"{plural(counts[0], 'member')} and {plural(counts[1], 'row')} that no model was trained on."]
                words += [f"{note[:1].upper()}{note[1:]}. Few documents say little."] if note else []
                words += [
                    "Good is the reference's curve, near the diagonal: below it, rows stand out for another reason."
                ]
                pair = f"{human(split).lower()} against {human(holdout or '').lower()}"
                title = f"Membership by {human(attack).lower()}: {pair}"
                yield Roc(title=title, lines=lines, words=words)


def _roc_line(name: str, kind: str, members: Numbers, others: Numbers) -> RocLine:
    from expunge.metrics.auc import placements

    false, true = roc_points(members, others)
    area = float(placements(members, others).mean())
    error = delong_error(members, others)
    return RocLine(name=name, role=kind, false_positive=false, true_positive=true, auc=area, error=error)


def _scored(values: Numbers) -> Numbers:
    return values[np.isfinite(values)]


def _leaks(record: RunRecord, convention: Convention) -> Iterator[Curves]:
    for split in _of_role(record, "forget")[:2]:
        lines, counts = [], set()
        for name in pictured(record):
            table = _table(record.path, "generations", name, split, "sampled")
            if table is None or not table.num_rows:
                continue
            line, n = leak_line(variant_label(record, name), record.kind(name), table, convention)
            lines += [line] if n else []
            counts |= {n}
        if lines:
            words = [
                "The chance that at least one of k sampled answers gives the answer away, mean over rows (unbiased "
                "estimate). The band reaches to an exact upper bound: at 99%, a row's leak is no more likely than that "
                "(Clopper–Pearson), given what its samples showed. Few samples leave it wide.",
                f"{' or '.join(map(str, sorted(counts)))} samples per row.",
            ]
            yield Curves(
                title=f"leak@k, {human(split).lower()} rows",
                x_name="k: answers that are sampled",
                y_name="chance of a leak",
                lines=lines,
                x_scale="log",
                words=words,
            )


def leak_line(name: str, kind: str, table: pa.Table, convention: Convention) -> tuple[Line, int]:
    """leak@k over k = 1, 2, 4, … of a table of samples, its upper bound, and how many samples a row has."""
    from expunge.metrics.leak import leak_curve, probability_bound, samples

    hits = samples(table, convention).hit
    hits = hits[~np.isnan(hits).all(axis=1)]
    n = int((~np.isnan(hits)).sum(axis=1).min()) if len(hits) else 0
    ks = [k for k in ascending(n) if k <= n]
    if not ks:
        return Line(name=name, x=[], y=[]), 0
    curve = np.nanmean(leak_curve(hits, ks), axis=0)
    bound = probability_bound(hits)
    upper = [float(np.nanmean(1 - (1 - bound) ** k)) for k in ks]
    y = [float(value) for value in curve]
    return Line(name=name, role=kind, x=[float(k) for k in ks], y=y, low=y, high=upper), n


def ascending(n: int) -> Sequence[int]:
    """1, 2, 4, … up to n, and n itself."""
    powers = [2**power for power in range(max(1, n).bit_length())]
    return list(dict.fromkeys([*(k for k in powers if k < n), n])) if n else []
