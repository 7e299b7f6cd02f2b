"""KnowUnDo (arXiv 2407.01920): what copyright and privacy law wants forgotten, beside what it does not.

Rows have `text` and `labels`, or `question` and `answer`. The layout of the public files was not seen by whoever wrote
this, so a folder is searched under several names, below `copyright/` or `privacy/` too: unlearn_train, unlearn or
forget; retention_train, retention or retain; unlearn_val or forget_val; retention_val or retain_val.
"""

from __future__ import annotations

from expunge.data.benchmarks.combine import one_minus, plain
from expunge.data.benchmarks.files import Collection, Wanted
from expunge.data.example import Role, Splits
from expunge.data.registry import BENCHMARKS, Aggregate, Benchmark, Measured, Request

_HUB = "zjunlp/KnowUnDo"
PARTS = ("copyright", "privacy")
#: split → (role, names of its file, split of the hub dataset)
_FILES: dict[str, tuple[Role, tuple[str, ...], str]] = {
    "forget": ("forget", ("unlearn_train", "unlearn", "forget_train", "forget"), "unlearn"),
    "retain": ("retain", ("retention_train", "retention", "retain_train", "retain"), "retention"),
    "forget_val": ("forget", ("unlearn_val", "forget_val"), ""),
    "retain_unseen": ("retain", ("retention_val", "retain_val"), ""),
}
_NOTE = "next tokens given the true ones before them, after the paper's idea; not its code"


def _load(request: Request) -> Splits:
    part = request.part or "copyright"
    files = Collection("knowundo", request)
    wanted = {name: _wanted(part, name) for name in _FILES}
    files.require(wanted["forget"], wanted["retain"])
    for name, (role, _, _) in _FILES.items():
        needed = name in ("forget", "retain")
        files.add(name, role, files.rows(wanted[name], name) if needed else files.optional(wanted[name], name))
    return files.made()


def _wanted(part: str, name: str) -> Wanted:
    _, stems, split = _FILES[name]
    places = tuple(f"{folder}{stem}" for stem in stems for folder in ("", f"{part}/", f"data/{part}/"))
    return Wanted(places, f"{_HUB}:{part}@{split}" if split else "", what=name)


def aggregates(measured: Measured) -> list[Aggregate]:
    """Success of unlearning and of retention, on the validation rows where there are any."""
    gone, gone_on = _first(measured, "forget_val", "forget")
    kept, kept_on = _first(measured, "retain_unseen", "retain")
    numbers = (
        ("unlearn_success", f"part of the answer's tokens that are not the argmax, on {gone_on}", one_minus(gone)),
        ("retention_success", f"part of the answer's tokens that are the argmax, on {kept_on}", kept),
    )
    return [
        Aggregate(made.name, made.value, made.summary, made.direction, made.note, official=False)
        for name, summary, value in numbers
        for made in [plain(name, summary, value, "exact_memorization", note=_NOTE)]
    ]


def _first(measured: Measured, *splits: str) -> tuple[float | None, str]:
    values = [(measured.mean(split, "exact_memorization"), split) for split in splits]
    return next((pair for pair in values if pair[0] is not None), values[-1])


BENCHMARKS.register("knowundo")(
    Benchmark(
        name="knowundo",
        description="copyrighted and private knowledge to forget, and what is near it to keep",
        load=_load,
        paper="arXiv:2407.01920",
        parts=PARTS,
        files="unlearn_train, retention_train, optionally unlearn_val, retention_val, with text and labels or question "
        f"and answer, also below copyright/ or privacy/; hub: {_HUB}",
        metrics=("exact_memorization", "extraction_strength", "perplexity", "rouge_l_recall"),
        aggregate=aggregates,
    )
)
