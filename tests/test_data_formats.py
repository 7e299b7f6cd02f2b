"""Formats × containers: the same rows come back from every file, and every format's own example is readable."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expunge.data.containers import container_of, read_file
from expunge.data.example import Example
from expunge.data.hub import is_dataset, split_id
from expunge.data.load import load_examples
from expunge.data.registry import FORMATS
from expunge.errors import UserError
from expunge.recipe import SourceConfig

#: texts that a container might damage: scripts, quotes, commas, line breaks, braces, and a decomposed accent
HARD = ("日本語の答え、はい", "مرحبا بالعالم", 'a "quoted", {braced} text', "two\nlines; and\ttab", "cafe\u0301 🦔")

ROWS: dict[str, list[dict[str, Any]]] = {
    "qa": [{"question": f"Q{i}?", "answer": text, "level": "2"} for i, text in enumerate(HARD)],
    "lume": [{"id": f"d{i}qa0", "input": text, "output": f"A{i}", "task": "Task2"} for i, text in enumerate(HARD)],
    "prompt_completion": [{"prompt": f"P{i}", "completion": text} for i, text in enumerate(HARD)],
    "choices": [{"question": text, "choices": [text, "else"], "answer": i % 2} for i, text in enumerate(HARD)],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "said"},
                {"role": "user", "content": f"Q{i}"},
                {"role": "assistant", "content": text},
            ]
        }
        for i, text in enumerate(HARD)
    ],
    "text": [{"text": text} for text in HARD],
    "text_labels": [{"text": f"Q{i}", "labels": text} for i, text in enumerate(HARD)],
}


def expected(name: str, row: dict[str, Any]) -> tuple[Any, ...]:
    """Prompt, answer, turns, task and is_text, written out by hand for each format."""
    if name == "messages":
        turns = (("system", "Be brief."), ("user", "first"), ("assistant", "said"))
        return row["messages"][3]["content"], row["messages"][4]["content"], turns, "", False
    if name == "choices":
        return f"{row['question'].strip()}\nA. {row['choices'][0]}\nB. else", "AB"[row["answer"]], (), "", False
    keys = {"qa": ("question", "answer"), "lume": ("input", "output"), "text_labels": ("text", "labels")}
    if name == "text":
        return "", row["text"], (), "", True
    prompt, answer = keys.get(name, ("prompt", "completion"))
    return row[prompt], row[answer], (), row.get("task", ""), False


def seen(example: Example) -> tuple[Any, ...]:
    return example.prompt, example.answer, example.turns, example.task, example.is_text


def write(path: Path, rows: list[dict[str, Any]], *, bom: bool = False) -> Path:
    """Rows in the container that the file's name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if path.suffix in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
        body = text.getvalue()
    elif path.suffix == ".json":
        body = json.dumps(rows, indent=2, ensure_ascii=False)
    else:
        body = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + body.encode())
    return path


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_format_comes_back_from_every_container(name: str, suffix: str, bom: bool, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS[name], bom=bom)
    for given in (None, name):
        examples = load_examples(SourceConfig(path=str(path), format=given), "forget")
        assert [seen(example) for example in examples] == [expected(name, row) for row in ROWS[name]]
        assert [example.id for example in examples] == [r.get("id", f"forget-{i}") for i, r in enumerate(ROWS[name])]
        assert all(example.source.startswith(str(path)) for example in examples)


def test_the_table_above_holds_every_format() -> None:
    assert sorted(ROWS) == FORMATS.names()


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_example_of_a_format_is_sniffed_as_that_format(name: str, tmp_path: Path) -> None:
    entry = FORMATS.get(name)
    assert entry.sniff(entry.example)
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(entry.example))
    example = load_examples(SourceConfig(path=str(path)))[0]
    assert seen(example) == seen(entry.read(entry.example, 0, ""))
    assert example.source == f"{path}:1"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"a": 1}\n{"a": 2}', "jsonl"),
        (b' \n[{"a": 1}]', "json"),
        (b"a,b\n1,2", "csv"),
        (b"a;b\n1;2", "csv"),
        (b"PAR1....", "parquet"),
    ],
)
def test_a_file_without_a_telling_name_is_known_by_its_content(content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    assert container_of(str(path)) == kind


def test_jsonl_under_the_name_json_and_an_array_under_the_name_jsonl(tmp_path: Path) -> None:
    rows = ROWS["qa"]
    lines, array = tmp_path / "lines.json", tmp_path / "array.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    array.write_text(json.dumps(rows))
    for path in (lines, array):
        assert [e.answer for e in load_examples(SourceConfig(path=str(path)))] == list(HARD)


def test_a_json_array_larger_than_the_window_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": "é{[" * (i % 400)} for i in range(3000)]
    rows[7]["answer"] = "x" * 3_000_000
    path = tmp_path / "big.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    assert [record.values for record in read_file(str(path))] == rows


def test_semicolons_of_a_spreadsheet_and_lines_of_a_quoted_field(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    path.write_text('question;answer\nq1;"a\nb"\n\nq2;a,2\n')
    examples = load_examples(SourceConfig(path=str(path)))
    assert [(e.answer, e.source) for e in examples] == [("a\nb", f"{path}:2"), ("a,2", f"{path}:5")]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "answer": 42}, "42"),
        ({"question": "q", "answer": 2.5}, "2.5"),
        ({"query": "q", "answer": "a"}, "a"),
    ],
)
def test_numbers_become_text_and_query_is_a_question(row: dict[str, Any], answer: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row))
    assert [(e.prompt, e.answer) for e in load_examples(SourceConfig(path=str(path)))] == [("q", answer)]


def test_further_columns_stay_in_extra_and_the_text_is_not_normalised() -> None:
    row = {"question": "q", "answer": " cafe\u0301 ", "paraphrased_answer": "p", "perturbed_answer": ["x", "y"]}
    example = FORMATS.get("qa").read(row, 0, "f:1")
    assert example.answer == " cafe\u0301 "
    assert example.extra == {"paraphrased_answer": "p", "perturbed_answer": ["x", "y"]}


def test_turns_of_prompt_and_completion_are_one_conversation() -> None:
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}],
        "completion": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "thanks"}],
    }
    example = FORMATS.get("prompt_completion").read(row, 0, "f:1")
    assert (example.prompt, example.answer, example.turns) == ("u", "a", (("system", "s"),))
    assert example.extra == {"turns_after": [{"role": "user", "content": "thanks"}]}


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n' * 2 + "broken\n")
    assert len(load_examples(SourceConfig(path=str(path), limit=2))) == 2


def test_a_second_row_of_the_same_id_gets_a_suffix(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    ids = ["x", "x", "x-2", "x", ""]
    path.write_text("\n".join(json.dumps({"id": i, "question": "q", "answer": "a"}) for i in ids))
    named = [e.id for e in load_examples(SourceConfig(path=str(path)), "forget")]
    assert named[0] == "x"
    assert named[2] == "x-2"
    assert named[4] == "forget-4"
    assert len(set(named)) == 5


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("locuslab/TOFU", ("locuslab/TOFU", None, None)),
        ("locuslab/TOFU:forget10", ("locuslab/TOFU", "forget10", None)),
        ("locuslab/TOFU:forget10@train", ("locuslab/TOFU", "forget10", "train")),
        ("owner/name@test", ("owner/name", None, "test")),
    ],
)
def test_the_parts_of_a_hub_id(path: str, parts: tuple[Any, ...]) -> None:
    assert is_dataset(path)
    assert split_id(path) == parts


@pytest.mark.parametrize("path", ["data/forget.jsonl", "forget.csv", "no such", "a/b/c"])
def test_what_is_no_hub_id(path: str) -> None:
    assert not is_dataset(path)


class TestDatasetFolder:
    """The same road as a hub id, without the network."""

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "set"
        folder.mkdir()
        write(folder / "a.jsonl", ROWS["qa"])
        write(folder / "b.jsonl", ROWS["qa"][:2])
        configs = "- config_name: forget10\n  data_files: a.jsonl\n- config_name: retain90\n  data_files: b.jsonl\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
        return folder

    @pytest.mark.parametrize(("suffix", "rows"), [(":forget10", 5), (":retain90", 2), (":forget10@train", 5)])
    def test_config_and_split(self, folder: Path, suffix: str, rows: int) -> None:
        examples = load_examples(SourceConfig(path=f"{folder}{suffix}"))
        assert [e.answer for e in examples] == list(HARD[:rows])
        assert examples[1].source == f"{folder}{suffix} row 2"

    @pytest.mark.parametrize(
        ("suffix", "said", "hint"),
        [
            ("", "has the configs forget10, retain90", "forget10"),
            (":forget11", "no config 'forget11'", "did you mean 'forget10'"),
            (":forget10@trian", "no split 'trian'", "did you mean 'train'"),
        ],
    )
    def test_a_wrong_part(self, folder: Path, suffix: str, said: str, hint: str) -> None:
        with pytest.raises(UserError) as raised:
            load_examples(SourceConfig(path=f"{folder}{suffix}"))
        assert said in raised.value.message
        assert hint in raised.value.hint

    def test_forget_and_retain_files_are_not_poured_together(self, folder: Path) -> None:
        (folder / "README.md").unlink()
        with pytest.raises(UserError, match="several data files"):
            load_examples(SourceConfig(path=str(folder)))

    def test_splits_must_be_chosen(self, tmp_path: Path) -> None:
        folder = tmp_path / "plain"
        folder.mkdir()
        write(folder / "train.jsonl", ROWS["qa"])
        write(folder / "test.jsonl", ROWS["qa"][:1])
        with pytest.raises(UserError, match="has the splits train, test"):
            load_examples(SourceConfig(path=str(folder)))
        assert len(load_examples(SourceConfig(path=f"{folder}@test"))) == 1
