"""TOFU: questions about 200 invented authors (arXiv 2401.06121), of whom 1%, 5% or 10% are to be forgotten.

Unlearning trains on `forget` and on `retain` (retain99, retain95 or retain90 without the 400 rows of retain_perturbed).
Those 400 are the split `retain_unseen`: the target has learnt them, unlearning does not see them, and TOFU's retain
numbers are taken on them. They are a part of every retain set of TOFU, where they are used for unlearning too.
Of its documents, which are authors of 20 rows each, `data.documents` takes the first so many of each split.
"""

from __future__ import annotations

from dataclasses import replace

from expunge.data.benchmarks.combine import harmonic, noted, one_minus, plain
from expunge.data.benchmarks.files import Collection, Wanted, in_task
from expunge.data.example import Splits
from expunge.data.load import content
from expunge.data.registry import BENCHMARKS, Aggregate, Benchmark, Measured, Published, Request

_HUB = "locuslab/TOFU"
#: part → forget rows in percent, two digits
PARTS = {"forget01": "01", "forget05": "05", "forget10": "10"}
#: splits that utility is measured on, by what TOFU calls them
UTILITY = {"retain": "retain_unseen", "real_authors": "real_authors", "world_facts": "world_facts"}
#: rows about one author, one after the other in every file
AUTHOR = 20
_FORMULA = "OpenUnlearning's formula, which its published parts do not turn into its published table"


def _load(request: Request) -> Splits:
    percent = PARTS[request.part or "forget10"]
    files = Collection("tofu", request)
    forget, retain, unseen = (
        _wanted(f"forget{percent}_perturbed", f"forget{percent}"),
        _wanted(f"retain{100 - int(percent)}"),
        _wanted("retain_perturbed"),
    )
    files.require(forget, retain, unseen)
    most = None if request.documents is None else AUTHOR * request.documents
    rows = files.rows(forget, "forget")[:most]
    if not any("perturbed_answer" in row.extra for row in rows):
        files.notes.append(f"forget rows have no paraphrased and perturbed answers: forget{percent}_perturbed has them")
    files.add("forget", "forget", rows)
    kept = files.rows(unseen, "retain_unseen")
    measured = set(map(content, kept))
    trained = [row for row in files.rows(retain, "retain") if content(row) not in measured]
    files.add("retain", "retain", trained[:most], evaluated=False)
    files.add("retain_unseen", "retain", kept[:most])
    for name in ("real_authors", "world_facts"):
        wanted = _wanted(f"{name}_perturbed", what=f"utility on {name}")
        files.add(name, "utility", map(in_task(name), files.optional(wanted, name)))
    holdout = _wanted(f"holdout{percent}", what="membership inference against rows that nobody learnt")
    files.add("holdout", "holdout", files.optional(holdout, "holdout")[:most])
    return files.made()


def _wanted(*names: str, what: str = "") -> Wanted:
    return Wanted(names, f"{_HUB}:{names[0]}@train", what=what)


def aggregates(measured: Measured) -> list[Aggregate]:
    """Forget quality, model utility, and OpenUnlearning's memorization, privacy, utility and their mean."""
    utility = harmonic("model_utility", "harmonic mean of nine: probability, ROUGE-L, truth ratio", nine(measured))
    memorization = harmonic("memorization", "harmonic mean of 1 − each of four", _memorized(measured), _FORMULA)
    closeness = measured.mean("forget", "privacy")
    privacy = plain("privacy", "harmonic mean of s_MIA of four attacks", closeness, "privacy (holdout and reference)")
    relative = _relative_utility(measured, utility)
    parts = {part.name: part.value for part in (memorization, privacy, relative)}
    overall = harmonic("open_unlearning", "harmonic mean of the three numbers above", parts, _FORMULA)
    further = (replace(number, official=False) for number in (memorization, privacy, relative, overall))
    return [_forget_quality(measured), utility, *further]


def nine(measured: Measured) -> dict[str, float | None]:
    """The parts of model utility. On real authors and world facts the probability is among the options."""
    parts = {}
    for name, split in UTILITY.items():
        probability = "probability" if name == "retain" else "probability_normalised"
        for metric in (probability, "rouge_l", "truth_ratio_true_better"):
            parts[f"{name} {metric}"] = measured.mean(split, metric)
    return parts


def _forget_quality(measured: Measured) -> Aggregate:
    count = len(measured.values("forget", "truth_ratio"))
    noise = f"{count} rows: noisy below 100" if 0 < count < 100 else ""
    value = measured.mean("forget", "forget_quality")
    summary = "p-value of KS between truth ratios of this model and of the reference; 1: not told apart"
    return plain("forget_quality", summary, value, "forget_quality, which needs a reference model", note=noise)


def _memorized(measured: Measured) -> dict[str, float | None]:
    names = ("extraction_strength", "exact_memorization", "probability_paraphrase", "truth_ratio_prob")
    return {f"1 − {name}": one_minus(measured.mean("forget", name)) for name in names}


def _relative_utility(measured: Measured, utility: Aggregate) -> Aggregate:
    target = measured.other("target")
    whole = None if target is None else harmonic("", "", nine(target)).value
    value = utility.value / whole if utility.value is not None and whole else None
    note = "without OpenUnlearning's fluency (a classifier of gibberish)"
    lacking = "" if value is not None else "missing: model utility of this model and of the target, above 0"
    return Aggregate("relative_utility", value, "model utility as part of the target's", note=noted(lacking, note))


_LLAMA_7B = "OpenUnlearning's docs/repro.md, TOFU forget10, Llama-2-7B, lr 1e-5, 10 epochs (not tuned)"
_LLAMA_1B = "OpenUnlearning (arXiv 2506.12618), TOFU forget10, Llama-3.2-1B"


def _published() -> tuple[Published, ...]:
    repro = {
        "target": (4e-25, 0.63),
        "grad_ascent": (1e-239, 0.0),
        "grad_diff": (2e-229, 0.58),
        "idk_dpo": (5e-13, 0.04),
        "npo": (0.42, 0.54),
        "simnpo": (1e-198, 0.60),
    }
    table = {
        "reference": (0.58, 0.31, 1.0, 0.99),
        "simnpo": (0.53, 0.32, 0.63, 1.0),
        "rmu": (0.52, 0.47, 0.50, 0.61),
        "undial": (0.42, 0.27, 0.48, 0.78),
        "altpo": (0.15, 0.63, 0.06, 0.95),
        "idk_nll": (0.15, 0.08, 0.17, 0.93),
        "npo": (0.15, 0.52, 0.06, 0.99),
        "idk_dpo": (0.14, 0.56, 0.06, 0.95),
        "grad_diff": (0.009, 0.97, 0.003, 0.79),
        "target": (0.0, 0.0, 0.10, 1.0),
    }
    names = ("open_unlearning", "memorization", "privacy", "relative_utility")
    return (
        *(
            Published(label, {"forget_quality": quality, "model_utility": utility}, _LLAMA_7B)
            for label, (quality, utility) in repro.items()
        ),
        *(Published(label, dict(zip(names, row, strict=True)), _LLAMA_1B) for label, row in table.items()),
    )


BENCHMARKS.register("tofu")(
    Benchmark(
        name="tofu",
        description="questions about 200 invented authors; forget 1%, 5% or 10% of them",
        load=_load,
        paper="arXiv:2401.06121",
        parts=tuple(PARTS),
        has_documents=True,
        files="forgetXX_perturbed (or forgetXX), retainYY, retain_perturbed, real_authors_perturbed, "
        f"world_facts_perturbed, holdoutXX; hub: {_HUB}",
        metrics=(
            "extraction_strength",
            "exact_memorization",
            "probability",
            "probability_normalised",
            "probability_paraphrase",
            "rouge_l",
            "truth_ratio",
            "truth_ratio_true_better",
            "truth_ratio_prob",
            "forget_quality",
            "forget_quality_log10",
            "privacy",
        ),
        convention="tofu",
        aggregate=aggregates,
        published=_published(),
    )
)
