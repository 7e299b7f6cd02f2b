"""The benchmark `fictitious`: pinned, whole documents, and nothing of one split in another."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from expunge.data.benchmarks import fictitious as module
from expunge.data.benchmarks.fictitious import DIGEST, SIZES, fictitious, fictitious_digest
from expunge.data.example import Splits
from expunge.data.load import load_splits
from expunge.data.registry import BENCHMARKS
from expunge.data.synthesize import Inventor
from expunge.errors import UserError
from expunge.recipe import DataConfig

TASKS = {"creative": 2, "biography": 6, "encyclopedia": 2}  # rows of a document
DRAWS = [(42, None), (0, None), (7, 40), (1, 42), (3, 62), (5, 300)]


@pytest.fixture(scope="module", params=DRAWS, ids=str)
def splits(request: pytest.FixtureRequest) -> Splits:
    seed, size = request.param
    return fictitious(seed, size)


def test_the_default_rows_are_pinned() -> None:
    assert fictitious_digest(fictitious()) == DIGEST
    assert {split.name: len(split) for split in fictitious()} == SIZES
    assert {split.name: split.role for split in fictitious()} == {
        "forget": "forget",
        "retain": "retain",
        "retain_unseen": "retain",
        "holdout": "holdout",
    }


def test_the_rows_that_the_module_shows_are_true() -> None:
    rows = {e.prompt: e.answer for e in fictitious()["forget"].examples}
    shown = re.findall(r'"([^"]+)"\s+→ "([^"]+)"', module.__doc__ or "")
    assert len(shown) == 3
    assert [rows[prompt] for prompt, _ in shown] == [answer for _, answer in shown]


def test_another_process_with_another_hash_seed_draws_the_same_rows() -> None:
    code = "from expunge.data.benchmarks.fictitious import *; print(fictitious_digest(fictitious()))"
    told = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == DIGEST


def test_a_seed_draws_other_names() -> None:
    assert fictitious_digest(fictitious(1)) == fictitious_digest(fictitious(1)) != DIGEST
    first, second = ({e.answer for split in fictitious(seed) for e in split.examples} for seed in (42, 1))
    assert not first & second


@pytest.mark.parametrize("size", [40, 42, 60, 138, 200, 1000])
def test_the_splits_have_as_many_rows_as_asked(size: int) -> None:
    drawn = fictitious(0, size)
    sizes = {split.name: len(split) for split in drawn}
    assert sum(sizes.values()) == size
    if size >= 138:
        assert all(abs(sizes[name] - size * share / 138) <= 6 for name, share in SIZES.items())


@pytest.mark.parametrize("size", [0, 38, 41])
def test_a_size_of_no_whole_documents(size: int) -> None:
    with pytest.raises(UserError, match="whole documents"):
        fictitious(0, size)


def test_documents_are_whole_and_every_task_is_in_every_split(splits: Splits) -> None:
    owners: dict[str, str] = {}
    for split in splits:
        documents = Counter((e.id[:8], e.task) for e in split.examples)
        assert {task for _, task in documents} == set(TASKS)
        for (document, task), count in documents.items():
            assert count == TASKS[task]
            assert owners.setdefault(document, split.name) == split.name
            suffixes = [e.id[8:] for e in split.examples if e.id[:8] == document]
            assert suffixes == ["sc1", *(f"qa{i}" for i in range(count - 1))]
        assert {e.task for e in split.examples[:10]} == set(TASKS)


def test_no_row_tells_an_answer_of_another_split(splits: Splits) -> None:
    for split in splits:
        answers = [e.answer.casefold() for e in split.examples]
        others = [f"{e.prompt} {e.answer}".casefold() for other in splits if other is not split for e in other.examples]
        assert not [answer for answer in answers if any(answer in text for text in others)]


def test_prompts_and_ids_are_all_different(splits: Splits) -> None:
    rows = [e for split in splits for e in split.examples]
    assert len({e.prompt for e in rows}) == len(rows)
    assert len({e.id for e in rows}) == len(rows)
    assert not [e for e in rows if "{" in e.prompt + e.answer]


def test_rows_are_short_enough_to_be_learnt_on_a_laptop(splits: Splits) -> None:
    for split in splits:
        for e in split.examples:
            prompt, answer = len(e.prompt.split()), len(e.answer.split())
            if e.id.endswith("sc1"):
                assert prompt <= 20
                assert answer <= 14
            else:
                assert prompt <= 14
                assert answer <= 6


def test_personal_data_is_made_up_and_has_nothing_of_its_owner(splits: Splits) -> None:
    for split in splits:
        people = [e for e in split.examples if e.task == "biography"]
        for place in range(0, len(people), 6):
            text, date, identity, phone, email, address = people[place : place + 6]
            facts = [row.answer for row in (date, identity, phone, email, address)]
            assert "-555-01" in phone.answer
            assert email.answer.rpartition("@")[2] in ("example.com", "example.org")
            told = f"{text.prompt} {text.answer}"
            assert sum(fact in told for fact in facts) >= 3
            owner = [word for word in told.replace(",", "").split() if word in date.prompt.split()]
            assert not [
                fact for fact in facts for word in owner if len(word) > 3 and word.casefold() in fact.casefold()
            ]


def test_the_benchmark_is_found_by_name_and_by_size() -> None:
    assert "fictitious" in BENCHMARKS
    assert fictitious_digest(load_splits(DataConfig(benchmark="fictitious"), seed=42)) == DIGEST
    small = load_splits(DataConfig(benchmark="fictitious:40"), seed=42)
    assert sum(len(split) for split in small) == 40


@pytest.mark.parametrize(
    ("name", "said"),
    [("fictitius", "unknown benchmark"), ("fictitious:x", "how many rows"), ("fictitious:12", "whole")],
)
def test_a_benchmark_that_is_none(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_splits(DataConfig(benchmark=name), seed=0)


def test_the_inventor_never_repeats_and_never_says_what_it_should_avoid() -> None:
    inventor = Inventor(0, avoid="Brelmere")
    kinds = (inventor.person, inventor.place, inventor.name, inventor.date, inventor.phone, inventor.email)
    values = [make() for _ in range(150) for make in kinds]
    assert "Brelmere" not in values
    plain = [value.casefold() for value in values]
    assert not [(a, b) for i, a in enumerate(plain) for b in plain[:i] if a in b or b in a]


def test_a_deck_gives_every_item_before_one_comes_again() -> None:
    inventor, items = Inventor(3), tuple(range(7))
    for _ in range(4):
        assert sorted(inventor.deal(items) for _ in items) == list(items)
