"""What looks at things: list, data check, doctor, runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.cli.app import main
from expunge.cli.list_ import KINDS, described

# ---------------------------------------------------------------- list


@pytest.mark.parametrize("kind", KINDS)
def test_list_shows_every_leaf_and_json_is_pure(capsys, kind):
    entries = described(kind)
    assert main(["list", kind]) == 0
    table = capsys.readouterr()
    assert all(name in table.out for name in entries)
    if not entries:
        assert f"no {kind} in this version" in table.err
    assert main(["list", kind, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == list(entries)
    assert all(entry["summary"] for entry in found)
    for name in entries:
        assert main(["list", kind, name]) == 0
        assert capsys.readouterr().out.startswith(f"{name}\n  summary: ")


def test_every_kind_has_something():
    assert all(described(kind) for kind in KINDS)


def test_list_without_a_kind_shows_all(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in KINDS)
    assert main(["list", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(KINDS)


# ---------------------------------------------------------------- data, doctor, runs


def test_data_check(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("f.jsonl").write_text('{"question": "Who?", "answer": "She\\u001b[31m."}\n' * 2)
    assert main(["data", "check", "f.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 rows can be used" in shown
    assert "format: qa" in shown
    assert "repeated rows: 1" in shown
    assert "\x1b" not in shown, "a file must not steer the terminal"
    Path("bad.jsonl").write_text(
        '{"question": "Who?", "answer": "She."}\n{"question": "What?", "answer": ""}\n{"quest\n'
    )
    assert main(["data", "check", "bad.jsonl"]) == 2
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [problem.split(":")[2] for problem in problems] == ["2", "3"]
    assert main(["data", "check", "bad.jsonl", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["rows"], report["good_rows"]) == (False, 3, 1)
    Path("odd.jsonl").write_text('{"q": "Who?", "a": "She."}\n')
    assert main(["data", "check", "odd.jsonl"]) == 2
    assert "odd.jsonl: no row can be used" in capsys.readouterr().out


def test_doctor(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    code = main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert code == (2 if any(check["status"] == "problem" for check in checks.values()) else 0)
    assert checks["python"]["status"] == "ok"
    assert {"torch", "transformers", "instructions", "threads", "memory", "disk here", "hub"} <= set(checks)
    assert "not in the cache" in checks["model tiny"]["found"]
    assert "not tried" in checks["hub"]["found"]
    assert not (tmp_path / "cache").exists(), "looking makes nothing"


@pytest.mark.parametrize(
    ("version", "problem"), [("1.0", "pip install 'torch>=2.6'"), ("missing", "pip install 'torch>=2.6'")]
)
def test_doctor_names_what_must_be_mended(capsys, monkeypatch, version, problem):
    from expunge.runs import provenance

    monkeypatch.setattr(provenance, "requirements", lambda: ["torch>=2.6"])
    monkeypatch.setattr(provenance, "versions", lambda: {"torch": version})
    assert main(["doctor"]) == 2
    shown = capsys.readouterr()
    assert problem in shown.out
    assert shown.err == "to mend: torch\n"


@pytest.mark.parametrize("answers", [True, False])
def test_doctor_online(capsys, monkeypatch, answers):
    from expunge.cli import doctor

    asked = []

    def reach(address):
        asked.append(address)
        return "" if answers else f"{address} can't be reached (no route)"

    monkeypatch.setattr(doctor, "_reach", reach)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    assert main(["doctor", "--online"]) == 0
    assert len(asked) == 1
    assert ("answers" in capsys.readouterr().out) is answers


def test_runs(tmp_path, capsys):
    from test_runs import made_run

    made_run(tmp_path / "a", 0.25)
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "0.900 → 0.250" in shown
    assert main(["runs", str(tmp_path), "--json", "--metric", "rouge_l_f1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["forget_after"] == 0.25
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert "no runs in" in capsys.readouterr().err
