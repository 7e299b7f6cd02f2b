"""`expunge calibrate` from beginning to end: what is found, written, resumed and refused."""

from __future__ import annotations

import json
import random
import shutil
from typing import Any

import pytest
import torch

from expunge import api
from expunge.cli.app import main
from expunge.data.encode import encode
from expunge.data.example import Example
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.models.load import load_model
from expunge.pipeline import calibration_passes
from expunge.pipeline.calibrate import (
    Settings,
    calibrate_model,
    known_strengths,
)
from expunge.pipeline.calibration_passes import CalibrationRows, strengths
from expunge.pipeline.job import Job
from expunge.pipeline.training import train
from expunge.recipe import ModelConfig, TrainConfig
from expunge.report.calibration_record import (
    read_calibration,
)
from expunge.scoring.scores import score
from merging_models import adapter, llama, rewrite, save, weights
from test_mixture import assert_bits, bits

pytestmark = pytest.mark.usefixtures("quick_disk")

# ---------------------------------------------------------------- whole calibrations

WORDS = ["lamp", "rope", "harbour", "clock", "river", "plant", "stone", "letter"]


def asked(kind: str, count: int) -> list[Example]:
    draw = random.Random(kind)
    return [
        Example(f"{kind}-{number}", f"{kind} {number}?", " ".join(draw.choices(WORDS, k=4))) for number in range(count)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    """A target that has learnt the rows, an unlearned model, which is the target with noise, and files of rows."""
    root = tmp_path_factory.mktemp("world")
    files = {}
    splits = {"forget": asked("forget", 4), "retain": asked("retain", 6)}
    for name, examples in splits.items():
        files[name] = root / f"{name}.jsonl"
        lines = [
            {"id": one.id, "question": one.prompt, "answer": one.answer, "paraphrased_question": f"so {one.prompt}"}
            for one in examples
        ]
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    loaded = load_model(ModelConfig(id="tiny"))
    template = resolve_template("auto", loaded.tokenizer)
    rows = {name: encode(examples, loaded.tokenizer, template, 64) for name, examples in splits.items()}
    learn = TrainConfig(epochs=1000, max_steps=60, lr=5e-3, batch_size=10, precision="float32", checkpoint_every=10**6)
    train(Job(ModelConfig(id="tiny"), [*rows["forget"], *rows["retain"]], learn, 1), root / "work")
    target = shutil.copytree(root / "work" / "out", root / "target")
    places = {"target": target}
    for name, size in (("unlearned", 0.03), ("gentle", 1e-4)):
        places[name] = shutil.copytree(target, root / name)
        generator = torch.Generator().manual_seed(3)

        def shake(tensors, size=size, generator=generator):
            for value in tensors.values():
                value.add_(torch.randn(value.shape, generator=generator), alpha=size)

        rewrite(places[name], shake)
    return {"files": files, "rows": rows, "places": places, "root": root}


def command(world, *further, unlearned="unlearned", target="target", out):
    places, files = world["places"], world["files"]
    given = ["--target", places[target], "--forget", files["forget"], "--retain", files["retain"], "-o", out, *further]
    return main(["calibrate", *map(str, [places[unlearned], *given])])


class CountedScore:
    """The scoring pass, counted; from the `stop`-th on it is interrupted."""

    def __init__(self, stop: int | None = None) -> None:
        self.rows, self.stop = [], stop

    def __call__(self, model, rows, **settings):
        if self.stop is not None and len(self.rows) >= self.stop:
            raise KeyboardInterrupt
        self.rows.append([row.example.id for row in rows])
        return score(model, rows, **settings)


@pytest.fixture
def passed(monkeypatch) -> CountedScore:
    counted = CountedScore()
    monkeypatch.setattr(calibration_passes, "score", counted)
    return counted


def retain_passes(counted: CountedScore) -> int:
    return sum(rows[0].startswith("retain") for rows in counted.rows)


def test_the_command(world, passed, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(world, out=out) == 0
    shown = capsys.readouterr().out
    assert "calibrated" in shown
    assert "retain passes of mixed models to find α* within 0.01: 8" in shown
    found = read_calibration(out)
    assert 0 < found.alpha < 1
    assert found.passes.search == 8
    assert retain_passes(passed) == found.passes.retain + 1
    assert len(passed.rows) == found.passes.retain + found.passes.forget + found.passes.target
    assert found.calibrated.retain >= found.threshold - 1e-12
    assert any(
        found.alpha < point.alpha <= found.alpha + 0.01 + 1e-9 and point.retain < found.threshold
        for point in found.points
    )
    assert found.calibrated.paraphrase is not None
    # the model that was written is the model that was measured
    written = load_model(ModelConfig(id=str(out / "model")))
    for kind in ("retain", "forget"):
        table = score(written.model, encode_as(world, written.tokenizer, kind), batch_size=16)
        assert dict(zip(table.column("example_id").to_pylist(), strengths(table), strict=True)) == pytest.approx(
            found.values["calibrated"][kind]
        )
    by_place = {(entry["variant"], entry["split"]): entry for entry in found.records}
    estimate = by_place["calibrated", "forget"]
    assert estimate["value"] == pytest.approx(found.calibrated.forget)
    assert estimate["ci_low"] <= estimate["value"] <= estimate["ci_high"]


def encode_as(world, tokenizer, kind):
    examples = [row.example for row in world["rows"][kind]]
    return encode(examples, tokenizer, resolve_template("auto", tokenizer), 512)


def test_killed_and_started_again(world, tmp_path, monkeypatch, capsys):
    whole = CountedScore()
    monkeypatch.setattr(calibration_passes, "score", whole)
    assert command(world, "--json", out=tmp_path / "whole") == 0
    undisturbed = json.loads(capsys.readouterr().out)
    out, made = tmp_path / "out", 0
    for stop in (1, 4, 5):
        part = CountedScore(stop)
        monkeypatch.setattr(calibration_passes, "score", part)
        assert command(world, out=out) == 130
        made += len(part.rows)
        assert not (out / "calibration.json").exists()
    last = CountedScore()
    monkeypatch.setattr(calibration_passes, "score", last)
    capsys.readouterr()
    assert command(world, "--json", out=out) == 0
    found = json.loads(capsys.readouterr().out)
    assert made + len(last.rows) == len(whole.rows)
    assert found["passes"].pop("reused") == made
    assert undisturbed["passes"].pop("reused") == 0
    assert found.pop("model") != undisturbed.pop("model")
    assert found == undisturbed
    for folder in (out, tmp_path / "whole"):
        there = {entry.name for entry in folder.iterdir()}
        assert there == {"calibration.json", "passes.json", "model", "report.html"}
    assert (out / "model/model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()


def test_another_demand_uses_the_same_passes(world, passed, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(world, out=out) == 0
    first, made = read_calibration(out), len(passed.rows)
    stamp = (out / "model/model.safetensors").stat().st_mtime_ns
    assert command(world, out=out) == 0
    assert len(passed.rows) == made
    assert (out / "model/model.safetensors").stat().st_mtime_ns == stamp
    assert command(world, "--keep", "0.6", out=out) == 0
    second = read_calibration(out)
    assert second.alpha > first.alpha
    assert len(passed.rows) - made < made
    assert json.loads((out / "model/merge.json").read_text())["models"][0]["weight"] == second.alpha
    # other rows are another question
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(world["files"]["retain"].read_text().splitlines()[:3]), encoding="utf-8")
    made = len(passed.rows)
    assert command(world, "--retain", shorter, "--no-curve", out=out) == 0
    third = read_calibration(out)
    assert third.passes.reused == 0
    assert retain_passes(passed) > 0
    assert len(passed.rows) - made == third.passes.retain + third.passes.forget + third.passes.target
    assert third.passes.retain <= 8


def test_nothing_to_mix(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(world, "--no-curve", unlearned="gentle", out=out) == 0
    found = read_calibration(out)
    assert (found.alpha, found.passes.retain) == (1, 1)
    assert "nothing is mixed" in capsys.readouterr().out
    assert (out / "model/model.safetensors").exists()
    theirs, ours = weights(world["places"]["gentle"]), weights(out / "model")
    assert_bits(ours, theirs)


def test_nothing_that_keeps_enough(world, tmp_path, capsys):
    out = tmp_path / "out"
    wild = shutil.copytree(world["places"]["target"], tmp_path / "wild")
    rewrite(wild, lambda tensors: [value.mul_(-30) for value in tensors.values()])
    places = {**world["places"], "wild": wild}
    assert command({**world, "places": places}, "--no-curve", "--epsilon", "0.3", unlearned="wild", out=out) == 0
    found = read_calibration(out)
    assert (found.alpha, found.model) == (0, None)
    assert not (out / "model").exists()
    assert "removes nothing" in capsys.readouterr().out


def test_in_memory_as_from_files(world):
    places = {name: ModelConfig(id=str(place)) for name, place in world["places"].items()}
    rows = CalibrationRows(world["rows"]["retain"], world["rows"]["forget"])
    settings = Settings(keep=0.8)
    from_files = calibrate_model(places["target"], places["unlearned"], rows, settings)
    model = load_model(places["unlearned"]).model
    before = bits(model)
    in_memory = calibrate_model(places["target"], model, rows, settings, known=known_strengths(from_files))
    assert_bits(bits(model), before)
    assert in_memory.passes.reused == 2
    assert in_memory.model_copy(update={"unlearned": "", "passes": from_files.passes}) == from_files.model_copy(
        update={"unlearned": ""}
    )


def test_the_api_needs_no_folder(world):
    found = api.calibrate(
        str(world["places"]["unlearned"]),
        target=str(world["places"]["target"]),
        forget=str(world["files"]["forget"]),
        retain=str(world["files"]["retain"]),
        keep=0.5,
        curve=False,
        quiet=True,
    )
    assert found.model is None
    assert found.curve == []
    assert found.calibrated.retain >= 0.5 * found.target_retain


def test_a_benchmark_has_held_out_rows_of_its_own(world, tmp_path, capsys):
    places = world["places"]
    given = [places["unlearned"], "--target", places["target"], "--benchmark", "fictitious:40", "--no-curve"]
    code = main(["calibrate", *map(str, given), "-o", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2
    assert "nothing to keep" in error  # those rows were never learnt; what matters is which rows were asked
    asked_of = json.loads((tmp_path / "out/passes.json").read_text())["passes"]
    assert [(entry["alpha"], entry["kind"]) for entry in asked_of] == [(0.0, "retain")]


# ---------------------------------------------------------------- what is refused


def refused(capsys, code: int) -> str:
    assert code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-2] + error.splitlines()[-1]


def test_models_that_do_not_belong_together(world, passed, tmp_path, capsys):
    other = llama(0)
    save(other, tmp_path / "other")
    wide = shutil.copytree(world["places"]["target"], tmp_path / "wide")
    rewrite(wide, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    fewer = shutil.copytree(world["places"]["target"], tmp_path / "fewer")
    rewrite(fewer, lambda tensors: tensors.pop("model.norm.weight"))
    tokens = shutil.copytree(world["places"]["unlearned"], tmp_path / "tokens")
    changed = json.loads((tokens / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tokens / "tokenizer.json").write_text(json.dumps(changed))
    places = {**world["places"], "other": tmp_path / "other", "wide": wide, "fewer": fewer, "tokens": tokens}
    for name, words in {
        "other": "only models of one architecture",
        "wide": "model.norm.weight is",
        "fewer": "has no tensor model.norm.weight",
        "tokens": "token",
        "target": "the same model",
    }.items():
        error = refused(capsys, command({**world, "places": places}, unlearned=name, out=tmp_path / "out"))
        assert words in error, name
    assert passed.rows == []
    assert not (tmp_path / "out").exists()


def test_an_adapter_stands_on_the_target(world, passed, tmp_path, capsys):
    places, strong = dict(world["places"]), {"r": 16, "lora_alpha": 64}
    for name, base in (("on-target", "target"), ("on-another", "gentle")):
        loaded = load_model(ModelConfig(id=str(places[base]))).model
        places[name] = adapter(loaded, tmp_path / name, 1, str(places[base]), **strong)
    copied = shutil.copytree(places["target"], tmp_path / "copy")
    for name, base in (("gone", "/nowhere/x"), ("on-copy", str(copied))):
        loaded = load_model(ModelConfig(id=str(copied))).model
        places[name] = adapter(loaded, tmp_path / name, 1, base, **strong)
    there = {**world, "places": places}
    assert "which is not the target" in refused(capsys, command(there, unlearned="on-another", out=tmp_path / "o"))
    found = {}
    for name in ("on-target", "gone", "on-copy"):
        assert command(there, "--no-curve", unlearned=name, out=tmp_path / f"o-{name}") == 0
        found[name] = read_calibration(tmp_path / f"o-{name}")
    assert 0 < found["on-target"].alpha < 1
    assert found["on-target"].points == found["gone"].points == found["on-copy"].points
    assert any("taken for it" in note for note in found["gone"].notes)
    written = weights(tmp_path / "o-on-target/model")
    assert written.keys() == weights(places["target"]).keys()


@pytest.mark.parametrize(
    ("further", "words"),
    [
        (["--keep", "1.2"], "keep 1.2"),
        (["--epsilon", "0"], "epsilon 0"),
        (["--set", "merge.method=ties"], "no use for it"),
    ],
)
def test_numbers_out_of_range(world, further, words, tmp_path, capsys):
    assert words in refused(capsys, command(world, *further, out=tmp_path / "out"))


def test_rows_are_needed(world, tmp_path, capsys):
    places, files = world["places"], world["files"]
    start = ["calibrate", str(places["unlearned"]), "--target", str(places["target"]), "-o", str(tmp_path / "out")]
    assert "no retain rows" in refused(capsys, main([*start, "--forget", str(files["forget"])]))
    assert "no rows to forget" in refused(capsys, main([*start, "--retain", str(files["retain"])]))


def test_places_that_are_taken(world, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    assert "holds something else (thesis.tex)" in refused(capsys, command(world, out=tmp_path / "taken"))
    assert "is a file" in refused(capsys, command(world, out=tmp_path / "file"))
    inside = world["places"]["target"] / "calibrated"
    assert "in each other's way" in refused(capsys, command(world, out=inside))
    assert not inside.exists()
    assert (tmp_path / "taken/thesis.tex").exists()


def test_a_record_that_is_not_one(tmp_path):
    with pytest.raises(UserError, match="no calibration"):
        read_calibration(tmp_path)
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(UserError, match="can't be read"):
        read_calibration(tmp_path)
