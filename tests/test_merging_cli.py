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
