"""SemEval's official scores of a small model against their definition: other people's code, row by row."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score

from expunge.data.benchmarks.fictitious import fictitious
from expunge.data.benchmarks.general import general_knowledge
from expunge.data.benchmarks.semeval import document_of, official_task
from expunge.data.encode import encode
from expunge.data.example import Example, Split, Splits
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.models.tiny import build_tiny, write_tiny
from expunge.pipeline.semeval import Official
from expunge.recipe import EvaluateConfig, ModelConfig
from expunge.recipe.conventions import convention_of

EVALUATE = EvaluateConfig.model_validate({"batch_size": 16, "generate": {"batch_size": 16}})
NEW = 60
TWELVE = [
    f"{split}_task{task}_{what}"
    for split in ("forget", "retain")
    for task in (1, 2, 3)
    for what in ("regurgitation", "knowledge")
]


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any, Splits]:
    """A model that learnt the retain rows and two of the forget rows, in SemEval's form."""
    model, tokenizer = build_tiny(seed=3)
    splits = fictitious(size=40)
    template = resolve_template("raw", tokenizer)
    chosen = [*splits["retain"].examples, *splits["forget"].examples[3:5]]
    rows = encode(chosen, tokenizer, template, 256, convention_of("semeval"))
    width = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.from_numpy(row.input_ids.astype(np.int64))
        labels[i, row.prompt_tokens : len(row.input_ids)] = ids[i, row.prompt_tokens : len(row.input_ids)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(50):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, splits


def official(taught: tuple[Any, Any, Splits], splits: Splits | None = None, **settings: Any) -> Official:
    _, tokenizer, own = taught
    template = resolve_template(settings.pop("template", "raw"), tokenizer)
    settings = {"new_tokens": NEW, "general": [], **settings}
    return Official(splits or own, {}, tokenizer, template, EVALUATE, **settings)


def said(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy decoding of one prompt: no cache, no batch, no draft."""
    ids = tokenizer(prompt)["input_ids"]
    found: list[int] = []
    while len(found) < NEW:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        found.append(token)
    return str(tokenizer.decode(found, skip_special_tokens=True))


def token_losses(model: Any, tokenizer: Any, text: str) -> list[float]:
    """Loss of every token but the first."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return [-float(value) for value in logits.gather(1, ids[0, 1:, None])[:, 0]]


def test_scores_are_those_of_the_definition(taught: tuple[Any, Any, Splits]) -> None:
    model, tokenizer, splits = taught
    facts = general_knowledge()[:6]
    found = official(taught, general=facts).score(model)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    values: dict[str, list[float]] = {}
    texts = []
    for split in ("forget", "retain"):
        for row in splits[split].examples:
            text = said(model, tokenizer, row.prompt)
            texts.append((split, official_task(row), row.prompt, row.answer, text))
            task, _, kind = str(official_task(row)).partition("-")
            if kind == "sc":
                value = scorer.score(row.answer, text)["rougeL"].recall
            else:
                value = float(text.strip().lower() == row.answer.strip().lower())
            what = "regurgitation" if kind == "sc" else "knowledge"
            values.setdefault(f"{split}_{task.lower()}_{what}", []).append(value)
    assert [tuple(answer) for answer in found.answers] == texts
    means = {name: statistics.mean(some) for name, some in values.items()}
    expected = {name: 1 - mean if name.startswith("forget") else mean for name, mean in means.items()}
    assert sorted(expected) == sorted(TWELVE)
    assert {name: found.values[name] for name in TWELVE} == pytest.approx(expected)
    assert 0 < min(expected.values()) < max(expected.values()), "the model knows some of the rows and not all"
    aggregate = statistics.harmonic_mean(expected.values())
    assert found.values["task_aggregate"] == pytest.approx(aggregate)
    losses = {
        split: [
            statistics.mean(token_losses(model, tokenizer, f"{row.prompt}{row.answer}"))
            for row in splits[split].examples
        ]
        for split in ("forget", "holdout")
    }
    labels = [1] * len(losses["forget"]) + [0] * len(losses["holdout"])
    auc = roc_auc_score(labels, [-loss for loss in (*losses["forget"], *losses["holdout"])])
    assert found.values["mia_auc"] == pytest.approx(auc)
    assert found.values["mia_score"] == pytest.approx(1 - 2 * abs(auc - 0.5))
    right = [
        all(answer_loss(model, tokenizer, row.prompt, row.answer) < answer_loss(model, tokenizer, row.prompt, wrong)
            for wrong in row.extra["perturbed_answer"])
        for row in facts
    ]  # fmt: skip
    assert found.values["general"] == pytest.approx(statistics.mean(right))
    three = [aggregate, 1 - 2 * abs(auc - 0.5), statistics.mean(right)]
    assert found.values["final"] == pytest.approx(statistics.mean(three))
    assert list(found.values)[-3:] == ["forget_es", "retain_es", "unseen_es"]
    assert found.values["retain_es"] > 0.9 > found.values["forget_es"] > found.values["unseen_es"]  # type: ignore[operator]


def answer_loss(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    losses = token_losses(model, tokenizer, f"{prompt} {answer}")
    return sum(losses[len(tokenizer(prompt)["input_ids"]) - 1 :])


def test_a_model_scores_the_same_from_its_folder_and_without_generation(
    taught: tuple[Any, Any, Splits], tmp_path: Any
) -> None:
    folder = write_tiny(tmp_path, seed=3)
    asked = official(taught, limit=1)
    model, _ = build_tiny(seed=3)
    from_memory, from_disk = asked.score(model), asked.score(ModelConfig(id=str(folder)))
    assert from_memory == from_disk
    quick = asked.score(model, generate=False)
    assert quick.answers == []
    assert [quick.values[name] for name in (*TWELVE, "task_aggregate", "final")] == [None] * 14
    same = ("mia_auc", "mia_score", "general", "forget_es", "retain_es", "unseen_es")
    assert {name: quick.values[name] for name in same} == {name: from_memory.values[name] for name in same}
    assert {answer.split for answer in from_memory.answers} == {"forget", "retain"}
    tasks = [(answer.split, answer.task) for answer in from_memory.answers]
    assert len(tasks) == len(set(tasks)) == 12, "one row of each split and task"


def as_lume(row: Example) -> Example:
    return Example(f"{row.id}", row.prompt, row.answer, str(official_task(row)))


def test_member_documents_are_told_apart_where_there_are_any(taught: tuple[Any, Any, Splits]) -> None:
    model, tokenizer, own = taught
    texts = {
        name: [Example(f"{name}{i}", "", f"{row.prompt} {row.answer}", is_text=True) for i, row in enumerate(rows)]
        for name, rows in (("mia_member", own["retain"].examples), ("holdout", own["holdout"].examples))
    }
    by_name = {
        name: Split(name, "forget" if name == "forget" else "retain", tuple(map(as_lume, own[name].examples)))
        for name in ("forget", "retain")
    }
    roles = {"mia_member": "forget", "holdout": "holdout"}
    splits = Splits(by_name | {name: Split(name, roles[name], tuple(rows)) for name, rows in texts.items()})  # type: ignore[arg-type]
    asked = official(taught, splits, limit=1)
    losses = [statistics.mean(token_losses(model, tokenizer, row.answer)) for name in texts for row in texts[name]]
    labels = [1] * len(texts["mia_member"]) + [0] * len(texts["holdout"])
    auc = roc_auc_score(labels, [-loss for loss in losses])
    found = asked.score(model, generate=False).values
    assert found["mia_auc"] == pytest.approx(auc)
    assert found["unseen_es"] is None
    assert not any("member documents" in note for note in asked.notes)
    assert any("member documents" in note for note in official(taught).notes)
    without = official(taught, Splits(by_name))
    assert any("can't be tested" in note for note in without.notes)
    assert without.score(model, generate=False).values["mia_auc"] is None


def test_rows_go_before_splits_and_the_digest_knows_what_is_asked(taught: tuple[Any, Any, Splits]) -> None:
    _, tokenizer, splits = taught
    template = resolve_template("raw", tokenizer)
    fewer = {"retain": encode(splits["retain"].examples[:6], tokenizer, template, 256)}
    asked = Official(splits, fewer, tokenizer, template, EVALUATE)
    assert (len(asked.rows["retain"]), len(asked.rows["forget"])) == (6, len(splits["forget"]))
    digests = {
        official(taught, **settings).digest
        for settings in (
            {},
            {"limit": 1},
            {"new_tokens": 5},
            {"general": general_knowledge()[:2]},
            {"template": "chat"},
        )
    }
    assert len(digests) == 5
    assert official(taught).digest in digests
    assert official(taught).digest == official(taught).digest


def test_rows_are_asked_as_semeval_asks_them(taught: tuple[Any, Any, Splits]) -> None:
    _, tokenizer, _ = taught
    row = official(taught).rows["forget"][0]
    text = tokenizer.decode(row.input_ids)
    assert text == row.example.prompt + row.example.answer + tokenizer.eos_token
    notes = official(taught, template="chat", limit=2).notes
    assert [any(words in note for note in notes) for words in ("MMLU", "chat", "60 tokens", "At most 2")] == [True] * 4
    assert not any("template" in note for note in official(taught).notes)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"forget": [Example("a1", "Who?", "Me", "people")]}, "three tasks"),
        ({"forget": [Example("asc1", "Who?", "Me", "Task1")]}, "need retain rows"),
    ],
)
def test_rows_of_another_shape_are_refused(taught: tuple[Any, Any, Splits], rows: Any, sentence: str) -> None:
    splits = Splits({name: Split(name, "forget", tuple(some)) for name, some in rows.items()})
    with pytest.raises(UserError, match=sentence):
        official(taught, splits)


def test_a_model_that_says_nan_has_no_scores_of_likelihood(taught: tuple[Any, Any, Splits]) -> None:
    model, _ = build_tiny(seed=3)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    found = official(taught, limit=1, new_tokens=4).score(model)
    assert found.values["mia_auc"] is None
    assert found.values["final"] is None


@pytest.mark.parametrize(
    ("name", "task", "expected", "document"),
    [
        ("3sc1", "Task1-sc", "Task1-sc", "3"),
        ('"x"qa0', "Task1", "Task1-qa", '"x"'),
        ("d7qa4", "biography", "Task2-qa", "d7"),
        ("d7sc1", "encyclopedia", "Task3-sc", "d7"),
        ("d7", "creative", None, "d7"),
        ("d7sc1", "people", None, "d7"),
    ],
)
def test_tasks_by_id(name: str, task: str, expected: str | None, document: str) -> None:
    row = Example(name, "p", "a", task)
    assert (official_task(row), document_of(row)) == (expected, document)
