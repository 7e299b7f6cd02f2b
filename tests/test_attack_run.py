"""`expunge attack`: every attack on model, target and reference; killed and run again it goes on."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from expunge import api
from expunge.attacks.base import (
    ATTACKS,
    Attack,
    Lesson,
    ModelAttack,
    Point,
    TrainingAttack,
    World,
    attack,
    build_attack,
)
from expunge.cli.app import main
from expunge.data.benchmarks.fictitious import fictitious
from expunge.data.encode import Encoded, encode
from expunge.data.load import load_splits
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.models.load import Loaded, load_model
from expunge.models.tiny import build_tokenizer
from expunge.pipeline import attacked
from expunge.pipeline.attack import attack_models, chosen_attacks, stored_tensors
from expunge.pipeline.attack_summary import attack_verdict, has_taught, is_informative, point_verdict
from expunge.pipeline.attacked import lesson_job, strongest
from expunge.pipeline.evaluate import LazyModel
from expunge.pipeline.job import Job
from expunge.pipeline.progress import Reporter
from expunge.pipeline.training import fit, train
from expunge.recipe import DataConfig, EvaluateConfig, LoraConfig, ModelConfig, TrainConfig
from expunge.recipe.model import GenerateConfig
from expunge.report.attack_record import AttackPoint, AttackRecord, Estimate, holds_attack, read_attack
from expunge.runs.record import SCHEMA
from expunge.scoring.scores import score
from expunge.scoring.tables import RECORD_KEYS

pytestmark = pytest.mark.usefixtures("quick_disk")

TINY = ModelConfig(id="tiny")
CONFIG = EvaluateConfig(
    metrics=["extraction_strength", "probability", "rouge_l_recall"],
    generate=GenerateConfig(max_new_tokens=4, limit=3),
    bootstrap=200,
)
#: Settings with which an attack takes no time on `tiny`.
SMALL: dict[str, dict[str, Any]] = {
    "relearn": {"steps": 2, "looks": 2},
    "benign_relearn": {"steps": 1},
    "rtt": {"steps": 1},
    "few_shot": {"shots": [1]},
    "token_noise": {"parts": [0.05]},
    "sampling": {"temperatures": [1.0], "count": 2},
    "quantize": {"schemes": ["int8"]},
    "prune": {"fractions": [0.1]},
    "extrapolate": {"gammas": [0.5]},
    "logit_lens": {"depths": [0.5]},
    "trained_lens": {"depths": [1.0], "steps": 2},
}
QUIET = Reporter(quiet=True)


@cache
def data() -> DataConfig:
    """Short questions about invented people and things: seven to forget, seven to keep, seven that nobody knows."""
    folder = Path(tempfile.mkdtemp(prefix="attack-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = {}
    for name in ("forget", "retain", "holdout"):
        asked = [row for row in fictitious(42, 40)[name].examples if row.extra["kind"] == "question"]
        lines = [{"id": row.id, "task": row.task, "question": row.prompt, "answer": row.answer} for row in asked]
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return DataConfig.model_validate(files)


def forget_rows() -> list[Encoded]:
    """The forget rows in the tokens of `tiny`."""
    tokenizer = build_tokenizer()
    examples = load_splits(data(), 42)["forget"].examples
    return encode(examples, tokenizer, resolve_template("auto", tokenizer), 512)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """`tiny` after it has learnt the forget rows by heart."""
    work = tmp_path_factory.mktemp("knowing")
    train(Job(TINY, forget_rows(), TrainConfig(epochs=50, lr=3e-3, batch_size=7, precision="float32"), 1), work)
    return ModelConfig(id=str(work / "out"))


def run(
    subjects: dict[str, ModelConfig], attacks: Sequence[Attack], output: Path, rows: DataConfig | None = None
) -> AttackRecord:
    return attack_models(subjects, rows or data(), attacks, CONFIG, 42, output, QUIET, limit=3)


def small(*names: str) -> list[Attack]:
    return [build_attack(name, SMALL.get(name, {})) for name in names]


def stages(output: Path) -> dict[str, bool]:
    """Stage → whether it was found done, of the last run."""
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {name: entry["skipped"] for name, entry in record["stages"].items()}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, knowing: ModelConfig) -> tuple[Path, AttackRecord]:
    """Every attack on a model that knows nothing, beside a target that knows, and a reference that is the model."""
    output = tmp_path_factory.mktemp("all") / "out"
    subjects = {"model": TINY, "target": knowing, "reference": TINY}
    return output, run(subjects, small(*ATTACKS.names()), output)


# ------------------------------------------------------------ the whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS.names())
def test_every_attack_runs_on_every_subject(name: str, everything: tuple[Path, AttackRecord]) -> None:
    output, record = everything
    result = record.attack(name)
    assert result.points
    for point in result.points:
        assert set(point.strengths) == {"model", "target", "reference"}, record.left_out
        assert point.margin is not None
        assert point.margin.value == 0  # the reference is the model, and every attack is the same for both
        assert point.verdict == ("yes" if point.informative else "not shown")
        assert all(0 <= estimate.value <= 1 for estimate in point.strengths.values())
        variants = {f"{subject}~{name}-{point.label}" for subject in record.subjects}
        assert {row["variant"] for row in point.records} == variants
        assert all(tuple(row) == RECORD_KEYS for row in point.records)
        for subject in record.subjects:
            folder = output / "tables" / f"{subject}~{name}" / point.label
            kind = "scores" if result.strength == "extraction_strength" else "generations"
            table = pq.read_table(folder / kind / "forget.parquet")
            assert table.num_rows == point.rows["forget"] == len(set(table["example_id"].to_pylist()))
    drawn = result.strength == "rouge_l_recall"  # of four tokens
    assert result.before.strengths["target"].value > (0.03 if drawn else 0.5)
    assert result.before.strengths["model"].value < 0.2


@pytest.mark.slow
def test_the_record_is_what_was_returned(everything: tuple[Path, AttackRecord]) -> None:
    output, record = everything
    assert holds_attack(output)
    assert read_attack(output) == record
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert len(metrics) == len(record.records) + sum(len(p.records) for r in record.attacks for p in r.points)
    values = pq.read_table(output / "values.parquet")
    assert {row["variant"] for row in metrics} >= set(values["variant"].to_pylist())
    assert set(record.splits) == {"forget", "retain", "holdout"}
    retain = {row["n"] for row in record.records if row["split"] == "retain" and row["metric"] == "probability"}
    assert retain == {3}
    assert any("first 3 of 7" in note for note in record.notes)
    reasons = {(entry.attack, entry.point): entry.reason for entry in record.left_out}
    assert reasons.get(("paraphrase", "paraphrases")) == "no forget row can be asked in this way"


@pytest.mark.slow
def test_training_attacks_measure_what_they_did_not_train_on(everything: tuple[Path, AttackRecord]) -> None:
    record = everything[1]
    assert record.attack("relearn").points[0].rows["forget"] == 7
    assert [point.budget for point in record.attack("relearn").points] == [1, 2]
    half = record.attack("rtt")
    assert 0 < half.points[0].rows["forget"] < 7
    assert half.before.rows["forget"] == half.points[0].rows["forget"]
    assert half.before.strengths["model"].n == half.points[0].rows["forget"]


@pytest.mark.slow
def test_a_second_run_does_nothing_and_says_the_same(
    everything: tuple[Path, AttackRecord], knowing: ModelConfig
) -> None:
    output, record = everything
    subjects = {"model": TINY, "target": knowing, "reference": TINY}
    again = run(subjects, small(*ATTACKS.names()), output)
    assert all(stages(output).values())
    assert again == record


# ------------------------------------------------------------ verdicts


def test_a_model_that_still_knows_is_not_robust(knowing: ModelConfig, tmp_path: Path) -> None:
    record = run({"model": knowing, "target": knowing, "reference": TINY}, small("token_noise"), tmp_path / "out")
    (point,) = record.attack("token_noise").points
    assert point.margin is not None
    assert point.margin.low is not None
    assert point.margin.low > record.robust_margin
    assert (point.verdict, record.verdict) == ("no", "no")
    rows = {s: _strengths(tmp_path / "out" / "tables" / f"{s}~token_noise" / "5pct") for s in ("model", "reference")}
    paired = [rows["model"][row] - rows["reference"][row] for row in rows["model"]]
    assert point.margin.value == pytest.approx(np.mean(paired))


def _strengths(folder: Path) -> dict[str, float]:
    table = pq.read_table(folder / "scores" / "forget.parquet")
    found = {}
    for row in table.to_pylist():
        hits = row["hit"][: row["answer_tokens"]]
        right = next((i for i, hit in enumerate(reversed(hits)) if not hit), len(hits))
        found[row["example_id"]] = right / len(hits)
    return found


@pytest.mark.parametrize(
    ("low", "high", "informative", "kind", "verdict"),
    [
        (-0.02, 0.05, True, "behaviour", "yes"),
        (0.02, 0.1, True, "weights", "yes"),
        (0.05, 0.15, True, "behaviour", "not shown"),
        (0.11, 0.3, True, "behaviour", "no"),
        (0.11, 0.3, False, "behaviour", "no"),  # what leaks has leaked
        (0.0, 0.05, False, "behaviour", "not shown"),
        (0.0, 0.05, None, "behaviour", "not shown"),
        (0.0, 0.05, None, "knowledge", "yes"),
        (None, None, True, "behaviour", "not shown"),
    ],
)
def test_a_verdict_needs_an_interval_and_an_attack_that_reads(
    low: float | None, high: float | None, informative: bool | None, kind: str, verdict: str
) -> None:
    margin = Estimate(value=0.05, low=low, high=high, n=10)
    reached = point_verdict(margin, informative, kind, 0.1)
    assert reached == verdict
    point = AttackPoint(label="p", budget=1, margin=margin, informative=informative, verdict=reached)
    found, reason = attack_verdict([point], AttackPoint(label="before", budget=0), kind, 0.1)
    assert found == verdict
    assert reason
    assert point_verdict(None, informative, kind, 0.1) == "not shown"


@pytest.mark.parametrize(
    ("before", "after", "informative"),
    [(0.9, 0.45, True), (0.9, 0.44, False), (0.1, 0.1, False), (0.3, 0.9, True)],
)
def test_an_attack_that_reads_nothing_from_the_target_is_uninformative(
    before: float, after: float, informative: bool
) -> None:
    assert is_informative({"a": before, "b": before, "c": 1.0}, {"a": after, "b": after}) == informative
    assert not is_informative({"a": 1.0}, {"b": 1.0})


# ------------------------------------------------------------ what is missing, what fails


def test_attacks_without_what_they_need_are_left_out_and_the_rest_runs(tmp_path: Path) -> None:
    forget = tmp_path / "forget.jsonl"
    rows = [{"question": f"Who lives at {i}?", "answer": f"Mr {'ABCDEF'[i]} does."} for i in range(6)]
    forget.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    alone = DataConfig.model_validate({"forget": str(forget)})
    names = ("few_shot", "extrapolate", "token_noise", "benign_relearn")
    record = run({"model": TINY}, small(*names), tmp_path / "out", alone)
    assert [result.name for result in record.attacks] == ["token_noise"]
    reasons = {entry.attack: entry.reason for entry in record.left_out}
    assert reasons == {
        "few_shot": "there are no retain rows (--retain)",
        "benign_relearn": "there are no retain rows (--retain)",
        "extrapolate": "no target model was given (--target)",
    }
    assert record.attacks[0].points[0].margin is None
    assert record.verdict == "not shown"
    assert "no reference model" in record.attacks[0].reason


@attack(name="stubborn", idea="never works", paper="-", kind="weights", budget="tries", suite="full")
class Stubborn(ModelAttack):
    """Refuses its first point."""

    def points(self) -> list[Point]:
        return [Point("never", 1), Point("zero", 2)]

    @contextmanager
    def applied(self, model: nn.Module, point: Point, world: World) -> Iterator[nn.Module]:
        if point.label == "never":
            raise UserError("this architecture has no such layer", "take another")
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        yield model
        model.load_state_dict(kept)


ATTACKS._entries.pop("stubborn")


def test_an_attack_that_fails_is_left_out_and_the_model_is_itself_again(tmp_path: Path, knowing: ModelConfig) -> None:
    subjects = {"model": knowing, "reference": TINY}
    record = run(subjects, [Stubborn(), *small("token_noise")], tmp_path / "with")
    assert [(entry.attack, entry.point) for entry in record.left_out] == [("stubborn", "never")] * 2
    assert [point.label for point in record.attack("stubborn").points] == ["zero"]
    assert record.attack("stubborn").points[0].strengths["model"].value == 0
    alone = run(subjects, small("token_noise"), tmp_path / "alone")
    assert record.attack("token_noise") == alone.attack("token_noise")


def test_a_training_that_diverges_is_left_out(tmp_path: Path) -> None:
    record = run({"model": TINY}, [build_attack("relearn", {"steps": 4, "looks": 3, "lr": 1e30})], tmp_path / "out")
    assert record.left_out
    assert all(entry.attack == "relearn" and "not finite" in entry.reason for entry in record.left_out)


# ------------------------------------------------------------ kill and resume


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects, attacks = {"model": TINY, "reference": TINY}, small("token_noise", "logit_lens", "relearn")
    whole = run(subjects, attacks, tmp_path / "whole")
    made = attacked.make_tables
    count = 0

    def killed(*arguments: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        if count in (3, 6):  # in a pass, and in a look of a training
            raise KeyboardInterrupt
        return made(*arguments, **settings)

    monkeypatch.setattr(attacked, "make_tables", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(subjects, attacks, tmp_path / "parts")
        assert not (tmp_path / "parts" / "attack.json").exists()
    parts = run(subjects, attacks, tmp_path / "parts")
    done = stages(tmp_path / "parts")
    assert done["model"]
    assert done["model~token_noise/5pct"]
    assert not done["reference"]
    assert parts == whole


def test_other_settings_make_that_attack_anew_and_no_other(tmp_path: Path) -> None:
    run({"model": TINY}, small("token_noise", "logit_lens"), tmp_path / "out")
    noisier = build_attack("token_noise", {"parts": [0.05], "draws": 2})
    run({"model": TINY}, [*small("logit_lens"), noisier], tmp_path / "out")
    done = stages(tmp_path / "out")
    assert [name for name, skipped in done.items() if not skipped] == ["model~token_noise/5pct"]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": SCHEMA, "name": "demo"}), encoding="utf-8")
    with pytest.raises(UserError, match="holds the run 'demo'"):
        run({"model": TINY}, small("token_noise"), tmp_path)


# ------------------------------------------------------------ parts


def test_attacks_on_another_model_are_not_written_over(tmp_path: Path, knowing: ModelConfig) -> None:
    run({"model": TINY}, small("token_noise"), tmp_path / "out")
    before = (tmp_path / "out" / "attack.json").read_bytes()
    with pytest.raises(UserError, match="another model"):
        run({"model": knowing}, small("token_noise"), tmp_path / "out")
    assert (tmp_path / "out" / "attack.json").read_bytes() == before


def test_a_look_during_training_sees_what_training_to_that_step_gives(tmp_path: Path) -> None:
    rows = forget_rows()
    for rank in (None, 4):
        lesson = Lesson(rows, 3, 1e-3, 4, rank)
        job = lesson_job(lesson, TINY, 42)
        with fit(job, tmp_path / f"{rank}") as fitted:
            folded = LazyModel(TINY, "float32", Loaded(fitted.model, fitted.tokenizer, fitted.folder, "")).loaded
            expected = score(folded.model, rows, batch_size=16)
        record = run(
            {"model": TINY},
            [build_attack("relearn", {"steps": 3, "looks": 1, "lr": 1e-3, "batch_size": 4, "lora_rank": rank})],
            tmp_path / f"attack-{rank}",
        )
        table = pq.read_table(
            tmp_path / f"attack-{rank}" / "tables" / "model~relearn" / "3steps" / "scores" / "forget.parquet"
        )
        assert record.attack("relearn").points[0].rows["forget"] == 7
        for seen, wanted in zip(table["logprob"].to_pylist(), expected["logprob"].to_pylist(), strict=True):
            np.testing.assert_allclose(seen, wanted, atol=2e-5)


def test_the_candidate_from_which_most_is_extracted_is_kept() -> None:
    rows = forget_rows()[:3]
    table = score(load_model(TINY).model, [row for row in rows for _ in range(3)], batch_size=16)
    hits = [[False] * len(row["hit"]) for row in table.to_pylist()]
    hits[1] = [False, *[True] * (len(hits[1]) - 1)]
    hits[5] = [True] * len(hits[5])
    worst = table.set_column(table.schema.get_field_index("hit"), table.schema.field("hit"), _lists(hits))
    assert strongest(worst, "scores") == [1, 5, 6]
    assert strongest(worst.slice(0, 1), "scores") == [0]


def _lists(values: list[list[bool]]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.list_(pa.bool_()))


def test_tensors_are_read_by_the_names_of_parameters(knowing: ModelConfig) -> None:
    read = stored_tensors(knowing)
    for name, tensor in load_model(knowing).model.named_parameters():
        assert torch.equal(read(name), tensor), name
    with pytest.raises(UserError, match="has no tensor other"):
        read("other")


def test_an_adapter_is_folded_before_it_is_attacked(tmp_path: Path) -> None:
    rows = forget_rows()
    job = lesson_job(Lesson(rows, 1, 1e-2, 4), TINY, 1)
    with fit(replace(job, lora=LoraConfig(rank=2)), tmp_path / "work") as fitted:
        fitted.model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "tiny"}))
    record = run(
        {"model": ModelConfig(id=str(tmp_path / "adapter"))}, small("relearn", "token_noise"), tmp_path / "out"
    )
    assert {result.name for result in record.attacks} == {"relearn", "token_noise"}
    assert not record.left_out


def test_suites_grow_and_names_are_checked() -> None:
    suites = [{made.about.name for made in chosen_attacks(None, suite)} for suite in ("quick", "standard", "full")]
    assert suites[0] < suites[1] < suites[2]
    assert suites[2] == set(ATTACKS.names())
    kinds = [made.about.kind for made in chosen_attacks(None, "full")]
    assert kinds == sorted(kinds, key=["behaviour", "weights", "knowledge"].index)
    with pytest.raises(UserError, match="unknown attack 'relern'") as caught:
        chosen_attacks(["relern"], "quick")
    assert "relearn" in caught.value.hint
    with pytest.raises(UserError, match="not among the attacks"):
        chosen_attacks(["quantize"], "quick", {"relearn": {"steps": 1}})
    (made,) = chosen_attacks(["relearn"], "quick", {"relearn": {"steps": 7}})
    assert isinstance(made, TrainingAttack)
    assert made.points()[-1].budget == 7


# ------------------------------------------------------------ the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    common = ["attack", "tiny", "--benchmark", "fictitious:40", "--reference", "tiny", "--limit", "2", "-o", out]
    common += [
        "--attacks",
        "token_noise,relearn",
        "--set",
        "attacks.relearn.steps=1",
        "--set",
        "evaluate.generate=null",
    ]
    assert main([*common, "--json"]) == 0
    printed = AttackRecord.model_validate(json.loads(capsys.readouterr().out))
    assert printed == read_attack(tmp_path / "out")
    assert [point.label for point in printed.attack("relearn").points] == ["1steps"]
    assert main(common) == 0
    said = capsys.readouterr()
    assert "relearn" in said.out
    assert "robust: not shown" in said.out
    assert all(stages(tmp_path / "out").values())


@dataclass(frozen=True)
class Mistake:
    arguments: tuple[str, ...]
    sentence: str
    hint: str


@pytest.mark.parametrize(
    "mistake",
    [
        Mistake(("--attacks", "relern"), "unknown attack 'relern'", "relearn"),
        Mistake(("--attacks", "relearn", "--set", "attacks.relearn.stps=3"), "no parameter 'stps'", "steps"),
        Mistake(("--set", "attacks.relern.steps=3"), "unknown attack 'relern'", "relearn"),
        Mistake(("--set", "attacks.relearn=3"), "not of the form", "attacks.relearn.steps=80"),
        Mistake(("--attacks", "relearn", "--set", "attacks.relearn.steps=0"), "greater than 0", "list attacks"),
        Mistake(("--set", "unlearn.0.method=npo"), "attacks have no use for it", "attacks.*"),
        Mistake(("--suite", "huge"), "suite", "quick"),
        Mistake(("--reference", "nowhere/at/all"), "no model at", "give a folder"),
    ],
    ids=lambda mistake: " ".join(mistake.arguments),
)
def test_mistakes_are_a_sentence_and_a_hint(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attack", "tiny", "--benchmark", "fictitious:40", "-o", str(tmp_path / "out"), *mistake.arguments]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert mistake.sentence in said
    assert mistake.hint in said
    assert not (tmp_path / "out").exists()


def test_the_function_takes_the_same(tmp_path: Path) -> None:
    record = api.attack(
        "tiny",
        benchmark="fictitious:40",
        attacks=["token_noise"],
        limit=2,
        output=tmp_path / "out",
        overrides=["attacks.token_noise.parts=[0.2]", "thresholds.robust_margin=0.3", "evaluate.generate=null"],
        quiet=True,
    )
    assert [point.label for point in record.attacks[0].points] == ["20pct"]
    assert record.robust_margin == 0.3


def test_what_can_not_be_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no attack is named"):
        chosen_attacks([], "standard")
    with pytest.raises(UserError, match="int3"):
        chosen_attacks(["quantize"], "standard", {"quantize": {"schemes": ["int3"]}})
    with pytest.raises(UserError, match="none of the attacks can be run"):
        run({"model": TINY}, small("extrapolate"), tmp_path / "out")


def test_a_training_that_teaches_not_even_the_reference_is_no_evidence() -> None:
    assert has_taught({"a": 0.0, "b": 0.0}, {"a": 0.3, "b": 0.0})
    assert not has_taught({"a": 0.1, "b": 0.0}, {"a": 0.1, "b": 0.01})
    assert not has_taught({"a": 0.1}, {})
