"""The command line: exit codes, one sentence per mistake, pure JSON, and what is handed to the API."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import expunge
from expunge import api
from expunge.cli.app import main
from expunge.errors import UserError
from expunge.pipeline.examine import Examination

UNLEARN = ("unlearn", "--model", "tiny", "--forget", "good.yaml", "-o", "out")
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "scipy", "numpy", "duckdb", "jinja2", "yaml")


def fake_result(path: Path = Path("runs/x"), skipped: bool = False) -> SimpleNamespace:
    return SimpleNamespace(path=path, report=path / "report.html", metrics=[], skipped_all=skipped)


@pytest.fixture
def calls(monkeypatch):
    """Every call of the API, none of which does anything."""
    made: list[tuple[str, tuple, dict]] = []

    def fake(name):
        def call(*args, **kwargs):
            made.append((name, args, kwargs))
            return fake_result()

        return call

    for name in ("demo", "run", "unlearn"):
        monkeypatch.setattr(api, name, fake(name))
    import expunge.report.terminal

    monkeypatch.setattr(expunge.report.terminal, "closing_table", lambda path: f"table of {path}")
    return made


# ---------------------------------------------------------------- start


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"import sys; from expunge.cli.app import main; code = main({arguments}); "
    code += f"print(code, [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("module", ["expunge.recipe", "expunge.errors", "expunge.registry", "expunge.runs.store"])
def test_light_rooms_stay_light(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules and name != 'yaml'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_is_there_and_has_help(capsys):
    from typer.main import get_command

    from expunge.cli.app import app

    wanted = {"demo", "run", "unlearn", "eval", "attack", "audit", "calibrate", "merge", "study", "report", "runs"}
    wanted |= {"init", "data", "list", "doctor", "localize"}
    commands = get_command(app).commands
    assert set(commands) == wanted
    for name in wanted:
        assert main([name, "--help"]) == 0
        assert "Usage: expunge" in capsys.readouterr().out
    assert main([]) == 0
    assert "Commands" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"expunge {expunge.__version__}\n"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "sentence", "hint"),
    [
        (["walk"], "No such command 'walk'", "see: expunge --help"),
        (["run"], "Missing argument 'RECIPE'", "see: expunge run --help"),
        (["run", "x.yaml", "--wet-run"], "No such option: --wet-run", "see: expunge run --help"),
        (["unlearn", "--model", "tiny"], "Missing option", "see: expunge unlearn --help"),
        (["unlearn", "--lora", "many"], "'--lora'", "see: expunge unlearn --help"),
        ([*UNLEARN, "--keep", "95"], "--keep: Input should be less than or equal to 1", "expunge unlearn --help"),
        ([*UNLEARN, "--minutes", "0"], "--minutes: Input should be greater than 0", "expunge unlearn --help"),
        ([*UNLEARN, "--set", "unlearn.0.keep=7"], "recipe: unlearn.0.keep: Input should be", "expunge init"),
        (["data"], "Missing command", "see: expunge data --help"),
        (["run", "none.yaml"], "no recipe at none.yaml", "expunge init"),
        (["run", "bad.yaml"], "unknown key", "did you mean 'unlearn'?"),
        (["run", "good.yaml", "--set", "seed"], "--set 'seed' is not of the form a.b=value", "for instance"),
        (["list", "metods"], "there is no list of 'metods'", "did you mean 'methods'?"),
        (["list", "methods", "npoo"], "unknown method 'npoo'", "did you mean 'npo'?"),
        (["runs", "nowhere"], "no folder nowhere", "expunge runs"),
        (["data", "check", "nowhere.jsonl"], "nowhere.jsonl", ""),
        (["report", "nowhere"], "nowhere", ""),
    ],
)
def test_a_mistake_is_one_sentence_and_a_hint(tmp_path, monkeypatch, capsys, arguments, sentence, hint):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("model: tiny\ndata: {forget: f.jsonl}\nunlearm: [{}]\n")
    Path("good.yaml").write_text("model: tiny\ndata: {forget: f.jsonl}\nunlearn: [{}]\n")
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    first, *rest = shown.err.splitlines()
    assert first.startswith("error: ")
    assert sentence in first
    assert all(line.startswith(("error: ", "hint: ")) for line in rest)
    assert hint in shown.err
    assert "Traceback" not in shown.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.yaml", "good.yaml"], "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ([*UNLEARN, "--lr", "1", "--keep", "9", "--lr", "2"], "--lr"),
        (["study", "auto", "--model", "m", "--rivals", "npo", "--rivals", "dqo"], "--rivals"),
        (["data", "check", "f", "--format", "qa", "--format", "lume"], "--format"),
    ],
)
def test_an_option_given_twice_is_told(tmp_path, monkeypatch, capsys, arguments, option):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2, "each has another mistake"
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == f"note: {option} is given 2 times; the last one counts"
    assert second.startswith("error: ")


def test_an_option_that_may_repeat_is_no_news(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*UNLEARN, "--set", "seed=1", "--set", "unlearn.0.keep=9"]) == 2
    assert "note:" not in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("a sentence", "a hint"), 2, ["error: a sentence", "hint: a hint"]),
        (UserError("only a sentence"), 2, ["error: only a sentence"]),
        (KeyboardInterrupt(), 130, ["interrupted; run the same command again to go on"]),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["error: no space left", "hint: free some space"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, ["error: /x/y: permission denied"]),
        (
            OutOfMemoryError("CUDA out of memory.\nTried 2 GiB."),
            2,
            ["error: out of memory (CUDA", "hint: lower the batch"],
        ),
        (ZeroDivisionError("ours"), 1, ["Traceback", "ZeroDivisionError: ours", "this is a bug in expunge"]),
        (OSError(errno.EIO, "Input/output error"), 1, ["Traceback"]),
    ],
)
def test_errors_become_exit_codes(monkeypatch, capsys, error, code, words):
    def fails(**_):
        raise error

    monkeypatch.setattr(api, "demo", fails)
    assert main(["demo"]) == code
    shown = capsys.readouterr().err
    for word in words:
        assert word in shown
    assert ("Traceback" in shown) == (code == 1)


def test_verbose_shows_the_traceback_of_a_user_error_too(monkeypatch, capsys):
    def fails(**_):
        raise UserError("a sentence", "a hint")

    monkeypatch.setattr(api, "demo", fails)
    assert main(["-v", "demo"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: a sentence\nhint: a hint\n")


def test_sigterm_ends_a_run_as_ctrl_c_does(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def waits(**_):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(api, "demo", waits)
    assert main(["demo"]) == 143
    assert "terminated; run the same command again to go on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m expunge.cli.app list formats --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() in ("0", "141")
    assert done.stderr == ""


# ---------------------------------------------------------------- what reaches the API


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo"], ("demo", (), {"tiny": False, "output": Path("runs/demo"), "overrides": []})),
        (["demo", "--tiny"], ("demo", (), {"tiny": True, "output": Path("runs/demo-tiny"), "overrides": []})),
        (
            ["demo", "-o", "d", "--set", "seed=1", "--set", "merge.density=0.5"],
            ("demo", (), {"tiny": False, "output": Path("d"), "overrides": ["seed=1", "merge.density=0.5"]}),
        ),
        (["run", "r.yaml"], ("run", ("r.yaml",), {"output": None, "overrides": []})),
        (["run", "r.yaml", "--output", "o"], ("run", ("r.yaml",), {"output": Path("o"), "overrides": []})),
    ],
)
def test_demo_and_run(calls, capsys, arguments, expected):
    assert main(arguments) == 0
    assert calls == [expected]
    assert capsys.readouterr().out.splitlines() == ["table of runs/x", "report: runs/x/report.html"]


def test_a_finished_run_says_so(calls, monkeypatch, capsys):
    monkeypatch.setattr(api, "demo", lambda **_: fake_result(skipped=True))
    assert main(["demo"]) == 0
    assert "done already" in capsys.readouterr().err


def test_unlearn_options_are_fields_of_the_recipe(monkeypatch, calls):
    files = ["--model", "m", "--forget", "f.jsonl", "--retain", "r.jsonl", "-o", "out"]
    options = [
        "--method",
        "simnpo",
        "--lora",
        "4",
        "--epochs",
        "2.5",
        "--lr",
        "1e-4",
        "--batch-size",
        "3",
        "--seed",
        "9",
    ]
    more = ["--template", "Q: {prompt}\nA: {answer}", "--reference", "ref", "--allow-pickle", "--trust-remote-code"]
    assert main(["unlearn", *files, *options, *more, "--set", "unlearn.0.train.lr=2e-4"]) == 0
    ((_, (recipe,), kwargs),) = calls
    assert kwargs == {"output": Path("out")}
    assert (recipe.model.id, recipe.reference.id) == ("m", "ref")
    assert (recipe.data.forget.path, recipe.data.retain.path) == ("f.jsonl", "r.jsonl")
    assert (recipe.unlearn[0].method, recipe.unlearn[0].lora.rank) == ("simnpo", 4)
    train = recipe.unlearn[0].train
    assert (train.epochs, train.batch_size, recipe.seed) == (2.5, 3, 9)
    assert train.lr == 2e-4, "--set has the last word"
    assert recipe.data.template == "Q: {prompt}\nA: {answer}"
    assert recipe.model.allow_pickle
    assert recipe.model.trust_remote_code
    assert recipe.reference.allow_pickle


def test_unlearn_without_options_changes_nothing(calls):
    from expunge.recipe import load_recipe

    assert main(["unlearn", "--model", "m", "--forget", "f", "-o", "out"]) == 0
    ((_, (recipe,), _),) = calls
    bare = {"name": "unlearn", "model": "m", "data": {"forget": "f"}, "unlearn": [{"method": "auto"}]}
    assert recipe == load_recipe(bare)


RECORDS = [
    {"variant": "model", "split": "forget", "metric": "extraction_strength", "value": 0.25, "ci_low": 0.1}
    | {"ci_high": 0.4, "n": 3, "unscored": 1, "direction": "lower"},
    {"variant": "model", "split": "[red]holdout", "metric": "nll", "value": float("nan"), "ci_low": None}
    | {"ci_high": None, "n": 0, "unscored": 3, "direction": "none"},
]


AGGREGATE = {"variant": "model", "benchmark": "lume", "convention": "semeval", "official": False, "name": "final_score"}


def examination(records):
    """What an evaluation gives back."""
    aggregates = [AGGREGATE | {"value": None, "note": "no mmlu"}]
    return Examination(records, aggregates, {"kl_drift": "needs a target model"}, "semeval")


def test_eval_json_is_all_of_stdout(monkeypatch, capsys):
    asked = {}

    def noisy(model, **kwargs):
        asked.update(kwargs, model=model)
        print("a library that prints")
        return examination(RECORDS)

    monkeypatch.setattr(api, "evaluate", noisy)
    arguments = ["eval", "m", "--forget", "f", "--retain", "r", "--reference", "ref", "--allow-pickle", "--json"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out, parse_constant=pytest.fail)
    assert found["left_out"] == {"kl_drift": "needs a target model"}
    records = found["records"]
    assert records[0] == RECORDS[0]
    assert records[1]["value"] is None
    assert "a library that prints" in shown.err
    assert (asked["model"], asked["forget"], asked["retain"], asked["reference"]) == ("m", "f", "r", "ref")
    assert asked["overrides"] == ["model.allow_pickle=true"]


def test_eval_table(monkeypatch, capsys):
    found = examination([RECORDS[0], RECORDS[1] | {"value": None}])
    monkeypatch.setattr(api, "evaluate", lambda model, **_: found)
    assert main(["eval", "m", "--forget", "f"]) == 0
    shown = capsys.readouterr()
    assert "0.250 [0.100, 0.400]" in shown.out
    assert "3 (+1 unscored)" in shown.out
    assert "[red]holdout" in shown.out, "text is never markup"
    assert "final_score" in shown.out
    assert "semeval, not official" in shown.out
    assert "left out: kl_drift (needs a target model)" in shown.err


def test_dry_run_prints_the_plan_and_runs_nothing(monkeypatch, calls, capsys):
    plans = []

    def plan(recipe, **kwargs):
        plans.append((recipe, kwargs))
        return SimpleNamespace(lines=lambda: ["model tiny", "unlearn npo"])

    monkeypatch.setattr(api, "plan", plan)
    assert main(["run", "r.yaml", "--dry-run", "--set", "seed=1", "-o", "o"]) == 0
    assert capsys.readouterr().out == "model tiny\nunlearn npo\n"
    assert plans == [("r.yaml", {"output": Path("o"), "overrides": ["seed=1"]})]
    assert main([*UNLEARN, "--dry-run"]) == 0
    assert capsys.readouterr().out == "model tiny\nunlearn npo\n"
    assert (plans[1][0].model.id, plans[1][1]) == ("tiny", {"output": Path("out")})
    assert calls == []
