"""The main job end to end on `tiny`: its outcome, its second run, a kill in the middle, and two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from expunge.metrics.base import METRICS
from expunge.runs.events import read_events
from expunge.runs.provenance import file_digest
from expunge.scoring.tables import RECORD_KEYS

EXPUNGE = [sys.executable, "-m", "expunge.cli.app"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
VARIANTS = ["original", "target", "over", "under", "merged", "reference"]
SPLITS = ["forget", "retain", "retain_unseen", "holdout"]


def expunge(*arguments: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*launcher, *EXPUNGE[1 if launcher else 0 :], *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny demo."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    done = expunge("demo", "--tiny", "-o", str(folder))
    assert done.returncode == 0, done.stderr
    assert str(folder / "report.html") in done.stdout
    return folder


def value(folder: Path, variant: str, split: str, metric: str = "extraction_strength") -> float:
    records = json.loads((folder / "metrics.json").read_text())
    found = [r for r in records if (r["variant"], r["split"], r["metric"]) == (variant, split, metric)]
    assert len(found) == 1
    return float(found[0]["value"])


def stages(folder: Path) -> dict[str, str]:
    """The last status of each stage in events.jsonl."""
    return {e["stage"]: e["status"] for e in read_events(folder / "events.jsonl") if e["event"] == "stage"}


def test_the_merged_model_forgets_and_keeps(demo: Path) -> None:
    reference = value(demo, "reference", "forget")
    assert value(demo, "target", "forget") >= 0.8
    assert value(demo, "original", "forget") < 0.1
    assert value(demo, "merged", "forget") <= max(0.15, reference + 0.05)
    assert value(demo, "merged", "retain") >= 0.95 * value(demo, "target", "retain")
    assert value(demo, "over", "forget") < value(demo, "under", "forget")


def test_every_table_and_record_is_there(demo: Path) -> None:
    records = json.loads((demo / "metrics.json").read_text())
    assert all(tuple(record) == RECORD_KEYS for record in records)
    assert {(r["variant"], r["split"]) for r in records} == {(v, s) for v in VARIANTS for s in SPLITS}
    for variant in VARIANTS:
        for split in SPLITS:
            scores = pq.read_table(demo / "scores" / variant / f"{split}.parquet")
            generated = pq.read_table(demo / "generations" / variant / f"{split}.parquet")
            assert scores.num_rows == generated.num_rows > 0
    values = pq.read_table(demo / "values.parquet")
    means = [record for record in records if METRICS.get(record["metric"]).per_example]
    listed = values.filter(pc.is_in(values["metric"], pa.array({record["metric"] for record in means})))
    assert listed.num_rows == sum(record["n"] + record["unscored"] for record in means)
    assert (demo / "report.html").stat().st_size < 1_000_000
    assert "evidence" in (demo / "README.md").read_text().lower()


def test_the_result_is_a_checkpoint_that_transformers_loads(demo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    with safe_open(demo / "models" / "over" / "adapter_model.safetensors", "pt") as adapter:
        assert all("lora" in name for name in adapter.keys())  # noqa: SIM118


def test_a_second_run_finds_everything_done(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*.safetensors")}
    again = expunge("demo", "--tiny", "-o", str(demo))
    assert again.returncode == 0, again.stderr
    assert set(stages(demo).values()) == {"skipped"}
    assert "nothing was run again" in again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*.safetensors")} == before


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [*EXPUNGE, "demo", "--tiny", "-o", str(folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        steps = [e for e in read_events(folder / "events.jsonl") if e.get("stage") == "unlearn/over"]
        if len(steps) > 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "models" / "over").exists(), "the stage was killed in the middle"
    assert expunge("demo", "--tiny", "-o", str(folder)).returncode == 0
    assert stages(folder)["prepare/target"] == "skipped"
    for name in ("models/target/model.safetensors", "model/model.safetensors"):
        assert file_digest(folder / name) == file_digest(demo / name)


@pytest.mark.slow
def test_two_processes_give_the_losses_and_scores_of_one(tmp_path: Path) -> None:
    """The same short run alone and under a launcher: every loss term, log-prob and hit."""
    changes = [
        "prepare.train.max_steps=6",
        "unlearn.over.train.max_steps=4",
        "unlearn.under.train.max_steps=4",
        "evaluate.generate=null",
    ]
    sets = [part for change in changes for part in ("--set", change)]
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for name, folder in folders.items():
        done = expunge("demo", "--tiny", "-o", str(folder), *sets, launcher=launcher if name == "two" else ())
        assert done.returncode == 0, done.stderr[-3000:]
    stages_of_unlearning = ["unlearn/over"] * 4 + ["unlearn/under"] * 4
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, folder in folders.items():
        events = [e for e in read_events(folder / "events.jsonl") if e["event"] == "train"]
        assert [e["stage"] for e in events] == ["prepare/target"] * 6 + ["prepare/reference"] * 6 + stages_of_unlearning
        curves[name] = [{k: v for k, v in e.items() if k not in ("time", "event", "stage")} for e in events]
    assert len(curves["one"]) == len(curves["two"]) == 6 + 6 + 4 + 4
    for left, right in zip(curves["one"], curves["two"], strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)
    for variant in VARIANTS:
        for split in SPLITS:
            left, right = (
                pq.read_table(f / "scores" / variant / f"{split}.parquet").to_pydict() for f in folders.values()
            )
            assert left["example_id"] == right["example_id"]
            for a, b in zip(left["logprob"], right["logprob"], strict=True):
                assert a == pytest.approx(b, abs=1e-3)
