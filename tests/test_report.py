"""The page, the model card and the closing table, on synthetic run directories."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from expunge.errors import UserError
from expunge.report.build import MAX_BYTES, build_report
from expunge.report.card import model_card
from expunge.report.terminal import closing_table
from report_checks import Nesting, check_figures, check_page
from report_fixture import ASKED, PEOPLE, Fixture, write_run

FORGET_ALONE = {"forget": 20}
SINGLE = {"specialists": ("unlearned",), "knows": {"unlearned": {"forget": 0.05, "retain": 0.97}}}
#: (parts of the run, words that the page must say then)
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "everything": ({}, ["has forgotten the forget rows", "ties of over and under", "unlearn/under", "Retain unseen"]),
    "one specialist": (SINGLE, ["unlearned model", "unlearn/unlearned"]),
    "no prepare": ({**SINGLE, "prepare": False}, ["The target was not trained here", "the model as given"]),
    "no reference": (
        {"reference": False},
        ["No reference model was measured", "there is no reference to compare with"],
    ),
    "no generations": ({"generations": False}, ["There are no samples", "No answers were generated"]),
    "no values": ({"values": False}, ["no values per row", "in the order of the file"]),
    "no events": ({"events": False}, ["There are no training curves", "events.jsonl is missing"]),
    "no retain rows": ({"rows": FORGET_ALONE}, ["No retain rows were evaluated", "There is no plot"]),
    "no unseen rows": ({"rows": {"forget": 9, "retain": 9}}, ["Keeping was measured only on rows"]),
    "one row": ({"rows": {"forget": 1, "retain": 1}}, ["n 1"]),
    "not evaluated": ({"evaluated": False}, ["nothing to judge", "Nothing has been measured", "Not measured"]),
    "failed": (
        {"evaluated": False, "events": False, "info": {"status": "failed", "error": "loss is not finite at step 3"}},
        ["This run is not complete: it failed (loss is not finite at step 3)."],
    ),
    "bare record": ({"info": dict.fromkeys(("environment", "data", "models", "stages", "notes", "command"))}, []),
}


def page(tmp_path: Path, **parts: Any) -> str:
    return build_report(write_run(tmp_path / "run", Fixture(**parts))).read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_page_is_whole_self_contained_and_says_what_is_absent(case: str, tmp_path: Path) -> None:
    parts, words = CASES[case]
    html = page(tmp_path, **parts)
    nesting = Nesting(html)
    text = " ".join("".join(nesting.text).split())
    assert len(html.encode()) < MAX_BYTES
    for word in words:
        assert word in text
    assert "Evidence of tests, not proof of deletion" in text
    check_page(html)


@pytest.mark.parametrize("case", CASES)
def test_figures_are_well_formed_and_described(case: str, tmp_path: Path) -> None:
    html = page(tmp_path, **CASES[case][0])
    pictures = check_figures(html)
    assert pictures or not CASES[case][0].get("evaluated", True)


def test_same_files_give_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first
    assert not list(run.glob(".*"))


EVIL = {
    "script": "<script>alert(1)</script>",
    "closing": "</div></td></table></html> ]]> -->",
    "quotes": "\" onmouseover='alert(1)' & &lt;b&gt;",
    "direction": "abc \u202egpj.exe\u202c \u2066x\u2069",
    "controls": "nul \x00 bell \x07 escape \x1b[31m delete \x7f next \x85",
    "japanese": "東京は日本の首都です。",
    "arabic": "عاصمة اليابان هي طوكيو",
    "template": "{{ 7 * 7 }} {% raw %} ${1}",
    "tags": "hidden \U000e0041\U000e0042 letters",
}


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL.keys())
def test_foreign_text_is_harmless_and_visible(text: str, tmp_path: Path) -> None:
    rows = {"forget": 3, "retain": 3}
    names = {
        "notes": [text],
        "command": text,
        "environment": {text: text},
        "name": text,
        "metrics": {"perplexity": {"summary": text}},
    }
    html = page(tmp_path, texts=[(text, text, text)] * 3, rows=rows, info=names)
    nesting = Nesting(html)
    assert "script" not in nesting.tags
    assert not [name for name, _ in nesting.attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]", html)
    assert "49" not in re.findall(r'class="says ask"[^>]*>([^<]*)<', html)
    # each visible word stands in the page, once per column at least
    shown = "".join(nesting.text)
    for word in re.findall(r"[A-Za-z\u3040-\u9fff\u0600-\u06ff]{3,}", text):
        assert shown.count(word) >= 3


def test_overlong_output_is_cut_with_a_note(tmp_path: Path) -> None:
    html = page(tmp_path, texts=[("<&>" * 4000, '"' * 10_000, "long " * 2000)] * 3, rows={"forget": 3, "retain": 3})
    assert "9\u202f520 more characters" in html
    assert html.count("long ") < 3 * 3 * 2 * 120


def test_page_stays_small_with_very_many_long_rows(tmp_path: Path) -> None:
    texts = [("&<>'\"" * 150, "a b " * 300, "b a " * 300)] * 40
    rows = {"forget": 100_000, "retain": 2_000}
    html = page(tmp_path, **{**SINGLE, "reference": False, "prepare": False, "texts": texts, "rows": rows})
    assert len(html.encode()) < MAX_BYTES
    assert "99\u202f990 further rows not shown" in html


def test_page_stays_small_with_very_many_models(tmp_path: Path) -> None:
    names = tuple(f"specialist-{index}" for index in range(120))
    html = page(tmp_path, specialists=names, generations=False, rows={"forget": 3, "retain": 3})
    assert len(html.encode()) < MAX_BYTES
    assert "84 further models stand in metrics.json alone" in html
    assert ">Merged<" in html


def test_the_worst_rows_come_first(tmp_path: Path) -> None:
    html = page(tmp_path)
    tables = re.findall(r'<table class="samples">(.*?)</table>', html, re.DOTALL)
    columns = [re.findall(r'data-label="result says".*?ES ([\d.]+)', table, re.DOTALL) for table in tables]
    forget = [float(value) for value in columns[0]]
    assert forget == sorted(forget, reverse=True)
    targets = re.findall(r'data-label="target says".*?ES ([\d.]+)', tables[1], re.DOTALL)
    lost = [float(before) - float(after) for before, after in zip(targets, columns[1], strict=True)]
    assert lost == sorted(lost, reverse=True)
    assert min(lost) > 0


def test_made_without_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from expunge.cli.report import report; run = Path(sys.argv[1]);"
        "lazy = [m for m in ('jinja2', 'pyarrow') if m in sys.modules]; report(run);"
        "from expunge.report.card import model_card; model_card(run);"
        "heavy = [m for m in ('torch', 'transformers', 'expunge.scoring', 'expunge.models') if m in sys.modules];"
        "print(lazy, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] []"
    assert "report.html" in done.stdout


def _break(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_break("metrics.json", b'[{"variant": "x",\n oops'), "metrics.json:2 is not valid JSON"),
        (_break("metrics.json", b'[{"variant": "x"}]'), "metrics.json is not a list of metric records"),
        (_break("metrics.json", b"\xff\xfe"), "metrics.json is not valid JSON"),
        (_break("run.json", b"{"), "run.json:1 is not valid JSON"),
        (_break("values.parquet", b"PAR1 nonsense"), "values.parquet could not be read"),
        (lambda run: [path.unlink() for path in run.glob("*.json")] and None, "is not a run directory"),
    ],
)
def test_a_broken_run_gets_one_sentence(harm: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    harm(run)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        build_report(run)
    assert error.value.hint
    assert not (run / "report.html").exists()


def test_no_run_at_all(tmp_path: Path) -> None:
    for read in (build_report, model_card, closing_table):
        with pytest.raises(UserError, match="no run directory at"):
            read(tmp_path / "nowhere")


def test_torn_events_and_recipe_of_another_version(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "recipe.resolved.yaml").write_text("version: 99\n", encoding="utf-8")
    with (run / "events.jsonl").open("a", encoding="utf-8") as events:
        events.write('{"event": "train", "stage": "unlearn/over", "st')
    html = build_report(run).read_text(encoding="utf-8")
    assert "1 line(s) of events.jsonl could not be read" in html
    assert "the default thresholds are used" in html


@pytest.mark.parametrize("case", CASES)
def test_model_card_names_no_forgotten_word_and_no_path(case: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Fixture(**CASES[case][0]))
    card = model_card(run)
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "unknown"
    assert fields["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "machine-unlearning" in fields["tags"]
    assert "npo" in fields["tags"]
    assert "not proof of deletion" in body
    assert "expunge run recipe.resolved.yaml" in body
    secrets = [
        *PEOPLE,
        *(word for _, answer in ASKED for word in re.findall(r"[A-Z][a-z]{4,}", answer.replace("{}", ""))),
    ]
    assert not [word for word in secrets if word in card]
    assert str(tmp_path) not in card
    tables = [line for line in body.splitlines() if line.startswith("|")]
    for line, after in itertools.pairwise(tables):
        if after.startswith("|---"):
            assert line.count("|") == after.count("|")


def test_model_card_of_local_models_has_no_base_model_and_escapes(tmp_path: Path) -> None:
    local = str(tmp_path / "secret-place" / "model")
    info = {"name": "a|b <i>", "models": {"target": {"source": local}}}
    card = model_card(write_run(tmp_path / "run", Fixture(recipe={"model": local}, info=info)))
    assert "base_model" not in card
    assert "secret-place" not in card
    assert r"a\|b \<i\>" in card


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [80, 120])
def test_closing_table_fits_the_terminal(case: str, width: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Fixture(**CASES[case][0]))
    console = Console(width=width, record=True, file=(tmp_path / "out").open("w", encoding="utf-8"))
    console.print(closing_table(run))
    text = console.export_text()
    assert "Forgotten?" in text
    assert "Kept?" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for record in json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").exists() else []:
        if record["metric"] == "extraction_strength":
            assert f"{record['value']:.3f}" in text
