"""What a merge refuses: one sentence, a hint, and nothing is written."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from expunge.errors import UserError
from expunge.merging import writer
from expunge.merging.run import merge_models
from merging_models import (
    llama,
    moved,
    reconfigure,
    rewrite,
    save,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


# ---------------------------------------------------------------- bad input: one sentence, nothing written


def cut_short(folder, bytes_left=-100):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def write(folder, name, text):
    (folder / name).write_text(text)


def index_without_shard(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save(model, folder, max_shard_size="20KB")
    next(folder.glob("model-00002*")).unlink()


def shard_cut_short(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save(model, folder, max_shard_size="20KB")
    shard = next(folder.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def tokens(folder, word):
    write(folder, "tokenizer.json", json.dumps({"model": {"vocab": {"a": 0, word: 1}}, "added_tokens": []}))


BROKEN = {
    "shape": (
        lambda d: save(llama(1, intermediate_size=56), d / "b"),
        r"layers\.0\.mlp\.\w+_proj\.weight is .*48.* in .*base and .*56",
    ),
    "vocabulary size": (
        lambda d: save(llama(1, vocab_size=65), d / "b"),
        "the vocabularies differ: .* is 64 × 32 in .*base and 65 × 32",
    ),
    "layers": (
        lambda d: save(llama(1, num_hidden_layers=3), d / "b"),
        r"base has no tensor model\.layers\.2\..*, which .*b has",
    ),
    "one tensor missing": (
        lambda d: rewrite(d / "b", lambda t: t.pop("model.norm.weight")),
        "b has no tensor model.norm.weight",
    ),
    "architecture": (
        lambda d: reconfigure(d / "b" / "config.json", model_type="mistral"),
        "architectures differ .*llama.*mistral",
    ),
    "heads": (
        lambda d: reconfigure(d / "b" / "config.json", num_attention_heads=8),
        "num_attention_heads is 4 in .* and 8 in",
    ),
    "tokens": (lambda d: (tokens(d / "base", "x"), tokens(d / "b", "y")), "token 1 is 'x' in .*base and 'y' in .*b"),
    "NaN": (
        lambda d: rewrite(d / "b", lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight in .*b holds NaN",
    ),
    "infinite": (
        lambda d: rewrite(d / "base", lambda t: t["lm_head.weight"][3].fill_(float("-inf"))),
        "lm_head.weight in .*base holds NaN",
    ),
    "cut short": (
        lambda d: cut_short(d / "b"),
        r"b/model\.safetensors is cut short: [\d,]+ bytes where its header promises",
    ),
    "header cut short": (lambda d: cut_short(d / "b", 100), "its header is not complete"),
    "empty file": (lambda d: cut_short(d / "b", 0), "its header is not complete"),
    "no safetensors": (lambda d: write(d / "b", "model.safetensors", "x" * 8 + "hello"), "header is not complete"),
    "appended": (lambda d: (d / "b/model.safetensors").open("ab").write(b"x"), "is damaged"),
    "pickle": (lambda d: pickled(d / "b"), "pickle"),
    "no weights": (lambda d: (d / "b" / "model.safetensors").unlink(), "holds no weights"),
    "no config": (lambda d: (d / "b" / "config.json").unlink(), "holds no model"),
    "broken config": (lambda d: write(d / "b", "config.json", "{\n\n"), r"config\.json:3 is not valid JSON"),
    "shard missing": (lambda d: index_without_shard(d / "b"), "model-00002-of-.*is missing"),
    "shard cut short": (lambda d: shard_cut_short(d / "b"), r"model-00002-of-.* is cut short: [\d,]+ bytes where"),
    "quantised": (lambda d: reconfigure(d / "b" / "config.json", quantization_config={"bits": 4}), "is quantised"),
    "float8": (
        lambda d: rewrite(d / "b", lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
        "stored as F8_E4M3",
    ),
    "partial in the way": (lambda d: ((d / "out.partial").mkdir(), write(d / "out.partial", "mine", "")), "in the way"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_inputs_are_refused_with_a_sentence_and_nothing_is_written(three, what):
    damage, sentence = BROKEN[what]
    damage(three)
    before = {path: path.stat().st_mtime_ns for path in three.rglob("*")}
    with pytest.raises(UserError, match=sentence) as caught:
        merge_models([three / "a", three / "b"], three / "out", base=three / "base", density=0.8)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert {path: path.stat().st_mtime_ns for path in three.rglob("*")} == before


def command(*arguments):
    from expunge.cli.app import main

    return main(["merge", *map(str, arguments)])


@pytest.mark.parametrize("what", ["shape", "vocabulary size", "architecture", "NaN", "cut short", "shard cut short"])
def test_the_command_says_so_in_one_sentence_and_ends_with_2(three, capsys, what):
    damage, sentence = BROKEN[what]
    damage(three)
    assert command(three / "a", three / "b", "--base", three / "base", "-o", three / "out") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    assert re.search(sentence, " ".join(lines))
    assert lines[-1].startswith("hint: ")
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base"]


def test_the_command_ends_with_2_without_a_base_and_without_room(three, capsys, monkeypatch):
    assert command(three / "a", three / "b", "-o", three / "out") == 2
    assert "say it with --base" in capsys.readouterr().err

    class Full:
        free = 1000

    def refuse(*arguments, **options):
        raise AssertionError("something was written before the space was checked")

    monkeypatch.setattr(writer.shutil, "disk_usage", lambda place: Full)
    monkeypatch.setattr(writer, "FolderLock", refuse)
    assert command(three / "a", three / "b", "--base", three / "base", "-o", three / "new" / "out") == 2
    assert "not enough disk" in capsys.readouterr().err
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base"]


WRONG = {
    "no models": ({"inputs": []}, "nothing to merge"),
    "no such folder": ({"inputs": ["./gone"]}, "gone"),
    "unknown method": ({"method": "tie"}, "unknown merge method 'tie'"),
    "missing base": ({"base": None}, "whole checkpoints do not say what theirs is"),
    "too few weights": ({"weights": [1.0]}, "1 weights for 2 models"),
    "weight not finite": ({"weights": [1.0, float("inf")]}, "finite"),
    "density zero": ({"density": 0.0}, "density 0 "),
    "density above one": ({"density": [0.5, 1.5]}, r"density 1\.5 "),
    "density NaN": ({"density": float("nan")}, "density must be finite, not nan"),
    "too many densities": ({"density": [0.5] * 3}, "3 densities for 2 models"),
    "parameter": ({"parameters": {"sing": "total"}}, "unknown parameter 'sing'"),
    "weights cancel": ({"method": "linear", "weights": [1.0, -1.0]}, "sum of the weights, which is 0"),
    "no base and a sum": (
        {"method": "linear", "base": None, "parameters": {"normalize": False}},
        "must add up to 1, not 2",
    ),
    "no base and a scale": (
        {"method": "linear", "base": None, "parameters": {"scale": 0.5}},
        r"must add up to 1, not 0\.5",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings_are_refused_before_anything_is_read(three, what):
    changes, sentence = WRONG[what]
    settings = {"inputs": [three / "a", three / "b"], "base": three / "base", "density": 0.8} | changes
    with pytest.raises(UserError, match=sentence) as caught:
        merge_models(settings.pop("inputs"), three / "out", **settings)
    assert caught.value.hint
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base"]


def test_the_result_must_fit_into_its_dtype(tmp_path):
    base = llama(0)
    save(moved(base, 1), tmp_path / "a", torch.float16)
    save(base, tmp_path / "base", torch.float16)
    with pytest.raises(UserError, match="result holds NaN or infinite") as caught:
        merge_models([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base", parameters={"scale": 1e8})
    assert "float16" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["a", "base", "a/inside", "other", "file"])
def test_the_output_does_not_fall_on_anything(three, place):
    (three / "other").mkdir()
    (three / "other" / "thesis.txt").write_text("years of work")
    (three / "file").write_text("")
    before = {path: path.stat().st_mtime_ns for path in three.rglob("*")}
    with pytest.raises(UserError) as caught:
        merge_models([three / "a", three / "b"], three / place, base=three / "base")
    assert "-o" in caught.value.hint
    assert {path: path.stat().st_mtime_ns for path in three.rglob("*")} == before


def test_an_earlier_merge_is_replaced_but_not_what_was_added_to_it(three):
    merge_models([three / "a"], three / "out", base=three / "base")
    with pytest.raises(UserError, match="in each other's way"):
        merge_models([three / "out"], three / "out", base=three / "base")
    (three / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        merge_models([three / "b"], three / "out", base=three / "base")
