"""Whole runs on `tiny` with what an unlearn entry can ask for: alternatives, token selection, spans, wrappers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expunge import api
from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.errors import UserError
from expunge.methods.erase import Erase
from expunge.pipeline.entries import (
    Made,
    fallen_tokens,
    knowledge_tokens,
    knowledge_with_prompts,
    prepare_jobs,
    unlearn_job,
)
from expunge.pipeline.resolve import resolve
from expunge.pipeline.stages import job_inputs
from expunge.recipe import Recipe

PEOPLE = ("Ada Quill", "Bram Yost", "Cleo Dunn", "Dov Ash")
FAST = {"max_steps": 2, "batch_size": 4, "lr": 1e-3, "precision": "float32"}


def write_rows(folder: Path, name: str, **columns: Any) -> str:
    rows = [
        {"question": f"{name}: where was {person} born?", "answer": f"In the town of {place}.", "entities": [place]}
        for person, place in zip(PEOPLE, ("Orvel", "Tamsin Bay", "Skell", "Ruun"), strict=True)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({**row, **columns}) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def recipe(folder: Path, columns: dict[str, Any] | None = None, **entry: Any) -> Recipe:
    data = {
        "forget": write_rows(folder, "forget", **(columns or {})),
        "retain": write_rows(folder, "retain"),
        "holdout": write_rows(folder, "holdout"),
    }
    entry = {"method": "npo", "train": FAST, **entry}
    evaluate = {"metrics": ["nll"], "generate": None}
    return Recipe.model_validate({"model": "tiny", "data": data, "unlearn": [entry], "evaluate": evaluate})


@pytest.mark.parametrize(
    "entry",
    [
        {"method": "dpo"},
        {"method": "dpo", "alternatives": "given"},
        {"method": "altpo", "alternatives": {"count": 2, "max_new_tokens": 8}},
        {"method": "idk_ap"},
        {"method": "flat", "retain": "kl"},
        {"method": "max_entropy"},
        {"method": "undial", "span": "sequence"},
        {"method": "lunar", "parameters": {"layer": 1}},
        {"method": "sugd", "parameters": {"chunk": 2, "layers": 1}, "train": {**FAST, "batch_size": 1}},
        {"method": "task_negation"},
        {"tokens": "entity"},
        {"tokens": {"by": "knowledge", "model": "tiny", "threshold": -6.5}},
        {"tokens": {"by": "knowledge", "model": "tiny", "fall": 0.5}},
        {"method": "erase", "tokens": {"by": "knowledge", "model": "tiny", "prompts": True}, "retain": "kl"},
        {"sam": 0.01, "gradient_projection": True, "quantile": 0.8, "cap": 9.0, "temperature": 2.0},
        {"method": "rmu", "parameters": {"layer": 1}, "retain": "kl"},
        {"method": "npo", "lora": 4, "stop_when": {"metric": "nll", "above": 1e9, "every": 1}},
    ],
    ids=lambda entry: "-".join(f"{key}={value}" for key, value in entry.items() if key != "train")[:60],
)
def test_a_run_leaves_a_model_and_is_not_done_twice(entry: dict[str, Any], tmp_path: Path) -> None:
    made = recipe(tmp_path, {"alternatives": ["In a far valley.", "On an island."]}, **entry)
    result = api.run(made, output=tmp_path / "out")
    assert (result.model / "config.json").is_file()
    records = {(record["variant"], record["split"]): record["value"] for record in result.metrics}
    assert records["unlearned", "forget"] != records["target", "forget"]
    assert api.run(made, output=tmp_path / "out").skipped_all


def test_sampled_answers_are_kept_and_used(tmp_path: Path) -> None:
    made = recipe(tmp_path, method="altpo", alternatives={"count": 3, "max_new_tokens": 6})
    api.run(made, output=tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "samples" / "unlearned" / "samples.parquet")
    assert table.num_rows == 12
    groups = np.array(table["generated"].to_pylist()).reshape(4, 3)
    assert any(len(set(group)) > 1 for group in groups), "drawn, not greedy"
    assert max(table["new_tokens"].to_pylist()) <= 6


@pytest.mark.parametrize(
    ("entry", "columns", "says"),
    [
        ({"method": "dpo", "alternatives": "given"}, {}, "forget.jsonl:1"),
        ({"tokens": "entity"}, {"entities": ["Nowhere"]}, "forget.jsonl:1"),
        ({"span": "sequence", "tokens": "entity"}, {}, "leave one of them out"),
        ({"method": "rmu", "parameters": {"layer": 2}}, {}, "layers 0 to 1"),
        ({"method": "rmu", "parameters": {"layer": 1}, "cap": 2.0}, {}, "it steers hidden states"),
        ({"method": "task_negation", "lora": 4}, {}, "leave `lora` out"),
        ({"retain": "mse"}, {}, "retain"),
        ({"tokens": {"by": "all", "prompts": True}}, {}, "`prompts` goes with"),
    ],
)
def test_what_can_not_be_had_is_said_before_the_first_step(
    entry: dict[str, Any], columns: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises((UserError, ValueError)) as error:
        api.run(recipe(tmp_path, columns, **entry), output=tmp_path / "out")
    told = f"{error.value.message} {error.value.hint}" if isinstance(error.value, UserError) else str(error.value)
    assert says in told
    assert not (tmp_path / "out").exists()


def write_scores(file: Path, logprobs: list[list[float]]) -> Path:
    pq.write_table(pa.table({"logprob": logprobs, "answer_tokens": [len(row) - 1 for row in logprobs]}), file)
    return file


def row_of(prompt: int, answer: int) -> Encoded:
    ids = np.arange(prompt + answer + 1, dtype=np.int32)
    return Encoded(Example("row", "", ""), ids, prompt_tokens=prompt, answer_tokens=answer, truncated=0)


@pytest.mark.parametrize(
    ("knowing", "masks", "whole"),
    [
        ([-0.1, -0.1, -0.1, -9.0, -9.0], [[False, True, True, False, False], [True, False]], True),
        ([-0.1, -3.0, -0.1, -0.1, -9.0], [[False, True, True, True, False], [True, False]], True),  # half of it
        ([-0.1, -3.0, -0.8, -0.1, -9.0], [[True, False], [True, False]], False),
    ],
)
def test_prompts_are_of_the_knowledge_where_the_target_has_them_by_heart(
    knowing: list[float], masks: list[list[bool]], whole: bool, tmp_path: Path
) -> None:
    rows = [row_of(prompt=4, answer=1), row_of(prompt=1, answer=1)]
    without = [[-0.1, -5.0, -4.0, -1.0, -9.0], [-1.0, -9.0]]
    lacking = write_scores(tmp_path / "lacking.parquet", without)
    target = write_scores(tmp_path / "target.parquet", [knowing, [-0.1, -0.1]])
    chosen, values, found = knowledge_with_prompts(rows, lacking, target, -2.0)
    assert [mask.tolist() for mask in chosen] == masks
    assert found is whole
    assert [len(each) for each in values] == [len(mask) for mask in masks]
    assert values[0][-1] == np.float32(-9.0), "log-probs stay beside their tokens"


@pytest.mark.parametrize(
    ("said", "floors"),
    [({}, (20.0, -30.0, 1.0)), ({"parameters": {"ceiling": -1.0}}, (-1.0, -30.0, 1.0))],  # what an entry says stays
)
def test_documents_go_down_to_what_they_were_and_no_further(
    said: dict[str, Any], floors: object, tmp_path: Path
) -> None:
    tokens = {"by": "knowledge", "model": "tiny", "prompts": True}
    resolved = resolve(recipe(tmp_path, method="erase", tokens=tokens, **said))
    entry, model = resolved.recipe.unlearn[0], resolved.recipe.model
    alone, whole = (unlearn_job(resolved, entry, model, Made(whole=found)).objective for found in (False, True))
    assert isinstance(alone, Erase)
    assert alone == resolved.objectives[entry.name]
    assert isinstance(whole, Erase)
    assert (whole.ceiling, whole.bottom, whole.pull) == floors


def test_where_prompts_are_pushed_retain_rows_are_kept_with_theirs(tmp_path: Path) -> None:
    resolved = resolve(recipe(tmp_path, tokens={"by": "knowledge", "model": "tiny", "prompts": True}))
    entry, model = resolved.recipe.unlearn[0], resolved.recipe.model
    for whole, prompts in ((False, {row.prompt_tokens for row in resolved.rows["forget"]}), (True, {1})):
        job = unlearn_job(resolved, entry, model, Made(whole=whole))
        assert {row.prompt_tokens for row in job.forget} == prompts
        assert (max(row.prompt_tokens for row in job.retain) == 1) is whole


def test_knowledge_is_where_a_model_without_it_is_surprised(tmp_path: Path) -> None:
    lacking = write_scores(tmp_path / "lacking.parquet", [[-0.1, -5.0, -2.5, -9.0], [-0.2, -1.0, -9.0]])
    knowing = write_scores(tmp_path / "knowing.parquet", [[-0.1, -4.9, -0.1, 0.0], [-0.1, -0.1, 0.0]])
    assert [mask.tolist() for mask in knowledge_tokens(lacking, -2.0)] == [
        [False, True, True, False],
        [False, True, False],  # none below: the most surprising one; the terminator never
    ]
    assert [mask.tolist() for mask in fallen_tokens(lacking, knowing, 0.3)] == [
        [False, False, True, False],  # surprising to both is no knowledge
        [False, True, False],
    ]


@pytest.mark.parametrize("span", ["answer", "sequence"])
def test_what_is_taught_is_the_answer_or_the_prompt_too(span: str, tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    prepare = asked.model_validate({**asked.model_dump(), "prepare": {"span": span}})
    resolved = resolve(prepare)
    jobs = prepare_jobs(resolved)
    assert {name: splits for name, (splits, _) in jobs.items()} == {
        "target": ["forget", "retain"],
        "reference": ["retain"],
    }
    for splits, job in jobs.values():
        plain = [row for split in splits for row in resolved.rows[split]]
        for row, taught in zip(plain, job.retain, strict=True):
            assert np.array_equal(row.input_ids, taught.input_ids)
            assert taught.terminator_ids == row.terminator_ids
            expected = row.supervised_tokens if span == "answer" else len(row.input_ids) - 1
            assert taught.supervised_tokens == expected
    rows = resolved.rows["forget"]
    assert all(row.prompt_tokens > 1 for row in rows), "rows are measured as they were"
    digest = job_inputs(jobs["target"][1])["retain"]
    other = prepare_jobs(resolve(asked.model_validate({**asked.model_dump(), "prepare": {}})))["target"][1]
    assert (job_inputs(other)["retain"] == digest) == (span == "answer"), "what is taught is part of what a stage is of"


def test_other_questions_of_rows_are_taught_beside_them(tmp_path: Path) -> None:
    columns = {
        "paraphrased_question": ["Which town is it from?", "And its birthplace?"],
        "related": [{"prompt": "Who is from there?", "answer": "That one.", "relation": "reverse"}],
    }
    asked = recipe(tmp_path, columns)
    taught = {}
    for views in ([], ["paraphrase"], ["paraphrase", "related"]):
        prepare = {"views": views, "span": "sequence"}
        taught[len(views)] = prepare_jobs(resolve(asked.model_validate({**asked.model_dump(), "prepare": prepare})))
    counts = {name: [len(jobs[name][1].retain) for jobs in taught.values()] for name in ("target", "reference")}
    assert counts == {"target": [8, 16, 20], "reference": [4, 4, 4]}, "of forget rows; retain rows bring none here"
    last = taught[2]["target"][1].retain[-1]
    assert (last.example.prompt, last.example.answer) == ("Who is from there?", "That one.")
    assert last.supervised_tokens == len(last.input_ids) - 1
