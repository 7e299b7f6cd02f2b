"""Pages of attacks, calibrations and evaluations, and what a run shows of them: complete, escaped, true."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from expunge.cli.app import main
from expunge.errors import UserError
from expunge.recipe.conventions import CONVENTIONS, EXPUNGE
from expunge.report.attack_page import attack_document, overall, state, worst
from expunge.report.build import MAX_BYTES, build_report
from expunge.report.calibration_page import calibration_document, monotone
from expunge.report.card import model_card
from expunge.report.conventions import consequences, convention_named
from expunge.report.document import Document
from expunge.report.evaluation_page import evaluation_document
from expunge.report.figure_data import (
    Curves,
    Distributions,
    Roc,
)  # fmt: skip
from expunge.report.pages import build_page
from expunge.report.records import read_run
from expunge.report.robust import robust
from expunge.report.tables import families, leading, split_tables
from expunge.report.text import named
from report_checks import check_figures, check_page
from report_fixture import METRICS, Fixture, write_run
from report_folders import (
    attack_record,
    calibration,
    write_attack,
    write_calibration,
    write_evaluation,
)  # fmt: skip
from test_report_figures import EVIL, FIGURES

WRITERS: dict[str, Callable[[Path], Path]] = {
    "attack": lambda folder: write_attack(folder, attack_record(text=EVIL)),
    "calibration": lambda folder: write_calibration(folder, calibration(EVIL)),
    "evaluation": lambda folder: write_evaluation(folder, EVIL, texts=[(EVIL, EVIL, EVIL)] * 3),
}


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("kind", WRITERS)
def test_pages_are_whole_safe_and_the_same_again(kind: str, tmp_path: Path) -> None:
    path, answer = build_page(WRITERS[kind](tmp_path / "folder"))
    html = path.read_text(encoding="utf-8")
    nesting = check_page(html)
    assert len(check_figures(html)) >= 2
    assert len(html.encode()) < MAX_BYTES
    assert "\u202e" not in html
    assert "".join(nesting.text).count("alert(1)") >= 5  # shown as text
    assert answer
    first = path.read_bytes()
    assert build_page(tmp_path / "folder")[0].read_bytes() == first


@pytest.mark.parametrize("kind", WRITERS)
def test_the_report_command_knows_every_folder(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = WRITERS[kind](tmp_path / "folder")
    assert main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["attack.json", "calibration.json", "evaluation.json", "audit.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": 3}', '{"schema": "expunge.attack/9"}'])
def test_a_broken_record_is_one_sentence(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match=re.escape(name)) as error:
        build_page(tmp_path)
    assert error.value.hint


def test_a_folder_of_none_of_these_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        build_page(tmp_path)


def test_documents_of_earlier_studies_and_of_audits_are_drawn(tmp_path: Path) -> None:
    found = Document(kind="audit", name="zoo", answer="ES is best.", sections=[{"title": "All", "figures": FIGURES}])
    (tmp_path / "audit.json").write_text(json.dumps(found.to_json()))
    path, answer = build_page(tmp_path)
    html = path.read_text(encoding="utf-8")
    check_page(html)
    assert len(check_figures(html)) == len(FIGURES)
    assert "Pearson 0.900, Spearman 0.800" in html
    assert answer == "ES is best."
    earlier = {"schema": "expunge.study/1", "study": "old", "summary": "", "paper": "", "answer": "a", "rule": "r"}
    assert Document.model_validate({**earlier, "planned": 2, "done": 1}).name == "old"


def test_made_without_torch(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "e")
    code = (
        "import sys; from pathlib import Path; from expunge.report.pages import build_page;"
        "build_page(Path(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers', 'expunge.models', 'expunge.scoring.scores') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- attacks


def test_an_attack_that_reads_nothing_is_grey_and_never_passed(tmp_path: Path) -> None:
    record = attack_record(("logit_lens", "quantize"))
    lens, quantize = record.attacks
    assert state(lens) == "no evidence"
    assert state(quantize) == "yes"
    html = build_page(write_attack(tmp_path / "a", record))[0].read_text(encoding="utf-8")
    table = re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL)[0]
    row = next(part for part in table.split("<tr") if "Logit lens" in part)
    assert row.count("grey") == 7
    assert "no evidence" in row
    assert ">yes<" not in row
    assert "hollow grey" in html.lower()
    # and an attack that shows the knowledge is a "no", even where the target itself shows little
    point = lens.points[0].model_copy(update={"verdict": "no"})
    assert state(lens.model_copy(update={"points": [point], "verdict": "no"})) == "no"


@pytest.mark.parametrize(
    ("names", "subjects", "answer", "words"),
    [
        (("relearn", "quantize"), ("model", "target", "reference"), "no", "Relearn draws more out of it"),
        (("quantize", "jailbreak"), ("model", "target", "reference"), "yes", "The model is robust: none of 2 attacks"),
        (("benign_relearn",), ("model", "target", "reference"), "not shown", "not shown that the model is robust"),
        (("logit_lens",), ("model", "target", "reference"), "not shown", "no attack here could read"),
        (("quantize",), ("model", "target"), "not shown", "not shown that the model is robust"),
    ],
)
def test_robust(names: tuple[str, ...], subjects: tuple[str, ...], answer: str, words: str) -> None:
    record = attack_record(names, subjects)
    document = attack_document(record)
    verdict = overall(record)
    assert verdict.answer == answer
    assert words in document.answer
    assert verdict.threshold == record.robust_margin
    if "reference" not in subjects:
        assert "no reference" in " ".join(document.limits).lower()
        assert verdict.value is None
    elif answer != "not shown" or "logit_lens" not in names:
        tried = [attack for attack in record.attacks if state(attack) != "no evidence"]
        margins = [point.margin for attack in tried if (point := worst(attack)) is not None]
        assert verdict.value == max(margin.value for margin in margins if margin is not None)


def test_every_point_and_what_was_left_out_stand_on_the_page(tmp_path: Path) -> None:
    record = attack_record()
    html = build_page(write_attack(tmp_path / "a", record))[0].read_text(encoding="utf-8")
    for attack in record.attacks:
        for point in attack.points:
            assert point.label in html
            assert f"{point.strengths['model'].value:.3f}".replace("-", "−") in html
    assert "needs retain rows" in html
    assert "1 row left without" in html
    pictures = [picture for picture in check_figures(html) if 'class="figure curves"' in picture]
    assert len(pictures) == len(record.attacks)
    assert all("curve v-reference" in picture for picture in pictures)


# ---------------------------------------------------------------- calibration


def test_calibration_says_where_it_is_read() -> None:
    record = calibration()
    document = calibration_document(record)
    along, over = document.sections[0].figures
    assert isinstance(along, Curves)
    assert isinstance(over, Curves)
    assert along.marks == {"α* = 0.438": record.alpha}
    assert along.levels == {"to be kept": record.threshold}
    x, y = over.lines[0].x, [value or 0.0 for value in over.lines[0].y]
    area = sum((b - a) * value for a, b, value in zip(x, x[1:], y[1:], strict=False))
    assert area == pytest.approx(record.area)  # what is shaded is what is said
    assert x[0] == 0
    without = calibration_document(calibration(curve=False))
    assert len(without.sections[0].figures) == 1
    assert monotone(record.points)
    assert not monotone(record.points[::-1])


# ---------------------------------------------------------------- evaluations


def test_an_evaluation_shows_distributions_roc_leaks_and_words(tmp_path: Path) -> None:
    document = evaluation_document(write_evaluation(tmp_path / "e"))
    kinds = [figure.kind for section in document.sections for figure in section.figures]
    assert {kind: kinds.count(kind) for kind in kinds} == {"heat_map": 3, "distributions": 2, "roc": 2, "curves": 1}
    figures = {figure.title: figure for section in document.sections for figure in section.figures}
    truth = figures["Truth ratio, forget rows"]
    assert isinstance(truth, Distributions)
    assert truth.distance is not None
    by_name = {sample.name: np.array(sample.values) for sample in truth.samples}
    assert truth.distance.statistic == pytest.approx(stats.ks_2samp(by_name["Model"], by_name["Reference"]).statistic)
    loss = figures["Membership by loss: forget against holdout"]
    assert isinstance(loss, Roc)
    assert [entry.name for entry in loss.lines] == ["Target", "Model", "Reference"]
    assert loss.lines[0].auc > 0.9
    assert any("standard error" in words for words in loss.words)
    html = build_page(tmp_path / "e")[0].read_text(encoding="utf-8")
    for words in ("convention semeval", "What the score cannot see", "standard error at 0.5 is 0.033", "AILS-NTUA"):
        assert words in html
    assert html.count("<mark>") > 20
    assert "privleak" in html
    assert "needs a reference" in html


def test_an_evaluation_without_anything_beside_the_model(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "e", benchmark=False, tables=False, reference=False, generations=False)
    records = [r for r in json.loads((folder / "metrics.json").read_text()) if r["variant"] == "model"]
    (folder / "metrics.json").write_text(json.dumps(records))
    (folder / "values.parquet").unlink()
    document = evaluation_document(folder)
    assert not [figure for section in document.sections for figure in section.figures]
    assert any("no target model" in words for words in document.limits)
    assert any("no reference model" in words for words in document.limits)
    check_page(build_page(folder)[0].read_text(encoding="utf-8"))


def test_every_convention_says_what_it_changes() -> None:
    assert consequences(EXPUNGE) == []
    skipped = {"name", "summary", "official"}
    for convention in CONVENTIONS.values():
        differs = [
            field.name
            for field in dataclasses.fields(convention)
            if field.name not in skipped and getattr(convention, field.name) != getattr(EXPUNGE, field.name)
        ]
        assert len(consequences(convention)) == len(differs), convention.name
    assert convention_named({"name": "tofu"}).name == "tofu"
    assert convention_named(None) is EXPUNGE
    assert convention_named("no such") is EXPUNGE


# ---------------------------------------------------------------- runs


def test_a_run_says_that_it_was_not_attacked_and_how_to(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    html = build_report(run).read_text(encoding="utf-8")
    assert "Not measured" in html
    assert "expunge attack RUN/model --target TARGET --reference REFERENCE --benchmark fictitious" in html
    assert robust(read_run(run)).answer == "not measured"


@pytest.mark.parametrize("place", ["attacks", "attacks/first"])
def test_a_run_shows_the_attacks_in_its_folder(place: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_attack(run / place)
    html = build_report(run).read_text(encoding="utf-8")
    check_page(html)
    verdict = robust(read_run(run))
    assert verdict.answer == "no"
    assert "Under attack" in html
    assert "Margin over the control" in html
    assert "None of that was tried here" not in html
    assert "**Robust? No**" in model_card(run)
    write_attack(run / "attacks" / "second", attack_record(("quantize", "jailbreak")))
    assert robust(read_run(run)).answer == "no"  # the least favourable counts
    (run / "attacks" / "second" / "attack.json").write_text("{")
    with pytest.raises(UserError, match=r"attack\.json can't be read"):
        build_report(run)


def test_records_with_and_without_the_newer_keys(tmp_path: Path) -> None:
    newer = write_run(tmp_path / "new")
    html = build_report(newer).read_text(encoding="utf-8")
    assert "where a model stands between the reference (0) and the target (1)" in html
    records = json.loads((newer / "metrics.json").read_text())
    flagged = next(r for r in records if r["variant"] == "over" and r["split"] == "forget")
    flagged |= {"over_unlearned": True, "note": "few rows; noisy"}
    (newer / "metrics.json").write_text(json.dumps(records))
    html = build_report(newer).read_text(encoding="utf-8")
    assert ">over-unlearned<" in html
    assert "Extraction strength of over: few rows." in html
    table = split_tables(read_run(newer))[0]
    kinds = {row.kind: row.cells[0].anchored for row in table.rows}
    assert kinds["target"] == kinds["reference"] == ""
    assert kinds["result"].startswith("a ")
    older = build_report(write_run(tmp_path / "old", Fixture(anchored=False))).read_text(encoding="utf-8")
    assert "where a model stands between" not in older
    check_page(older)


MANY = (
    "extraction_strength_paraphrase", "extraction_strength_entity", "truth_ratio", "truth_ratio_prob", "mia_loss",
    "mia_zlib", "mia_min_k", "s_mia_loss", "s_mia_zlib", "leak_at_1", "leak_at_8", "privleak", "repetition",
)  # fmt: skip


def test_many_metrics_are_folded_by_family(tmp_path: Path) -> None:
    names = [*METRICS, *MANY]
    assert leading(METRICS) == list(METRICS)
    first = leading(names)
    assert first == [
        "extraction_strength", "exact_memorization", "probability", "rouge_l_recall", "truth_ratio", "mia_loss",
        "perplexity",
    ]  # fmt: skip
    rest = families([name for name in names if name not in first])
    assert list(rest) == ["Extraction strength", "MIA", "S MIA", "Leak at", "Others"]
    assert sorted(name for family in rest.values() for name in family) == sorted(set(names) - set(first))
    assert leading([f"odd_{n}" for n in range(20)]) == [f"odd_{n}" for n in range(8)]
    html = build_report(write_run(tmp_path / "run", Fixture(more=MANY))).read_text(encoding="utf-8")
    check_page(html)
    assert html.count("Forget: 12 further metrics") == 1
    seen = re.sub(r"<details>.*?</details>", "", html, flags=re.DOTALL)
    for name in ("Leak at 8", "S MIA zlib", "Repetition"):
        assert name in html
        assert name not in seen


def test_a_run_of_a_benchmark_shows_its_aggregates(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    about = {"benchmark": "lume", "convention": "expunge", "official": False, "direction": "higher", "summary": EVIL}
    rows = [{**about, "variant": "merged", "name": "task_aggregate", "value": 0.5, "note": EVIL}]
    (run / "aggregates.json").write_text(json.dumps(rows))
    html = build_report(run).read_text(encoding="utf-8")
    check_page(html)
    assert "Benchmark lume" in html
    assert "these are not the official numbers" in html
    assert "Not comparable" in html
    for broken in ("{", '[{"name": 1}]', "[3]", "null"):
        (run / "aggregates.json").write_text(broken)
        assert "Benchmark lume" not in build_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/me/secret/model", "model"),
        ("./runs/demo/", "demo"),
        ("owner/name", "owner/name"),
        ("tiny", "tiny"),
        ("C:\\models\\a", "a"),
        ("", ""),
    ],
)
def test_a_path_is_no_part_of_a_name(source: str, shown: str) -> None:
    assert named(source) == shown
