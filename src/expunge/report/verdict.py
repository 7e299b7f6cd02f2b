"""The verdicts: Forgotten? Kept? Fluent? Judged by the recipe's thresholds, which were fixed before the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from expunge.report.judgement import Answer, Mark, Verdict
from expunge.report.records import RunRecord
from expunge.report.text import human, interval, listed, number, percent, plural

REPETITION = "repetition"
#: Random draws of one bootstrap at most; with very many rows fewer resamples say the same.
_DRAWS = 40_000_000


def split_of_role(record: RunRecord, role: str) -> str | None:
    """The split that a verdict rests on: the one called like the role, else the first of that role."""
    if role in record.splits:
        return role
    return next((split for split in record.splits if record.role(split) == role), None)


def forget_threshold(record: RunRecord) -> tuple[float, str]:
    """The largest extraction strength that counts as forgotten, and how it comes about."""
    limits = record.thresholds
    reference = record.get(record.reference, split_of_role(record, "forget") or "forget")
    if reference is None or reference.value is None:
        return limits.forget_extraction, "set in the recipe; there is no reference to compare with"
    near = reference.value + limits.reference_margin
    words = f"the larger of {number(limits.forget_extraction)} and "
    words += f"the reference's {number(reference.value)} + {number(limits.reference_margin)}"
    return max(limits.forget_extraction, near), words


def forgotten(record: RunRecord) -> Verdict:
    """Is the result's extraction strength on the forget rows at most the threshold, with its whole interval?"""
    split = split_of_role(record, "forget") or "forget"
    threshold, words = forget_threshold(record)
    rule = f"Yes if the whole 95% interval lies at or below {number(threshold)} ({words}); no if all of it lies above."
    measure = record.get(record.result, split)
    if measure is None or measure.value is None:
        reason = "The result has no extraction strength on forget rows."
        return Verdict(
            "Forgotten?", "not measured", None, None, None, threshold, "extraction strength", rule, (reason,)
        )
    remarks = []
    low, high = measure.ci_low, measure.ci_high
    if low is None or high is None:
        answer: Answer = "not shown"
        remarks.append("There is no interval, so that the point estimate alone proves neither.")
    else:
        answer = "yes" if high <= threshold else "no" if low > threshold else "not shown"
    if answer == "not shown" and low is not None:
        side = "below" if measure.value <= threshold else "above"
        remarks.append(f"The point estimate lies {side} the threshold, but the interval crosses it.")
    if answer == "yes" and _hardly_known(record, split, threshold):
        # a model that never knew the rows passes the threshold too, and has forgotten nothing
        answer = "not shown"
        remarks.append("The target lies at or below the threshold already: it hardly knew these rows.")
    marks = [
        Mark(name, record.kind(name), found.value)
        for name in (record.target, record.reference)
        if name is not None and (found := record.get(name, split)) is not None and found.value is not None
    ]
    words = f"extraction strength on {plural(measure.n, 'forget row')}"
    return Verdict("Forgotten?", answer, measure.value, low, high, threshold, words, rule, tuple(remarks), tuple(marks))


def _hardly_known(record: RunRecord, split: str, threshold: float) -> bool:
    target = record.get(record.target, split)
    return target is not None and target.value is not None and target.value <= threshold


def kept(record: RunRecord) -> Verdict:
    """Is the result's extraction strength on the retain rows at least the wanted part of the target's?"""
    split = split_of_role(record, "retain")
    limit = record.thresholds.retain_kept
    rule = f"Yes if the result keeps at least {percent(limit)} of the target's extraction strength (point estimate)."
    if split is None:
        reason = ("No retain rows were evaluated.",)
        return Verdict("Kept?", "not measured", None, None, None, limit, "part kept", rule, reason, is_ratio=True)
    return _ratio_verdict(record, "Kept?", split, limit, rule)


def kept_unseen(record: RunRecord) -> Verdict | None:
    """The same on retain rows that unlearning never saw: information, not a verdict. None where there are none."""
    if "retain_unseen" not in record.splits:
        return None
    rule = "For information: these rows were taught to the target and never shown to unlearning."
    found = _ratio_verdict(record, "Kept on unseen rows", "retain_unseen", record.thresholds.retain_kept, rule)
    return replace(found, informs=True)


def fluent(record: RunRecord) -> Verdict | None:
    """Where outputs repeat themselves most, do they so little more than before? None where no text was generated."""
    margin = record.thresholds.repetition_margin
    found = []
    for split in (split for split in record.splits if record.role(split) in ("forget", "retain")):
        result, target = (record.get(name, split, REPETITION) for name in (record.result, record.target))
        reference = record.get(record.reference, split, REPETITION)
        known = [measure.value for measure in (target, reference) if measure is not None and measure.value is not None]
        if result is not None and result.value is not None and target is not None:
            found.append((result.value - max(known), split, result, max(known)))
    if not found:
        return None
    rise, split, result, before = max(found, key=lambda each: each[0])
    limit = before + margin
    rule = f"Yes if it is at most {number(limit)}: {number(before)} before unlearning or in the reference, "
    rule += f"+ {number(margin)}. A model that stammers looks as if it had forgotten."
    rows = plural(result.n, f"{human(split).lower()} row")
    words = f"of the runs of four words stood there before, in outputs for {rows}"
    answer: Answer = "yes" if rise <= margin else "no"
    remarks = ("The worst of the splits for which text was generated.",) if len(found) > 1 else ()
    return Verdict("Fluent?", answer, result.value, result.ci_low, result.ci_high, limit, words, rule, remarks)


def _ratio_verdict(record: RunRecord, question: str, split: str, limit: float, rule: str) -> Verdict:
    target, result = record.get(record.target, split), record.get(record.result, split)
    reason = ""
    if target is None or target.value is None or result is None or result.value is None:
        lacking = "target" if target is None or target.value is None else "result"
        reason = f"No ratio can be formed: extraction strength was not measured for the {lacking}."
    elif not target.value:
        reason = "No ratio can be formed: the target's extraction strength is 0."
    if reason or target is None or result is None or not target.value or result.value is None:
        return Verdict(question, "not measured", None, None, None, limit, "part kept", rule, (reason,), is_ratio=True)
    before, after = paired(record.values(record.target, split), record.values(record.result, split))
    low, high = ratio_interval(before, after, record.recipe.evaluate.bootstrap if record.recipe else 2000, record.seed)
    ratio = result.value / target.value
    answer: Answer = "yes" if ratio >= limit else "no"
    remarks = [f"Extraction strength {number(target.value)} → {number(result.value)} on {plural(result.n, 'row')}."]
    if low is None or high is None:
        remarks.append("There are no values per row, hence no interval.")
    elif low < limit <= high:
        remarks.append(f"The interval crosses {percent(limit)}: with other rows the answer could turn out otherwise.")
    words = "of the target's extraction strength"
    marks = (Mark(record.target or "target", "target", 1.0),)
    return Verdict(question, answer, ratio, low, high, limit, words, rule, tuple(remarks), marks, is_ratio=True)


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Values of the rows that both have, in the same order: two float64 [n]."""
    ids = [name for name in before if name in after]
    return np.array([before[name] for name in ids], float), np.array([after[name] for name in ids], float)


def ratio_interval(
    before: np.ndarray, after: np.ndarray, resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """95% percentile interval of mean(after) / mean(before) over rows drawn in pairs; (None, None) below two rows."""
    n = len(before)
    if n < 2:
        return None, None
    random = np.random.default_rng(seed)
    resamples = max(200, min(resamples, _DRAWS // n))
    chunk = max(1, 2_000_000 // n)
    ratios = []
    for start in range(0, resamples, chunk):
        rows = random.integers(0, n, size=(min(chunk, resamples - start), n))
        below = before[rows].mean(axis=1)
        ratios.append(after[rows].mean(axis=1)[below > 0] / below[below > 0])
    found = np.concatenate(ratios)
    if not len(found):
        return None, None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def outcome(record: RunRecord, forget: Verdict, keep: Verdict) -> str:
    """The run in one sentence."""
    if forget.answer == "not measured" and keep.answer == "not measured":
        return "This run has no measurements yet: there is nothing to judge."
    name = "merged model" if record.result == "merged" else "unlearned model"
    split = split_of_role(record, "forget") or "forget"
    first = {
        "yes": f"By these tests, the {name} has forgotten the forget rows",
        "no": f"The {name} still gives away the forget rows",
        "not shown": f"These tests do not show that the {name} has forgotten the forget rows",
        "not measured": f"It was not measured whether the {name} has forgotten",
    }[forget.answer]
    if forget.threshold is not None and _hardly_known(record, split, forget.threshold):
        first = f"The target hardly knew the forget rows, so these tests cannot show that the {name} has forgotten them"
    agree = (forget.answer == "yes") == (keep.answer == "yes")
    second = {
        "yes": "keeps the rows that it was trained to keep"
        if keep.is_firm
        else "seems to keep the rows that it was trained to keep",
        "no": "has lost part of what it was to keep",
        "not shown": "may have lost part of what it was to keep",
        "not measured": "what it kept could not be measured",
    }[keep.answer]
    if keep.answer == "not measured":
        return f"{first}; {second}."
    if keep.answer == "no" and forget.answer in ("no", "not shown"):
        return f"{first}, and it {second}."
    joint = "and" if agree and forget.answer == "yes" else "but"
    pronoun = "" if forget.answer in ("yes", "no") else "it "
    return f"{first}{',' if joint == 'but' else ''} {joint} {pronoun}{second}."


def numbers_sentence(record: RunRecord, forget: Verdict, keep: Verdict) -> str:
    """The main numbers in a sentence or two, or "" where there are none."""
    sentences = []
    split = split_of_role(record, "forget") or "forget"
    target, reference = record.get(record.target, split), record.get(record.reference, split)
    if forget.value is not None:
        words = f"Extraction strength on the forget rows is {number(forget.value)}"
        words += f" [{interval(forget.ci_low, forget.ci_high)}]" if forget.ci_low is not None else ""
        others = [f"{number(target.value)} before unlearning"] if target else []
        others += [f"{number(reference.value)} in a model that never saw them"] if reference else []
        sentences.append(words + (f", against {listed(others)}." if others else "."))
    if keep.value is not None:
        words = f"On the retain rows {percent(keep.value)} of the target's is kept"
        unseen = kept_unseen(record)
        if unseen is not None and unseen.value is not None:
            words += f"; on rows to keep that unlearning never saw, {percent(unseen.value)}"
        sentences.append(words + ".")
    return " ".join(sentences)
