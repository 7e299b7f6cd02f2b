"""What a fresh machine needs: Makefile, pins, licence, continuous integration, generated tables."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"
)
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def docs_tool():
    """scripts/generate_docs.py as a module."""
    spec = util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("declared", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_every_dependency_is_pinned_inside_its_range(declared):
    requirement = Requirement(declared)
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    version = pins[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version, prereleases=True)


def test_pins_are_versions_from_any_index():
    assert PINS["torch"] == "2.13.0"
    for name, version in PINS.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        assert re.fullmatch(r"[0-9][0-9A-Za-z.]*", version), f"{name}: no local version, no url"
    assert "expunge" not in PINS
    assert "--" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_tests_run_with_the_pins():
    """Where the environment was made by `make test`, it is what constraints.txt says."""
    if not (Path(sys.prefix) / ".installed-dev").exists():
        pytest.skip("this environment was not made by the Makefile")
    differing = {
        name: (version, metadata.version(name))
        for name, version in PINS.items()
        if util.find_spec(name.lower().replace("-", "_")) and metadata.version(name).partition("+")[0] != version
    }
    assert differing == {}


@needs_make
@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("demo", ["-m venv .venv", "install --constraint constraints.txt --editable .\n", ".venv/bin/expunge demo"]),
        ("test", ["-m venv .venv", "install --constraint constraints.txt --editable '.[dev]'", "-m pytest"]),
        ("test-all", ['-m "slow or not slow"']),
        (
            "check",
            ["ruff format --check", "ruff check", "/mypy", "lint-imports", "generate_docs.py --check", "-m pytest"],
        ),
        ("clean", ["rm -rf"]),
    ],
)
def test_make_targets(tmp_path, target, commands):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
    for command in commands:
        assert command in done.stdout
    assert "index-url" not in done.stdout


@needs_make
def test_make_refuses_an_old_python_with_a_sentence(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    assert f"error: expunge needs Python 3.11 or newer, and '{old}' is Python 3.9.2" in done.stderr
    assert "hint: name another one: make demo PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_a_stamp_saves_the_second_installation(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    for stamp in (".created", ".installed", ".installed-dev"):
        (tmp_path / ".venv" / stamp).touch()

    def planned() -> str:
        made = subprocess.run(
            ["make", "-n", "test"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
        )
        return made.stdout

    assert "install" not in planned()
    newer = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (newer, newer))
    assert "install" in planned()


def test_continuous_integration_runs_what_a_person_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    text = script.read_text(encoding="utf-8")
    targets = re.findall(r"^step \d+ ([a-z-]+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"test", "lint", "types", "imports", "test-slow"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert "pip install" not in text, "what the tests need, make test installs"


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License\n")
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_version_is_said_once():
    import expunge

    assert PROJECT["version"] == expunge.__version__


# ---------------------------------------------------------------- generated tables


def test_generated_tables_are_fresh(capsys):
    assert docs_tool().main(["--check"]) == 0, capsys.readouterr().out


def test_tables_are_filled_once_and_for_all(tmp_path, capsys):
    tool = docs_tool()
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table:methods -->\nan earlier row\n<!-- /table -->\n"
        "between\n<!-- table:commands -->\n<!-- /table -->\n"
    )
    assert tool.main(["--check", str(page)]) == 1
    assert "stale" in capsys.readouterr().out
    assert "an earlier row" in page.read_text()
    assert tool.main([str(page)]) == 0
    text = page.read_text()
    assert "| `npo` |" in text
    assert "](https://arxiv.org/abs/2404.05868)" in text
    assert "| `expunge data check` |" in text
    assert text.startswith("before\n")
    assert "\nbetween\n" in text
    assert "an earlier row" not in text
    assert tool.main(["--check", str(page)]) == 0


@pytest.mark.parametrize(
    "kind", ["methods", "merges", "metrics", "attacks", "benchmarks", "formats", "presets", "commands"]
)
def test_every_row_of_a_table_has_every_column(kind):
    rows = [line for line in docs_tool().table(kind).splitlines() if line.startswith("|")]
    assert rows or kind == "attacks"
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [("<!-- table:nonsense -->\n<!-- /table -->\n", "no table 'nonsense'"), ("<!-- table:methods -->\n", "not closed")],
)
def test_a_broken_block_is_an_error(tmp_path, capsys, text, problem):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert docs_tool().main([str(page)]) == 1
    assert problem in capsys.readouterr().err
    assert page.read_text() == text
