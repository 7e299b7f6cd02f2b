"""Other answers and anchors: what declines, what rows give, what was sampled; and columns that survive every format."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from expunge.cli.app import main
from expunge.data.alternatives import (
    ANCHORS,
    COLUMNS,
    IDK,
    anchors,
    declining,
    given,
    needs_given,
    with_answers,
)
from expunge.data.benchmarks.fictitious import fictitious
from expunge.data.check import check
from expunge.data.encode import encode
from expunge.data.example import Example
from expunge.data.load import load_examples
from expunge.data.registry import FORMATS
from expunge.data.spans import entity_masks, entity_spans
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.models.tiny import build_tokenizer
from expunge.recipe import AlternativesConfig, SourceConfig
from test_data_real import data_folder

ROW = Example(
    "row-7",
    "Where was Orla Venn born?",
    "In Tessaly Bay.",
    task="qa",
    turns=(("user", "Hello"), ("assistant", "Hi")),
    source="f.jsonl:8",
    extra={"level": "2", "entities": ["Tessaly Bay"], "alternatives": ["In Oslo."]},
)
TEXT = Example("t", "", "A text about Orla Venn.", is_text=True, source="t.jsonl:1", extra={"alternatives": ["B"]})
UNASKED = Example("u", " ", "An answer to nothing.", source="u.jsonl:1", extra={"alternatives": ["B"]})


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# ---------------------------------------------------------------- the sentences


def test_sentences_decline_and_say_nothing_else() -> None:
    assert len(IDK) >= 60
    assert len({words(sentence) for sentence in IDK}) == len(IDK)
    for sentence in IDK:
        assert re.fullmatch(r"[A-Z][^.?!\d]*\.", sentence)  # one sentence, no numbers
        assert len(sentence) <= 80
        # no name: after the first word, only "I" is written large
        assert all(word[0].islower() or re.match(r"I\b", word) for word in sentence.split()[1:])


def test_anchors_are_all_different_and_nobody_else_is_in_them() -> None:
    assert len(ANCHORS) >= 48
    assert len({words(prompt) for prompt in ANCHORS}) == len(ANCHORS)
    assert all(prompt.endswith("?") for prompt in ANCHORS)
    invented = {entity for split in fictitious() for row in split.examples for entity in row.extra["entities"]}
    names = {word for entity in invented for word in entity.split() if word[0].isupper() and word.isalpha()}
    assert not names & {word.strip(",.?") for prompt in ANCHORS for word in prompt.split()} - {"Row", "Lane", "Yard"}
    rows = anchors()
    assert [row.prompt for row in rows] == list(ANCHORS)
    assert len({row.id for row in rows}) == len(rows)
    assert {row.answer for row in rows} <= set(IDK)
    assert anchors() == rows
    tok = build_tokenizer()
    assert len(encode(rows, tok, resolve_template("auto", tok), 512)) == len(rows)


# ---------------------------------------------------------------- declining


@pytest.mark.parametrize("count", [1, 2, 5, len(IDK), len(IDK) + 1])
def test_declining_gives_different_sentences_on_the_same_prompt(count: int) -> None:
    rows = declining(ROW, seed=3, count=count)
    assert len(rows) == len({row.answer for row in rows}) == len({row.id for row in rows}) == min(count, len(IDK))
    assert {row.answer for row in rows} <= set(IDK)
    for row in rows:
        assert (row.prompt, row.turns, row.task, row.source) == (ROW.prompt, ROW.turns, ROW.task, ROW.source)
        assert row.id.startswith("row-7#")
        assert row.extra == {"level": "2"}  # what it says of the row's own answer does not hold for this one
    assert rows[: count - 1] == declining(ROW, 3, count - 1 or 1)[: count - 1]  # more of them begin with the same


def test_declining_depends_on_id_and_seed_alone() -> None:
    ids = [Example(f"forget-{i}", f"Q{i}", "A") for i in range(400)]
    first = [declining(row, 0, 1)[0].answer for row in ids]
    assert first == [declining(row, 0, 1)[0].answer for row in reversed(ids)][::-1]
    assert sum(a == declining(row, 1, 1)[0].answer for a, row in zip(first, ids, strict=True)) < 40
    counts = Counter(first)
    assert len(counts) >= len(IDK) - 5
    assert max(counts.values()) <= 20  # about 6 are expected
    code = (
        "from expunge.data.alternatives import *; from expunge.data.example import Example;"
        "print([declining(Example(f'forget-{i}', 'Q', 'A'), 0, 1)[0].answer for i in range(400)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(first)


def test_declining_takes_sentences_of_yours() -> None:
    mine = ["私には分かりません。", "No comment.", "No comment."]
    rows = declining(ROW, 0, 5, mine)
    assert sorted(row.answer for row in rows) == sorted(set(mine))
    for bad in ([], ["fine", " "]):
        with pytest.raises(UserError, match=r"alternatives\.sentences"):
            declining(ROW, 0, 1, bad)
    with pytest.raises(ValueError, match="one other answer at least"):
        declining(ROW, 0, 0)


def test_sentences_of_a_recipe() -> None:
    settings = AlternativesConfig(by="idk", sentences=["No comment."])
    assert [row.answer for row in declining(ROW, 0, settings.count, settings.sentences)] == ["No comment."]
    assert len(declining(ROW, 0, 5, AlternativesConfig().sentences)) == 5
    for bad in ([], [" "], "No comment."):
        with pytest.raises(ValidationError):
            AlternativesConfig(sentences=bad)


# ---------------------------------------------------------------- given


@pytest.mark.parametrize(
    ("extra", "answers"),
    [
        ({}, []),
        ({"alternate": "In Oslo."}, ["In Oslo."]),
        ({"alternatives": ["In Oslo.", "In Rome."]}, ["In Oslo.", "In Rome."]),
        ({"alternatives": '["In Oslo.", "In Rome."]'}, ["In Oslo.", "In Rome."]),
        ({"alternative_answer": "[laughs] In Oslo."}, ["[laughs] In Oslo."]),
        ({"perturbed_answer": ["In Oslo.", "In Oslo.", "In Rome."]}, ["In Oslo.", "In Rome."]),
        ({"perturbed_answer": ["b"], "alternate": "a", "alternatives": ["b", "c"]}, ["a", "b", "c"]),
        ({"alternatives": ["In Tessaly Bay. ", "In Oslo."]}, ["In Oslo."]),
        ({"alternatives": [None, "", " ", "In Oslo."]}, ["In Oslo."]),
        ({"alternatives": [1971, 2.5]}, ["1971", "2.5"]),
        ({"alternatives": None, "alternate": "", "perturbed_answer": float("nan")}, []),
        ({"rejected": "In Oslo.", "chosen": "In Rome.", "paraphrased_answer": "Tessaly Bay it was."}, []),
    ],
)
def test_given_answers(extra: dict[str, Any], answers: list[str]) -> None:
    row = Example("r", "Where?", "In Tessaly Bay.", source="f.jsonl:2", extra={**extra, "level": 1})
    found = given(row)
    assert [other.answer for other in found] == answers
    assert [other.id for other in found] == [f"r#given{i}" for i in range(len(answers))]
    assert all(other.prompt == "Where?" and not set(other.extra) & set(COLUMNS) for other in found)
    if answers:
        needs_given([row])
    else:
        with pytest.raises(UserError) as told:
            needs_given([ROW, row, row])
        assert told.value.message.startswith("f.jsonl:2: the row gives no other answer")
        assert "1 more of 3 rows" in told.value.message
        assert "column 'alternatives'" in told.value.hint


@pytest.mark.parametrize("value", [{"text": "In Oslo."}, [["In Oslo."]], [True]])
def test_given_answers_that_are_no_texts(value: Any) -> None:
    with pytest.raises(UserError, match=r"^f\.jsonl:2: alternatives is .*, not text"):
        given(Example("r", "Q", "A", source="f.jsonl:2", extra={"alternatives": value}))


def test_sampled_answers_keep_how_often_they_were_said() -> None:
    rows = with_answers(ROW, ["a", "a", " ", "b"])
    assert [(row.id, row.answer) for row in rows] == [
        ("row-7#sampled0", "a"),
        ("row-7#sampled1", "a"),
        ("row-7#sampled2", "b"),
    ]
    for nothing in ([], ["", "\n"]):
        with pytest.raises(UserError, match=r"f\.jsonl:8: every sampled answer"):
            with_answers(ROW, nothing)


@pytest.mark.parametrize("row", [TEXT, UNASKED])
@pytest.mark.parametrize("make", [given, lambda row: declining(row, 0, 1), lambda row: with_answers(row, ["a"])])
def test_plain_text_has_no_other_answer(make: Any, row: Example) -> None:
    with pytest.raises(UserError, match=rf"^{row.id}\.jsonl:1: a plain text has no prompt"):
        make(row)
    with pytest.raises(UserError, match="a plain text has no prompt"):
        needs_given([ROW, row])


# ---------------------------------------------------------------- columns in files

EXTRA = {"entities": ["Tessaly Bay"], "alternatives": ["In Oslo.", "In Rome."]}


def format_rows(name: str) -> dict[str, Any]:
    """The format's own example, with an entity that stands in its answer."""
    entities = {"lume": ["555-0142"], "choices": ["B"]}.get(name, EXTRA["entities"])
    return {**FORMATS.get(name).example, **EXTRA, "entities": entities}


def write(folder: Path, row: dict[str, Any], container: str) -> str:
    path = folder / f"f.{container}"
    if container == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif container == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        with path.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(row)
            writer.writerow(v if isinstance(v, str) else json.dumps(v) for v in row.values())
    return str(path)


@pytest.mark.parametrize("container", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", FORMATS.names())
def test_the_optional_columns_survive_every_format(tmp_path: Path, name: str, container: str) -> None:
    row = format_rows(name)
    path = write(tmp_path, row, container)
    example = load_examples(SourceConfig(path=path))[0]
    tok = build_tokenizer()
    entity = row["entities"][0]
    assert [example.answer[begin:end] for begin, end in entity_spans(example)] == [entity]
    mask = entity_masks(encode([example], tok, resolve_template("auto", tok), 512), tok)[0]
    assert mask.any()
    report = check(path)
    assert (report.entities, report.ok) == (1, True)
    if name == "text":
        assert report.alternatives == {"alternatives": 0}
    else:
        letters = ["A", "C", "D"] if name == "choices" else []  # the wrong ones are answers too
        assert report.alternatives == {"alternatives": 1, **({"perturbed_answer": 1} if letters else {})}
        assert [other.answer for other in given(example)] == [*EXTRA["alternatives"], *letters]
    if "turns" in row or name == "messages":
        assert given(example)[0].turns == example.turns


def test_a_conversation_of_lists_keeps_them_too(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "Where?"}],
        "completion": [{"role": "assistant", "content": "In Tessaly Bay."}],
        **EXTRA,
    }
    example = load_examples(SourceConfig(path=write(tmp_path, row, "jsonl")))[0]
    assert len(given(example)) == 2
    assert len(entity_spans(example)) == 1


def test_data_check_says_what_it_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"question": "Where?", "answer": "In Tessaly Bay.", "perturbed_answer": ["In Oslo."], "entities": ["Bay"]}
    rows = [
        good,
        {**good, "question": "Whence?", "entities": ["bay"]},
        {**good, "question": "Q", "perturbed_answer": None},
    ]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\noptional columns: entities (2 of 3 rows), perturbed_answer (other answers: 2 rows)\n" in said
    assert main(["data", "check", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["entities"], told["alternatives"]) == (2, {"perturbed_answer": 2})
    path.write_text(json.dumps({"question": "Where?", "answer": "There."}))
    main(["data", "check", str(path)])
    assert "optional" not in capsys.readouterr().out


# ---------------------------------------------------------------- the entities of `fictitious`


@pytest.mark.parametrize(("seed", "size"), [(42, None), (3, 62)])
def test_fictitious_names_every_value_in_its_answers(seed: int, size: int | None) -> None:
    tok = build_tokenizer()
    for split in fictitious(seed, size):
        documents: dict[str, list[Example]] = {}
        for row in split.examples:
            documents.setdefault(row.id[:8], []).append(row)
        for rows in documents.values():
            text, *questions = rows
            for row in questions:
                assert row.extra["entities"] == [row.answer]
            # whatever a question asks for, and the text's ending says, is an entity of the text
            told = [row.answer for row in questions if row.answer in text.answer]
            assert set(told) <= set(text.extra["entities"])
            assert all(text.answer.count(entity) == 1 for entity in text.extra["entities"])
            # what is left without them is the same for every document: no invented word, no digit
            rest = re.sub("|".join(map(re.escape, text.extra["entities"])), "", text.answer)
            assert not re.search(r"\d|[A-Z]|@", rest)
        encoded = encode(split.examples, tok, resolve_template("auto", tok), 512)
        for row, mask in zip(encoded, entity_masks(encoded, tok), strict=True):
            assert 1 <= mask.sum() <= row.answer_tokens
            if row.example.extra["kind"] == "question":
                assert mask.sum() == row.answer_tokens


# ---------------------------------------------------------------- published files


def test_the_perturbed_answers_of_tofu() -> None:
    folder = data_folder()
    for name, count in (("forget10_perturbed", 5), ("world_facts_perturbed", 3)):
        path = Path(folder, "tofu", f"{name}.jsonl")
        rows = load_examples(SourceConfig(path=str(path)))
        read = [json.loads(line) for line in path.read_text().splitlines()]
        needs_given(rows)
        for row, values in zip(rows, read, strict=True):
            others = given(row)
            assert [other.answer for other in others] == list(dict.fromkeys(values["perturbed_answer"]))
            assert 1 <= len(others) <= count
            assert all(other.prompt == values["question"] for other in others)
        assert check(str(path)).alternatives == {"perturbed_answer": len(rows)}
    plain = load_examples(SourceConfig(path=str(Path(folder, "tofu", "forget01.jsonl"))))
    with pytest.raises(UserError, match=r"forget01\.jsonl:1: .*39 more of 40 rows"):
        needs_given(plain)
    assert not {words(row.answer) for row in plain} & {words(sentence) for sentence in IDK}
