"""LUME, the data of SemEval-2025 Task 4 (arXiv 2502.15097): documents to forget and to keep, in three tasks.

Task1 are invented stories, Task2 invented people with their data, Task3 Wikipedia articles. Each document is continued
(`sc`) and asked about (`qa`), which the end of a row's id says. A row's task here is both, e.g. "Task1-sc", so that
means over a task keep the two apart. Members of the membership test are whole Task3 documents of the forget set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace

from expunge.data.benchmarks.combine import arithmetic, harmonic, noted, one_minus, plain
from expunge.data.benchmarks.files import Collection, Wanted
from expunge.data.example import Example, Splits
from expunge.data.registry import BENCHMARKS, Aggregate, Benchmark, Measured, Published, Request
from expunge.errors import UserError

_HUB = "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
#: part → how SemEval's files are called; `all` is the whole of LUME's own release
PARTS = {"train": ("train",), "validation": ("validation", "val"), "all": ()}
TASKS = ("Task1", "Task2", "Task3")
#: end of the id → what is measured, and by which metric
KINDS = {"sc": ("regurgitation", "rouge_l_recall"), "qa": ("knowledge", "exact_match")}
MEMBERS, NONMEMBERS = "mia_member", "holdout"
#: 75% of what the 7B model has before unlearning; below it SemEval struck a submission out
MMLU_FLOOR = 0.371

_KIND = re.compile(r"(?P<kind>sc|qa)\d+$")


def _load(request: Request) -> Splits:
    part = request.part or "train"
    files = Collection("lume", request)
    wanted = {name: _wanted(name, part) for name in ("forget", "retain")}
    files.require(*wanted.values())
    for name in ("forget", "retain"):
        files.add(name, name, [_with_kind(row) for row in files.rows(wanted[name], name)])
    beginnings = {
        row.prompt: row.task.partition("-")[0] for row in files.splits["forget"].examples if row.extra["kind"] == "sc"
    }
    members = files.optional(_mia("member", part), MEMBERS)
    others = files.optional(_mia("nonmember", part), NONMEMBERS) if members else []
    if members and others:
        files.add(MEMBERS, "forget", [replace(row, task=_task_of(row, beginnings)) for row in members])
        files.add(NONMEMBERS, "holdout", others)
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
    match = _KIND.search(row.id)
    if match is None:
        raise UserError(
            f"{row.place}: the id '{row.id}' ends neither in sc nor in qa and a number",
            "LUME's ids are a document's, then sc1 (to be continued) or qa0, qa1, … (asked about)",
        )
    return replace(row, task=f"{row.task}-{match['kind']}", extra={**row.extra, "kind": match["kind"]})


def _task_of(member: Example, beginnings: dict[str, str]) -> str:
    """The task of the forget row that a member document begins with; empty if there is none."""
    return next((task for prompt, task in beginnings.items() if member.answer.startswith(prompt)), "")


def aggregates(measured: Measured) -> list[Aggregate]:
    """The twelve values, their harmonic mean, the membership score, MMLU, and the mean of the three."""
    twelve = [_value(measured, split, task, kind) for split in ("forget", "retain") for task in TASKS for kind in KINDS]
    parts = {number.name: number.value for number in twelve}
    zeros = [name for name, value in parts.items() if value == 0]
    task = harmonic(
        "task_aggregate",
        "harmonic mean of the twelve values; 0 as soon as one is 0",
        parts,
        f"0 because of {', '.join(zeros)}" if zeros else "",
    )
    auc, score = membership(measured)
    mmlu = _mmlu(measured)
    parts = {number.name: number.value for number in (task, score, mmlu)}
    final = arithmetic("final_score", "mean of task aggregate, MIA score and MMLU", parts)
    without = arithmetic(
        "final_without_mmlu", "mean of task aggregate and MIA score", {task.name: task.value, score.name: score.value}
    )
    return [*twelve, task, auc, score, mmlu, final, replace(without, official=False)]


def _value(measured: Measured, split: str, task: str, kind: str) -> Aggregate:
    what, metric = KINDS[kind]
    value = measured.mean(split, metric, f"{task}-{kind}")
    name = f"{split}_{task.lower()}_{what}"
    source = f"{metric} on rows {task}-{kind} of {split}"
    if split == "forget":
        return plain(name, f"1 − mean {metric} on {task}'s {kind} rows", one_minus(value), source)
    return plain(name, f"mean {metric} on {task}'s {kind} rows", value, source)


def membership(measured: Measured) -> tuple[Aggregate, Aggregate]:
    """AUC of the mean token loss of whole documents, and 1 − 2 |AUC − 0.5|, each with what it cannot tell."""
    value = measured.mean(MEMBERS, "mia_loss")
    source = "mia_loss on mia_member against holdout (the mia folder)"
    auc = plain(
        "mia_auc",
        "AUC of members' against nonmembers' loss: near 1 still known, near 0 overdone",
        value,
        source,
        "none",
    )
    score = None if value is None else 1 - 2 * abs(value - 0.5)
    note = "" if value is None else membership_note(measured)
    return (
        replace(auc, note=noted(auc.note, note)),
        plain("mia_score", "1 − 2 |AUC − 0.5|: 1 is a model that cannot tell members", score, source, note=note),
    )


def membership_note(measured: Measured) -> str:
    """AUC's standard error at this number of documents, what a perfect model gets, and which task it is about."""
    members = len(measured.values(MEMBERS, "perplexity"))
    others = len(measured.values(NONMEMBERS, "perplexity"))
    tasks = ", ".join(task for task in measured.tasks(MEMBERS) if task) or "documents of unknown tasks"
    about = f"members are {tasks} documents: it says nothing about other tasks"
    if not members or not others:
        return about
    error = auc_error(members, others)
    expected = 1 - 2 * error * math.sqrt(2 / math.pi)
    chance = f"{members} + {others} documents: AUC's standard error at 0.5 is {error:.3f}"
    return f"{chance}, so a perfect model scores {expected:.3f} on average; {about}"


def auc_error(members: int, others: int) -> float:
    """Standard error of the AUC when nothing tells the two apart: that of the rank-sum statistic."""
    return math.sqrt((members + others + 1) / (12 * members * others))


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
        files="forget_train and retain_train (part train), forget_val and retain_val (validation) or forget and retain "
        "(all), mia/train_member, mia/train_nonmember, …; LUME's GitHub release has data/forget and data/retain",
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
