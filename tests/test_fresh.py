"""`fresh-5m`: an untrained model on which facts are learnt from scratch, and what `auto` makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expunge.models.aliases import alias_folder, fetch_alias
from expunge.models.fresh import build_fresh
from expunge.pipeline.auto import Given, decided
from expunge.recipe import Recipe, load_recipe


def test_the_model_is_the_same_each_time_and_holds_every_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = build_fresh()
    again, _ = build_fresh()
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_246_208
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), again.parameters(), strict=True))
    for text in ("Above which town does Huldeda stand?", "東京の電話番号 ☎ 03", "naïve\n\tcode"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    assert fetch_alias("fresh-5m") == alias_folder("fresh-5m")
    assert (alias_folder("fresh-5m") / "model.safetensors").is_file()


def test_a_base_that_never_learnt_anything_chooses_no_tokens():
    data = {"benchmark": "fictitious"}
    for model, by in (("fresh-5m", "all"), ("tiny", "knowledge")):
        made = Recipe.model_validate({"model": model, "data": data, "prepare": {}, "unlearn": [{"method": "auto"}]})
        assert decided(made, Given(30, 60))[0].unlearn[0].tokens.by == by


def test_the_preset_teaches_every_fact_more_than_fifty_times():
    scratch = load_recipe(preset="scratch")
    assert scratch.prepare is not None
    assert scratch.prepare.views == ["paraphrase", "related"]
    assert scratch.prepare.train.epochs * 3 > 50  # a question, and two other wordings of it
