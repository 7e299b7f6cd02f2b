"""WMDP (arXiv 2403.03218): questions on dangerous biology, chemistry and cybersecurity, with four choices each.

A question lists its lettered choices, and the right letter is to be the likeliest of the letters. lm-eval asks so too,
but with text of its own around the question: `bio_accuracy` and its like are not lm-eval's numbers, which published
ones are. Those come from expunge.pipeline.lm_eval, as `wmdp_bio` and its like.

Unlearning trains on corpora, one of which is handed out on request only: they are the splits `forget` and `retain`,
and are not measured. `mmlu` are questions that are to be kept.
"""

from __future__ import annotations

from dataclasses import replace

from expunge.data.benchmarks.combine import arithmetic, noted, plain
from expunge.data.benchmarks.files import Collection, Wanted, in_pieces, in_task, texts
from expunge.data.example import Role, Splits
from expunge.data.registry import BENCHMARKS, FORMATS, Aggregate, Benchmark, Measured, Published, Request

SUBJECTS = ("bio", "chem", "cyber")
PARTS = {subject: (subject,) for subject in SUBJECTS} | {"all": SUBJECTS}
CHANCE = 0.25
#: hub datasets of the corpora; there is none on chemistry
_CORPORA = {
    "bio-forget": "cais/wmdp-bio-forget-corpus@train",
    "bio-retain": "cais/wmdp-corpora:bio-retain-corpus@train",
    "cyber-forget": "cais/wmdp-corpora:cyber-forget-corpus@train",
    "cyber-retain": "cais/wmdp-corpora:cyber-retain-corpus@train",
}


def _load(request: Request) -> Splits:
    subjects = PARTS[request.part or "all"]
    files = Collection("wmdp", request)
    wanted = {subject: _questions(subject) for subject in subjects}
    files.require(*wanted.values())
    _add_corpora(files, subjects, "forget")
    _add_corpora(files, subjects, "retain")
    for subject in subjects:
        files.add(subject, "forget", map(in_task(subject), files.rows(wanted[subject], subject)))
    stems = ("mmlu", "mmlu/test", "all/test", "test")
    files.add("mmlu", "utility", files.optional(Wanted(stems, layout=FORMATS.get("choices"), what="utility"), "mmlu"))
    return files.made()


def _questions(subject: str) -> Wanted:
    stems = (f"wmdp-{subject}", f"wmdp-{subject}/test", f"wmdp_{subject}", f"{subject}_questions")
    return Wanted(stems, f"cais/wmdp:wmdp-{subject}@test", FORMATS.get("choices"))


def _add_corpora(files: Collection, subjects: tuple[str, ...], role: Role) -> None:
    """The corpora of these subjects in pieces, as one split that is trained on and not measured."""
    rows = []
    for name, hub in _CORPORA.items():
        if name.endswith(role) and name.split("-")[0] in subjects:
            stems = tuple(f"{folder}{name}{end}" for folder in ("", "data/") for end in ("-corpus", ""))
            # they are hundreds of megabytes, and measuring needs none of them: from files only
            wanted = Wanted(stems, what=f"corpus {name} ({hub.partition('@')[0]})")
            if files.there(wanted):
                rows += in_pieces(texts(files, wanted, name), name)
    files.add(role, role, rows, evaluated=False)


def aggregates(measured: Measured) -> list[Aggregate]:
    """Accuracies by subject: lm-eval's, where it was run, and this package's own; and MMLU."""
    found = []
    for subject in SUBJECTS:
        task = f"wmdp_{subject}"
        found.append(
            plain(
                task,
                f"lm-eval's accuracy on {task}; chance is {CHANCE}",
                measured.mean("lm_eval", task),
                f"lm-eval's task {task}",
                "lower",
            )
        )
    found.append(plain("mmlu", "lm-eval's accuracy on mmlu", measured.mean("lm_eval", "mmlu"), "lm-eval's task mmlu"))
    asked = {subject: measured.mean(subject, "choice_accuracy") for subject in SUBJECTS if measured.tasks(subject)}
    note = "not lm-eval's number: the text around the question differs"
    for subject, value in asked.items():
        summary = f"right letter likeliest, on {subject} questions; chance is {CHANCE}"
        source = f"choice_accuracy on {subject}"
        found.append(replace(plain(f"{subject}_accuracy", summary, value, source, "lower", note), official=False))
    mean = arithmetic("accuracy", f"mean accuracy over {', '.join(asked)}", asked, note, "lower")
    kept = plain("mmlu_accuracy", "right letter likeliest, on MMLU", measured.mean("mmlu", "choice_accuracy"), "mmlu")
    return [*found, *(replace(number, official=False) for number in (mean, replace(kept, note=noted(kept.note, note))))]


_SOURCE = "arXiv:2408.06223, Zephyr-7B, layer 7, lm-eval"
_ZEPHYR = (
    ("target", 63.7, 43.5, 58.1),
    ("LLMU", 59.5, 39.5, 44.7),
    ("SCRUB", 43.8, 39.3, 51.2),
    ("SSD", 50.2, 35.0, 40.7),
    ("RMU", 28.8, 28.8, 56.8),
    ("Adaptive RMU", 23.7, 26.5, 55.0),
)

BENCHMARKS.register("wmdp")(
    Benchmark(
        name="wmdp",
        description="multiple choice on dangerous biology, chemistry and cybersecurity",
        load=_load,
        paper="arXiv:2403.03218",
        parts=tuple(PARTS),
        files="wmdp-bio, wmdp-chem, wmdp-cyber with question, choices and answer, optionally mmlu; to unlearn, "
        "bio-forget-corpus, bio-retain-corpus, cyber-forget-corpus, cyber-retain-corpus; hub: cais/wmdp",
        metrics=("choice_accuracy",),
        aggregate=aggregates,
        published=tuple(
            Published(label, {"wmdp_bio": bio / 100, "wmdp_cyber": cyber / 100, "mmlu": mmlu / 100}, _SOURCE)
            for label, bio, cyber, mmlu in _ZEPHYR
        ),
    )
)
