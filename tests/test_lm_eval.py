"""Tasks of lm-evaluation-harness, with a stand-in for it, and with itself where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmark_folders import write
from expunge.data.encode import encode
from expunge.data.load import load_examples
from expunge.data.template import resolve_template
from expunge.data.views import viewed
from expunge.errors import UserError
from expunge.metrics.choice import choice_accuracy
from expunge.models.load import load_model
from expunge.pipeline import lm_eval
from expunge.pipeline.lm_eval import SPLIT, TaskValue, lm_eval_records, run_tasks
from expunge.recipe import ModelConfig, SourceConfig
from expunge.scoring.scores import score
from expunge.scoring.tables import RECORD_KEYS

RESULTS = {
    "results": {
        "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.01},
        "mmlu_law": {"acc,none": 0.25, "acc_stderr,none": 0.1},
        "gsm8k": {
            "exact_match,strict-match": 0.0,
            "exact_match_stderr,strict-match": "N/A",
            "exact_match,flexible-extract": 0.125,
            "exact_match_stderr,flexible-extract": 0.02,
        },
    },
    "n-samples": {"gsm8k": {"original": 1319, "effective": 8}},
}


class Model:
    """What run_tasks asks of a model."""

    training = True

    def eval(self) -> Model:
        self.training = False
        return self

    def train(self, mode: bool = True) -> Model:
        self.training = mode
        return self


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """lm-eval's names with answers by hand; what was asked is kept, and `error` is raised where it is set."""
    asked: dict[str, Any] = {"error": None}

    def simple_evaluate(**given: Any) -> Any:
        asked.update(given)
        if asked["error"] is not None:
            raise asked["error"]
        return RESULTS

    class TaskManager:
        all_tasks = ("gsm8k", "mmlu", "mmlu_law")

        def __init__(self, include_path: str | None = None) -> None:
            asked["include_path"] = include_path

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: given},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lm_eval, "hub_answers", lambda: False)
    return asked


def test_results_are_those_of_the_tasks_that_were_named(harness: dict[str, Any]) -> None:
    model = Model()
    found = run_tasks(model, "tokenizer", ["mmlu", "gsm8k"], limit=8, batch_size=3)
    assert found == {
        "mmlu": {"acc": TaskValue(0.5, 0.01, 0)},
        "gsm8k": {
            "exact_match (strict-match)": TaskValue(0.0, None, 8),
            "exact_match (flexible-extract)": TaskValue(0.125, 0.02, 8),
        },
    }
    assert (harness["limit"], harness["tasks"]) == (8, ["mmlu", "gsm8k"])
    assert harness["model"] == {"pretrained": model, "tokenizer": "tokenizer", "batch_size": 3}
    assert model.training, "the model is given back as it came"


def test_records_stand_beside_those_of_metrics(harness: dict[str, Any]) -> None:
    records = lm_eval_records(run_tasks(Model(), None, ["mmlu", "gsm8k"]), "unlearned")
    assert all(tuple(record) == RECORD_KEYS for record in records)
    assert [(r["variant"], r["split"], r["metric"], r["value"]) for r in records] == [
        ("unlearned", SPLIT, "mmlu", 0.5),
        ("unlearned", SPLIT, "gsm8k", 0.0),
    ]
    assert records[0]["ci_low"] == pytest.approx(0.5 - 1.96 * 0.01, abs=1e-5)
    assert records[1]["ci_low"] is None
    assert "strict-match" in records[1]["note"]


@pytest.mark.parametrize(
    ("tasks", "error", "sentence", "hint"),
    [
        (["mmlo"], None, "lm-eval has no task 'mmlo'", "did you mean 'mmlu'"),
        (["qqqqqq"], None, "lm-eval has no task 'qqqqqq'", "lm-eval ls tasks"),
        ([], None, "no lm-eval task is named", "wmdp_bio"),
        (["mmlu"], ConnectionError("no\nroute"), "cannot load the data of mmlu: no route", "HF_DATASETS_OFFLINE"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    harness: dict[str, Any], tasks: list[str], error: Exception | None, sentence: str, hint: str
) -> None:
    harness["error"] = error
    model = Model()
    with pytest.raises(UserError, match=sentence) as caught:
        run_tasks(model, None, tasks)
    assert hint in caught.value.hint
    assert model.training


def test_a_fault_of_another_kind_is_not_hidden(harness: dict[str, Any]) -> None:
    harness["error"] = ZeroDivisionError("in the model")
    with pytest.raises(ZeroDivisionError):
        run_tasks(Model(), None, ["mmlu"])


def test_without_lm_eval_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="need the package lm-eval") as caught:
        run_tasks(Model(), None, ["mmlu"])
    assert "expunge[eval]" in caught.value.hint


def test_the_harness_itself_agrees_with_choice_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the package lm-eval is not installed (extra eval)")
    random = np.random.default_rng(0)
    words = np.array(["alpha", "beta", "town", "river", "stone", "glass"])
    rows = [
        {"question": f"What follows {i}?", "choices": [str(w) for w in random.choice(words, 4)], "answer": i % 4}
        for i in range(40)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    choices = "".join(f"\\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate("ABCD"))
    config = {
        "task": "own_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": f"{{{{question}}}}{choices}\\nAnswer:".replace("\\n", "\n"),
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "own.yaml").write_text(json.dumps(config))
    loaded = load_model(ModelConfig(id="tiny"))
    found = run_tasks(loaded.model, loaded.tokenizer, ["own_choices"], folder=tmp_path)["own_choices"]["acc"]
    examples = load_examples(SourceConfig(path=str(path)))
    template = resolve_template("{prompt}\nAnswer: {answer}", loaded.tokenizer)
    tables = [
        score(loaded.model, encode(part, loaded.tokenizer, template, 512), batch_size=8)
        for part in (examples, viewed(examples, "perturbed_answer"))
    ]
    assert found.n == 40
    assert found.value == pytest.approx(choice_accuracy(tables[0], tables[0].slice(0, 0), tables[1]).mean())
