"""MUSE (arXiv 2407.06460): BBC news or the Harry Potter books, looked at from six sides.

Unlearning trains on `forget` and `retain` (raw texts, cut into pieces that fit). Measured are `verbmem` (the beginning
of a passage, to be continued), `knowmem_forget` and `knowmem_retain` (questions, each after MUSE's own examples), and
`privleak` against `holdout` (texts that the model has learnt, and texts that it never saw).

Where this differs from MUSE's own code: the true continuation of a passage is not cut to 128 tokens, and an answer may
have 128 new tokens, not 32, before the next "Question:" ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from expunge.data.benchmarks.combine import Direction, plain
from expunge.data.benchmarks.files import Collection, Wanted, in_pieces, in_task, texts
from expunge.data.cells import optional_text, rest, text
from expunge.data.example import Example, Role, Splits
from expunge.data.registry import BENCHMARKS, Aggregate, Benchmark, Format, Measured, Published, Request, Row

#: part → its name on the hub
PARTS = {"news": "News", "books": "Books"}
#: 1 − AUC of Min-40% of MUSE's retrained model, forget against holdout texts (its code's AUC_RETRAIN)
RETRAINED = {"news": 0.4772, "books": 0.5393}
#: side → the raw texts that unlearning trains on
_SIDES: dict[Role, str] = {"forget": "forget", "retain": "retain1"}
_AXES = {
    "scalability": "utility against forget sets of growing size: unlearn scal/forget_1 … forget_4 apart",
    "sustainability": "utility after requests one by one: unlearn sust/forget_1 … forget_4 in turn",
}


def _passage(row: Row) -> Example:
    return Example(
        id=optional_text(row, "id"),
        prompt=text(row, "prompt"),
        answer=text(row, "gt"),
        source=row.source,
        extra=rest(row, "id", "prompt", "gt"),
    )


VERBMEM = Format("muse verbmem", "a passage's beginning and its continuation", (("prompt",), ("gt",)), {}, _passage)


def _load(request: Request) -> Splits:
    part = request.part or "news"
    files = Collection("muse", request)
    verbmem = _wanted(part, "verbmem", "forget", layout=VERBMEM)
    asked = {side: _wanted(part, "knowmem", f"{side}_qa") for side in _SIDES}
    files.require(verbmem, *asked.values())
    for side, split in _SIDES.items():
        raw = _wanted(part, "raw", split, what=f"{side} texts to train on")
        rows = texts(files, raw, side) if files.there(raw) else []
        files.add(side, side, in_pieces(rows, side), evaluated=False)
    files.add("verbmem", "forget", map(in_task(part), files.rows(verbmem, "verbmem")))
    for side, wanted in asked.items():
        name = f"knowmem_{side}"
        shots = _wanted(part, "knowmem", f"{side}_qa_icl", what=f"the examples in front of the questions of {name}")
        rows = _after(files.optional(shots, "shot"), files.rows(wanted, name))
        files.add(name, side, map(in_task(part), rows))
    seen, unseen = (_wanted(part, "privleak", side, what="privacy leakage") for side in ("forget", "holdout"))
    if files.there(seen) and files.there(unseen):
        files.add("privleak", "forget", map(in_task(part), texts(files, seen, "privleak")))
        files.add("holdout", "holdout", map(in_task(part), texts(files, unseen, "holdout")))
    return files.made()


def _wanted(part: str, config: str, split: str, *, layout: Format | None = None, what: str = "") -> Wanted:
    folders = ("", f"{part}/", f"data/{part}/", f"MUSE-{PARTS[part]}/")
    stems = tuple(f"{folder}{config}/{split}" for folder in folders)
    return Wanted(stems, f"muse-bench/MUSE-{PARTS[part]}:{config}@{split}", layout, what)


def _after(shots: Sequence[Example], rows: Sequence[Example]) -> list[Example]:
    """Questions as MUSE asks them: after all of its examples, each with its answer."""
    before = "".join(f"Question: {shot.prompt}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return [replace(row, prompt=f"{before}Question: {row.prompt}\nAnswer:") for row in rows]


def aggregates(measured: Measured) -> list[Aggregate]:
    """The six axes in percent, as MUSE has them; the last two are about several runs."""
    rouge = "mean ROUGE-L × 100"
    return [
        _percent(measured, "verbatim_memorization", "verbmem", f"{rouge} of continued forget passages", "lower"),
        _percent(measured, "knowledge_memorization", "knowmem_forget", f"{rouge} on forget questions", "lower"),
        _privacy(measured),
        _percent(measured, "utility", "knowmem_retain", f"{rouge} on retain questions", "higher"),
        *(
            Aggregate(name, None, summary, "higher", "needs several runs, of which this is one")
            for name, summary in _AXES.items()
        ),
    ]


def _percent(measured: Measured, name: str, split: str, summary: str, direction: Direction) -> Aggregate:
    value = measured.mean(split, "rouge_l")
    percent = None if value is None else 100 * value
    return plain(name, summary, percent, f"rouge_l on {split}", direction)


def _privacy(measured: Measured) -> Aggregate:
    summary = "100 (s − s_ref) / s_ref, s = 1 − AUC of Min-40%: below 0 still known, above 0 overdone"
    value = measured.mean("privleak", "privleak")
    if value is not None:
        return Aggregate("privacy_leakage", value, summary, "none", "measured beside the reference model")
    part = next(iter(measured.tasks("privleak")), "")
    auc, retrained = measured.mean("privleak", "mia_min_k"), RETRAINED.get(part)
    if auc is None or retrained is None:
        return plain("privacy_leakage", summary, None, "mia_min_k of privleak against holdout", "none")
    note = f"s_ref = {retrained}, that of MUSE's own retrained {part} model: give a reference model for your own"
    return Aggregate("privacy_leakage", 100 * (1 - auc - retrained) / retrained, summary, "none", note)


BENCHMARKS.register("muse")(
    Benchmark(
        name="muse",
        description="news or books: verbatim and factual memory, privacy and utility",
        load=_load,
        paper="arXiv:2407.06460",
        parts=tuple(PARTS),
        files="raw/forget, raw/retain1, verbmem/forget, knowmem/{forget_qa, forget_qa_icl, retain_qa, retain_qa_icl}, "
        "privleak/{forget, holdout}, also below news/ or books/; hub: muse-bench/MUSE-News and MUSE-Books",
        metrics=("rouge_l", "rouge_l_recall", "extraction_strength", "mia_min_k", "privleak"),
        convention="muse",
        aggregate=aggregates,
        published=(
            Published(
                "GA + KL on retain, books",
                {"verbatim_memorization": 13.0, "knowledge_memorization": 15.1, "utility": 33.7},
                "arXiv:2410.16454, full precision",
            ),
            Published(
                "GA + KL on retain, books, 4 bits",
                {"verbatim_memorization": 75.6, "knowledge_memorization": 34.6, "utility": 51.3},
                "arXiv:2410.16454, quantized to 4 bits",
            ),
        ),
    )
)
