"""RWKU (arXiv 2406.10890): real people, known from pretraining, and what else is known around them.

There is nothing to train on but a person's `passage` (split `forget`). The probes are `forget_level1` (blanks to fill),
`forget_level2` (questions) and `forget_level3` (questions under nine kinds of attack, the task of a row), the same of
neighbours that are to be kept, and texts for membership inference: members are about the person, and `holdout` are
RWKU's retain_mia texts about others, which the model may well have read too. The part is a person, as in
`rwku:Stephen King`; everyone without it. BIG-Bench Hard is not read: worked solutions are not scored here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from expunge.data.benchmarks.combine import Direction, plain
from expunge.data.benchmarks.files import Collection, Wanted
from expunge.data.cells import as_text, cell, entries, optional_text, rest, text
from expunge.data.example import Example, Role, Splits
from expunge.data.formats.choices import LETTERS, lettered, options, right_choice
from expunge.data.registry import BENCHMARKS, Aggregate, Benchmark, Format, Measured, Request, Row, RowError
from expunge.errors import UserError, did_you_mean

_HUB = "jinzhuoran/RWKU"
_ROUGE = "rouge_l_recall"
#: split → (role, file of a person's folder, config on the hub)
PROBES: dict[str, tuple[Role, str, str]] = {
    "forget_level1": ("forget", "forget_level1", "forget_level1"),
    "forget_level2": ("forget", "forget_level2", "forget_level2"),
    "forget_level3": ("forget", "forget_level3", "forget_level3"),
    "neighbor_level1": ("retain", "neighbor_level1", "neighbor_level1"),
    "neighbor_level2": ("retain", "neighbor_level2", "neighbor_level2"),
}
#: as above, of plain texts; what is lost without them
TEXTS: dict[str, tuple[Role, str, str, str]] = {
    "forget": ("forget", "passage", "train_original_passage", "texts to unlearn from"),
    "mia_member": ("forget", "forget_mia", "mia_forget", "membership inference"),
    "holdout": ("holdout", "retain_mia", "mia_retain", "membership inference"),
}


def _probe(row: Row) -> Example:
    """The kind of probe is the row's task; the person stays in `extra` as `subject`."""
    return Example(
        id=optional_text(row, "id"),
        prompt=text(row, "query"),
        answer=text(row, "answer"),
        task=optional_text(row, "type"),
        source=row.source,
        extra=rest(row, "id", "query", "answer"),
    )


PROBE = Format("rwku probe", "a question about a person", (("query",), ("answer",)), {}, _probe)


def _options(row: Row) -> Example:
    """MMLU: five answered questions, then the one that is asked."""
    choices = options(row)
    right = LETTERS[right_choice(cell(row, "answer"), choices)]
    shots = [Row(shot, number, row.source) for number, shot in enumerate(entries(row.values.get("examples")))]
    before = "".join(f"{_asked(shot)}\nAnswer: {_letter(shot)}\n\n" for shot in shots)
    return _utility(row, f"{before}{_asked(row)}", right, [c for c in LETTERS[: len(choices)] if c != right])


def _asked(row: Row) -> str:
    return lettered(text(row, "question"), options(row))


def _letter(row: Row) -> str:
    return LETTERS[right_choice(cell(row, "answer"), options(row))]


def _truthful(row: Row) -> Example:
    """TruthfulQA's MC1: the one true answer among false ones."""
    targets = cell(row, "mc1_targets")
    try:
        labelled = list(zip(targets["choices"], targets["labels"], strict=True))
    except (TypeError, KeyError, ValueError):
        raise RowError("mc1_targets does not hold as many choices as labels") from None
    right = [as_text(choice, "a choice") for choice, label in labelled if label == 1]
    if len(right) != 1:
        raise RowError(f"mc1_targets has {len(right)} true choices, not one")
    return _utility(row, text(row, "question"), right[0], [str(choice) for choice, label in labelled if label != 1])


def _trivia(row: Row) -> Example:
    """TriviaQA: the first of the accepted answers."""
    answers = [as_text(answer, "an answer") for answer in entries(cell(row, "answers"))]
    if not answers:
        raise RowError("answers is empty")
    return _utility(row, text(row, "question"), answers[0], [])


def _instruction(row: Row) -> Example:
    """An instruction without a right answer: only how fluent the output is counts."""
    return _utility(row, text(row, "instruction"), "", [])


def _utility(row: Row, prompt: str, answer: str, wrong: list[str]) -> Example:
    used = ("id", "task", "question", "answer", "answers", "examples", "instruction", "choices")
    extra = {**rest(row, *used), **({"perturbed_answer": wrong} if wrong else {})}
    return Example(optional_text(row, "id"), prompt, answer, optional_text(row, "task"), source=row.source, extra=extra)


#: split → (file, config on the hub, layout)
UTILITY: dict[str, tuple[str, str, Format]] = {
    "mmlu": ("retain_mmlu", "utility_general", Format("rwku mmlu", "", (("question",), ("choices",)), {}, _options)),
    "truthful": ("truthful", "utility_truthfulness", Format("rwku truthful", "", (("mc1_targets",),), {}, _truthful)),
    "triviaqa": ("triviaqa", "utility_factuality", Format("rwku triviaqa", "", (("answers",),), {}, _trivia)),
    "fluency": ("fluency", "utility_fluency", Format("rwku fluency", "", (("instruction",),), {}, _instruction)),
}


def _load(request: Request) -> Splits:
    files = Collection("rwku", request)
    people = {"": files} if request.folder is None else _people(request)
    for name, (role, stem, config) in PROBES.items():
        wanted = Wanted((stem,), f"{_HUB}:{config}@test", PROBE)
        for person in people.values():
            person.require(wanted)
        rows = [row for key, person in people.items() for row in person.rows(wanted, _called(name, key))]
        files.add(name, role, _about(request, rows))
    for name, (role, stem, config, what) in TEXTS.items():
        wanted = Wanted((stem,), f"{_HUB}:{config}@{'train' if name == 'forget' else 'test'}", what=f"{what} ({stem})")
        rows = [row for key, person in people.items() for row in person.optional(wanted, _called(name, key))]
        files.add(name, role, _about(request, rows), evaluated=name != "forget")
    for name, (stem, config, layout) in UTILITY.items():
        wanted = Wanted((stem,), f"{_HUB}:{config}@test", layout, f"utility on {name}")
        # these are the same rows for every person, so one folder's are enough
        holder = next((person for person in people.values() if person.folder and person.files(wanted)), files)
        files.add(name, "utility", holder.optional(wanted, name))
    notes = [note for person in {id(p): p for p in (*people.values(), files)}.values() for note in person.notes]
    return Splits(files.splits, tuple(dict.fromkeys(notes)))


def _called(split: str, person: str) -> str:
    return f"{split}-{person}" if person else split


def _people(request: Request) -> dict[str, Collection]:
    """The chosen person, or everyone whose folder is there. Raises UserError with who there is."""
    assert request.folder is not None
    root = request.folder
    homes = [home for home in (root, root / "Target", root / "benchmark" / "Target") if home.is_dir()]
    found = {
        place.name: place for home in homes for place in sorted(home.iterdir()) if _has_probes(place) and place.is_dir()
    }
    if not found and _has_probes(root):
        found = {root.name: root}
    if not found:
        raise UserError(
            f"{root} has no folder of a person with forget_level1.json",
            f"RWKU's folders are called like 1_Stephen_King; without data.folder {_HUB} is loaded",
        )
    if request.part:
        chosen = {name: place for name, place in found.items() if plain_name(name) == plain_name(request.part)}
        if not chosen:
            raise UserError(f"rwku has no person '{request.part}' in {root}", did_you_mean(request.part, found))
        found = chosen
    ordered = sorted(found.items(), key=lambda item: _number(item[0]))
    return {name: Collection("rwku", replace(request, folder=place)) for name, place in ordered}


def _has_probes(place: Path) -> bool:
    return place.is_dir() and any(place.glob("forget_level1.*"))


def _number(name: str) -> tuple[int, str]:
    number = re.match(r"\d+", name)
    return int(number[0]) if number else 0, name


def plain_name(name: str) -> str:
    """ "1_Stephen_King", "Stephen King" and "stephen-king" are the same person."""
    return re.sub(r"[\W_]+", " ", re.sub(r"^\d+_", "", name)).strip().lower()


def _about(request: Request, rows: Iterable[Example]) -> list[Example]:
    """On the hub, rows of all people are in one dataset."""
    chosen = list(rows)
    if request.folder is None and request.part:
        wanted = plain_name(request.part)
        chosen = [row for row in chosen if plain_name(str(row.extra.get("subject", ""))) == wanted]
    return chosen


def aggregates(measured: Measured) -> list[Aggregate]:
    """ROUGE-L recall on forget probes and neighbours by level and over all rows, membership, and utility."""
    found = []
    groups: tuple[tuple[str, Direction, tuple[int, ...]], ...]
    groups = (("forget", "lower", (1, 2, 3)), ("neighbor", "higher", (1, 2)))
    for group, direction, levels in groups:
        splits = [f"{group}_level{level}" for level in levels]
        for split in splits:
            summary = f"mean ROUGE-L recall on {split}"
            found.append(plain(split, summary, measured.mean(split, _ROUGE), f"{_ROUGE} on {split}", direction))
        every = [measured.values(split, _ROUGE) for split in splits]
        value = sum(map(sum, every)) / sum(map(len, every)) if all(every) else None
        summary = f"mean ROUGE-L recall over all rows of {group} probes"
        found.append(plain(f"{group}_all", summary, value, f"{_ROUGE} on {', '.join(splits)}", direction))
    return [*found, *_membership(measured), *_kept(measured)]


def _membership(measured: Measured) -> list[Aggregate]:
    note = "perplexity = exp(loss); texts about others may have been learnt too"
    own, others = (measured.mean(split, "perplexity") for split in ("mia_member", "holdout"))
    losses = [
        plain("mia_forget", "perplexity of texts about the person", own, "perplexity on mia_member", note=note),
        plain("mia_retain", "perplexity of texts about others", others, "perplexity on holdout", "lower", note),
    ]
    auc = measured.mean("mia_member", "mia_loss")
    summary = "AUC of the loss of texts about the person against texts about others: 1 all told apart"
    return [*losses, replace(plain("mia_auc", summary, auc, "mia_loss on mia_member", "none", note), official=False)]


def _kept(measured: Measured) -> list[Aggregate]:
    """Utility by RWKU's files; RWKU's own prompts and scorers differ in part."""
    parts = (
        ("general", "mmlu", "choice_accuracy", "accuracy on MMLU, five examples before each question"),
        ("truthfulness", "truthful", "choice_accuracy", "accuracy on TruthfulQA's single true answer"),
        ("factuality", "triviaqa", _ROUGE, "ROUGE-L recall of the first of TriviaQA's accepted answers"),
        ("fluency", "fluency", "ngram_entropy", "entropy of runs of two and three words of free answers"),
    )
    return [
        replace(plain(name, summary, measured.mean(split, metric), f"{metric} on {split}"), official=False)
        for name, split, metric, summary in parts
    ]


BENCHMARKS.register("rwku")(
    Benchmark(
        name="rwku",
        description="real people known from pretraining: blanks, questions, attacks, and their neighbours",
        load=_load,
        paper="arXiv:2406.10890",
        files="a folder for each person (1_Stephen_King, …) with forget_level1 … 3, neighbor_level1 and 2, passage, "
        f"forget_mia, retain_mia, and optionally retain_mmlu, truthful, triviaqa, fluency; hub: {_HUB}",
        metrics=(_ROUGE, "exact_match", "perplexity", "mia_loss", "choice_accuracy", "ngram_entropy"),
        aggregate=aggregates,
    )
)
