"""Attacks on prompts, and what relearning trains on: the row stays, its answer is never told, draws repeat."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from expunge.attacks.base import ATTACKS, Attack, Point, PromptAttack, World, attack, build_attack
from expunge.attacks.noise import token_places
from expunge.attacks.prompts import gives_away, normalised, prompt_text, secrets
from expunge.attacks.relearn import Relearning, document_of, independent_halves
from expunge.data.benchmarks.fictitious import fictitious
from expunge.data.encode import Encoded, encode
from expunge.data.example import Example
from expunge.data.load import load_examples
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.models.tiny import build_tokenizer
from expunge.pipeline.attacked import rewrite_rows
from expunge.recipe import SourceConfig

TOKENIZER = build_tokenizer()
PROMPT_ATTACKS = [name for name, entry in ATTACKS.items() if issubclass(entry, PromptAttack)]
JAPANESE = Example(
    "ja",
    "大阪の古い港で船を作った人の名前は何ですか",
    "山田花子です",
    "港",
    extra={"paraphrased_question": "大阪で船を作ったのは誰"},
)
CHAT = Example("chat", "And her sister?", "She is Mira.", "biography", turns=(("user", "Who?"), ("assistant", "Tola.")))
SYSTEM = Example("sys", "Who paints?", "Orla paints.", "biography", turns=(("system", "Be brief."),))
TEXT = Example("text", "", "A story that is a text from end to end.", is_text=True)


def encoded(examples: Sequence[Example]) -> list[Encoded]:
    return encode(examples, TOKENIZER, resolve_template("auto", TOKENIZER), 512)


def world(splits: Mapping[str, Sequence[Example]], seed: int = 5) -> World:
    return World(splits, {name: encoded(rows) for name, rows in splits.items()}, TOKENIZER, seed, encoded)


def invented(seed: int = 5) -> World:
    made = {split.name: list(split.examples) for split in fictitious(42, 60)}
    made["forget"] += [JAPANESE, CHAT, SYSTEM, TEXT]
    return world(made, seed)


WORLD = invented()


def rewritten(name: str, here: World = WORLD) -> Iterator[tuple[Example, Point, list[Example]]]:
    made: Any = build_attack(name, {})
    for point in made.points():
        for example in here.examples["forget"]:
            yield example, point, made.rewrite(example, point, here)


@pytest.mark.parametrize("name", PROMPT_ATTACKS)
def test_a_rewritten_prompt_is_another_prompt_for_the_same_row(name: str) -> None:
    asked: dict[str, int] = {}
    for example, point, candidates in rewritten(name):
        asked[point.label] = asked.get(point.label, 0) + len(candidates)
        assert [other.candidate for other in candidates] == list(range(len(candidates)))
        for other in candidates:
            assert (other.id, other.answer, other.task) == (example.id, example.answer, example.task)
            assert prompt_text(other) != prompt_text(example)
        if example.is_text:
            assert not candidates
    assert all(asked.values()) or name == "few_shot", asked


@pytest.mark.parametrize("name", PROMPT_ATTACKS)
def test_prompts_depend_on_seed_and_row_alone(name: str) -> None:
    first = {(example.id, point.label): found for example, point, found in rewritten(name)}
    order = replace(WORLD, examples={**WORLD.examples, "forget": WORLD.examples["forget"][::-1]})
    assert first == {(example.id, point.label): found for example, point, found in rewritten(name, order)}
    others = {(example.id, point.label): found for example, point, found in rewritten(name, invented(seed=6))}
    assert (first != others) == (name in ("token_noise", "few_shot"))


@pytest.mark.parametrize("name", ["jailbreak", "paraphrase"])
def test_the_question_itself_stays(name: str) -> None:
    for example, point, candidates in rewritten(name):
        asked = example.prompt if name == "jailbreak" or point.label == "forms" else None
        for other in candidates:
            assert asked is None or asked in other.prompt
            assert other.turns == example.turns
    if name == "paraphrase":
        attacked: Any = build_attack(name, {})
        (only,) = attacked.rewrite(JAPANESE, Point("paraphrases", 2), WORLD)
        assert only.prompt == JAPANESE.extra["paraphrased_question"]
        both = attacked.rewrite(JAPANESE, Point("both", 3), WORLD)
        assert len(both) == len(attacked.rewrite(JAPANESE, Point("forms", 1), WORLD))
        assert all(JAPANESE.extra["paraphrased_question"] in other.prompt for other in both)


@pytest.mark.parametrize("example", [*WORLD.examples["forget"][:6], JAPANESE, CHAT], ids=lambda example: example.id)
def test_noise_replaces_as_many_places_as_it_says(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.attacks.noise._vocabulary", lambda tokenizer: ["◆"])  # stands in no prompt
    places = token_places(example.prompt, TOKENIZER)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    weaker = example.prompt
    made: Any = build_attack("token_noise", {"parts": [0.01, 0.3, 1.0]})
    for point in made.points():
        (noisy,) = made.rewrite(example, point, WORLD)
        assert noisy.prompt.count("◆") == max(1, round(point.settings["part"] * len(places)))
        # the rest stays where it was, and so does what a weaker point had replaced
        kept = ".+?".join(map(re.escape, noisy.prompt.split("◆")))
        assert re.fullmatch(kept, weaker, re.DOTALL)
        weaker = noisy.prompt
    assert not any(char.isalnum() for char in weaker)


def test_noise_is_whole_characters_of_the_vocabulary() -> None:
    for example, _, candidates in rewritten("token_noise"):
        for noisy in candidates:
            assert "\ufffd" not in noisy.prompt
            assert noisy.turns == example.turns


def test_shots_are_other_rows_with_other_answers() -> None:
    retain = {(row.prompt, row.answer): row for row in WORLD.examples["retain"]}
    seen = set()
    for example, point, candidates in rewritten("few_shot"):
        for other in candidates:
            turns = other.turns[len([turn for turn in example.turns if turn[0] == "system"]) :]
            turns = turns[: len(turns) - len([turn for turn in example.turns if turn[0] != "system"])]
            assert [role for role, _ in turns] == ["user", "assistant"] * point.settings["shots"]
            shots = [retain[turns[i][1], turns[i + 1][1]] for i in range(0, len(turns), 2)]
            assert len({shot.id for shot in shots}) == point.settings["shots"]
            assert all(shot.answer != example.answer for shot in shots)
            related = point.settings["kind"] == "related"
            assert {shot.task == example.task for shot in shots} == {related}
            seen.add(point.label)
            encoded([other])  # the chat template takes it
    assert seen == {point.label for point in build_attack("few_shot", {}).points()}


def test_shots_never_hold_the_answer_of_the_row() -> None:
    retain = [Example(f"r{i}", f"Question {i}?", "Blue." if i % 2 else f"Reply {i}.", "t") for i in range(8)]
    here = world({"forget": [Example("f", "Which colour?", "Blue.", "t")], "retain": retain})
    made: Any = build_attack("few_shot", {"shots": [3, 5], "unrelated": False})
    three, five = (made.rewrite(here.examples["forget"][0], point, here) for point in made.points())
    assert "Blue" not in prompt_text(three[0])
    assert five == []  # only four rows answer otherwise


@pytest.mark.parametrize(
    ("prompt", "answer", "entities", "told", "untold"),
    [
        ("Who?", "Mira Tolan.", [], "It was MIRA  TOLAN, they say", "Mira asked Tolan"),
        ("Who?", "Ann", [], "ann!", "Annual planning"),  # whole words
        ("When?", "1969-12-21", [], "on 1969 12 21", "in 1969"),
        ("Who?", "It is José Núñez.", ["José Núñez"], "JOSÉ NÚÑEZ!", "Jose"),
        ("誰ですか", "山田花子", [], "昨日、山田花子さんが来た", "山田さんの花子"),
        ("Which number?", "１２３", [], "call 123", "call 1234"),
    ],
)
def test_what_tells_an_answer(prompt: str, answer: str, entities: list[str], told: str, untold: str) -> None:
    hidden = secrets(Example("x", prompt, answer, extra={"entities": entities}))
    assert hidden
    assert gives_away(told, hidden)
    assert not gives_away(untold, hidden)


def test_what_the_row_asks_itself_is_no_secret() -> None:
    assert secrets(Example("x", "Is Mira Tolan a painter called mira tolan?", "Mira Tolan")) == []
    partly = Example("x", "Where did Mira live?", "Mira lived in Oslo.", extra={"entities": ["Mira", "Oslo"]})
    assert secrets(partly) == [normalised("Mira lived in Oslo"), normalised("Oslo")]


def test_prompts_that_tell_the_answer_are_dropped_and_counted() -> None:
    class Teller(PromptAttack):
        def points(self) -> list[Point]:
            return [Point("told", 1)]

        def rewrite(self, example: Example, point: Point, world: World) -> list[Example]:
            told = replace(example, prompt=f"{example.prompt} Is it {example.answer.upper()}", candidate=0)
            turned = replace(example, turns=(("user", "Hm?"), ("assistant", example.answer)), candidate=1)
            plain = replace(example, prompt=f"Please: {example.prompt}", candidate=2)
            return [told, turned] + ([plain] if example.id != "b" else [])

    teller: Any = Teller()
    rows = {
        "forget": [
            Example("a", "Who?", "Mira."),
            Example("b", "Where?", "In Oslo."),
            Example("c", "Is it Ann?", "Ann"),
        ],
        "retain": [Example("d", "When?", "Now.")],
    }
    here = world(rows)
    found = rewrite_rows(teller, Point("told", 1), here, here.rows)
    asked = [(row.example.id, row.example.candidate) for row in found.rows["forget"]]
    assert asked == [("a", 2), ("c", 0), ("c", 1), ("c", 2)]
    assert (found.dropped.candidates, found.dropped.rows, found.dropped.exempt) == (4, 1, 1)
    assert [row.example.candidate for row in found.rows["retain"]] == [2]
    rows["forget"] = rows["forget"][1:2]
    assert rewrite_rows(teller, Point("told", 1), world(rows), world(rows).rows).rows == {}


@pytest.mark.parametrize(("data", "rows"), [("tofu", 120), ("lume", 80)])
def test_no_prompt_tells_its_answer_on_real_rows(data: str, rows: int) -> None:
    name = os.environ.get("EXPUNGE_TEST_DATA")
    if not name:
        pytest.skip("EXPUNGE_TEST_DATA is not set: it names a folder with tofu/, lume/ and rwku/")
    files = {"tofu": ("forget10.jsonl", "retain90.jsonl"), "lume": ("forget_train.jsonl", "retain_train.jsonl")}[data]
    forget, retain = (load_examples(SourceConfig(path=str(Path(name) / data / file)), file[:6]) for file in files)
    here = World({"forget": forget[:rows], "retain": retain[:150]}, {}, TOKENIZER, 0, lambda examples: [])
    fast: dict[str, Any] = {"few_shot": {"shots": [5]}, "token_noise": {"parts": [0.1]}}
    for attacked in PROMPT_ATTACKS:
        made: Any = build_attack(attacked, fast.get(attacked, {}))
        told, asked = 0, 0
        for point in made.points():
            for example in here.examples["forget"]:
                answer = normalised(example.answer)
                if answer in normalised(example.prompt):
                    continue
                candidates = made.rewrite(example, point, here)
                asked += len(candidates)
                told += sum(answer in normalised(prompt_text(other)) for other in candidates)
        assert asked
        assert told == 0, attacked


# ------------------------------------------------------------ relearning


def lesson(name: str, here: World = WORLD, **settings: Any) -> Any:
    made: Any = build_attack(name, settings)
    return made.lesson(here)


def test_points_are_looks_at_the_steps_of_one_training() -> None:
    for name, entry in ATTACKS.items():
        if issubclass(entry, Relearning):
            made: Any = build_attack(name, {"steps": 12, "looks": 3})
            assert [(point.budget, point.label) for point in made.points()] == [
                (3, "3steps"),
                (6, "6steps"),
                (12, "12steps"),
            ]
            assert [point.budget for point in build_attack(name, {"steps": 2, "looks": 9}).points()] == [1, 2]


def test_relearning_on_a_part_measures_the_rest() -> None:
    everything = {row.example.id for row in WORLD.rows["forget"]}
    whole = lesson("relearn")
    assert whole.measured is None
    assert {row.example.id for row in whole.rows} == everything
    part = lesson("relearn", part=0.5)
    trained = {row.example.id for row in part.rows}
    assert len(trained) == len(everything) // 2
    assert part.measured
    assert not part.measured & trained
    assert part.measured <= everything
    assert lesson("relearn", invented(seed=6), part=0.5).measured != part.measured
    with pytest.raises(UserError, match="too few forget rows"):
        lesson("relearn", part=0.01)


def test_benign_rows_hold_no_answer() -> None:
    found = lesson("benign_relearn")
    answers = [row.example.answer for row in WORLD.rows["forget"]]
    assert found.rows
    assert found.measured is None
    assert {row.example.id for row in found.rows} <= {row.example.id for row in WORLD.rows["retain"]}
    teller = Example("t", "What of it?", f"I heard: {answers[0]}")
    more = world({**WORLD.examples, "retain": [*WORLD.examples["retain"], teller]})
    assert "t" not in {row.example.id for row in lesson("benign_relearn", more).rows}
    with pytest.raises(UserError, match="nothing to train on: every retain row"):
        lesson("benign_relearn", world({"forget": WORLD.examples["forget"], "retain": [teller]}))
    with pytest.raises(UserError, match="no holdout rows"):
        lesson("benign_relearn", world({"forget": [CHAT], "retain": [SYSTEM]}), source="holdout")


def test_halves_share_no_document() -> None:
    rows = encoded(fictitious(42, 138)["forget"].examples)
    first, second = independent_halves(rows, seed=3)
    assert sorted(row.example.id for row in (*first, *second)) == sorted(row.example.id for row in rows)
    assert not {document_of(row) for row in first} & {document_of(row) for row in second}
    assert abs(len(first) - len(second)) <= 6  # the largest document
    here = world({"forget": [row.example for row in rows]})
    one, two = lesson("rtt", here), lesson("rtt", here, fold=1)
    assert not {row.example.id for row in one.rows} & one.measured
    assert {row.example.id for row in one.rows} >= two.measured


def test_rows_without_documents_are_cut_in_the_middle_of_the_file() -> None:
    rows = encoded([Example(f"forget-{i}", f"Q{i}?", f"Answer number {i}.") for i in range(9)])
    first, second = independent_halves(rows, seed=3)
    assert [row.example.id for row in (*first, *second)] == [row.example.id for row in rows]
    assert (len(first), len(second)) == (4, 5)


def test_an_answer_that_the_trained_half_says_is_not_measured() -> None:
    rows = [Example(f"forget-{i}", f"Q{i}?", "In Oslo." if i in (0, 3) else f"Answer {i}.") for i in range(4)]
    assert lesson("rtt", world({"forget": rows})).measured == {"forget-2"}


def test_every_attack_declares_itself() -> None:
    for name, entry in ATTACKS.items():
        described = entry.describe()
        assert entry.about.name == name
        assert described["summary"]
        assert described["budget"]
        points = build_attack(name, {}).points()
        labels = [point.label for point in points]
        assert len(set(labels)) == len(labels) > 0
        assert all(label.replace("-", "").replace(".", "").replace("_", "").isalnum() for label in labels)


def test_a_new_attack_is_one_class() -> None:
    @attack(name="whisper", idea="ask quietly", paper="-", kind="behaviour", budget="whispers")
    class Whisper(PromptAttack):
        times: int = 1

        def points(self) -> list[Point]:
            return [Point("once", self.times)]

        def rewrite(self, example: Example, point: Point, world: World) -> list[Example]:
            return [replace(example, prompt=example.prompt.lower() + " …")]

    try:
        made: Attack = build_attack("whisper", {"times": 2})
        assert made.points() == [Point("once", 2)]
        with pytest.raises(UserError, match="no parameter 'tims'"):
            build_attack("whisper", {"tims": 2})
    finally:
        del ATTACKS._entries["whisper"]
