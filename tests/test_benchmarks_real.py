"""Real files of TOFU, LUME and RWKU, where they are at hand: EXPUNGE_TEST_DATA names their folder."""

from __future__ import annotations

from collections import Counter

import pytest

from expunge.data.example import Splits
from expunge.data.load import load_splits
from expunge.data.views import viewed
from expunge.recipe import DataConfig
from test_data_real import data_folder


def load(name: str) -> Splits:
    return load_splits(DataConfig(benchmark=name, folder=str(data_folder() / name.partition(":")[0])), 0)


@pytest.mark.parametrize(("part", "forget", "retain"), [("01", 40, 3560), ("05", 200, 3400), ("10", 400, 3200)])
def test_tofu(part: str, forget: int, retain: int) -> None:
    splits = load(f"tofu:forget{part}")
    assert splits.notes == ()
    sizes = {split.name: len(split) for split in splits if split.evaluated}
    assert sizes == {
        "forget": forget,
        "retain_unseen": 400,
        "holdout": forget,
        "real_authors": 100,
        "world_facts": 117,
    }
    # all 400 measured rows are a part of each training set, and the rest is trained on
    assert len(splits["retain"]) == retain
    for name, wrong in (("forget", 5), ("retain_unseen", 5), ("real_authors", 3), ("world_facts", 3)):
        assert len(viewed(splits[name].examples, "perturbed_answer")) == wrong * len(splits[name])
    assert len(viewed(splits["forget"].examples, "paraphrase")) == forget


@pytest.mark.parametrize(
    ("part", "forget", "retain", "documents"),
    [
        ("train", (83, 107, 152), (103, 102, 159), 150),
        ("validation", (24, 23, 34), (27, 25, 37), 34),
    ],
)
def test_lume(part: str, forget: tuple[int, ...], retain: tuple[int, ...], documents: int) -> None:
    splits = load(f"lume:{part}")
    assert splits.notes == ()
    for name, counts in (("forget", forget), ("retain", retain)):
        found = Counter(row.task for row in splits[name].examples)
        assert found == {f"Task{i}-sc": count for i, count in enumerate(counts, start=1)} | {
            f"Task{i}-qa": count * (5 if i == 2 else 1) for i, count in enumerate(counts, start=1)
        }
    assert len(splits["mia_member"]) == len(splits["holdout"]) == documents
    assert {row.task for row in splits["mia_member"].examples} == {"Task3"}, "members are of one task alone"


def test_lume_with_both_folds() -> None:
    splits = load("lume:folds")
    sizes = {split.name: len(split) for split in splits}
    assert sizes == {
        "forget": 254,
        "retain": 278,
        "retain_unseen": 1136,
        "holdout": 34,
        "mia_member": 34,
        "outside": 116,
    }
    # the validation fold's nonmembers are all among the train fold's: they are tested, and not searched on
    assert len({row.answer for name in ("holdout", "outside") for row in splits[name].examples}) == 150


def test_rwku() -> None:
    everyone = load("rwku")
    sizes = {split.name: len(split) for split in everyone}
    probes = {"forget_level1": 99, "forget_level2": 70, "forget_level3": 202}
    assert sizes == {
        **probes,
        "forget": 505,
        "neighbor_level1": 176,
        "neighbor_level2": 163,
        "mia_member": 216,
        "holdout": 219,
        "mmlu": 171,
        "truthful": 50,
        "triviaqa": 100,
        "fluency": 50,
    }
    assert len({row.extra["subject"] for row in everyone["forget_level3"].examples}) == 6
    one = load("rwku:Stephen King")
    assert {row.extra["subject"] for row in one["neighbor_level2"].examples} == {"Stephen King"}
    assert len(one["mmlu"]) == 171
    assert all(row.prompt.count("\nAnswer: ") == 5 for row in one["mmlu"].examples), "five examples come first"
    assert any("utility on mmlu left out" in note for note in load("rwku:Confucius").notes)
