"""`method: auto`: what it writes out, what it leaves to the user, and whole runs of it on `tiny`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from expunge import api
from expunge.errors import UserError
from expunge.methods.erase import Erase, log_odds
from expunge.pipeline.auto import Given, decided
from expunge.pipeline.resolve import resolve
from expunge.pipeline.strangers import words_of_their_own
from expunge.recipe import Recipe
from expunge.report.provenance import switches
from method_cases import FORGET_TOKENS, SIDES, outputs
from method_steps import make_step
from test_unlearn_entries import recipe

FAST = {"epochs": 1, "lr": 1e-3, "precision": "float32"}


def written(entry, forget_rows=4, given=None, **beside):
    made = Recipe.model_validate(
        {"model": "tiny", "data": {"forget": "f.jsonl"}, "unlearn": [{"method": "auto", **entry}], **beside}
    )
    return decided(made, given or Given(forget_rows))


@pytest.mark.parametrize(
    ("entry", "beside", "wanted"),
    [
        ({}, {}, {"method": "erase", "neighbours": 4, "tokens.by": "all", "train.lr": 2e-4, "retain.kl": 2.0}),
        ({}, {"reference": "r"}, {"tokens.by": "knowledge", "tokens.model": "reference", "tokens.prompts": True}),
        ({"tokens": {"by": "knowledge", "model": "m", "prompts": False}}, {}, {"tokens.prompts": False}),
        ({"tokens": {"by": "knowledge", "model": "m", "fall": 0.3}}, {}, {"tokens.prompts": False}),
        ({}, {"prepare": {}}, {"tokens.by": "knowledge", "tokens.model": "original"}),
        ({"tokens": "entity"}, {"reference": "r"}, {"tokens.by": "entity"}),
        ({"neighbours": 1, "retain": "kl"}, {}, {"neighbours": 1, "retain.kl": 1.0}),
        ({"train": {"lr": 3e-4}}, {}, {"train.lr": 3e-4, "train.schedule": "linear"}),
        ({"lora": 8}, {}, {"train.lr": 3e-4, "lora.rank": 8, "null_space": None}),
        ({}, {"localize": {"by": "magnitude"}}, {"null_space": None}),
        ({}, {}, {"parameters": {}, "null_space": 3.0, "keep": None}),
        ({"parameters": {"depth": 1}}, {}, {"parameters": {"depth": 1}}),
    ],
    ids=str,
)
def test_what_is_written_out(entry, beside, wanted):
    entry = {**entry, "lora": {"rank": 8}} if "lora" in entry else entry
    found, reasons = written(entry, **beside)
    plain = found.unlearn[0].model_dump()
    for key, value in wanted.items():
        at = plain
        for part in key.split("."):
            at = at[part]
        assert at == value, key
    assert len(reasons) == 1
    assert "auto is erase" in reasons[0]


@pytest.mark.parametrize(
    ("rows", "epochs", "neighbours"), [(4, 72, 4), (30, 20, 4), (60, 20, 2), (120, 10, 1), (400, 3, 1), (100_000, 3, 1)]
)
def test_length_and_strangers_follow_the_number_of_rows(rows, epochs, neighbours):
    entry = written({}, rows)[0].unlearn[0]
    assert (entry.train.epochs, entry.neighbours) == (epochs, neighbours)


@pytest.mark.parametrize(
    ("given", "rate", "keep"),
    [(Given(4), 2e-4, None), (Given(4, 40, 135_000_000), 2e-4, 0.95), (Given(4, 400, 7_000_000_000), 2.8e-5, 0.95),
     (Given(4, 39, 5_246_208), 1e-3, None)],
    ids=str,
)  # fmt: skip
def test_rate_and_what_stays_follow_the_model_and_the_retain_rows(given, rate, keep):
    entry = written({}, given=given)[0].unlearn[0]
    assert (entry.train.lr, entry.keep) == (rate, keep)


def test_other_methods_are_left_alone():
    made = Recipe.model_validate({"model": "tiny", "data": {"forget": "f.jsonl"}, "unlearn": [{"method": "npo"}]})
    assert decided(made, Given(4)) == (made, [])


def test_floors_stand_below_what_ignorance_gives():
    logits, hidden = outputs()
    known = torch.linspace(-12, 0, FORGET_TOKENS, dtype=torch.float64)
    step = make_step(SIDES["forget"], (), logits[:FORGET_TOKENS], hidden[:FORGET_TOKENS], lacking=known)
    odds = log_odds(step.forget.logits, step.forget.targets)
    for ceiling in (-4.0, 8.0):
        floors = torch.logit(known.exp()).clamp(min=-9.0, max=ceiling) - 2.0
        found = Erase(depth=2.0, bottom=-9.0, ceiling=ceiling).loss(step)["forget"]
        torch.testing.assert_close(found, (odds - floors).clamp(min=0).mean())


def test_log_odds_have_a_slope_of_one_where_the_probability_is_one():
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    value = log_odds(logits, torch.tensor([0]))
    value.sum().backward()
    assert value.item() == pytest.approx(60 - torch.log(torch.tensor(2.0)).item())
    assert logits.grad is not None
    assert logits.grad[0, 0].item() == pytest.approx(1.0)


def test_a_whole_run_names_what_it_chose_and_trains_on_strangers(tmp_path):
    made = recipe(tmp_path, method="auto", neighbours=2, train=FAST)
    result = api.run(made, output=tmp_path / "out", quiet=True)
    resolved = yaml.safe_load((tmp_path / "out" / "recipe.resolved.yaml").read_text())
    assert resolved["unlearn"][0]["method"] == "erase"
    assert (tmp_path / "out" / "neighbours" / "unlearned" / "words.parquet").is_file()
    assert "auto is erase" in json.dumps(json.loads((tmp_path / "out" / "run.json").read_text()))
    assert api.run(made, output=tmp_path / "out", quiet=True).skipped_all
    assert {record["variant"] for record in result.metrics} == {"target", "unlearned"}


def test_strangers_need_a_term_without_true_answers(tmp_path):
    with pytest.raises(UserError, match="neighbours have no true answers") as error:
        api.run(recipe(tmp_path, method="npo", neighbours=2), output=tmp_path / "out", quiet=True)
    assert error.value.hint is not None
    assert "retain=kl" in error.value.hint


@pytest.mark.parametrize("retain", [True, False])
def test_rows_without_names_have_no_strangers_and_are_unlearned_all_the_same(tmp_path, retain):
    for name, question in (("forget", "what is it?"), ("retain", "what was it?")):
        rows = [{"question": question, "answer": f"it is a {word}."} for word in ("hat", "cat", "mat")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"forget": str(tmp_path / "forget.jsonl")}
    data |= {"retain": str(tmp_path / "retain.jsonl")} if retain else {}
    made = {
        "model": "tiny",
        "data": data,
        "unlearn": [{"method": "auto", "train": {**FAST, "max_steps": 2}}],
        "evaluate": {"metrics": ["nll"], "generate": None},
    }
    result = api.run(made, output=tmp_path / "out", quiet=True)
    assert result.model.is_dir()


@pytest.mark.parametrize("learnt", [True, False])
def test_prompts_that_were_learnt_go_with_their_answers_and_without_strangers(tmp_path, learnt):
    for name, town in (("forget", "Oslo"), ("retain", "Rome")):
        rows = [{"question": f"Where was {who} born?", "answer": town} for who in ("Ada", "Bob", "Cyd")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    taught = {"span": "sequence", "train": {"epochs": 80 if learnt else 1, "lr": 1e-2, "batch_size": 6}}
    made = {
        "model": "tiny",
        "data": {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl")},
        "prepare": taught,
        "unlearn": [{"method": "auto", "tokens": {"by": "knowledge", "model": "tiny"}, "train": FAST}],
        "evaluate": {"metrics": ["nll"], "generate": None},
    }
    api.run(made, output=tmp_path / "out", quiet=True)
    said = (tmp_path / "out" / "run.json").read_text()
    assert ("whole rows go, without strangers" in said) == learnt
    assert (tmp_path / "out" / "neighbours").exists() != learnt


def test_the_report_says_that_strangers_are_kept():
    entry = written({"tokens": {"by": "knowledge", "model": "strangers"}})[0].unlearn[0]
    shown = " / ".join(switches(entry))
    assert "4 strangers beside each forget row" in shown
    assert "the target, asked about strangers, below" in shown


def test_without_another_model_what_forget_rows_alone_hold_becomes_strangers(tmp_path):
    found = words_of_their_own(resolve(recipe(tmp_path)))
    # the same people and answers stand in the retain rows of this recipe
    assert found == set()
    made = recipe(tmp_path)
    retain = made.data.retain
    assert retain is not None
    rows = [{"question": "Where?", "answer": "In the town of Oslo."}] * 2
    Path(retain.path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    people = {"Ada", "Quill", "Bram", "Yost", "Cleo", "Dunn", "Dov", "Ash"}
    assert words_of_their_own(resolve(made)) == people | {"Orvel", "Tamsin", "Bay", "Skell", "Ruun"}


@pytest.mark.parametrize(
    ("question", "answer", "own"),
    [
        ("Who swept Ovale?", "Mira swept it.", {"Ovale", "Mira"}),  # no question word, no common one
        ("オルヴェはどこ?", "スケル", {"オルヴェ", "スケル"}),
    ],
)
def test_words_of_their_own_are_written_like_names(question, answer, own, tmp_path):
    made = recipe(tmp_path)
    Path(made.data.forget.path).write_text(
        json.dumps({"question": question, "answer": answer}) + "\n", encoding="utf-8"
    )
    assert words_of_their_own(resolve(made)) == own
