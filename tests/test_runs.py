"""Atomic files, events, provenance, and the catalogue over many runs."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from expunge.errors import UserError
from expunge.recipe import ModelConfig, load_recipe
from expunge.runs import atomic, provenance
from expunge.runs.catalogue import catalogue, find_runs, main_numbers
from expunge.runs.events import EventLog, read_events
from expunge.runs.store import RunDirectory


@dataclasses.dataclass
class Point:
    x: float
    place: Path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (math.nan, None),
        (-math.inf, None),
        (Path("a/b"), "a/b"),
        ((1, [2.5, "x"]), [1, [2.5, "x"]]),
        ({"b", "a"}, ["a", "b"]),
        ({1: np.float32(0.5), "n": np.int64(3)}, {"1": 0.5, "n": 3}),
        (Point(1.0, Path("p")), {"x": 1.0, "place": "p"}),
        (ModelConfig(id="tiny").model_copy(), {**ModelConfig(id="tiny").model_dump()}),
    ],
)
def test_plain(value, expected):
    assert atomic.plain(value) == expected


@pytest.mark.parametrize("value", [object(), {"a": lambda: 1}, [np.zeros(2)], Point])
def test_plain_refuses_what_has_no_stable_text(value):
    with pytest.raises((TypeError, ValueError)):
        atomic.plain(value)


@pytest.mark.parametrize("old", ["before", None])
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, old, failing):
    file = tmp_path / "f.json"
    if old is not None:
        file.write_text(old)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(UserError, match="no space left"):
        atomic.write_json(file, {"a": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if old is None else ["f.json"])
    assert old is None or file.read_text() == old


def test_json_is_what_every_parser_reads(tmp_path):
    atomic.write_json(tmp_path / "a" / "f.json", {"nan": math.nan, "name": "Zoë", "v": [1, 2.5]})
    text = (tmp_path / "a" / "f.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"nan": None, "name": "Zoë", "v": [1, 2.5]}


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("x")
    atomic.write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_error_that_is_not_about_space_stays_itself(tmp_path):
    with pytest.raises(ValueError, match="other"), atomic.disk_errors(tmp_path):
        raise ValueError("other")


def test_events_are_appended_in_order_and_torn_lines_left_out(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("train", step=1, loss=math.nan)
    with log.path.open("a") as file:
        file.write('{"event": "tor')  # a kill in the middle of a line
    EventLog(log.path).write("note", text="line\nbreak “quoted”")
    events = read_events(log.path)
    assert [event["event"] for event in events] == ["train", "note"]
    assert events[0]["loss"] is None
    assert events[1]["text"] == "line\nbreak “quoted”"
    assert all(event["time"].endswith("+00:00") for event in events)
    assert read_events(tmp_path / "none") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_events_on_a_full_disk():
    with pytest.raises(UserError, match="no space left"):
        EventLog(Path("/dev/full")).write("note", text="x")


def test_digests_are_of_names_and_contents(tmp_path):
    def folder(name, files):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return provenance.folder_digest(tmp_path / name)

    same = folder("a", {"x": "1", "sub/y": "2"})
    assert folder("b", {"sub/y": "2", "x": "1", ".cache/z": "3", "stage.json": "{}"}) == same
    assert folder("c", {"x": "1", "sub/z": "2"}) != same
    assert folder("d", {"x": "1", "sub/y": "3"}) != same
    assert provenance.file_digest(tmp_path / "a" / "x") == hashlib.sha256(b"1").hexdigest()


def test_environment_says_with_what_it_was_made(monkeypatch):
    found = atomic.plain(provenance.environment())
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["pydantic"].count(".") == 2
    assert "missing" not in found["versions"].values()
    assert found["cores"] >= 1
    monkeypatch.setitem(sys.modules, "torch", None)
    assert provenance.environment()["gpu"] is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/expunge", "run", "my recipe.yaml"], "expunge run 'my recipe.yaml'"),
        (["script.py"], "expunge run out/recipe.resolved.yaml -o out"),
    ],
)
def test_the_command_that_makes_the_run_again(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.command_line(Path("out")) == expected


def made_run(path: Path, forget: float | None, **recipe):
    given = {"model": "tiny", "data": {"benchmark": "fictitious"}, "unlearn": [{"name": "u", "method": "npo"}]}
    with RunDirectory(path, load_recipe({**given, **recipe})):
        pass
    if forget is None:
        return
    records = [
        {"variant": variant, "split": split, "metric": metric, "value": value, "ci_low": None, "ci_high": None}
        | {"n": 3, "unscored": 0, "direction": "lower"}
        for metric in ("extraction_strength", "rouge_l_f1")
        for variant, split, value in [
            ("target", "forget", 0.9),
            ("u", "forget", forget),
            ("target", "retain", 0.8),
            ("u", "retain", None),
        ]
    ]
    atomic.write_json(path / "metrics.json", records)


def test_catalogue_over_many_runs(tmp_path):
    made_run(tmp_path / "a", 0.25)
    made_run(tmp_path / "deep" / "b", 0.5, name="b", seed=3)
    made_run(tmp_path / "c", None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("[1]")
    (tmp_path / "c" / "run.json").write_text((tmp_path / "c" / "run.json").read_text().replace('"done"', '"running"'))
    assert len(find_runs([tmp_path, tmp_path / "a"])) == 4
    rows = {Path(row["path"]).name: row for row in main_numbers([tmp_path])}
    assert set(rows) == {"a", "b", "c"}
    assert (rows["a"]["forget_before"], rows["a"]["forget_after"]) == (0.9, 0.25)
    assert (rows["b"]["retain_before"], rows["b"]["retain_after"]) == (0.8, None)
    assert (rows["b"]["seed"], rows["b"]["methods"], rows["b"]["result"]) == (3, ["npo"], "u")
    assert rows["c"]["status"] == "killed"
    assert rows["c"]["forget_after"] is None
    newest_first = [row["started"] for row in main_numbers([tmp_path])]
    assert newest_first == sorted(newest_first, reverse=True)
    best = catalogue([tmp_path]).sql("SELECT min(value) FROM metrics WHERE metric = 'rouge_l_f1'").fetchall()
    assert best == [(0.25,)]


def test_catalogue_of_nothing(tmp_path):
    assert main_numbers([tmp_path]) == []
    with pytest.raises(UserError, match="no folder"):
        main_numbers([tmp_path / "none"])
