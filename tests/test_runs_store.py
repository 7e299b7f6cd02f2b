"""The run directory: stages appear whole, survive kills, are not done twice, and say what went wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from expunge.errors import UserError
from expunge.recipe import load_recipe
from expunge.runs.events import read_events
from expunge.runs.lock import is_running
from expunge.runs.provenance import folder_digest
from expunge.runs.store import RunDirectory

RECIPE = {"name": "t", "model": "tiny", "data": {"benchmark": "fictitious"}, "unlearn": [{}]}


def recipe(**changes):
    return load_recipe({**RECIPE, **changes})


def product(text="made", calls=None, name="model.safetensors"):
    """Work that writes one file into `out` and counts its calls."""

    def work(folder: Path):
        if calls is not None:
            calls.append(sorted(entry.name for entry in folder.iterdir()))
        (folder / "out").mkdir()
        (folder / "out" / name).write_text(text)
        return {"text": text}

    return work


def run_json(path: Path) -> dict:
    return json.loads((path / "run.json").read_text())


def test_a_stage_appears_and_is_not_done_twice(tmp_path):
    calls: list = []
    with RunDirectory(tmp_path / "r", recipe()) as run:
        first = run.stage("unlearn/over", "models/over", {"lr": 1.0}, product("a", calls))
        assert not run.skipped_all
    with RunDirectory(tmp_path / "r", recipe()) as run:
        second = run.stage("unlearn/over", "models/over", {"lr": 1.0}, product("b", calls))
        assert run.skipped_all
    assert calls == [[]]
    assert (first.skipped, second.skipped) == (False, True)
    assert first.digest == second.digest
    assert second.outputs == {"text": "a"}
    assert (second.path / "model.safetensors").read_text() == "a"
    assert second.path == tmp_path / "r" / "models" / "over"
    assert not (tmp_path / "r" / ".work").exists()
    record = run_json(tmp_path / "r")
    assert record["status"] == "done"
    assert record["stages"]["unlearn/over"]["skipped"] is True
    assert len(record["recipe_digest"]) == 64
    assert record["environment"]["versions"]["torch"]


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({}, False),
        ({"lr": 2.0}, True),
        ({"rows": {"forget": "abc"}}, True),
    ],
)
def test_only_changed_inputs_are_redone(tmp_path, change, redone):
    inputs = {"lr": 1.0, "rows": {"forget": "ab"}}
    with RunDirectory(tmp_path / "r", recipe()) as run:
        run.stage("a", "models/a", inputs, product("old"))
    with RunDirectory(tmp_path / "r", recipe(seed=1)) as run:
        result = run.stage("a", "models/a", inputs | change, product("new"))
    assert result.skipped is not redone
    assert (result.path / "model.safetensors").read_text() == ("new" if redone else "old")


def test_the_old_target_stands_until_the_new_one_is_ready(tmp_path):
    with RunDirectory(tmp_path / "r", recipe()) as run:
        old = run.stage("a", "models/a", {"v": 1}, product("old")).path / "model.safetensors"

        def fails(folder: Path):
            (folder / "out").mkdir()
            assert old.read_text() == "old"
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            run.stage("a", "models/a", {"v": 2}, fails)
        assert old.read_text() == "old"
        assert run.stage("a", "models/a", {"v": 1}, product("again")).skipped


@pytest.mark.parametrize("damage", ["missing", "shorter", "record"])
def test_a_damaged_target_is_made_again(tmp_path, damage):
    with RunDirectory(tmp_path / "r", recipe()) as run:
        place = run.stage("a", "models/a", {}, product("whole")).path
        file = place / "model.safetensors"
        {
            "missing": file.unlink,
            "shorter": lambda: file.write_text("who"),
            "record": lambda: (place / "stage.json").write_text("{"),
        }[damage]()
        assert not run.stage("a", "models/a", {}, product("whole")).skipped
        assert file.read_text() == "whole"


def test_a_card_may_be_edited_afterwards(tmp_path):
    with RunDirectory(tmp_path / "r", recipe()) as run:
        place = run.stage("a", "model", {}, product("x", name="README.md")).path
        (place / "README.md").write_text("another text")
        assert run.stage("a", "model", {}, product("y", name="README.md")).skipped


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (UserError("the loss is not finite", "lower lr"), "failed", "the loss is not finite"),
        (ZeroDivisionError("x"), "failed", "ZeroDivisionError: x"),
    ],
)
def test_what_ended_a_stage_is_recorded_and_its_work_folder_kept(tmp_path, error, status, sentence):
    seen = []

    def stops(folder: Path):
        (folder / "checkpoint-20").mkdir()
        (folder / "out").mkdir()
        raise error

    def goes_on(folder: Path):
        seen.extend(sorted(entry.name for entry in folder.iterdir()))
        (folder / "out").mkdir()

    with pytest.raises(type(error)), RunDirectory(tmp_path / "r", recipe()) as run:
        run.stage("unlearn/a", "models/a", {"v": 1}, stops)
    record = run_json(tmp_path / "r")
    assert (record["status"], record["error"]) == (status, sentence)
    assert record["stages"]["unlearn/a"]["status"] == status
    assert not (tmp_path / "r" / "models").exists()
    with RunDirectory(tmp_path / "r", recipe()) as run:
        run.stage("unlearn/a", "models/a", {"v": 1}, goes_on)
    assert seen == ["checkpoint-20"], "the half of a product is removed, checkpoints stay"
    record = run_json(tmp_path / "r")
    assert record["status"] == "done"
    assert "error" not in record
    stages = [event["status"] for event in read_events(tmp_path / "r" / "events.jsonl") if event["event"] == "stage"]
    assert stages == ["start", status, "start", "done"]


def test_other_inputs_get_another_work_folder_and_stale_ones_go(tmp_path):
    def stops(folder: Path):
        (folder / "checkpoint").mkdir()
        raise KeyboardInterrupt

    with RunDirectory(tmp_path / "r", recipe()) as run:
        for stage in ("a", "a-b"):
            with pytest.raises(KeyboardInterrupt):
                run.stage(stage, f"models/{stage}", {"v": 1}, stops)
        calls: list = []
        run.stage("a", "models/a", {"v": 2}, product("x", calls))
        assert calls == [[]]
        left = [folder.name for folder in (tmp_path / "r" / ".work").iterdir()]
    assert len(left) == 1
    assert left[0].startswith("a-b-"), "the work of another stage is not touched"


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from expunge.recipe import load_recipe
    from expunge.runs.store import RunDirectory
    recipe = {"name": "t", "model": "tiny", "data": {"benchmark": "fictitious"}, "unlearn": [{}]}
    run = RunDirectory(Path(sys.argv[1]), load_recipe(recipe))
    def work(folder):
        (folder / "checkpoint").write_text("20")
        (folder / "out").mkdir()
        (folder / "out" / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)
    run.stage("a", "models/a", {"v": 1}, work)
"""


def test_a_kill_loses_nothing_that_was_checkpointed(tmp_path):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "r")], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert run_json(tmp_path / "r")["status"] == "running"
    assert not is_running(tmp_path / "r")
    assert not (tmp_path / "r" / "models").exists()
    calls: list = []
    with RunDirectory(tmp_path / "r", recipe()) as run:
        result = run.stage("a", "models/a", {"v": 1}, product("whole", calls))
    assert calls == [["checkpoint"]]
    assert sorted(entry.name for entry in result.path.iterdir()) == ["model.safetensors", "stage.json"]


def test_killed_between_the_last_write_and_the_rename_only_the_rename_is_left(tmp_path, monkeypatch):
    from expunge.runs import atomic

    with monkeypatch.context() as patch:

        def stopped(*_):
            raise KeyboardInterrupt

        patch.setattr(atomic, "publish", stopped)
        with pytest.raises(KeyboardInterrupt), RunDirectory(tmp_path / "r", recipe()) as run:
            run.stage("a", "models/a", {}, product("whole"))
    calls: list = []
    with RunDirectory(tmp_path / "r", recipe()) as run:
        assert run.stage("a", "models/a", {}, product("again", calls)).outputs == {"text": "whole"}
    assert calls == []
    assert (tmp_path / "r" / "models" / "a" / "model.safetensors").read_text() == "whole"


def test_one_process_at_a_time(tmp_path):
    run = RunDirectory(tmp_path / "r", recipe())
    assert is_running(tmp_path / "r")
    with pytest.raises(UserError, match=rf"in use by another expunge process \(pid {os.getpid()}\)"):
        RunDirectory(tmp_path / "r", recipe())
    run.close()
    assert not is_running(tmp_path / "r")
    RunDirectory(tmp_path / "r", recipe()).close()


def foreign_file(path: Path):
    path.write_text("a file")


def foreign_folder(path: Path):
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def foreign_record(path: Path):
    path.mkdir()
    (path / "run.json").write_text('{"experiment": 3}')


def broken_record(path: Path):
    path.mkdir()
    (path / "run.json").write_text('{"schema": ')


def newer_record(path: Path):
    path.mkdir()
    (path / "run.json").write_text('{"schema": "expunge.run/9"}')


def below_a_file(path: Path):
    path.parent.rmdir()
    path.parent.write_text("a file")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (foreign_file, "is a file, not a folder"),
        (foreign_folder, r"holds something else \(thesis.tex\)"),
        (foreign_record, "is not a run of expunge"),
        (broken_record, "is damaged"),
        (newer_record, "of another version"),
        (below_a_file, "can't be made"),
    ],
)
def test_a_folder_that_is_not_a_run_is_refused_and_left_as_it_was(tmp_path, make, sentence):
    place = tmp_path / "inner" / "r"
    place.parent.mkdir()
    make(place)
    before = folder_digest(tmp_path)
    with pytest.raises(UserError, match=sentence) as refused:
        RunDirectory(place, recipe())
    assert "-o" in refused.value.hint
    assert folder_digest(tmp_path) == before


def test_an_empty_folder_and_one_killed_at_birth_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty", recipe()).close()
    (tmp_path / "born").mkdir()
    (tmp_path / "born" / ".lock").write_text("1")
    (tmp_path / "born" / ".run.json.aa.tmp").write_text("{")
    RunDirectory(tmp_path / "born", recipe()).close()
    assert not (tmp_path / "born" / ".run.json.aa.tmp").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_no_half_product(tmp_path, error):
    def fills(folder: Path):
        (folder / "checkpoint").mkdir()
        (folder / "out").mkdir()
        (folder / "out" / "model.safetensors").write_text("half")
        raise error

    with (
        pytest.raises(UserError, match="no space left on the disk") as full,
        RunDirectory(tmp_path / "r", recipe()) as run,
    ):
        run.stage("a", "models/a", {}, fills)
    assert full.value.__cause__ is error
    assert not (tmp_path / "r" / "models").exists()
    work = next((tmp_path / "r" / ".work").iterdir())
    assert [entry.name for entry in work.iterdir()] == ["checkpoint"]
    assert run_json(tmp_path / "r")["status"] == "failed"


def test_a_library_that_hides_the_errno_is_seen_through_the_disk(tmp_path, monkeypatch):
    def writes(folder: Path):
        raise RuntimeError("unexpected pos 64 vs 0")

    with RunDirectory(tmp_path / "r", recipe()) as run:
        with pytest.raises(RuntimeError):
            run.stage("a", "models/a", {}, writes)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
        with pytest.raises(UserError, match="no space left"):
            run.stage("a", "models/a", {}, writes)


def test_when_even_the_record_cannot_be_written_the_first_error_is_told(tmp_path, monkeypatch):
    def fills(folder: Path):
        (folder / "checkpoint").mkdir()

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        raise UserError("the first error")

    with pytest.raises(UserError, match="the first error"), RunDirectory(tmp_path / "r", recipe()) as run:
        run.stage("a", "models/a", {}, fills)
    assert run_json(tmp_path / "r")["status"] == "running", "the last record that could be written, whole"


def test_another_recipe_forgets_what_the_former_recorded(tmp_path):
    with RunDirectory(tmp_path / "r", recipe()) as run:
        run.record(models={"over": {"digest": "a"}}, data={"forget": {"rows": 1}})
        run.record(models={"under": {"digest": "b"}})
        run.note("3 rows were cut")
        run.note("3 rows were cut")
        run.stage("a", "models/a", {}, product())
    record = run_json(tmp_path / "r")
    assert record["models"] == {"over": {"digest": "a"}, "under": {"digest": "b"}}
    assert record["notes"] == ["3 rows were cut"]
    with RunDirectory(tmp_path / "r", recipe()):
        assert run_json(tmp_path / "r")["models"], "the same recipe keeps it"
    with RunDirectory(tmp_path / "r", recipe(seed=7)):
        record = run_json(tmp_path / "r")
    assert (record["models"], record["data"], record["stages"], record["notes"]) == ({}, {}, {}, [])
    assert record["seed"] == 7
    assert load_recipe(tmp_path / "r" / "recipe.resolved.yaml") == recipe(seed=7)


@pytest.mark.parametrize("target", ["", "/tmp/x", "../x", "models/../../x", ".work/x"])
def test_a_target_outside_the_run_is_our_bug(tmp_path, target):
    with RunDirectory(tmp_path / "r", recipe()) as run, pytest.raises(ValueError, match="not inside"):
        run.stage("a", target, {}, product())


def test_work_without_a_product_is_our_bug(tmp_path):
    with pytest.raises(RuntimeError, match="no folder 'out'"), RunDirectory(tmp_path / "r", recipe()) as run:
        run.stage("a", "models/a", {}, lambda folder: None)


def test_inputs_must_have_the_same_digest_in_every_process(tmp_path):
    with RunDirectory(tmp_path / "r", recipe()) as run, pytest.raises(TypeError, match="not plain data"):
        run.stage("a", "models/a", {"model": object()}, product())
