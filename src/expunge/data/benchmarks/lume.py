"""LUME, the data of SemEval-2025 Task 4 (arXiv 2502.15097): documents to forget and to keep, in three tasks.

Task1 are invented stories, Task2 invented people with their data, Task3 Wikipedia articles. Each document is continued
(`sc`) and asked about (`qa`), which the end of a row's id says. A row's task here is both, e.g. "Task1-sc", so that
means over a task keep the two apart. Members of the membership test are whole Task3 documents of the forget set.

The part `folds` is for experiments that teach a model LUME first: the validation fold, and beside it from the train
fold `retain_unseen` (taught, but never shown to unlearning) and `outside` (articles that nobody learnt, other ones than
those of the membership test: a search may look at them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from expunge.data.benchmarks.combine import noted
from expunge.data.benchmarks.files import Collection, Wanted
from expunge.data.benchmarks.semeval import (
    MEMBERS,
    NONMEMBERS,
    OUTSIDE,
    first_documents,
    kind_of,
    official_numbers,
)
from expunge.data.example import Example, Role, Splits
from expunge.data.registry import BENCHMARKS, Aggregate, Benchmark, Measured, Published, Request
from expunge.errors import UserError

_HUB = "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
#: part → how SemEval's files are called; `all` is the whole of LUME's own release
PARTS = {"train": ("train",), "validation": ("validation", "val"), "folds": ("validation", "val"), "all": ()}
#: 75% of what the 7B model has before unlearning; below it SemEval struck a submission out
MMLU_FLOOR = 0.371


def _load(request: Request) -> Splits:
    part = request.part or "train"
    files = Collection("lume", request)
    wanted: dict[str, tuple[Role, Wanted]] = {
        "forget": ("forget", _wanted("forget", part)),
        "retain": ("retain", _wanted("retain", part)),
    }
    if part == "folds":
        wanted["retain_unseen"] = ("retain", _wanted("retain", "train"))
    files.require(*(rows for _, rows in wanted.values()))
    for name, (role, rows) in wanted.items():
        found = [_with_kind(row) for row in files.rows(rows, name)]
        files.add(name, role, first_documents(found, request.documents))
    members = files.optional(_mia("member", part), MEMBERS)
    others = files.optional(_mia("nonmember", part), NONMEMBERS) if members else []
    beginnings = {
        row.prompt: row.task.partition("-")[0] for row in files.splits["forget"].examples if row.extra["kind"] == "sc"
    }
    members = [replace(row, task=_task_of(row, beginnings)) for row in members]
    if request.documents is not None:  # a member whose document is not taught is none
        members = [row for row in members if row.task]
    if members and others:
        files.add(MEMBERS, "forget", members)
        files.add(NONMEMBERS, "holdout", others)
    if part == "folds":  # a folder may have one file of nonmembers for all folds
        tested = {row.answer for row in others}
        outside = files.optional(_mia("nonmember", "train"), OUTSIDE)
        files.add(OUTSIDE, "holdout", [row for row in outside if row.answer not in tested])
    return files.made()


def _wanted(split: str, part: str) -> Wanted:
    names = PARTS[part]
    stems = [f"{folder}{split}_{name}" for name in names for folder in ("", "data/")]
    if part == "all":
        return Wanted((split, f"data/{split}"))
    return Wanted(tuple(stems), f"{_HUB}@{split}_{names[0]}")


def _mia(side: str, part: str) -> Wanted:
    folders = ("mia/", "mia_data/", "data/mia/", "")
    names = [f"{name}_{side}" for name in PARTS[part] or ("train",)] + [side]
    stems = tuple(f"{folder}{name}" for name in names for folder in folders)
    return Wanted(stems, what=f"membership inference ({side} documents)")


def _with_kind(row: Example) -> Example:
    """Raises UserError on an id that does not say what the row is."""
    kind = kind_of(row)
    if kind is None:
        raise UserError(
            f"{row.place}: the id '{row.id}' ends neither in sc nor in qa and a number",
            "LUME's ids are a document's, then sc1 (to be continued) or qa0, qa1, … (asked about)",
        )
    return replace(row, task=f"{row.task}-{kind}", extra={**row.extra, "kind": kind})


def _task_of(member: Example, beginnings: dict[str, str]) -> str:
    """The task of the forget row that a member document begins with; empty if there is none."""
    return next((task for prompt, task in beginnings.items() if member.answer.startswith(prompt)), "")


def aggregates(measured: Measured) -> list[Aggregate]:
    """The twelve values, their harmonic mean, the membership score, MMLU, and the mean of the three."""
    return official_numbers(measured, _mmlu(measured))


def _mmlu(measured: Measured) -> Aggregate:
    value = measured.mean("lm_eval", "mmlu")
    lacking = "missing: accuracy on MMLU's 57 subjects, from the lm-eval task mmlu; it needs the hub"
    floor = "SemEval's own comes from Open-Instruct's code; on a 1B model it is near chance (0.25)"
    below = (
        f"below SemEval's floor of {MMLU_FLOOR} for the 7B model" if value is not None and value < MMLU_FLOOR else ""
    )
    note = noted(lacking if value is None else "", below, floor)
    return Aggregate("mmlu", value, "accuracy on MMLU", note=note)


def _board(size: str, rows: Iterable[tuple[str, float, float, float, float]]) -> tuple[Published, ...]:
    names = ("final_score", "task_aggregate", "mia_score", "mmlu")
    source = f"SemEval-2025 Task 4, {size} leaderboard"
    return tuple(Published(label, dict(zip(names, numbers, strict=True)), source) for label, *numbers in rows)


# fmt: off
BASELINES = (
    ("gradient ascent", .394, 0, .912, .269), ("gradient difference", .243, 0, .382, .348),
    ("KL minimisation", .395, 0, .916, .269), ("NPO", .188, .021, .080, .463),
)
LARGE = (
    ("AILS-NTUA", .706, .827, .847, .443), ("ZJUKLAB", .487, .944, .048, .471), ("YNU", .470, .834, .139, .436),
    ("Mr. Snuffleupagus", .376, .387, .256, .485), ("ishumei-Chinchunmei", .326, .496, 0, .481),
    ("georgetown", .3082, .433, 0, .492), ("GIL-IIMAS UNAM", .3080, .478, 0, .446),
    ("Atyaephyra", .273, .348, .014, .456), ("Lacuna Inc.", .251, .283, 0, .469), ("APT", .169, .1, .021, .385),
    ("JU-CSE-NLP'25", .165, 0, 0, .495), ("Tsotsa", .1649, 0, 0, .495),
)
STRUCK_OUT = (
    ("SHA256", .711, .964, .894, .275), ("NeuroReset", .420, .152, .876, .232), ("Cyber for AI", .409, 0, .999, .229),
    ("MALTO", .402, 0, .965, .242), ("Innovative_Team", .365, 0, .849, .247),
)
SMALL = (
    ("AILS-NTUA", .688, .964, .857, .242), ("SHA256", .652, .973, .741, .243), ("Atyaephyra", .586, .887, .622, .248),
    ("Mr. Snuffleupagus", .485, .412, .793, .250), ("ZJUKLAB", .483, .915, .292, .243),
    ("GIL-IIMAS UNAM", .416, 0, .98, .269), ("YNU", .412, .955, .039, .244), ("MALTO", .409, 0, .959, .269),
    ("JU-CSE-NLP'25", .397, 0, .929, .261), ("Cyber for AI", .389, 0, .914, .251),
    ("Innovative_Team", .375, 0, .869, .255), ("NeuroReset", .36, 0, .841, .238), ("APT", .357, .837, 0, .236),
    ("Tübingen (NEKO)", .351, 0, .824, .229), ("georgetown", .205, .378, 0, .236), ("Lacuna Inc.", .177, .289, 0, .243),
    ("DUTir", .172, .26, .026, .229), ("ishumei-Chinchunmei", .096, .047, 0, .241),
)
# fmt: on

BENCHMARKS.register("lume")(
    Benchmark(
        name="lume",
        description="SemEval-2025 Task 4: stories, invented people and articles, continued and asked about",
        load=_load,
        paper="arXiv:2502.15097",
        parts=tuple(PARTS),
        has_documents=True,
        files="forget_train and retain_train (part train), forget_val and retain_val (validation; folds: "
        "retain_train too) or forget and retain (all), mia/train_member, "
        "mia/train_nonmember, …; LUME's GitHub release has data/forget and data/retain",
        metrics=("rouge_l_recall", "exact_match", "mia_loss", "perplexity", "extraction_strength", "probability"),
        convention="semeval",
        aggregate=aggregates,
        published=(
            *_board("7B (organisers' baselines)", BASELINES),
            *_board("7B", LARGE),
            *_board("7B (struck out: MMLU)", STRUCK_OUT),
            *_board("1B", SMALL),
        ),
    )
)
