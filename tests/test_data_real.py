"""Real files of TOFU, LUME and RWKU, where they are at hand: EXPUNGE_TEST_DATA names their folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from expunge.data.check import check
from expunge.data.encode import encode
from expunge.data.load import load_examples, load_splits
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.models.tiny import build_tokenizer
from expunge.recipe import DataConfig, SourceConfig


def data_folder() -> Path:
    """The folder with tofu/, lume/ and rwku/, or a skip that says why."""
    name = os.environ.get("EXPUNGE_TEST_DATA")
    if not name:
        pytest.skip("EXPUNGE_TEST_DATA is not set: it names a folder with tofu/, lume/ and rwku/")
    if not Path(name).is_dir():
        pytest.skip(f"EXPUNGE_TEST_DATA={name} is no folder")
    return Path(name)


@pytest.mark.parametrize(
    ("file", "format_", "rows", "prompt", "answer"),
    [
        ("tofu/forget01.jsonl", "qa", 40, "What gender is author Basil", "Author Basil Mahfouz"),
        ("tofu/retain90.jsonl", "qa", 3600, "Are the details of Jaime", "Yes, Jaime Vasquez"),
        ("tofu/forget10_perturbed.jsonl", "qa", 400, "What does Hsiao Yun-Hwa", "Hsiao Yun-Hwa is part"),
        ("lume/forget_train.jsonl", "lume", 1112, "", ""),
        ("lume/retain_train.jsonl", "lume", 1136, "What is the birth date of Fredericka", "1969-12-21"),
        ("lume/mia/train_member.jsonl", "text", 150, "", ""),
        ("rwku/3_Bruce_Lee/forget_level2.json", "qa", 19, "Where did Bruce Lee open", "Seattle"),
        ("rwku/3_Bruce_Lee/passage.json", "text", 152, "", ""),
    ],
)
def test_published_files_are_read(file: str, format_: str, rows: int, prompt: str, answer: str) -> None:
    path = data_folder() / file
    report = check(str(path))
    assert report.ok, report.errors
    assert (report.format, report.rows) == (format_, rows)
    examples = load_examples(SourceConfig(path=str(path)), "forget")
    assert len(examples) == len({e.id for e in examples}) == rows
    assert examples[1].prompt.startswith(prompt)
    assert examples[1].answer.startswith(answer)
    tok = build_tokenizer()
    for row in encode(examples[:50], tok, resolve_template("raw", tok), 100_000):
        assert tok.decode(row.input_ids[: row.prompt_tokens + row.answer_tokens]) in (
            f"{row.example.prompt} {row.example.answer}",
            f"{row.example.prompt}{row.example.answer}",
        )


def test_tofu_splits_are_disjoint_and_its_full_set_is_not() -> None:
    tofu = data_folder() / "tofu"
    config = {"forget": str(tofu / "forget10.jsonl"), "retain": str(tofu / "retain90.jsonl")}
    splits = load_splits(DataConfig.model_validate({**config, "holdout": str(tofu / "holdout10.jsonl")}), seed=0)
    assert [len(split) for split in splits] == [400, 3600, 400]
    with pytest.raises(UserError, match="are the same row, and 399 more"):
        load_splits(DataConfig.model_validate({**config, "retain": str(tofu / "full.jsonl")}), seed=0)


def test_the_tasks_of_lume_are_counted() -> None:
    report = check(str(data_folder() / "lume" / "forget_val.jsonl"))
    assert set(report.tasks) == {"Task1", "Task2", "Task3"}
    assert sum(report.tasks.values()) == report.rows == 254


@pytest.mark.parametrize("name", ["triviaqa", "truthful", "intro"])
def test_files_of_another_shape_are_refused_with_their_columns(name: str) -> None:
    path = data_folder() / "rwku" / "1_Stephen_King" / f"{name}.json"
    with pytest.raises(UserError, match="no data format has the columns"):
        load_examples(SourceConfig(path=str(path)))
