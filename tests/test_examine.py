"""Evaluation end to end on tiny models: one pass per table, anchors between yardsticks, and what is left out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from expunge import api
from expunge.data.benchmarks.fictitious import fictitious
from expunge.data.load import load_splits
from expunge.data.views import VIEWS, viewed
from expunge.errors import UserError
from expunge.metrics.anchoring import with_anchors
from expunge.metrics.base import METRICS, RECORD_KEYS, VALUES, Resampling, chosen_metrics
from expunge.models.load import load_model, load_tokenizer
from expunge.models.save import save_model
from expunge.pipeline.asked import ask, exam_of
from expunge.pipeline.examine import warnings
from expunge.recipe import DataConfig, EvaluateConfig, ModelConfig
from expunge.scoring.tables import SUITES, TABLES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three checkpoints of one architecture: as it is, and two that were shaken."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("target", "model", "reference")):
        loaded = load_model(ModelConfig(id="tiny"))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05 * seed)
        save_model(loaded.model, loaded.tokenizer, root / name)
    return {name: str(root / name) for name in ("target", "model", "reference")}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A full evaluation of all three."""
    out = tmp_path_factory.mktemp("eval") / "out"
    given = {"target": models["target"], "reference": models["reference"], "benchmark": "fictitious:60"}
    overrides = ["evaluate.samples=3", "evaluate.generate.max_new_tokens=6"]
    found = api.evaluate(models["model"], suite="full", overrides=overrides, output=out, quiet=True, **given)
    return found, out


def value(found, metric, split="forget", variant="model"):
    (record,) = [r for r in found.records if (r["metric"], r["split"], r["variant"]) == (metric, split, variant)]
    return record


def test_every_table_is_made_once_per_model_and_split(whole):
    found, out = whole
    about = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    for variant in ("target", "model", "reference"):
        splits = {path.stem for path in (out / "scores" / variant).glob("*.parquet")}
        assert set(about["splits"]) <= splits
        texts = {path.stem for path in (out / "generations" / variant).glob("*.parquet")}
        assert {"forget", "forget@jailbreak", "forget@sampled"} <= texts
        assert "retain@sampled" not in texts
    samples = pq.read_table(out / "generations" / "model" / "forget@sampled.parquet")
    plain = pq.read_table(out / "generations" / "model" / "forget.parquet")
    assert len(samples) == 3 * len(plain)
    assert not (out / "scores" / "target" / "states").exists()
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == found.records


def test_records_have_every_key_and_known_metrics(whole):
    found, _ = whole
    assert all(tuple(record) == RECORD_KEYS for record in found.records)
    measured = {record["metric"] for record in found.records}
    assert measured | set(found.left_out) == set(chosen_metrics(None, "full"))
    assert not measured & set(found.left_out)
    assert all(reason for reason in found.left_out.values())
    assert json.loads(json.dumps(found.records, allow_nan=False)) == found.records


def test_the_target_stands_at_one_and_does_not_drift(whole):
    found, _ = whole
    assert value(found, "kl_drift", variant="model")["value"] > 0
    drifting = [r for r in found.records if r["metric"] == "kl_drift" and r["variant"] == "target"]
    assert all(r["value"] == pytest.approx(0, abs=1e-6) for r in drifting)
    for record in found.records:
        if record["anchored"] is not None and record["variant"] in ("target", "reference"):
            assert record["anchored"] == pytest.approx(1.0 if record["variant"] == "target" else 0.0)


def test_weights_and_layers_are_looked_into(whole):
    found, _ = whole
    assert value(found, "weight_drift", "model")["value"] > 0
    assert 0 < value(found, "bucket_crossing_int4", "model")["value"] <= 1
    further = value(found, "weight_drift", "model", "reference")["value"]
    assert further > value(found, "weight_drift", "model")["value"]
    for name in ("krs", "cka_erasure"):
        assert any(record["metric"] == name for record in found.records)


def test_metrics_with_two_models_agree_with_the_tables(whole):
    found, out = whole
    own, theirs = (pq.read_table(out / "scores" / name / "forget.parquet") for name in ("model", "reference"))
    records = value(found, "nll")
    total = [-sum(row["logprob"][: row["answer_tokens"]]) for row in own.to_pylist()]
    assert records["value"] == pytest.approx(np.mean(total), rel=1e-5)
    assert own.column("example_id").to_pylist() == theirs.column("example_id").to_pylist()


def test_a_killed_evaluation_goes_on_where_it_was(models, tmp_path, monkeypatch):
    from expunge.pipeline import examine

    asked = {"benchmark": "fictitious:60", "target": models["target"], "quiet": True}
    asked |= {"overrides": ["evaluate.generate.max_new_tokens=4"]}
    whole = api.evaluate(models["model"], output=tmp_path / "whole", **asked)
    made = []

    def broken(model, *given):
        made.append(Path(model.config.id).name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return write(model, *given)

    write = examine.write_generations
    monkeypatch.setattr(examine, "write_generations", broken)
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(models["model"], output=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    again = api.evaluate(models["model"], output=tmp_path / "out", **asked)
    assert made == ["target", "model", "model"], "the target's pass was not made again"
    assert again.records == whole.records
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_suites_grow(models):
    for smaller, larger in pairwise(SUITES):
        few, many = (exam_of(EvaluateConfig(suite=suite)) for suite in (smaller, larger))
        assert set(few.metrics) < set(many.metrics)
        assert few.tables < many.tables
        assert all(SUITES.index(TABLES[table]) <= SUITES.index(smaller) for table in few.tables)


def test_a_missing_yardstick_leaves_its_metrics_out_with_a_reason(models):
    found = api.evaluate(models["model"], benchmark="fictitious:60", suite="standard", quiet=True)
    assert found.left_out["kl_drift"] == "needs a target model"
    assert "reference" in found.left_out["mia_reference"]
    assert {record["variant"] for record in found.records} == {"model"}
    assert all(record["anchored"] is None for record in found.records)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"overrides": ["evaluate.metrics=[extraction_strenght]"]}, "unknown metric"),
        ({"overrides": ["evaluate.convention=open-unlerning"]}, "unknown convention"),
        ({"benchmark": "fictitius"}, "unknown benchmark"),
        ({"benchmark": "fictitious:many"}, "does not say how many rows"),
        ({"benchmark": None}, "no rows to forget"),
        ({"benchmark": None, "folder": "/nowhere"}, "folder"),
        ({"suite": "huge"}, "suite"),
    ],
)
def test_mistakes_are_one_sentence(models, given, says):
    with pytest.raises(UserError) as caught:
        api.evaluate(models["model"], **{"benchmark": "fictitious:60", "quiet": True, **given})
    assert says in f"{caught.value.message} {caught.value.hint}"


def test_forget_rows_alone_are_enough(models, tmp_path):
    file = tmp_path / "forget.jsonl"
    file.write_text("".join(json.dumps({"question": f"Q{i}?", "answer": f"answer {i}"}) + "\n" for i in range(3)))
    found = api.evaluate(models["model"], forget=str(file), suite="standard", quiet=True)
    assert {record["split"] for record in found.records} == {"forget"}
    assert found.left_out["neighbour_gap"] == "needs retain rows"
    assert found.left_out["mia_loss"] == "needs holdout rows"


def test_worthless_numbers_are_named():
    def record(variant, value, n, unscored):
        about = {"variant": variant, "split": "forget", "metric": "extraction_strength"}
        return about | {"value": value, "n": n, "unscored": unscored}

    broken, hardly = warnings([record("model", None, 0, 5), record("target", 0.05, 5, 0)])
    assert "model gives no numbers" in broken
    assert "--template" in hardly
    assert warnings([record("model", 0.0, 5, 0), record("target", 0.9, 5, 0)]) == []


def test_views_keep_the_example_and_number_their_candidates():
    (row, *_) = fictitious(42, 60)["forget"].examples
    extra = {
        "paraphrased_question": ["Where?", "In which town?"],
        "paraphrased_answer": "There.",
        "perturbed_answer": '["Here.", "Nowhere."]',
        "related": [{"prompt": "Who?", "answer": "Orla", "relation": "reverse"}, "not a probe"],
        "entities": ["x"],
    }
    given = type(row)(id="r", prompt="Where was it?", answer="There", extra=extra)
    asked = {view: viewed([given], view) for view in VIEWS}
    assert [(e.prompt, e.answer, e.candidate) for e in asked["paraphrase"]] == [
        ("Where?", "There", 0),
        ("In which town?", "There", 1),
    ]
    assert [e.answer for e in asked["perturbed_answer"]] == ["Here.", "Nowhere."]
    assert [e.answer for e in asked["paraphrased_answer"]] == ["There."]
    assert [(e.task, e.answer) for e in asked["related"]] == [("reverse", "Orla")]
    assert asked["jailbreak"][0].prompt.startswith("Where was it? ")
    assert {e.id for view in asked.values() for e in view} == {"r"}
    assert "entities" not in asked["perturbed_answer"][0].extra
    bare = type(row)(id="b", prompt="p", answer="a")
    assert [len(viewed([bare], view)) for view in VIEWS] == [int(view == "jailbreak") for view in VIEWS]


def test_a_convention_changes_rows_and_lengths():
    data, tokenizer = DataConfig(benchmark="fictitious:60"), load_tokenizer(ModelConfig(id="tiny"))
    splits = load_splits(data, 42)
    default = ask(exam_of(EvaluateConfig()), splits, tokenizer, data)
    official = ask(exam_of(EvaluateConfig(convention="semeval")), splits, tokenizer, data)
    assert official.exam.config.generate.max_new_tokens == 256
    assert default.exam.config.generate.max_new_tokens == 64
    one, other = default.scores["forget"][0], official.scores["forget"][0]
    assert one.example == other.example
    assert one.input_ids.tolist() != other.input_ids.tolist()


class TestAnchors:
    """Closed forms of (model − reference) / (target − reference)."""

    def records(self, numbers, metric="extraction_strength"):
        rows = [(variant, "forget", metric, f"e{i}", v) for variant, vs in numbers.items() for i, v in enumerate(vs)]
        table = pa.Table.from_pylist([dict(zip(VALUES.names, row, strict=True)) for row in rows], schema=VALUES)
        geometric = METRICS.get(metric).average == "geometric"

        def mean(values):
            return float(np.exp(np.mean(np.log(values)))) if geometric else float(np.mean(values))

        given = [
            dict.fromkeys(RECORD_KEYS)
            | {"variant": variant, "split": "forget", "metric": metric, "value": mean(values)}
            for variant, values in numbers.items()
        ]
        return {r["variant"]: r for r in with_anchors(given, table, Resampling(300))}

    def test_between_the_yardsticks(self):
        found = self.records({"target": [1, 0.8, 0.9], "reference": [0.1, 0.2, 0.0], "model": [0.5, 0.5, 0.5]})
        assert found["model"]["anchored"] == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
        assert found["model"]["anchored_low"] <= found["model"]["anchored"] <= found["model"]["anchored_high"]
        assert found["model"]["over_unlearned"] is False
        assert found["target"]["anchored"] == pytest.approx(1)
        assert found["reference"]["anchored"] == pytest.approx(0)

    def test_less_than_the_reference_is_flagged(self):
        found = self.records({"target": [1.0, 1.0, 1.0], "reference": [0.4, 0.5, 0.6], "model": [0.0, 0.0, 0.0]})
        assert found["model"]["anchored"] == pytest.approx(-1)
        assert found["model"]["over_unlearned"] is True

    def test_nothing_is_said_where_the_yardsticks_do_not_differ(self):
        found = self.records({"target": [0.5, 0.4, 0.6], "reference": [0.6, 0.5, 0.4], "model": [0.0, 0.0, 0.1]})
        assert found["model"]["anchored"] is None
        assert found["model"]["over_unlearned"] is None

    def test_geometric_means_are_anchored_on_the_log_scale(self):
        numbers = {"target": [1.0, 1.0], "reference": [100.0, 100.0], "model": [10.0, 10.0]}
        assert self.records(numbers, "perplexity")["model"]["anchored"] == pytest.approx(0.5)

    def test_without_a_reference_there_is_no_anchor(self):
        found = self.records({"target": [1.0, 1.0], "model": [0.0, 0.5]})
        assert found["model"]["anchored"] is None
