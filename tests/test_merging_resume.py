"""What a merge leaves behind when it is killed, stopped or fails, and what the next one makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from expunge.errors import UserError
from expunge.merging import run, writer
from expunge.merging.registry import MERGES
from expunge.merging.run import merge_models
from expunge.merging.ties import ties
from merging_models import reconfigure, rewrite, weights

pytestmark = pytest.mark.usefixtures("quick_disk")


def fail_after(count):
    calls = [0]

    def function(deltas, weights, density, **parameters):
        calls[0] += 1
        if calls[0] > count:
            raise RuntimeError("the lights went out")
        return ties(deltas, weights, density, **parameters)

    return function


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_failure_midway_leaves_nothing(three, monkeypatch, count):
    entry = MERGES.get("ties")
    monkeypatch.setitem(MERGES._entries, "ties", type(entry)(**{**vars(entry), "function": fail_after(count)}))
    before = sorted(path.name for path in three.iterdir())
    with pytest.raises(RuntimeError, match="lights"):
        merge_models([three / "a", three / "b"], three / "out", base=three / "base")
    assert sorted(path.name for path in three.iterdir()) == before


def test_a_failure_leaves_an_earlier_result_as_it_was(three, monkeypatch):
    merge_models([three / "a"], three / "out", base=three / "base")
    before = {file.name: file.read_bytes() for file in (three / "out").iterdir()}
    monkeypatch.setattr(run, "model_card", lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_models([three / "b"], three / "out", base=three / "base")
    assert {file.name: file.read_bytes() for file in (three / "out").iterdir()} == before
    monkeypatch.undo()
    merge_models([three / "b"], three / "out", base=three / "base")
    assert (three / "out" / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base", "out"]


SHARD = 12_000  # bytes: the three models are then written in a dozen shards

KILLED = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from expunge.merging.run import merge_models
    from expunge.merging.writer import CheckpointWriter
    write, calls = CheckpointWriter.write, []
    def dying(*arguments):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), 9)
        write(*arguments)
    CheckpointWriter.write = dying
    folder = Path(sys.argv[1])
    merge_models(
        [folder / "a", folder / "b"], folder / "out", base=folder / "base", density=0.8, shard_bytes=int(sys.argv[2])
    )
""")


def killed(folder):
    """A merge that was killed when it had written eleven tensors; gives the names of the shards it had finished."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(SHARD)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -9
    assert not (folder / "out").exists()
    return list(json.loads((folder / "out.partial" / "merge.json").read_text())["shards"])


def again(folder, name="out", **changes):
    """The merge that was killed, or one like it."""
    settings = {"density": 0.8, "shard_bytes": SHARD} | changes
    return merge_models([folder / "a", folder / "b"], folder / name, base=folder / "base", **settings)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def failing(error, after):
    """A writer's `write` that raises after so many tensors."""
    write, calls = writer.CheckpointWriter.write, []

    def function(self, *arguments):
        calls.append(1)
        if len(calls) > after:
            raise error
        write(self, *arguments)

    return function


def interrupted(folder):
    """As `killed`, by Ctrl-C and in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "write", failing(KeyboardInterrupt(), 11))
        with pytest.raises(KeyboardInterrupt):
            again(folder)
    return list(json.loads((folder / "out.partial" / "merge.json").read_text())["shards"])


@pytest.fixture
def written(monkeypatch):
    """Names of the tensors that are written from here on."""
    names, write = [], writer.CheckpointWriter.write

    def noted(self, name, *rest):
        names.append(name)
        write(self, name, *rest)

    monkeypatch.setattr(writer.CheckpointWriter, "write", noted)
    return names


def test_a_killed_merge_leaves_no_final_name_and_the_next_one_keeps_its_finished_shards(three, written):
    again(three, "whole")
    every = list(written)
    written.clear()
    finished = killed(three)
    assert len(finished) > 2
    before = {name: (three / "out.partial" / name).stat().st_mtime_ns for name in finished}
    seen = []
    result = again(three, progress=lambda done, total: seen.append((done, total)))
    assert 0 < len(written) < len(every)
    assert written == every[len(every) - len(written) :]
    assert {name: (three / "out" / name).stat().st_mtime_ns for name in finished} == before
    assert files(three / "out") == files(three / "whole")  # the record and its statistics, too
    assert result.statistics == json.loads((three / "whole" / "merge.json").read_text())["statistics"]
    assert seen[-1][0] == seen[-1][1] == sum(tensor.numel() for tensor in weights(three / "out").values())
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base", "out", "whole"]


def flip_a_bit(folder, finished):
    file = folder / "out.partial" / finished[0]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def touch_an_input(folder, finished):
    rewrite(folder / "b", lambda tensors: tensors["model.norm.weight"].add_(1.0))


OTHER = {  # what is different now, what happened to files, and whether all must be written again
    "density": ({"density": 0.5}, None, True),
    "weights": ({"weights": [1.0, 0.5]}, None, True),
    "method": ({"method": "linear"}, None, True),
    "shards": ({"shard_bytes": SHARD * 2}, None, True),
    "input": ({}, touch_an_input, True),
    "base config": ({}, lambda folder, _: reconfigure(folder / "base" / "config.json", rope_theta=5.0), True),
    "a shard is damaged": ({}, flip_a_bit, False),
    "a shard is gone": ({}, lambda folder, finished: (folder / "out.partial" / finished[-1]).unlink(), False),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_another_merge_left_is_not_kept(three, written, what):
    changes, damage, all_again = OTHER[what]
    finished = interrupted(three)
    written.clear()
    if damage is not None:
        damage(three, finished)
    again(three, **changes)
    resumed = len(written)
    written.clear()
    again(three, "whole", **changes)
    assert (resumed == len(written)) == all_again
    assert files(three / "out") == files(three / "whole")


def test_all_shards_may_be_finished(three, monkeypatch, written):
    def interrupted(record):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "model_card", interrupted)
    settings = {"parameters": {"scope": "model", "scale_match": "model"}}
    with pytest.raises(KeyboardInterrupt):
        again(three, **settings)
    monkeypatch.undo()
    seen = []
    again(three, progress=lambda *both: seen.append(both), **settings)
    again(three, "whole", **settings)
    assert files(three / "out") == files(three / "whole")
    assert seen == [(seen[0][1],) * 2]


@pytest.mark.parametrize(
    ("error", "after", "stays"),
    [
        (KeyboardInterrupt(), 11, True),
        (KeyboardInterrupt(), 0, False),  # nothing is finished
        (SystemExit(143), 11, True),
        (UserError("no"), 11, False),
        (MemoryError(), 11, False),
    ],
)
def test_ctrl_c_leaves_the_finished_shards_and_a_mistake_leaves_nothing(three, monkeypatch, error, after, stays):
    monkeypatch.setattr(writer.CheckpointWriter, "write", failing(error, after))
    with pytest.raises(type(error)):
        again(three)
    assert (three / "out.partial").exists() == stays
    if stays:
        shards = {file.name for file in (three / "out.partial").glob("*.safetensors")}
        assert shards == set(json.loads((three / "out.partial" / "merge.json").read_text())["shards"])
    assert not (three / "out").exists()
    monkeypatch.undo()
    again(three)
    again(three, "whole")
    assert files(three / "out") == files(three / "whole")


def test_the_room_that_an_unfinished_merge_takes_counts_as_free(three, monkeypatch):
    interrupted(three)
    there = sum(file.stat().st_size for file in (three / "out.partial").iterdir())
    needed = (three / "base" / "model.safetensors").stat().st_size + writer._SLACK

    class Nearly:
        free = needed - there // 2

    monkeypatch.setattr(writer.shutil, "disk_usage", lambda place: Nearly)
    again(three)
    assert (three / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("parameters", [{}, {"scope": "model"}, {"scale_match": "model"}])
def test_the_number_of_threads_changes_no_byte(three, monkeypatch, parameters):
    for count in (1, 4):
        monkeypatch.setattr(run, "processors", lambda count=count: count)
        again(three, str(count), parameters=parameters)
    assert files(three / "1") == files(three / "4")


@pytest.mark.parametrize(("device", "sentence"), [("gpu", "gpu is no device"), ("cuda", "no GPU that torch can use")])
def test_devices_are_checked_first(three, monkeypatch, device, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=sentence) as caught:
        again(three, device=device)
    assert caught.value.hint


def test_an_empty_folder_is_a_place_even_if_one_stands_in_it(three, monkeypatch):
    (three / "out").mkdir()
    monkeypatch.chdir(three / "out")
    merge_models([three / "a"], Path("."), base="../base")
    assert (three / "out" / "model.safetensors").is_file()
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base", "out"]


def test_two_merges_into_one_folder_do_not_mix(three):
    from expunge.runs.lock import FolderLock

    (three / "out.partial").mkdir()
    lock = FolderLock(three / "out.partial")
    try:
        with pytest.raises(UserError, match="in use by another"):
            merge_models([three / "a"], three / "out", base=three / "base")
    finally:
        lock.release()
    merge_models([three / "a"], three / "out", base=three / "base")


def test_a_full_disk_is_a_sentence_and_nothing_is_left(three, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr(writer.shutil, "disk_usage", lambda place: Full)
    with pytest.raises(UserError, match=r"not enough disk for .*out: .* GB are needed"):
        merge_models([three / "a"], three / "out", base=three / "base")
    monkeypatch.undo()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", no_space)
    with pytest.raises(UserError, match="no space left"):
        merge_models([three / "a"], three / "out", base=three / "base")
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base"]
