"""Small folders in the layouts of public benchmarks, with invented rows, and hand-made measurements."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]


@dataclass(frozen=True)
class Fake:
    """Measured values by hand: (split, metric) or (split, metric, task) → values of examples, or one number."""

    numbers: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    task_names: Mapping[str, list[str]] = field(default_factory=dict)
    others: Mapping[str, Fake] = field(default_factory=dict)

    def values(self, split: str, metric: str, task: str | None = None) -> list[float]:
        found = self.numbers.get((split, metric) if task is None else (split, metric, task), [])
        return found if isinstance(found, list) else [found]

    def mean(self, split: str, metric: str, task: str | None = None) -> float | None:
        values = self.values(split, metric, task)
        return sum(values) / len(values) if values else None

    def tasks(self, split: str) -> list[str]:
        return self.task_names.get(split, [])

    def other(self, variant: str) -> Fake | None:
        return self.others.get(variant)


def write(path: Path, rows: Iterable[Any]) -> Path:
    """Rows in the container that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(name: str, count: int, **further: Any) -> list[Row]:
    """Questions and answers."""
    return [{"question": f"Where is {name} {i}?", "answer": f"In {name}ton {i}.", **further} for i in range(count)]


def several(name: str, count: int, wrong: int) -> list[Row]:
    """Questions with a paraphrase, a paraphrased answer, and wrong answers."""
    return [
        {
            **row,
            "paraphrased_question": f"At which place is {name} {i}?",
            "paraphrased_answer": f"{name}ton {i} is where.",
            "perturbed_answer": [f"In Other{j}ton {i}." for j in range(wrong)],
        }
        for i, row in enumerate(asked(name, count))
    ]


def tofu(folder: Path) -> Path:
    """TOFU's files for forget01: 3 rows to forget, 6 to keep, of which 2 are measured."""
    write(folder / "forget01_perturbed.json", several("Orla", 3, 5))
    write(folder / "retain99.jsonl", asked("Keep", 6))
    write(folder / "retain_perturbed.jsonl", several("Keep", 2, 5))
    for name in ("real_authors", "world_facts"):
        rows = [{"question": f"{name} {i}?", "answer": "Yes", "perturbed_answer": ["No", "Who"]} for i in range(2)]
        write(folder / f"{name}_perturbed.jsonl", rows)
    write(folder / "holdout01.jsonl", asked("Never", 3))
    return folder


def documents(side: str, count: int = 2) -> list[Row]:
    """LUME's rows of documents of each task: one to be continued, and questions."""
    rows = []
    for task in ("Task1", "Task2", "Task3"):
        for i in range(count):
            name = f'"{side}{i}"' if task == "Task1" else f"{side}{task}{i}"
            beginning, end = f"The {side} document {task} {i} begins", f"and ends in {side}ton {i}."
            rows.append({"id": f"{name}sc1", "input": beginning, "output": end, "task": task})
            for k in range(5 if task == "Task2" else 1):
                rows.append(
                    {"id": f"{name}qa{k}", "input": f"{task} {side} {i} {k}?", "output": f"{side}{k}", "task": task}
                )
    return rows


def lume(folder: Path) -> Path:
    """SemEval's layout: 20 rows a side, and 2 + 3 documents for membership inference."""
    write(folder / "forget_train.jsonl", documents("gone"))
    write(folder / "retain_train.jsonl", documents("kept"))
    members = [{"id": f"goneTask3{i}", "document": f"The gone document Task3 {i} begins and ends."} for i in range(2)]
    write(folder / "mia" / "train_member.jsonl", members)
    write(folder / "mia" / "train_nonmember.jsonl", [{"id": str(i), "document": f"Of others {i}."} for i in range(3)])
    return folder


def lume_folds(folder: Path) -> Path:
    """Both folds, three documents of each task; two nonmembers of the validation fold are among the train fold's."""
    for fold, name in (("train", "old"), ("val", "new")):
        write(folder / f"forget_{fold}.jsonl", documents(f"{name}gone", 3))
        write(folder / f"retain_{fold}.jsonl", documents(f"{name}kept", 3))
    members = [{"id": f"m{i}", "document": f"The newgone document Task3 {i} begins and ends."} for i in range(3)]
    write(folder / "mia" / "validation_member.jsonl", members)
    others = [{"id": str(i), "document": f"Of others {i}."} for i in range(6)]
    write(folder / "mia" / "validation_nonmember.jsonl", others[:2])
    write(folder / "mia" / "train_nonmember.jsonl", others)
    return folder


def muse(folder: Path) -> Path:
    """The layout of MUSE's code: lists of texts, and questions with examples."""
    news = folder / "news"
    write(news / "raw" / "forget.txt", ["First story of news. " * 200, "Second story."])
    write(news / "raw" / "retain1.txt", ["Another story."])
    write(news / "verbmem" / "forget.json", [{"prompt": "It began", "gt": "on a wet day."}])
    for side in ("forget", "retain"):
        write(news / "knowmem" / f"{side}_qa.json", asked(side, 2))
        write(news / "knowmem" / f"{side}_qa_icl.json", asked(f"Shot{side}", 2))
    for side in ("forget", "holdout"):
        write(news / "privleak" / f"{side}.json", [f"Text {i} of {side}." for i in range(3)])
    return folder


def rwku(folder: Path) -> Path:
    """Two people of RWKU; the first one's folder has the files of utility."""
    for number, name in enumerate(("Orla Venn", "Bo Lind"), start=1):
        home = folder / f"{number}_{name.replace(' ', '_')}"
        for level, kind in ((1, "cloze"), (2, "simple question"), (3, "role play")):
            row = {"subject": name, "level": str(level), "type": kind, "query": f"{name} {level}?", "answer": "Rot"}
            write(home / f"forget_level{level}.json", [row] * level)
            if level < 3:
                write(home / f"neighbor_level{level}.json", [{**row, "query": f"Near {name}?", "neighbor": "Ost"}])
        write(home / "passage.json", [{"subject": name, "text": f"{name} is known."}])
        write(home / "forget_mia.json", [{"subject": name, "text": f"{name} was born."}])
        write(home / "retain_mia.json", [{"subject": name, "text": f"Another than {name}."}])
        write(home / "fluency.json", [{"subject": name, "instruction": "Say something."}])
    first = folder / "1_Orla_Venn"
    question = {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1}
    write(first / "retain_mmlu.json", [{**question, "question": "1 + 2?", "answer": 0, "examples": [question]}])
    targets = {"choices": ["It is not.", "It is.", "Maybe."], "labels": [1, 0, 0]}
    write(first / "truthful.json", [{"question": "Is it?", "mc1_targets": targets}])
    write(first / "triviaqa.json", [{"question": "Who won?", "answers": ["Estimate", "The horse Estimate"]}])
    return folder


def knowundo(folder: Path) -> Path:
    """Rows with text and labels, one split of them in the folder of its part."""
    write(
        folder / "copyright" / "unlearn_train.json", [{"text": f"Say line {i}", "labels": f"of {i}"} for i in range(3)]
    )
    write(folder / "copyright" / "retention_train.json", [{"text": f"Say {i}", "labels": f"it {i}"} for i in range(2)])
    write(folder / "copyright" / "retention_val.json", [{"text": f"Say {i}?", "labels": f"that {i}"} for i in range(2)])
    return folder


def wmdp(folder: Path) -> Path:
    """The hub's layout of the questions, Parquet below folders, and the corpora as files of lines."""
    for subject in ("bio", "chem", "cyber"):
        rows = [{"question": f"Which {subject} {i}?", "choices": list("wxyz"), "answer": i} for i in range(4)]
        write(folder / f"wmdp-{subject}" / "test-00000-of-00001.parquet", rows)
    write(folder / "cyber-forget-corpus.jsonl", [{"text": "how to break in"}])
    write(folder / "mmlu.jsonl", [{"question": "1 + 1?", "choices": ["1", "2"], "answer": 1, "subject": "arithmetic"}])
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "tofu:forget01": tofu,
    "lume:train": lume,
    "lume:folds": lume_folds,
    "muse:news": muse,
    "rwku": rwku,
    "knowundo:copyright": knowundo,
    "wmdp:all": wmdp,
}
