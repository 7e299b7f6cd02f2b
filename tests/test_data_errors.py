"""What a user can get wrong in data files: one sentence with the place, and a hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.data.check import check
from expunge.data.load import load_examples, load_splits
from expunge.errors import UserError
from expunge.recipe import DataConfig, SourceConfig

GOOD = b'{"question": "q", "answer": "a"}\n'

#: file name, content, what the message holds after the file's path, what the hint holds
CASES: dict[str, tuple[str, bytes, str, str]] = {
    "broken JSON": ("f.jsonl", GOOD + b'{"question": "q", "answer" "a"}\n', ":2: broken JSON", "quotes, commas"),
    "pretty-printed object": ("f.json", b'{\n "question": "q"\n}', ":1: broken JSON", "one whole JSON object"),
    "list as a row": ("f.jsonl", GOOD + b"[1]\n", ":2: the row is a list", "data check"),
    "empty answer": ("f.jsonl", GOOD + GOOD + b'{"question": "q", "answer": " \\n"}', ":3: empty answer", "data check"),
    "empty question": ("f.jsonl", b'{"question": "", "answer": "a"}', ":1: empty question", "data check"),
    "null": ("f.jsonl", GOOD + b'{"question": "q", "answer": null}', ":2: answer is null", "data check"),
    "list as answer": (
        "f.jsonl",
        b'{"question": "q", "answer": ["a"]}',
        ":1: answer is a list, not text",
        "data check",
    ),
    "true as answer": ("f.jsonl", b'{"question": "q", "answer": true}', ":1: answer is true/false", "data check"),
    "missing column": (
        "f.jsonl",
        GOOD + b'{"question": "q", "anwser": "a"}',
        ":2: no column 'answer' (did you mean 'anwser'?)",
        "rename",
    ),
    "mixed columns": ("f.jsonl", GOOD + b'{"prompt": "q", "completion": "a"}', ":2: no column 'question'", "split it"),
    "no format": (
        "f.jsonl",
        b'{"question": "q", "anwser": "a"}',
        ":1: no data format has the columns question, anwser",
        "'answer' by the column 'anwser'",
    ),
    "alpaca": ("f.jsonl", b'{"instruction": "i", "input": "q", "output": "a"}', ":1: no data format", "format"),
    "two formats": (
        "f.jsonl",
        b'{"question": "q", "answer": "a", "prompt": "p", "completion": "c"}',
        ":1: the columns",
        "say which",
    ),
    "latin-1": (
        "f.jsonl",
        GOOD + '{"question": "q", "answer": "é"}'.encode("latin-1"),
        ":2: not UTF-8 text (byte 0xe9)",
        "iconv",
    ),
    "latin-1 in an array": (
        "f.json",
        b'[\n{"question": "q",\n"answer": "\xe9"}]',
        ":3: not UTF-8 text (byte 0xe9)",
        "iconv",
    ),
    "UTF-16": ("f.jsonl", "{}".encode("utf-16"), ":1: not UTF-8 text but UTF-16", "iconv"),
    "latin-1 in CSV": ("f.csv", b"question,answer\nq,a\nq,\xe9\n", ":3: not UTF-8 text (byte 0xe9)", "iconv"),
    "empty file": ("f.jsonl", b"", " is empty", "JSONL"),
    "blank file": ("f.jsonl", b"\n \n", " is empty", "JSONL"),
    "empty array": ("f.json", b"[]", " has no rows", "list formats"),
    "header alone": ("f.csv", b"question,answer\n", " has no rows", "list formats"),
    "broken array": ("f.json", b'[{"question": "q", "answer": "a"},\n {"question": "q"', ":2: broken JSON", "brackets"),
    "text after an array": ("f.json", b'[{"question": "q", "answer": "a"}]\nmore', ":2: broken JSON", "brackets"),
    "missing in an array": (
        "f.json",
        b'[{"question": "q", "answer": "a"}, {"question": "q"}]',
        " row 2: no column 'answer'",
        "rename",
    ),
    "too many fields": (
        "f.csv",
        b"question,answer\nq,a\nq,a,b\n",
        ":3: 3 fields, but the header has 2",
        "double quotes",
    ),
    "open quote": ("f.csv", b'question,answer\nq,a\nq,"a\n', ":3: broken CSV", "double quotes"),
    "column twice": ("f.csv", b"answer,answer\nq,a\n", ":1: two columns are called 'answer'", "data check"),
    "empty field": ("f.csv", b"question,answer\nq,\n", ":2: empty answer", "data check"),
    "no Parquet": ("f.parquet", b"nothing", " is not a Parquet file", ".parquet"),
    "broken Parquet": ("f.parquet", b"PAR1nothingPAR1", " is a broken Parquet file", "write"),
    "compressed": ("f.jsonl.gz", b"\x1f\x8b\x08", " is compressed", "gunzip"),
    "prose": ("f.txt", b"Once upon a time\nthere was", ":1: neither JSON nor a CSV header", "JSONL"),
    "no assistant turn": (
        "f.jsonl",
        b'{"messages": [{"role": "user", "content": "q"}]}',
        ":1: no assistant turn",
        "data check",
    ),
    "assistant first": (
        "f.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a"}]}',
        ":1: the last assistant turn does not answer",
        "data check",
    ),
    "image": (
        "f.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        ":1: turn 1 holds something other than text",
        "data check",
    ),
    "turn without role": (
        "f.jsonl",
        b'{"messages": [{"content": "q"}]}',
        ":1: turn 1 has no role and content",
        "data check",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_gets_one_sentence_with_its_place_and_a_hint(case: str, tmp_path: Path) -> None:
    name, content, said, hint = CASES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_examples(SourceConfig(path=str(path)))
    assert raised.value.message.startswith(f"{path}{said}")
    assert "\n" not in raised.value.message
    assert hint in raised.value.hint
    report = check(str(path))
    assert not report.ok
    assert report.errors[0] in raised.value.message
    assert report.hint == raised.value.hint


def test_five_rows_are_told_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes((GOOD + b"{\n" + b'{"question": "q", "answer": ""}\n') * 4)
    with pytest.raises(UserError) as raised:
        load_examples(SourceConfig(path=str(path)))
    message = raised.value.message
    assert message.startswith(f"{path}:2: broken JSON")
    assert "line 3: empty answer" in message
    assert "line 8: broken JSON" in message
    assert "line 9" not in message
    assert message.endswith("and 3 more")


@pytest.mark.parametrize(
    ("source", "said", "hint"),
    [
        ({"path": "{dir}/forgte.jsonl"}, "forgte.jsonl: no such file", "did you mean '{dir}/forget.jsonl'"),
        ({"path": "{dir}/none/f.jsonl"}, "no such file", "there is no folder"),
        ({"path": "{dir}/empty"}, "a folder without data files", "path of a file"),
        ({"path": "{dir}/forget.jsonl", "format": "qaa"}, "unknown data format 'qaa'", "did you mean 'qa'"),
        (
            {"path": "{dir}/forget.jsonl", "format": "lume"},
            "forget.jsonl:1: format 'lume' needs the column input and output",
            "'qa'",
        ),
        ({"path": "{dir}/forget.jsonl", "format": "text"}, "format 'text' needs the column text", "'qa'"),
    ],
)
def test_a_source_that_does_not_fit(source: dict[str, str], said: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "forget.jsonl").write_bytes(GOOD)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as raised:
        load_examples(SourceConfig(**{key: value.format(dir=tmp_path) for key, value in source.items()}))
    assert said in raised.value.message
    assert hint.format(dir=tmp_path) in raised.value.hint


def rows(path: Path, *questions: str) -> str:
    path.write_text("".join(json.dumps({"question": q, "answer": "a"}) + "\n" for q in questions))
    return str(path)


@pytest.mark.parametrize("other", ["retain", "retain_unseen", "holdout"])
def test_a_row_to_forget_may_stand_on_no_other_side(other: str, tmp_path: Path) -> None:
    forget = rows(tmp_path / "forget.jsonl", "q1", "q2", "q3")
    second = rows(tmp_path / "other.jsonl", "q9", " q3 ", "q2")
    with pytest.raises(UserError) as raised:
        load_splits(DataConfig.model_validate({"forget": forget, other: second}), seed=0)
    assert raised.value.message == f"{forget}:3 (forget) and {second}:2 ({other}) are the same row, and 1 more"
    assert "remove them" in raised.value.hint


def test_the_same_question_with_another_answer_is_another_row(tmp_path: Path) -> None:
    forget = rows(tmp_path / "forget.jsonl", "q1")
    retain = tmp_path / "retain.jsonl"
    retain.write_text('{"question": "q1", "answer": "b"}')
    assert len(load_splits(DataConfig.model_validate({"forget": forget, "retain": str(retain)}), 0)["retain"]) == 1


def test_splits_have_roles_ids_and_an_order(tmp_path: Path) -> None:
    names = ["forget", "retain", "retain_unseen", "holdout", "facts"]
    paths = {name: rows(tmp_path / f"{name}.jsonl", f"{name} 0", f"{name} 1") for name in names}
    config = DataConfig.model_validate(
        {"splits": {"facts": {"path": paths["facts"], "limit": 1}}, **{name: paths[name] for name in names[:4]}}
    )
    splits = load_splits(config, seed=0)
    assert [(s.name, s.role, len(s)) for s in splits] == [
        ("forget", "forget", 2),
        ("retain", "retain", 2),
        ("retain_unseen", "retain", 2),
        ("holdout", "holdout", 2),
        ("facts", "utility", 1),
    ]
    assert [e.id for e in splits.examples(["forget", "facts"])] == ["forget-0", "forget-1", "facts-0"]


def test_retain_may_be_absent_and_forget_may_not(tmp_path: Path) -> None:
    splits = load_splits(DataConfig.model_validate({"forget": rows(tmp_path / "f.jsonl", "q")}), seed=0)
    assert [split.name for split in splits] == ["forget"]
    with pytest.raises(UserError, match=r"data\.forget"):
        load_splits(DataConfig(), seed=0)


def test_a_further_split_cannot_take_a_name(tmp_path: Path) -> None:
    path = rows(tmp_path / "f.jsonl", "q")
    with pytest.raises(UserError, match=r"data\.splits\.retain"):
        load_splits(DataConfig.model_validate({"forget": path, "splits": {"retain": {"path": path}}}), seed=0)


class TestCheck:
    def test_a_sound_file(self, tmp_path: Path) -> None:
        path = tmp_path / "f.jsonl"
        table = [("q", "a"), ("qq", "aaaa"), (" q", "a ")]
        path.write_text("".join(json.dumps({"question": q, "answer": a, "task": "t"}) + "\n" for q, a in table))
        report = check(str(path))
        assert report.ok
        assert (report.format, report.columns, report.rows) == ("qa", ["question", "answer", "task"], 3)
        assert report.tasks == {"t": 3}
        assert report.duplicates == 1
        assert report.duplicate_places == [f"{path}:3 repeats {path}:1"]
        answer = report.lengths["answer"]
        assert (answer.unit, answer.least, answer.median, answer.most) == ("characters", 1, 2.0, 4)
        assert [e.answer for e in report.examples] == ["a", "aaaa", "a "]
        assert json.dumps(report.as_dict())

    def test_every_problem_is_told_up_to_twenty(self, tmp_path: Path) -> None:
        path = tmp_path / "f.jsonl"
        path.write_bytes(GOOD + b'{"question": "q", "answer": ""}\n' * 15 + b"{\n" * 15 + GOOD)
        report = check(str(path))
        assert (report.rows, report.good_rows, report.bad_rows, report.empty) == (32, 2, 30, 15)
        assert len(report.errors) == 20
        assert report.errors[0] == f"{path}:2: empty answer"
        assert report.errors[19].startswith(f"{path}:21: broken JSON")

    @pytest.mark.parametrize(("path", "format_"), [("none.jsonl", None), (__file__, "qaa")])
    def test_nothing_to_examine(self, path: str, format_: str | None) -> None:
        with pytest.raises(UserError):
            check(path, format_)
