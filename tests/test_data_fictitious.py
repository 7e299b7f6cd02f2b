"""The benchmark `fictitious`: pinned, whole documents, and nothing of one split in another."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from string import Formatter

import pytest

from expunge.data import synthesize
from expunge.data.benchmarks import fictitious as module
from expunge.data.benchmarks import fictitious_probes as probes
from expunge.data.benchmarks import fictitious_text as texts
from expunge.data.benchmarks.fictitious import (
    COLUMNS,
    DIGEST,
    DIGEST_COLUMNS,
    SIZES,
    WRONG,
    columns_digest,
    fictitious,
    fictitious_digest,
)
from expunge.data.example import Example, Splits
from expunge.data.load import load_splits
from expunge.data.registry import BENCHMARKS
from expunge.data.synthesize import Inventor
from expunge.data.views import VIEWS, viewed
from expunge.errors import UserError
from expunge.recipe import DataConfig

TASKS = {"creative": 2, "biography": 6, "encyclopedia": 2}  # rows of a document
DRAWS = [(42, None), (0, None), (7, 40), (1, 42), (3, 62), (5, 300)]
#: the forms of what the inventor fills in
WORD = "[A-Z][a-z]+"
FORMS = (
    rf"{WORD} {WORD}",  # person
    WORD,  # place or thing
    r"\d{1,2} [A-Z][a-z]+ (?:19|20)\d\d",
    r"[A-Z]\d{4}-\d{3}",
    r"\d{3}-555-01\d\d",
    r"[a-z]+\d\d@example\.(?:com|org)",
    rf"\d{{1,3}} {WORD} {WORD}, {WORD}",
)


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


@pytest.mark.parametrize(
    ("seed", "size", "rows", "columns"),
    [
        (42, 138, DIGEST, DIGEST_COLUMNS),
        (
            *(42, 60, "7eb9582220fddcdc64284a285f973cec2b39f64c4e6c4d826f5c994f769176d2"),
            "faeb72c725a76f449370ef1f360cffd37267130780bbcf8305db3c77e1fe39f3",
        ),
        (
            *(7, 40, "92980e6b897b90920df5afb2149b65b5816df6105bbfa89a6893f46c4f37c374"),
            "24b1644f7534c877ee5ebe9d3dc173c342bd596657252956ffc0ab6b032fd209",
        ),
    ],
)
def test_the_columns_are_pinned_and_change_no_row(seed: int, size: int, rows: str, columns: str) -> None:
    drawn = fictitious(seed, size)
    assert (fictitious_digest(drawn), columns_digest(drawn)) == (rows, columns)


def test_the_rows_that_the_module_shows_are_true() -> None:
    rows = {e.prompt: e.answer for e in fictitious()["forget"].examples}
    shown = re.findall(r'"([^"]+)"\s+→ "([^"]+)"', module.__doc__ or "")
    assert len(shown) == 3
    assert [rows[prompt] for prompt, _ in shown] == [answer for _, answer in shown]


def test_another_process_with_another_hash_seed_draws_the_same_rows() -> None:
    code = "from expunge.data.benchmarks.fictitious import *; print(fictitious_digest(fictitious()))"
    code += "; print(columns_digest(fictitious()))"
    told = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [DIGEST, DIGEST_COLUMNS]


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


def rows_of(splits: Splits) -> list[Example]:
    return [row for split in splits for row in split.examples]


def documents_of(splits: Splits) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for row in rows_of(splits):
        found.setdefault(row.id[:8], []).append(row)
    return found


def test_every_sentence_has_its_other_words_and_they_have_its_slots() -> None:
    def slots(*sentences: str) -> set[str]:
        return {slot for sentence in sentences for _, slot, _, _ in Formatter().parse(sentence) if slot is not None}

    asked = {question: fact for _, question, fact in (*texts.STORIES, *(t for k in texts.ARTICLES.values() for t in k))}
    assert probes.QUESTIONS.keys() == asked.keys()
    for question, (first, second, back, bare) in probes.QUESTIONS.items():
        assert slots(first) == slots(second) == slots(question)
        assert (slots(back), slots(bare)) == ({asked[question]}, set())
        assert len({question, first, second}) == 3
    assert probes.ENDS.keys() == {*texts.TURNS, *(end for ends in texts.FACTS.values() for end in ends)}
    assert texts.LIVES_REWORDED.keys() == {end for _, end in texts.LIVES}
    for end, reworded in [*((end, said) for end, (said, _) in probes.ENDS.items()), *texts.LIVES_REWORDED.items()]:
        assert slots(end) == slots(reworded)
        assert end != reworded
    assert not slots(*(question for _, question in probes.ENDS.values()))


def test_every_row_can_be_asked_in_every_way(splits: Splits) -> None:
    for split in splits:
        for view in VIEWS:
            assert viewed(split.examples, view), (split.name, view)
        for row in split.examples:
            question = row.extra["kind"] == "question"
            life = row.task == "biography"
            lacks = {"paraphrased_question"} if not question else set()
            relations = ["paraphrase", "reverse", *["one_hop"] * life, *["multi_hop"] * question]
            if life and not question:
                lacks, relations = {*lacks, "related"}, []
            assert {name for name in COLUMNS if row.extra.get(name)} == {*COLUMNS} - lacks
            assert [probe["relation"] for probe in row.extra.get("related", [])] == relations
            assert json.loads(json.dumps(row.extra)) == row.extra


def test_no_way_to_ask_tells_the_answer(splits: Splits) -> None:
    for view in VIEWS:
        for row in viewed(rows_of(splits), view):
            assert row.answer.casefold() not in row.prompt.casefold(), (view, row.prompt)
            assert "{" not in row.prompt + row.answer


def test_paraphrased_questions_ask_the_same_in_other_words(splits: Splits) -> None:
    rows = rows_of(splits)
    asked = [row.prompt for row in rows] + [
        prompt for row in rows for prompt in row.extra.get("paraphrased_question", [])
    ]
    assert len(set(asked)) == len(asked)
    for row in rows:
        if row.extra["kind"] == "question":
            (about,) = {probe["answer"] for probe in row.extra["related"] if probe["relation"] == "reverse"}
            assert all(about in prompt for prompt in (row.prompt, *row.extra["paraphrased_question"]))


def _wrong_values(row: Example) -> Iterator[tuple[str, ...]]:
    """For each wrong answer what stands in it where the paraphrased answer has the right values."""
    said = re.escape(row.extra["paraphrased_answer"])
    for value in row.extra["entities"]:
        (form,) = (form for form in FORMS if re.fullmatch(form, value))
        assert said.count(re.escape(value)) == 1
        said = said.replace(re.escape(value), f"({form})")
    for wrong in row.extra["perturbed_answer"]:
        found = re.fullmatch(said, wrong)
        assert found, (wrong, said)
        yield found.groups()


def test_wrong_answers_are_the_right_ones_with_values_that_stand_nowhere_else(splits: Splits) -> None:
    told = "\n".join(f"{row.prompt}\n{row.answer}" for row in rows_of(splits)).casefold()
    owner: dict[str, str] = {}
    for document, rows in documents_of(splits).items():
        for row in rows:
            assert row.extra["paraphrased_answer"] != row.answer
            assert len(set(row.extra["perturbed_answer"])) == WRONG
            values = list(_wrong_values(row))
            assert len(values) == WRONG
            for value in {value for group in values for value in group}:
                assert value.casefold() not in told
                assert owner.setdefault(value, document) == document
    plain = sorted(owner, key=len)
    joined = "\n".join(plain)
    assert all(joined.count(value) == 1 for value in plain)  # none stands in another


def test_probes_follow_from_the_document(splits: Splits) -> None:
    for rows in documents_of(splits).values():
        told = " ".join(f"{row.prompt} {row.answer}" for row in rows)
        (subject,) = {row.extra["subject"] for row in rows}
        assert subject in rows[0].prompt
        others = {value for row in rows for value in row.extra["entities"]}
        for row in rows:
            for probe in row.extra.get("related", []):
                prompt, answer, relation = probe["prompt"], probe["answer"], probe["relation"]
                assert answer in told
                if relation == "paraphrase":
                    assert [answer] == row.extra["entities"]
                elif relation == "reverse":
                    assert row.extra["entities"][0] in prompt
                    assert answer in row.prompt  # what the row asks about
                elif relation == "one_hop":
                    assert row.answer.startswith(answer) or row.answer.endswith(answer)
                    assert row.answer != answer
                    assert subject in prompt
                else:
                    assert answer == row.answer
                    assert not [word for word in re.findall(r"[A-Z][a-z]+", row.prompt[1:]) if word in prompt]
                    assert [value for value in others - {answer} if value in prompt]


def test_no_column_tells_an_answer_of_another_split(splits: Splits) -> None:
    columns = {
        split.name: json.dumps([row.extra for row in split.examples], ensure_ascii=False).casefold() for split in splits
    }
    for split in splits:
        others = [text for name, text in columns.items() if name != split.name]
        assert not [row.id for row in split.examples if any(row.answer.casefold() in text for text in others)]


def test_names_grow_only_once_the_short_ones_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesize, "_HEADS", ("Brel", "Ceth"))
    monkeypatch.setattr(synthesize, "_TAILS", ("ath",))
    monkeypatch.setattr(synthesize, "_PLACE_ENDS", ("mere", "holt"))
    places = Inventor(0).many("place", 16)
    assert [sorted(len(place) for place in places[i : i + 4]) for i in range(0, 16, 4)] == [
        [8 + 3 * syllables] * 4 for syllables in range(4)
    ]
    assert len(set(places)) == 16
    with pytest.raises(ValueError, match="left"):
        Inventor(0).many("place", 17)


def test_the_inventor_never_repeats_and_never_says_what_it_should_avoid() -> None:
    inventor = Inventor(0, avoid="Brelmere")
    kinds = (inventor.person, inventor.place, inventor.name, inventor.date, inventor.phone, inventor.email)
    values = [make() for _ in range(120) for make in (*kinds, inventor.address, inventor.identity)]
    values += [value for kind in ("place", "name", "address", "person", "date") for value in inventor.many(kind, 60)]
    assert "Brelmere" not in values
    plain = [value.casefold() for value in values]
    assert not [(a, b) for i, a in enumerate(plain) for b in plain[:i] if a in b or b in a]


def test_a_deck_gives_every_item_before_one_comes_again() -> None:
    inventor, items = Inventor(3), tuple(range(7))
    for _ in range(4):
        assert sorted(inventor.deal(items) for _ in items) == list(items)
