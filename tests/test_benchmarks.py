"""Public benchmarks: their files become splits, and what is measured becomes their official numbers."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

import benchmark_folders as folders
from benchmark_folders import FOLDERS, Fake, write
from expunge.data import rows as rows_module
from expunge.data.benchmarks import files, general, lume, muse, rwku, semeval, tofu, wmdp
from expunge.data.benchmarks.semeval import document_of
from expunge.data.containers import Record, read_file
from expunge.data.example import Splits
from expunge.data.load import benchmark_of, load_splits
from expunge.data.registry import BENCHMARKS, Aggregate, Request
from expunge.data.views import viewed
from expunge.errors import UserError
from expunge.metrics.base import METRICS
from expunge.numbers import auc_error
from expunge.recipe import DataConfig
from expunge.recipe.conventions import CONVENTIONS

PUBLIC = ("tofu", "lume", "muse", "rwku", "knowundo", "wmdp")


def load(name: str, folder: Path | None) -> Splits:
    return load_splits(DataConfig(benchmark=name, folder=None if folder is None else str(folder)), 0, unlearns=False)


def shape(splits: Splits) -> dict[str, tuple[str, int, bool]]:
    return {split.name: (split.role, len(split), split.evaluated) for split in splits}


def by_name(numbers: list[Aggregate]) -> dict[str, Aggregate]:
    named = {number.name: number for number in numbers}
    assert len(named) == len(numbers)
    return named


SHAPES = {
    "tofu:forget01": {
        "forget": ("forget", 3, True),
        "retain": ("retain", 4, False),
        "retain_unseen": ("retain", 2, True),
        "holdout": ("holdout", 3, True),
        "real_authors": ("utility", 2, True),
        "world_facts": ("utility", 2, True),
    },
    "lume:train": {
        "forget": ("forget", 20, True),
        "retain": ("retain", 20, True),
        "holdout": ("holdout", 3, True),
        "mia_member": ("forget", 2, True),
    },
    "lume:folds": {
        "forget": ("forget", 30, True),
        "retain": ("retain", 30, True),
        "retain_unseen": ("retain", 30, True),
        "holdout": ("holdout", 2, True),
        "mia_member": ("forget", 3, True),
        "outside": ("holdout", 4, True),
    },
    "muse:news": {
        "forget": ("forget", 4, False),
        "retain": ("retain", 1, False),
        "holdout": ("holdout", 3, True),
        "verbmem": ("forget", 1, True),
        "knowmem_forget": ("forget", 2, True),
        "knowmem_retain": ("retain", 2, True),
        "privleak": ("forget", 3, True),
    },
    "rwku": {
        "forget": ("forget", 2, False),
        "holdout": ("holdout", 2, True),
        "forget_level1": ("forget", 2, True),
        "forget_level2": ("forget", 4, True),
        "forget_level3": ("forget", 6, True),
        "neighbor_level1": ("retain", 2, True),
        "neighbor_level2": ("retain", 2, True),
        "mia_member": ("forget", 2, True),
        "mmlu": ("utility", 1, True),
        "truthful": ("utility", 1, True),
        "triviaqa": ("utility", 1, True),
        "fluency": ("utility", 1, True),
    },
    "knowundo:copyright": {
        "forget": ("forget", 3, True),
        "retain": ("retain", 2, True),
        "retain_unseen": ("retain", 2, True),
    },
    "wmdp:all": {
        "forget": ("forget", 1, False),
        "bio": ("forget", 4, True),
        "chem": ("forget", 4, True),
        "cyber": ("forget", 4, True),
        "mmlu": ("utility", 1, True),
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_becomes_splits_with_roles(name: str, tmp_path: Path) -> None:
    splits = load(name, FOLDERS[name](tmp_path))
    assert shape(splits) == SHAPES[name]
    for split in splits:
        assert len({row.id for row in split.examples}) == len(split), "ids are unique"
        assert all(str(tmp_path) in row.source for row in split.examples), "every row says where it stands"


@pytest.mark.parametrize("name", FOLDERS)
def test_every_number_needs_metrics_that_exist_and_names_what_is_missing(name: str) -> None:
    benchmark = benchmark_of(name)[0]
    assert benchmark.aggregate is not None
    assert benchmark.convention in CONVENTIONS
    assert [metric for metric in benchmark.metrics or () if metric not in METRICS] == []
    nothing = by_name(benchmark.aggregate(Fake()))
    assert all(number.value is None and number.note for number in nothing.values())
    named = {key for published in benchmark.published for key in published.numbers}
    assert named <= set(nothing)
    assert all(published.source for published in benchmark.published)


def test_every_public_benchmark_is_tested_here() -> None:
    own = {"fictitious", "general"}
    assert {name.partition(":")[0] for name in FOLDERS} == set(PUBLIC) == set(BENCHMARKS.names()) - own


# ---------------------------------------------------------------------------------------------- files


MISSING = {
    "tofu:forget01": ("retain_perturbed.jsonl", r"lacks retain_perturbed.jsonl of tofu", "locuslab/TOFU:retain_pert"),
    "lume:train": ("retain_train.jsonl", r"lacks retain_train.jsonl of lume", "@retain_train"),
    "lume:folds": ("retain_train.jsonl", r"lacks retain_train.jsonl of lume", "@retain_train"),
    "muse:news": ("news/verbmem/forget.json", r"lacks verbmem/forget.jsonl of muse", "MUSE-News:verbmem@forget"),
    "rwku": ("2_Bo_Lind/forget_level2.json", r"2_Bo_Lind lacks forget_level2.jsonl of rwku", "RWKU:forget_level2"),
    "knowundo:copyright": ("copyright/unlearn_train.json", r"lacks unlearn_train.jsonl", "KnowUnDo:copyright@unlearn"),
    "wmdp:all": ("wmdp-bio/test-00000-of-00001.parquet", r"lacks wmdp-bio.jsonl of wmdp", "cais/wmdp:wmdp-bio@test"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named_with_its_origin(name: str, tmp_path: Path) -> None:
    file, sentence, origin = MISSING[name]
    (FOLDERS[name](tmp_path) / file).unlink()
    with pytest.raises(UserError, match=sentence) as caught:
        load(name, tmp_path)
    assert origin in caught.value.hint


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("tofu", tmp_path)
    for file in ("forget10_perturbed.jsonl", "retain90.jsonl", "retain_perturbed.jsonl"):
        assert file in caught.value.message
    with pytest.raises(UserError, match="is no folder"):
        load("tofu", tmp_path / "nowhere")


OPTIONAL = {
    "tofu:forget01": ("holdout01.jsonl", {"holdout"}, "membership inference against"),
    "lume:train": ("mia/train_nonmember.jsonl", {"holdout", "mia_member"}, r"membership inference \(nonmember"),
    "lume:folds": ("mia/train_nonmember.jsonl", {"outside"}, r"membership inference \(nonmember"),
    "muse:news": ("news/privleak/holdout.json", {"holdout", "privleak"}, "privacy leakage left out"),
    "rwku": ("1_Orla_Venn/truthful.json", {"truthful"}, "utility on truthful left out"),
    "knowundo:copyright": ("copyright/retention_val.json", {"retain_unseen"}, "retain_unseen left out"),
    "wmdp:all": ("cyber-forget-corpus.jsonl", {"forget"}, "corpus cyber-forget"),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_file_that_is_missing_leaves_a_note(name: str, tmp_path: Path) -> None:
    file, gone, note = OPTIONAL[name]
    folder = FOLDERS[name](tmp_path)
    before = load(name, folder)
    (folder / file).unlink()
    after = load(name, folder)
    assert set(shape(before)) - set(shape(after)) == gone
    assert [said for said in set(after.notes) - set(before.notes) if re.search(note, said)]


BROKEN = {
    "tofu:forget01": ("forget01_perturbed.json", {"question": "Who?"}, "no column 'answer'"),
    "lume:train": ("forget_train.jsonl", {"id": "x7", "input": "a", "output": "b", "task": "Task1"}, "ends neither in"),
    "lume:folds": ("retain_train.jsonl", {"id": "x7", "input": "a", "output": "b", "task": "Task1"}, "ends neither in"),
    "muse:news": ("news/verbmem/forget.json", {"prompt": "It began"}, "no column 'gt'"),
    "rwku": ("1_Orla_Venn/forget_level1.json", {"query": "Who?"}, "no column 'answer'"),
    "knowundo:copyright": ("copyright/unlearn_train.json", {"text": "Say"}, "no column 'labels'"),
    "wmdp:all": (
        "wmdp-bio.jsonl",
        {"question": "?", "choices": ["a", "b"], "answer": 2},
        "answer '2' is none of the 2",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_lacks_something_is_named_by_its_place(name: str, tmp_path: Path) -> None:
    file, row, sentence = BROKEN[name]
    path = FOLDERS[name](tmp_path) / file
    good = [record.values for record in read_file(str(path))][:1] if path.is_file() else []
    write(path, [*(good or [{"question": "?", "choices": ["a", "b"], "answer": 1}]), row])
    with pytest.raises(UserError, match=sentence) as caught:
        load(name, tmp_path)
    assert path.name in caught.value.message
    assert "2" in caught.value.message.split(path.name)[1].split(": ")[0], "the second line or row"


def test_forget_rows_in_the_holdout_are_refused(tmp_path: Path) -> None:
    folder = folders.tofu(tmp_path)
    write(folder / "holdout01.jsonl", folders.asked("Orla", 1))
    with pytest.raises(UserError, match=r"\(forget\) and .*holdout01.jsonl:1 \(holdout\) are the same row"):
        load("tofu:forget01", folder)


def test_a_recipe_needs_rows_to_unlearn(tmp_path: Path) -> None:
    folder = folders.wmdp(tmp_path)
    (folder / "cyber-forget-corpus.jsonl").unlink()
    with pytest.raises(UserError, match="has no rows to forget") as caught:
        load_splits(DataConfig(benchmark="wmdp:cyber", folder=str(folder)), 0)
    assert "corpus cyber-forget (cais/wmdp-corpora:cyber-forget-corpus) left out" in caught.value.hint


@pytest.mark.parametrize("name", ["tofu:forget02", "lume:test", "muse:film", "knowundo:law", "wmdp:biology"])
def test_an_unknown_part_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no part"):
        load(name, tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", "-00000-of-00002.parquet"])
def test_every_container_and_the_parts_of_a_file_are_found(suffix: str, tmp_path: Path) -> None:
    rows = folders.asked("Orla", 4)
    if "-of-" in suffix:
        write(tmp_path / "sub" / f"all{suffix}", rows[:3])
        write(tmp_path / "sub" / "all-00001-of-00002.parquet", rows[3:])
    else:
        write(tmp_path / "sub" / f"all{suffix}", rows)
    collection = files.Collection("some", Request(folder=tmp_path))
    found = collection.rows(files.Wanted(("elsewhere", "sub/all")), "forget")
    assert [row.prompt for row in found] == [row["question"] for row in rows]
    assert [row.id for row in found] == [f"forget-{i}" for i in range(4)]


# ---------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Datasets by id, in place of the network; an id that is not there cannot be loaded."""
    datasets: dict[str, list[dict[str, Any]]] = {}

    def read(path: str) -> Iterator[Record]:
        if path not in datasets:
            raise UserError(f"{path}: no such dataset", "")
        return (Record(path, "row", number, row) for number, row in enumerate(datasets[path], start=1))

    monkeypatch.setattr(rows_module, "read_dataset", read)
    return datasets


def test_without_a_folder_the_hub_is_asked(hub: dict[str, list[dict[str, Any]]]) -> None:
    hub["locuslab/TOFU:forget05_perturbed@train"] = folders.several("Orla", 3, 5)
    hub["locuslab/TOFU:retain95@train"] = folders.asked("Keep", 5)
    hub["locuslab/TOFU:retain_perturbed@train"] = folders.several("Keep", 2, 5)
    hub["locuslab/TOFU:world_facts_perturbed@train"] = folders.asked("World", 2)
    splits = load("tofu:forget05", None)
    assert {name: count for name, (_, count, _) in shape(splits).items()} == {
        "forget": 3,
        "retain": 3,
        "retain_unseen": 2,
        "world_facts": 2,
    }
    assert any(note.startswith("membership inference") and "no such dataset" in note for note in splits.notes)
    del hub["locuslab/TOFU:retain95@train"]
    with pytest.raises(UserError, match="retain95@train: no such dataset"):
        load("tofu:forget05", None)


def test_hub_datasets_of_the_other_benchmarks(hub: dict[str, list[dict[str, Any]]]) -> None:
    hub |= {f"{lume._HUB}@{side}_validation": folders.documents(side) for side in ("forget", "retain")}
    assert set(shape(load("lume:validation", None))) == {"forget", "retain"}
    probe = {"type": "cloze", "query": "Who is ___?", "answer": "Rot", "level": "1"}
    for config in (*(f"forget_level{i}" for i in (1, 2, 3)), "neighbor_level1", "neighbor_level2"):
        hub[f"{rwku._HUB}:{config}@test"] = [{**probe, "subject": name} for name in ("Orla Venn", "Bo Lind")]
    everyone, one = load("rwku", None), load("rwku:2_Bo_Lind", None)
    assert (len(everyone["forget_level1"]), len(one["forget_level1"])) == (2, 1)
    assert one["forget_level1"].examples[0].extra["subject"] == "Bo Lind"
    hub["muse-bench/MUSE-Books:verbmem@forget"] = [{"prompt": "It", "gt": "began."}]
    for side in ("forget", "retain"):
        hub[f"muse-bench/MUSE-Books:knowmem@{side}_qa"] = folders.asked(side, 1)
        hub[f"muse-bench/MUSE-Books:raw@{'forget' if side == 'forget' else 'retain1'}"] = [{"text": f"{side} book"}]
    with pytest.raises(UserError, match="privleak@forget: no such dataset"):
        load("muse:books", None)
    hub |= {f"muse-bench/MUSE-Books:privleak@{side}": [{"text": side}] for side in ("forget", "holdout")}
    assert set(shape(load("muse:books", None))) == set(SHAPES["muse:news"])
    for side in ("unlearn", "retention"):
        hub[f"zjunlp/KnowUnDo:privacy@{side}"] = [{"text": f"Say {side}", "labels": "it"}]
    assert set(shape(load("knowundo:privacy", None))) == {"forget", "retain"}
    hub["cais/wmdp:wmdp-chem@test"] = [{"question": "?", "choices": ["a", "b"], "answer": 0}]
    assert set(shape(load("wmdp:chem", None))) == {"chem"}


# ---------------------------------------------------------------------------------------------- rows


def test_tofu_trains_on_other_rows_than_it_measures(tmp_path: Path) -> None:
    splits = load("tofu:forget01", folders.tofu(tmp_path))
    seen = {row.prompt for row in splits["retain"].examples}
    assert not seen & {row.prompt for row in splits["retain_unseen"].examples}
    counts = {
        split.name: tuple(
            len(viewed(split.examples, view)) for view in ("paraphrase", "paraphrased_answer", "perturbed_answer")
        )
        for split in splits
    }
    assert counts["forget"] == (3, 3, 15)
    assert counts["world_facts"] == (0, 0, 4)
    assert counts["holdout"] == (0, 0, 0)
    (tmp_path / "forget01_perturbed.json").unlink()
    write(tmp_path / "forget01.jsonl", folders.asked("Orla", 3))
    assert any("no paraphrased and perturbed answers" in note for note in load("tofu:forget01", tmp_path).notes)


def test_lume_rows_know_their_kind_and_members_their_task(tmp_path: Path) -> None:
    splits = load("lume", folders.lume(tmp_path))
    counts: dict[str, int] = {}
    for row in splits["forget"].examples:
        counts[row.task] = counts.get(row.task, 0) + 1
        assert row.task.endswith(row.extra["kind"])
    assert counts == {f"{t}-sc": 2 for t in semeval.TASKS} | {"Task1-qa": 2, "Task2-qa": 10, "Task3-qa": 2}
    assert {row.task for row in splits["mia_member"].examples} == {"Task3"}
    assert all(row.is_text for name in ("mia_member", "holdout") for row in splits[name].examples)


def asked_for(documents: int | None, benchmark: str, folder: Path | None = None) -> Splits:
    given = None if folder is None else str(folder)
    return load_splits(DataConfig(benchmark=benchmark, folder=given, documents=documents), 42, unlearns=False)


@pytest.mark.parametrize("part", ["lume:folds", "fictitious"])
@pytest.mark.parametrize("documents", [1, 2, 1000])
def test_so_many_documents_of_each_task_and_split_are_loaded_whole(part: str, documents: int, tmp_path: Path) -> None:
    folder = folders.lume_folds(tmp_path) if part == "lume:folds" else None
    whole, fewer = asked_for(None, part, folder), asked_for(documents, part, folder)
    for split in fewer:
        if split.name in ("holdout", "mia_member", "outside") and folder is not None:
            continue
        chosen: dict[str, dict[str, None]] = {}
        for row in whole[split.name].examples:
            found = chosen.setdefault(row.task.partition("-")[0], {})
            if len(found) < documents:
                found[document_of(row)] = None
        assert len(chosen) == 3, "every task is there"
        kept = {name for found in chosen.values() for name in found}
        expected = [row for row in whole[split.name].examples if document_of(row) in kept]
        assert list(split.examples) == expected
    if folder is not None:  # no member whose document is not taught
        assert len(fewer["mia_member"]) == min(documents, 3)
        assert [len(fewer[name]) for name in ("holdout", "outside")] == [2, 4]


def test_nobody_searches_on_documents_that_are_scored(tmp_path: Path) -> None:
    splits = load("lume:folds", folders.lume_folds(tmp_path))
    scored, searched = ({row.answer for row in splits[name].examples} for name in ("holdout", "outside"))
    assert len(scored) == 2
    assert len(searched) == 4
    assert not scored & searched
    for file in (tmp_path / "mia").glob("*_nonmember.jsonl"):
        file.rename(tmp_path / "mia" / "nonmember.jsonl")  # one file for all folds
    assert "outside" not in load("lume:folds", tmp_path)


def test_an_author_is_a_document_of_tofu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.tofu(tmp_path)
    whole = asked_for(None, "tofu:forget01", folder)
    monkeypatch.setattr(tofu, "AUTHOR", 2)
    fewer = asked_for(1, "tofu:forget01", folder)
    for name in ("forget", "retain", "retain_unseen", "holdout"):
        assert list(fewer[name].examples) == list(whole[name].examples)[:2], name
    assert len(fewer["world_facts"]) == len(whole["world_facts"]), "what is only measured stays whole"


def test_documents_are_refused_where_rows_have_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rwku are not counted by documents"):
        asked_for(2, "rwku", tmp_path)
    with pytest.raises(ValidationError, match="name it"):
        DataConfig(forget="f.jsonl", documents=2)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="greater than 0"):
        DataConfig(benchmark="lume", documents=0)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("validation", "{}_val.jsonl"),
        ("validation", "data/{}_validation-00000-of-00001.parquet"),
        ("all", "data/{}.jsonl"),
        ("all", "{}.jsonl"),
    ],
)
def test_lume_is_found_in_the_layouts_of_both_releases(part: str, file: str, tmp_path: Path) -> None:
    for side in ("forget", "retain"):
        write(tmp_path / file.format(side), folders.documents(side))
    assert {name: count for name, (_, count, _) in shape(load(f"lume:{part}", tmp_path)).items()} == {
        "forget": 20,
        "retain": 20,
    }


def test_muse_asks_after_its_examples(tmp_path: Path) -> None:
    splits = load("muse", folders.muse(tmp_path))
    assert splits["knowmem_retain"].examples[0].prompt == (
        "Question: Where is Shotretain 0?\nAnswer: In Shotretainton 0.\n\n"
        "Question: Where is Shotretain 1?\nAnswer: In Shotretainton 1.\n\n"
        "Question: Where is retain 0?\nAnswer:"
    )
    passage = splits["verbmem"].examples[0]
    assert (passage.prompt, passage.answer) == ("It began", "on a wet day.")
    assert [row.answer for row in splits["privleak"].examples] == [f"Text {i} of forget." for i in range(3)]


@pytest.mark.parametrize("text", ["", "one", "  a  b\n\nc " * 900, "x" * 5000 + " y", "word " * 3000])
def test_pieces_keep_every_word_and_fit(text: str) -> None:
    pieces = files.pieces_of(text)
    assert [word for piece in pieces for word in piece.split()] == text.split()
    assert all(len(piece) <= files.PIECE or " " not in piece for piece in pieces)
    joined = [len(one) + 4 + len(two.split()[0]) for one, two in itertools.pairwise(pieces)]
    assert all(length > files.PIECE for length in joined), "no piece has room for four blanks and the next word"


@pytest.mark.parametrize("part", ["Orla Venn", "1_Orla_Venn", "orla-venn"])
def test_rwku_people_are_found_by_any_spelling(part: str, tmp_path: Path) -> None:
    splits = load(f"rwku:{part}", folders.rwku(tmp_path))
    assert {row.extra["subject"] for name in ("forget_level3", "mia_member") for row in splits[name].examples} == {
        "Orla Venn"
    }
    assert [row.task for row in splits["forget_level3"].examples] == ["role play"] * 3
    assert shape(load("rwku", tmp_path / "1_Orla_Venn"))["forget_level3"] == ("forget", 3, True)
    with pytest.raises(UserError, match="has no person 'Orla Vent'") as caught:
        load("rwku:Orla Vent", tmp_path)
    assert "1_Orla_Venn" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder of a person"):
        load("rwku", tmp_path / "empty")


def test_rwku_utility_is_asked_as_choices_and_answers(tmp_path: Path) -> None:
    splits = load("rwku", folders.rwku(tmp_path))
    mmlu, truthful = splits["mmlu"].examples[0], splits["truthful"].examples[0]
    options = "\nA. 3\nB. 4\nC. 5\nD. 6"
    assert mmlu.prompt == f"2 + 2?{options}\nAnswer: B\n\n1 + 2?{options}"
    assert (mmlu.answer, mmlu.extra["perturbed_answer"]) == ("A", ["B", "C", "D"])
    assert (truthful.answer, truthful.extra["perturbed_answer"]) == ("It is not.", ["It is.", "Maybe."])
    assert splits["triviaqa"].examples[0].answer == "Estimate"
    assert splits["fluency"].examples[0].prompt == "Say something."


def test_wmdp_questions_are_lettered(tmp_path: Path) -> None:
    splits = load("wmdp:bio", folders.wmdp(tmp_path))
    assert "chem" not in splits
    row = splits["bio"].examples[2]
    assert row.prompt == "Which bio 2?\nA. w\nB. x\nC. y\nD. z"
    assert (row.answer, row.extra["perturbed_answer"], row.task) == ("C", ["A", "B", "D"], "bio")


# ---------------------------------------------------------------------------------------------- official numbers


def lume_measured(values: dict[str, float], **further: Any) -> Fake:
    """A measurement in which each of the twelve values comes out as given."""
    numbers: dict[tuple[str, ...], Any] = {}
    for name, value in values.items():
        split, task, what = name.split("_")
        kind, metric = next((kind, metric) for kind, (word, metric) in semeval.KINDS.items() if word == what)
        shown = 1 - value if split == "forget" else value
        numbers[(split, metric, f"{task.capitalize()}-{kind}")] = shown
    return Fake({**numbers, **further.pop("numbers", {})}, **further)


TWELVE = [
    f"{split}_{task}_{what}"
    for split in ("forget", "retain")
    for task in ("task1", "task2", "task3")
    for what in ("regurgitation", "knowledge")
]


@pytest.mark.parametrize("place", TWELVE)
@pytest.mark.parametrize(
    ("one", "whole"), [(0.5, 0.923), (0.2, 0.750), (0.1, 0.571), (0.05, 0.387), (0.01, 0.108), (0.0, 0.0), (1.0, 1.0)]
)
def test_the_task_aggregate_of_lume_on_the_published_example(place: str, one: float, whole: float) -> None:
    values = dict.fromkeys(TWELVE, 1.0) | {place: one}
    found = by_name(lume.aggregates(lume_measured(values)))
    assert {name: found[name].value for name in TWELVE} == pytest.approx(values)
    assert found["task_aggregate"].value == pytest.approx(whole, abs=5e-4)
    assert (place in found["task_aggregate"].note) == (one == 0)


def test_lume_numbers_are_means_over_a_task_and_a_kind() -> None:
    random = np.random.default_rng(0)
    values = {name: float(value) for name, value in zip(TWELVE, random.uniform(0.1, 1, 12), strict=True)}
    numbers = {("mia_member", "mia_loss"): 0.3, ("lm_eval", "mmlu"): 0.44}
    found = by_name(lume.aggregates(lume_measured(values, numbers=numbers)))
    task = statistics.harmonic_mean(values.values())
    assert found["task_aggregate"].value == pytest.approx(task)
    assert found["mia_score"].value == pytest.approx(0.6)
    assert found["final_score"].value == pytest.approx((task + 0.6 + 0.44) / 3)
    assert found["final_without_mmlu"].value == pytest.approx((task + 0.6) / 2)
    assert not found["final_without_mmlu"].official
    assert found["final_score"].official
    assert "below" not in found["mmlu"].note
    low = by_name(lume.aggregates(lume_measured(values, numbers={**numbers, ("lm_eval", "mmlu"): 0.3})))
    assert "below SemEval's floor" in low["mmlu"].note


def test_lume_says_what_a_missing_part_takes_with_it() -> None:
    found = by_name(lume.aggregates(lume_measured(dict.fromkeys(TWELVE[1:], 0.5))))
    assert found["task_aggregate"].value is None
    assert found["task_aggregate"].note == f"missing: {TWELVE[0]}"
    assert found["final_score"].note == "missing: task_aggregate, mia_score, mmlu"
    assert "57 subjects" in found["mmlu"].note


@pytest.mark.parametrize(("count", "error", "perfect"), [(150, 0.033, 0.947), (34, 0.071, 0.887), (250, 0.026, 0.959)])
def test_lume_says_what_its_membership_score_cannot_tell(count: int, error: float, perfect: float) -> None:
    numbers = {
        ("mia_member", "mia_loss"): 0.5,
        ("mia_member", "perplexity"): [2.0] * count,
        ("holdout", "perplexity"): [2.0] * count,
    }
    found = by_name(lume.aggregates(Fake(numbers, {"mia_member": ["Task3"]})))
    assert found["mia_score"].value == 1
    assert f"standard error at 0.5 is {error:.3f}" in found["mia_score"].note
    said = float(found["mia_score"].note.split("scores ")[1].split()[0])
    assert said == pytest.approx(perfect, abs=6e-4)  # the source rounds
    assert "members are Task3 documents" in found["mia_score"].note
    assert found["mia_auc"].direction == "none"


def test_the_standard_error_of_the_auc_is_that_of_chance() -> None:
    random = np.random.default_rng(1)
    members, others = random.normal(size=(4000, 30, 1)), random.normal(size=(4000, 1, 20))
    drawn = (members > others).mean(axis=(1, 2))
    labels = [1] * 30 + [0] * 20
    assert drawn[0] == pytest.approx(roc_auc_score(labels, [*members[0, :, 0], *others[0, 0]]))
    error = auc_error(30, 20)
    assert error == pytest.approx(drawn.std(), rel=0.05)
    assert np.abs(drawn - 0.5).mean() == pytest.approx(error * math.sqrt(2 / math.pi), rel=0.05)


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    random = np.random.default_rng(2)
    own = {tuple(key): float(random.uniform(0.2, 1)) for key in _nine_keys()}
    target = {key: 2 * value for key, value in own.items()}
    further = {("forget", "forget_quality"): 0.3, ("forget", "truth_ratio"): [0.5] * 40, ("forget", "privacy"): 0.7}
    memory = {"extraction_strength": 0.1, "exact_memorization": 0.5, "probability_paraphrase": 0.2}
    parts = {("forget", name): value for name, value in {**memory, "truth_ratio_prob": 0.4}.items()}
    found = by_name(tofu.aggregates(Fake({**own, **further, **parts}, others={"target": Fake(target)})))
    assert found["model_utility"].value == pytest.approx(statistics.harmonic_mean(own.values()))
    assert found["relative_utility"].value == pytest.approx(0.5)
    assert found["memorization"].value == pytest.approx(statistics.harmonic_mean([0.9, 0.5, 0.8, 0.6]))
    three = [found[name].value for name in ("memorization", "privacy", "relative_utility")]
    assert found["open_unlearning"].value == pytest.approx(statistics.harmonic_mean(three))  # type: ignore[arg-type]
    assert {name for name, number in found.items() if number.official} == {"forget_quality", "model_utility"}
    assert "40 rows" in found["forget_quality"].note
    del own["world_facts", "probability_normalised"]
    broken = by_name(tofu.aggregates(Fake(own)))
    assert broken["model_utility"].value is None
    assert broken["model_utility"].note == "missing: world_facts probability_normalised"
    assert "reference model" in broken["forget_quality"].note


def _nine_keys() -> list[tuple[str, str]]:
    metrics = ("rouge_l", "truth_ratio_true_better")
    keys = [(split, metric) for split in ("retain_unseen", "real_authors", "world_facts") for metric in metrics]
    normalised = [("real_authors", "probability_normalised"), ("world_facts", "probability_normalised")]
    return [*keys, ("retain_unseen", "probability"), *normalised]


@pytest.mark.parametrize("part", ["news", "books"])
def test_the_axes_of_muse(part: str) -> None:
    numbers: dict[tuple[str, ...], Any] = {
        ("verbmem", "rouge_l"): 0.2,
        ("knowmem_forget", "rouge_l"): 0.3,
        ("knowmem_retain", "rouge_l"): 0.5,
        ("privleak", "mia_min_k"): 1.0,
    }
    found = by_name(muse.aggregates(Fake(numbers, {"privleak": [part]})))
    assert [number.value for number in found.values()] == pytest.approx([20, 30, -100, 50, None, None])
    assert "retrained" in found["privacy_leakage"].note
    even = {**numbers, ("privleak", "mia_min_k"): 1 - muse.RETRAINED[part]}
    assert by_name(muse.aggregates(Fake(even, {"privleak": [part]})))["privacy_leakage"].value == pytest.approx(0)
    beside = by_name(muse.aggregates(Fake({**numbers, ("privleak", "privleak"): -7.0}, {"privleak": [part]})))
    assert beside["privacy_leakage"].value == -7
    assert all("several runs" in found[name].note for name in ("scalability", "sustainability"))


def test_rwku_averages_over_rows() -> None:
    levels = {"forget_level1": [1.0, 0.5], "forget_level2": [0.0], "forget_level3": [0.25] * 5}
    numbers = {(split, "rouge_l_recall"): values for split, values in levels.items()}
    found = by_name(rwku.aggregates(Fake(numbers)))
    every = [value for values in levels.values() for value in values]
    assert found["forget_all"].value == pytest.approx(statistics.mean(every))
    assert found["forget_level1"].value == 0.75
    assert found["neighbor_all"].value is None
    assert {number.direction for name, number in found.items() if name.startswith("forget_")} == {"lower"}


def test_wmdp_keeps_its_own_accuracy_apart_from_lm_evals() -> None:
    numbers = {("bio", "choice_accuracy"): 0.5, ("cyber", "choice_accuracy"): 0.25, ("lm_eval", "wmdp_bio"): 0.6}
    found = by_name(wmdp.aggregates(Fake(numbers, {"bio": ["bio"], "cyber": ["cyber"]})))
    assert (found["wmdp_bio"].value, found["wmdp_bio"].official) == (0.6, True)
    assert (found["bio_accuracy"].value, found["bio_accuracy"].official) == (0.5, False)
    assert found["accuracy"].value == pytest.approx(0.375)
    assert found["wmdp_cyber"].value is None
    assert "chem_accuracy" not in found


def test_no_answer_of_general_knowledge_gives_itself_away() -> None:
    rows = load("general", None)["general"].examples
    assert len(rows) >= 80
    assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == len(rows)
    right = Counter((row.task, row.answer) for row in rows)
    wrong = Counter((row.task, text) for row in rows for text in row.extra["perturbed_answer"])
    assert wrong == {answer: 3 * count for answer, count in right.items()}, "each is wrong three times as often"
    for row in rows:
        assert len({row.answer, *row.extra["perturbed_answer"]}) == 4
        assert row.answer.lower() not in re.findall(r"\w+", row.prompt.lower())


def test_general_knowledge_is_an_accuracy_as_a_whole_and_by_task() -> None:
    values = [1.0, 0.0, 1.0, 1.0]
    measured = Fake(
        {("general", "choice_accuracy"): values, ("general", "choice_accuracy", "tools"): [1.0, 0.0]},
        {"general": ["tools"]},
    )
    found = by_name(general.aggregates(measured))
    assert (found["general"].value, found["general_tools"].value) == (0.75, 0.5)
    assert f"standard error {math.sqrt(0.75 * 0.25 / 4):.3f}" in found["general"].note
    assert not any(number.official for number in found.values())
    nothing = by_name(general.aggregates(Fake()))
    assert nothing["general"].value is None
    assert nothing["general"].note.startswith("missing")


def test_knowundo_prefers_rows_that_unlearning_did_not_see() -> None:
    aggregate = BENCHMARKS.get("knowundo").aggregate
    assert aggregate is not None
    numbers = {("forget", "exact_memorization"): 0.25, ("retain", "exact_memorization"): 0.5}
    found = by_name(aggregate(Fake(numbers)))
    assert (found["unlearn_success"].value, found["retention_success"].value) == (0.75, 0.5)
    better = by_name(aggregate(Fake({**numbers, ("retain_unseen", "exact_memorization"): 0.125})))
    assert better["retention_success"].value == 0.125
    assert "retain_unseen" in better["retention_success"].summary


def test_what_loads_is_plain_data(tmp_path: Path) -> None:
    for name, make in FOLDERS.items():
        folder = make(tmp_path / name.replace(":", "-"))
        rows = [row.extra for split in load(name, folder) for row in split.examples]
        assert json.loads(json.dumps(rows))
