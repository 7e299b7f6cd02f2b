"""`expunge merge`."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from merging_models import (
    adapter,
    assert_equal,
    in_memory,
    llama,
    save,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


# ---------------------------------------------------------------- the command


def command(*arguments):
    from expunge.cli.app import main

    return main(["merge", *map(str, arguments)])


def test_the_command_writes_and_says_so(three, capsys):
    code = command(
        three / "a",
        three / "b",
        "--base",
        three / "base",
        "--weights",
        "1,0.5",
        "--density",
        "0.8",
        "--set",
        "scale=0.5",
        "-o",
        three / "out",
    )
    assert code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"wrote {three / 'out'}: 21 tensors")
    assert_equal(weights(three / "out"), in_memory(three, 0.8, scale=0.5), 1e-7)


def test_a_merge_in_place_of_an_earlier_one_is_said(three, capsys):
    arguments = (three / "a", three / "b", "--method", "linear", "-o", three / "out")
    assert command(*arguments) == 0
    assert "in place of" not in capsys.readouterr().out
    assert command(*arguments) == 0
    assert "in place of the merge that was there" in capsys.readouterr().out


def test_the_command_prints_json(three, capsys):
    assert command(three / "a", three / "b", "--method", "linear", "--json", "-o", three / "out") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["path"] == str(three / "out")
    assert printed["tensors"] == 21
    assert len(printed["statistics"]["delta_norms"]) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--weights", "one,two"], "--weights one,two is not a list of numbers"),
        (["--density", "most"], "--density most is not a list of numbers"),
        (["--set", "scale"], "is not of the form"),
        (["--method", "tie"], "unknown merge method 'tie'"),
    ],
)
def test_the_command_refuses_with_exit_code_2(three, capsys, arguments, sentence):
    assert command(three / "a", three / "b", "--base", three / "base", "-o", three / "out", *arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert "hint: " in printed.err
    assert not (three / "out").exists()


def test_the_command_folds_an_adapter(tmp_path, capsys):
    base = save(llama(0), tmp_path / "base")
    one = adapter(llama(0), tmp_path / "a", 1, str(base))
    assert command(one, "--method", "linear", "-o", tmp_path / "out") == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# ---------------------------------------------------------------- numbers as YAML


def merged(three, *arguments):
    assert command(three / "a", three / "b", "--base", three / "base", "-o", three / "out", *arguments) == 0
    return weights(three / "out")


def expected(three, part):
    """base + Σ weight · Δ, the weights of a tensor by its name."""
    base, one, two = (weights(three / name) for name in ("base", "a", "b"))
    return {
        name: value + part(name)[0] * (one[name] - value) + part(name)[1] * (two[name] - value)
        for name, value in base.items()
    }


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("1,-0.5", lambda name: (1, -0.5)),
        ("-1,2", lambda name: (-1, 2)),
        ("[1, 0.5]", lambda name: (1, 0.5)),
        ("1e-1,1", lambda name: (0.1, 1)),
        ("[1, {mlp: 0.5, default: 1}]", lambda name: (1, 0.5 if "mlp" in name else 1)),
        ("{mlp: 0.5, default: 1}", lambda name: (0.5, 0.5) if "mlp" in name else (1, 1)),
        ("[[0.25, 0.5], 1]", lambda name: (0.25 if "layers.0" in name or "embed" in name else 0.5, 1)),
    ],
)
def test_weights_are_numbers_lists_and_maps(three, given, part):
    found = merged(three, "--method", "linear", "--set", "normalize=false", "--weights", given)
    assert_equal(found, expected(three, part), 1e-6)


def test_density_may_differ_from_tensor_to_tensor(three):
    found = merged(three, "--density", "{self_attn: 0.5, default: 1}", "--weights", "1,0.5")
    half, whole = in_memory(three, 0.5), in_memory(three, 1.0)
    assert_equal(found, {name: (half if "self_attn" in name else whole)[name] for name in whole}, 1e-6)


def test_the_default_density_is_that_of_the_published_merge(three):
    assert_equal(merged(three, "--weights", "1,0.5"), in_memory(three, 0.8), 1e-6)


# ---------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "linear", "--density", "0.5"], "linear has no use for a density"),
        (["--weights", "{mlp: 0.5}"], "a map needs a number for all other parameters"),
        (["--weights", "[1, {nothing: 0.5, default: 1}]"], "no parameter matches nothing"),
        (["--weights", "[[1, 1, 1], 1]"], "3 numbers for a model of 2 layers"),
        (["--weights", "1,{a: true}"], "is not a list of numbers"),
        (["--forget", "rows.jsonl"], "--forget is for a search"),
        (["--aim", "forget:mia_loss=0.5"], "--aim is for a search"),
        (["--trials", "5"], "--trials is for a search"),
        (["--range", "scale=0.5:1"], "--range is for a search"),
        (["--against", "outside"], "--against is for a search"),
        (["--data-dir", "lume"], "--data-dir is for a search"),
        (["--device", "abacus"], "abacus"),
        (["--search"], "no rows to forget"),
        (["--search", "--range", "lambda=0:1"], "is not of the form"),
        (["--search", "--range", "scale=1:0"], "1 is not below 0"),
        (["--search", "--aim", "mia_loss"], "SPLIT:METRIC=VALUE"),
        (["--search", "--keep", "retain"], "SPLIT:METRIC=PART"),
        (["--line", "--trials", "5"], "--trials is for a search, and --line alone makes none"),
        (["--line", "--methods", "ties"], "--methods is for a search"),
        (["--line", "--weights", "1,1"], "the line is linear"),
        (["--line", "--method", "ties"], "the line is linear"),
        (["--search", "--set", "evaluate.dtpe=bfloat16"], "unknown key"),
    ],
)
def test_combinations_that_make_no_sense(three, capsys, arguments, sentence):
    assert command(three / "a", three / "b", "--base", three / "base", "-o", three / "out", *arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert sorted(path.name for path in three.iterdir()) == ["a", "b", "base"]


def test_a_line_needs_two_models(three, capsys):
    assert command(three / "a", "--base", three / "base", "--line", "-o", three / "out") == 2
    assert "lies between two models, not 1" in capsys.readouterr().err
