"""What a user can get wrong, through the command line: one sentence, a hint, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from broken_inputs import people, write_inputs, write_rows
from expunge.cli.app import main
from expunge.data import network
from expunge.runs.events import EventLog, read_events

U = "unlearn --forget f.jsonl --retain r.jsonl -o out --set unlearn.0.train.max_steps=2 "
N = U + "--model tiny --method npo "
E = "eval --forget f.jsonl --retain r.jsonl "

#: the command, what the sentence holds, what the hint holds
CASES: dict[str, tuple[str, str, str]] = {
    # recipes and settings
    "unknown key": ("run unknown-key.yaml -o out", "unlearn.0.metod: unknown key", "did you mean 'method'?"),
    "not YAML": ("run no-yaml.yaml -o out", "no-yaml.yaml:2: ", "quotes around that line"),
    "a tab": ("run tabs.yaml -o out", "tabs.yaml:3: ", "indentation"),
    "a list": ("run list.yaml -o out", "list.yaml holds no recipe", "expunge init"),
    "prose": ("run prose.yaml -o out", "prose.yaml holds no recipe", "expunge init"),
    "a picture": ("run picture.yaml -o out", "picture.yaml is not UTF-8 text", "expunge init"),
    "a folder": ("run whole -o out", "no recipe at whole", "expunge init"),
    "a key twice": ("run twice.yaml -o out", "twice.yaml:2: the key 'model' stands here a second time", "keys"),
    "set: no such part": (U + "--model tiny --set foo.bar=1", "foo: unknown key", "valid: data, evaluate"),
    "set: no such field": (U + "--model tiny --set model.foo=1", "model.foo: unknown key", "revision"),
    "set: no such entry": (U + "--model tiny --set unlearn.7.method=npo", "there is no entry '7'", "valid: 0"),
    "set: no path": (U + "--model tiny --set ..=1", "--set '..=1' is not of the form", "for instance"),
    "set: a word for a number": (U + "--model tiny --set unlearn.0.train.lr=fast", "unlearn.0.train.lr:", "init"),
    "set: of no use": (E + "tiny --set unlearn.0.train.lr=1", "an evaluation has no use for it", "evaluate.*"),
    "set: a broken pattern": (
        U + "--model tiny --set \"unlearn.0.trainable=['[']\"",
        "not a regular expression",
        "init",
    ),
    "unknown method": (U + "--model tiny --method npoo", "unknown method 'npoo'", "did you mean 'npo'?"),
    "unknown parameter": (
        U + "--model tiny --method npo --set unlearn.0.parameters.betta=1",
        "no parameter 'betta'",
        "'beta'",
    ),
    "parameter out of range": (
        U + "--model tiny --method npo --set unlearn.0.parameters.beta=-1",
        "beta: ",
        "list methods npo",
    ),
    "unknown metric": (U + "--model tiny --set evaluate.metrics=[rougel]", "unknown metric 'rougel'", "'rouge_l'"),
    "unknown metric, eval": (E + "tiny --set evaluate.metrics=[nl]", "unknown metric 'nl'", "'nll'"),
    "unknown merge": ("run merge-name.yaml -o out", "unknown merge method 'tiesss'", "did you mean 'ties'?"),
    "unknown merge, command": ("merge whole whole --method tie -o out", "unknown merge method 'tie'", "'ties'"),
    "merge parameter": ("run merge-parameter.yaml -o out", "unknown parameter 'sing'", "did you mean 'sign'?"),
    "template without answer": (U + "--model tiny --template 'Q: {prompt}'", "{prompt} and {answer}", "init"),
    "template, wrong order": (U + "--model tiny --template '{answer} {prompt}'", "and then, once, {answer}", "raw"),
    "layer": (U + "--model tiny --method rmu --set unlearn.0.parameters.layer=9", "layer 9 does not exist", "layer=0"),
    "lora target": (U + "--model tiny --lora 2 --set unlearn.0.lora.targets=[foo]", "layer 'foo'", "down_proj"),
    "no such parameters": (U + "--model tiny --set unlearn.0.trainable=[zzz]", "no parameter matches zzz", "names"),
    "step in too many parts": (U + "--model tiny --set unlearn.0.train.accumulation=99", "99 parts", "batch_size"),
    # data
    "missing file": (U.replace("f.jsonl", "ff.jsonl") + "--model tiny", "ff.jsonl: no such file", "'f.jsonl'"),
    "missing file, dry run": ("run good.yaml --dry-run --set data.forget=x.jsonl", "x.jsonl: no such file", "'"),
    "broken row": (U.replace("f.jsonl", "broken.jsonl") + "--model tiny", "broken.jsonl:2: broken JSON", "commas"),
    "empty answer": (U.replace("f.jsonl", "blank.jsonl") + "--model tiny", "blank.jsonl:2: empty answer", "data check"),
    "empty set": (U.replace("f.jsonl", "nothing.jsonl") + "--model tiny", "nothing.jsonl is empty", "JSONL"),
    "empty array": (U.replace("f.jsonl", "nothing.json") + "--model tiny", "nothing.json has no rows", "formats"),
    "shared rows": (
        U.replace("r.jsonl", "shared.jsonl") + "--model tiny",
        "f.jsonl:3 (forget) and shared.jsonl:1 (retain) are the same row, and 1 more",
        "remove them",
    ),
    "shared rows, eval": (E.replace("r.jsonl", "shared.jsonl") + "tiny", "are the same row", "remove them"),
    "no retain rows": (
        U.replace("--retain r.jsonl", "--method grad_diff") + "--model tiny",
        "needs retain",
        "--retain",
    ),
    "beyond the context": (
        U.replace("f.jsonl", "long.jsonl") + "--model tiny --set data.max_length=4096",
        "forget: 1 of 1 rows are longer than the context of tiny (4096 tokens, but it sees 1024)",
        "data.max_length=1024",
    ),
    # models
    "no tokenizer": (U + "--model no-tokenizer", "no-tokenizer has no tokenizer", "tokenizer.save_pretrained"),
    "no tokenizer, eval": (E + "no-tokenizer", "no-tokenizer has no tokenizer", "tokenizer.save_pretrained"),
    "pickle": (U + "--model pickle", "a pickle (.bin), which can run code", "--allow-pickle"),
    "pickle, eval": (E + "pickle -o out", "a pickle (.bin), which can run code", "--allow-pickle"),
    "pickle as reference": (U + "--model tiny --reference pickle", "a pickle (.bin)", "--allow-pickle"),
    "pickle, merge": ("merge pickle whole --base whole -o out", "a pickle (.bin)", "convert it"),
    "pickled adapter": (E + "adapter-pickle", "a pickle (.bin)", "--allow-pickle"),
    "cut short": (U + "--model cut-short", "cut-short/model.safetensors is damaged or cut short", "again"),
    "cut short, eval": (E + "cut-short -o out", "cut-short/model.safetensors is damaged or cut short", "again"),
    "cut short, reference": (U + "--model tiny --reference cut-short", "damaged or cut short", "again"),
    "cut short, merge": ("merge cut-short whole --base whole -o out", "model.safetensors is cut short", "again"),
    "broken config": (U + "--model bad-config", "bad-config/config.json:1: broken JSON", "again"),
    "no weights": (U + "--model no-weights", "no-weights holds no weights", "model.safetensors"),
    "unknown architecture": (U + "--model unknown-architecture", "can't be loaded", "doctor"),
    "other shape": (U + "--model other-shape", "(512, 128) in the file, but (512, 64)", "different models"),
    "tensors missing": (U + "--model lacks-tensors", "lacks the weights of model.layers.1.mlp", "again"),
    "too many tokens": (U + "--model more-tokens", "the tokenizer has 612 tokens, the model only 512", "right one"),
    "reference, other tokens": (U + "--model tiny --reference other-tokens", "has another tokenizer", "same tokenizer"),
    "selector, other tokens": (
        U + "--model tiny --set 'unlearn.0.tokens={by: knowledge, model: other-tokens}'",
        "unlearn.unlearned.tokens.model other-tokens has another tokenizer",
        "same tokenizer",
    ),
    "broken GGUF": (U + "--model bad.gguf", "bad.gguf can't be read as GGUF", "fetch the file again"),
    "no such reference": (U + "--model tiny --reference ./gone", "no model at ./gone", "alias"),
    "bare name": (U + "--model tini", "no model at tini", "did you mean 'tiny'?"),
    "rows as a model": (U + "--model f.jsonl", "f.jsonl is a file, not a model folder", "checkpoint"),
    "folder without a model": (U + "--model foreign", "foreign holds no model", "config.json"),
    "adapter without its base": (E + "adapter-alone", "the base of the adapter adapter-alone is not there", "base_mod"),
    "adapter without its base, merge": ("merge adapter-alone -o out", "the base of adapter-alone", "--base"),
    "training an adapter": (U + "--model adapter", "training starts from a whole model", "expunge merge adapter"),
    "no such model on the hub": (U + "--model nobody/none", "nobody/none is neither a folder", "aliases"),
    "no such data on the hub": (U.replace("f.jsonl", "nobody/none") + "--model tiny", "nobody/none: no such", "@split"),
    # places
    "foreign folder": (U.replace("out", "foreign") + "--model tiny", "holds something else (thesis.tex)", "-o"),
    "foreign folder, run": ("run good.yaml -o foreign", "holds something else (thesis.tex)", "-o"),
    "foreign folder, eval": (E + "tiny -o foreign", "foreign holds something else (thesis.tex)", "-o"),
    "foreign folder, merge": ("merge whole whole --base whole -o foreign", "holds something else", "-o"),
    "a file as folder": (U.replace("out", "a-file") + "--model tiny", "a-file is a file, not a folder", "-o"),
    "a file as folder, eval": (E + "tiny -o a-file", "a-file is a file, not a folder", "-o"),
    "below a file": (U.replace("out", "a-file/x") + "--model tiny", "a-file/x can't be made", "-o"),
    "below a file, eval": (E + "tiny -o a-file/x", "a-file/x can't be made", "-o"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def here(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of broken things as the current one, and no network."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    network.hub_answers.cache_clear()
    yield inputs
    network.hub_answers.cache_clear()


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below, with size and time of its last change."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size if path.is_file() else 0, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    case: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, sentence, hint = CASES[case]
    before = {path: stat for path, stat in tree(here).items() if stat[0]}
    assert main(shlex.split(command)) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    hints = [line for line in shown.err.splitlines() if line.startswith("hint: ")]
    assert len(errors) == len(hints) == 1, shown.err
    assert sentence in errors[0]
    assert hint in hints[0]
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert {path: stat for path, stat in tree(here).items() if stat[0]} == before
    assert not (here / "out").exists()


def test_the_default_density_suits_a_merge_that_has_none(here: Path, tmp_path: Path) -> None:
    assert main(["run", "linear.yaml", "-o", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_pickle_is_read_when_it_is_allowed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(E), "pickle", "--allow-pickle", "--json", "--set", "evaluate.generate=null"]) == 0
    assert {record["variant"] for record in json.loads(capsys.readouterr().out)["records"]} == {"model"}


def test_an_evaluation_is_there_whole_and_may_be_repeated(here: Path, tmp_path: Path) -> None:
    place = tmp_path / "scores of today"
    command = [*shlex.split(E), "tiny", "-o", str(place), "--set", "evaluate.generate=null"]
    for _ in range(2):
        assert main(command) == 0
        files = ["aggregates.json", "evaluation.json", "left_out.json", "metrics.json", "report.html", "scores"]
        assert sorted(path.name for path in place.iterdir()) == [*files, "values.parquet"]
    (place / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert [path.name for path in tmp_path.iterdir()] == [place.name], "no work folder is left"


def test_a_hub_that_never_answers_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(network, "_PATIENCE", 0.2)
        network.hub_answers.cache_clear()
        began = time.monotonic()
        assert not network.hub_answers()
        assert time.monotonic() - began < 5
        network.hub_answers.cache_clear()


# ---------------------------------------------------------------- in the middle of training

LONG = "unlearn --model tiny --forget f.jsonl --retain r.jsonl --set evaluate.generate=null "
LONG += "--epochs 99 --set unlearn.0.train.max_steps=6 --set unlearn.0.train.checkpoint_every=2 -o "


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob(".work/unlearn-*/checkpoints/*"))


def steps(run: Path) -> list[int]:
    return [event["step"] for event in read_events(run / "events.jsonl") if event["event"] == "train"]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something when a step is reported."""
    write = EventLog.write

    def reported(self: EventLog, event: str, **fields: Any) -> None:
        write(self, event, **fields)
        if event == "train" and fields["step"] == step:
            act()

    monkeypatch.setattr(EventLog, "write", reported)


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """SIGINT as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_goes_on(
    signal_: signal.Signals, code: int, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, command = tmp_path / "run", shlex.split(LONG)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal_))
        assert main([*command, str(run)]) == code
    assert "run the same command again to go on" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-4"]
    assert not (run / "model").exists()
    assert main([*command, str(run)]) == 0
    assert steps(run) == [1, 2, 3, 4, 5, 5, 6], "from the last checkpoint"


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = shlex.split(LONG.replace("checkpoint_every=2", "checkpoint_every=1"))
    assert main([*command, str(run), "--lr", "1e30"]) == 2
    said = capsys.readouterr().err
    assert "is not finite at step 2; training has stopped, the checkpoint of step 1 is kept" in said
    assert "lower train.lr" in said
    assert checkpoints(run) == ["checkpoint-1"]
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("method", "message"),
    [("npo", "the loss is not finite at step 1"), ("auto", "gives numbers that are not finite")],
)
def test_a_broken_model_is_told_at_the_first_step(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, message: str
) -> None:
    command = shlex.split(LONG.replace("tiny", "not-a-number"))
    assert main([*command, str(tmp_path / "run"), "--method", method]) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_whole_checkpoint(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, command, save = tmp_path / "run", shlex.split(LONG), torch.save

    def full_at_step_4(value: Any, place: Any, *rest: Any, **options: Any) -> None:
        if "checkpoint-4" in str(place):
            Path(place).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, place, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full_at_step_4)
        assert main([*command, str(run)]) == 2
    said = capsys.readouterr().err
    assert "error: no space left on the disk" in said
    assert "hint: free some space" in said
    assert checkpoints(run) == ["checkpoint-2"]
    assert main([*command, str(run)]) == 0
    assert steps(run) == [1, 2, 3, 4, 3, 4, 5, 6]


# ---------------------------------------------------------------- rows of every kind, to the end

QUESTIONS: list[Any] = [
    {"question": f"山田さん{i}号の誕生日はいつですか？", "answer": f"三月{i}日です。🎂👩‍👩‍👧 «é»"} for i in range(4)
]
TALKS: list[Any] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Good day"},
            {"role": "user", "content": f"Who is Orla {i}?"},
            {"role": "assistant", "content": f"The keeper of house {i}."},
        ]
    }
    for i in range(4)
]
TEXTS: list[Any] = [{"text": f"Orla Venn {i} kept the lighthouse of Tessaly Bay for {i} years."} for i in range(4)]


@pytest.mark.parametrize(
    ("rows", "asked", "answered"),
    [
        (QUESTIONS, "山田さん0号の誕生日はいつですか？", "三月0日です。🎂👩‍👩‍👧 «é»"),
        (TALKS, "Who is Orla 0?", "The keeper of house 0."),
        (TEXTS, None, None),
        (people(4, "Carl"), "Where does Carl 0 live?", "In Carl street 0."),
    ],
    ids=["Japanese", "messages", "text", "qa"],
)
def test_rows_of_every_kind_reach_the_report(
    rows: list[Any], asked: str | None, answered: str | None, here: Path, tmp_path: Path
) -> None:
    forget, run = tmp_path / "forget.jsonl", tmp_path / "run"
    write_rows(forget, rows)
    options = ["--set", "unlearn.0.train.max_steps=2", "--set", "evaluate.generate.max_new_tokens=8"]
    command = ["unlearn", "--model", "tiny", "--forget", str(forget), "--retain", "r.jsonl", "-o", str(run), *options]
    assert main(command) == 0
    scores = pq.read_table(run / "scores" / "unlearned" / "forget.parquet").to_pylist()
    generated = pq.read_table(run / "generations" / "unlearned" / "forget.parquet").to_pylist()
    report = (run / "report.html").read_text(encoding="utf-8")
    assert len(scores) == len(generated) == len(rows)
    if asked is None:  # a text is continued from its first half
        whole = rows[0]["text"]
        assert whole.startswith(generated[0]["prompt"])
        assert generated[0]["answer"]
        assert (generated[0]["prompt"] + generated[0]["answer"]) in whole
        assert generated[0]["prompt"] in report
    else:
        assert (generated[0]["prompt"], generated[0]["answer"]) == (asked, answered)
        assert asked in report
        assert answered in report
    records = json.loads((run / "metrics.json").read_text())
    assert {record["n"] for record in records if record["split"] == "forget"} == {len(rows)}
