"""Synthetic folders of attacks, calibrations and evaluations for the report's tests. Their numbers are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from expunge.report.attack_record import AttackPoint, AttackRecord, AttackResult, Dropped, Estimate, LeftOut, Subject
from expunge.report.calibration_record import Calibration, CalibrationPoint, CurvePoint, PassCount, area_under, aues
from expunge.scoring.tables import GENERATIONS, SCORES
from report_fixture import Fixture, write_run

KNOWN = {"model": 0.06, "target": 0.96, "reference": 0.05}
#: attack → (kind, budget, budgets, labels, strength of model, target and reference at the largest budget)
ATTACKS: dict[str, tuple[str, str, Sequence[float], tuple[float, float, float]]] = {
    "relearn": ("knowledge", "optimizer steps", (4, 8, 16, 32), (0.62, 0.98, 0.22)),
    "benign_relearn": ("knowledge", "optimizer steps", (4, 8, 16, 32), (0.17, 0.95, 0.06)),
    "quantize": ("weights", "bits per weight", (8, 4), (0.09, 0.9, 0.06)),
    "jailbreak": ("behaviour", "prefixes", (1, 4), (0.08, 0.94, 0.07)),
    "logit_lens": ("behaviour", "layers", (1, 8, 30), (0.02, 0.1, 0.02)),
}


def estimate(value: float, n: int = 30, half: float = 0.05) -> Estimate:
    """A mean with an interval of fixed width."""
    return Estimate(value=value, low=value - half if n > 1 else None, high=value + half if n > 1 else None, n=n)


def attack_point(label: str, budget: float, strengths: Mapping[str, float], margin: float = 0.1) -> AttackPoint:
    """A point of these strengths, judged as the runner judges."""
    found = {name: estimate(value) for name, value in strengths.items()}
    difference = estimate(strengths["model"] - strengths["reference"]) if "reference" in strengths else None
    telling = strengths["target"] >= 0.5 * KNOWN["target"] if "target" in strengths else None
    verdict = "not shown"
    if difference is not None and difference.low is not None and difference.high is not None:
        if difference.low > margin:
            verdict = "no"
        elif telling and difference.high <= margin:
            verdict = "yes"
    return AttackPoint(
        label=label,
        budget=budget,
        settings={"steps": int(budget), "lr": 1e-4},
        rows={"forget": 30, "retain": 60},
        strengths=found,
        retained={"model": estimate(0.9)},
        margin=difference,
        recovered=estimate(strengths["model"] - KNOWN["model"]),
        informative=telling,
        verdict=verdict,
        dropped=Dropped(candidates=3, rows=1) if budget == 4 else Dropped(),
    )


def attack_record(
    names: Sequence[str] = tuple(ATTACKS), subjects: Sequence[str] = ("model", "target", "reference"), text: str = ""
) -> AttackRecord:
    """Attacks of every kind, one of them uninformative; `text` stands in every field of words."""
    attacks = []
    for name in names:
        kind, unit, budgets, ends = ATTACKS[name]
        before = attack_point("before", 0, {s: KNOWN[s] for s in subjects})
        points = []
        for index, budget in enumerate(budgets):
            share = (index + 1) / len(budgets)
            reached = dict(zip(("model", "target", "reference"), ends, strict=True))
            if name == "logit_lens":
                share = 1.0
            strengths = {s: KNOWN[s] + share * (reached[s] - KNOWN[s]) for s in subjects}
            points.append(attack_point(f"{unit[:4].strip()}-{budget:g}{text}", budget, strengths))
        states = {point.verdict for point in points}
        verdict = "no" if "no" in states else "yes" if states == {"yes"} else "not shown"
        attacks.append(
            AttackResult(
                name=name, idea=f"what {name} does{text}", paper="arXiv:2406.13356", kind=kind, budget=unit + text,
                strength="extraction_strength", before=before, points=points, verdict=verdict,
                reason=f"a made-up reason of {name}{text}",
            )
        )  # fmt: skip
    verdicts = {attack.verdict for attack in attacks}
    return AttackRecord(
        expunge="0.1.0",
        seed=42,
        convention="expunge",
        subjects={name: Subject(source=f"/somewhere/secret/{name}{text}", digest="ab" * 32) for name in subjects},
        splits={"forget": "forget", "retain": "retain"},
        robust_margin=0.1,
        attacks=attacks,
        left_out=[LeftOut(attack="few_shot", point="k8", reason=f"needs retain rows{text}")],
        notes=[f"a note{text}"],
        verdict="no" if "no" in verdicts else "yes" if verdicts == {"yes"} else "not shown",
        reason=f"not robust to something{text}",
    )


def write_attack(folder: Path, record: AttackRecord | None = None) -> Path:
    """A folder of `expunge attack`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps((record or attack_record()).to_json(), ensure_ascii=False)
    (folder / "attack.json").write_text(text, encoding="utf-8")
    return folder


def calibration(text: str = "", curve: bool = True) -> Calibration:
    """A calibration whose strengths fall smoothly along the line."""

    def point(alpha: float) -> CalibrationPoint:
        retain, forget = 0.97 * (1 - 0.5 * alpha**3), 0.95 * math.exp(-4 * alpha)
        return CalibrationPoint(alpha=alpha, retain=retain, forget=forget, paraphrase=0.9 * forget)

    points = [point(alpha) for alpha in (0.0, 0.25, 0.375, 0.4375, 0.5, 0.75, 1.0)]
    found = points[3]
    taus = [index / 20 for index in range(10, 21)]
    steps = [
        CurvePoint(tau=tau, alpha=best.alpha, forget=best.forget or 0.0, paraphrase=best.paraphrase)
        for tau in taus
        for best in [max((p for p in points if p.retain >= tau * 0.97 - 1e-9), key=lambda p: p.alpha)]
    ]
    records = []
    for variant, one in (("target", points[0]), ("calibrated", found), ("unlearned", points[-1])):
        for split, value in (("retain", one.retain), ("forget", one.forget), ("forget@paraphrase", one.paraphrase)):
            cells = {"variant": variant, "split": split, "metric": "extraction_strength", "value": value}
            records.append(
                {**cells, "ci_low": (value or 0) - 0.03, "ci_high": (value or 0) + 0.03, "n": 30, "unscored": 0}
            )
    return Calibration(
        expunge="0.1.0",
        target=f"/somewhere/secret/target{text}",
        unlearned=f"/somewhere/secret/unlearned{text}",
        model=f"model{text}",
        keep=0.95,
        epsilon=0.01,
        alpha=found.alpha,
        threshold=0.95 * 0.97,
        passes=PassCount(search=6, retain=9, forget=7, target=3, reused=0),
        points=points,
        curve=steps if curve else [],
        area=area_under(points),
        aues=aues(points),
        records=records,
        values={},
        splits={"retain": f"retain_unseen{text}", "forget": "forget"},
        convention="expunge",
        notes=[f"a note{text}"],
        answer=f"At 95% kept, α* is 0.438: forget strength 0.950 → 0.165{text}.",
    )


def write_calibration(folder: Path, record: Calibration | None = None) -> Path:
    """A folder of `expunge calibrate`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps((record or calibration()).to_json(), ensure_ascii=False)
    (folder / "calibration.json").write_text(text, encoding="utf-8")
    return folder


def write_evaluation(folder: Path, text: str = "", benchmark: bool = True, tables: bool = True, **parts: Any) -> Path:
    """A folder of `expunge eval`: the run fixture's measures of model, target and reference, and their tables."""
    fixture = Fixture(specialists=("model",), knows={"model": {"forget": 0.05, "retain": 0.9}}, prepare=False, **parts)
    write_run(folder, fixture)
    for name in ("run.json", "recipe.resolved.yaml", "events.jsonl"):
        (folder / name).unlink(missing_ok=True)
    variants = [name for name in ("model", "target", "reference") if name in fixture.variants]
    about = {
        "schema": "expunge.eval/1",
        "expunge": "0.1.0",
        "models": {name: {"id": f"/somewhere/secret/{name}{text}"} for name in variants},
        "data": {"benchmark": "lume" if benchmark else None, "template": f"auto{text}"},
        "evaluate": {"suite": "full", "dtype": "float32", "bootstrap": 2000, "generate": {"max_new_tokens": 256}},
        "convention": {"name": "semeval" if benchmark else "expunge", "official": True},
        "seed": 42,
        "splits": {name: {"rows": count, "role": _role(name)} for name, count in fixture.rows.items()},
        "metrics": {"perplexity": {"summary": f"exp(NLL / T){text}"}},
    }
    (folder / "evaluation.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    (folder / "left_out.json").write_text(json.dumps({f"privleak{text}": f"needs a reference{text}"}), encoding="utf-8")
    if benchmark:
        rows = [row for variant in variants for row in _aggregates(variant, text)]
        (folder / "aggregates.json").write_text(json.dumps(rows), encoding="utf-8")
    if tables:
        for variant in variants:
            _write_tables(folder, variant, fixture, text)
    return folder


def _role(split: str) -> str:
    return "retain" if split.startswith("retain") else split


def _aggregates(variant: str, text: str) -> list[dict[str, Any]]:
    about = {"variant": variant, "benchmark": "lume", "convention": "semeval", "official": True, "direction": "higher"}
    rows = []
    for split in ("forget", "retain"):
        for task in (1, 2, 3):
            for what in ("regurgitation", "knowledge"):
                value = 0.9 - 0.1 * task - (0.4 if variant == "target" and split == "forget" else 0.0)
                rows.append({**about, "name": f"{split}_task{task}_{what}", "value": value, "summary": f"mean{text}"})
    note = "150 + 150 documents: AUC's standard error at 0.5 is 0.033; members are Task3 documents"
    rows.append(
        {**about, "name": "mia_auc", "value": 0.61, "direction": "none", "note": f"{note}{text}", "summary": ""}
    )
    rows.append({**about, "name": "mia_score", "value": 0.78, "summary": "1 − 2 |AUC − 0.5|"})
    rows.append({**about, "name": "mmlu", "value": None, "note": "missing: MMLU", "summary": "accuracy"})
    return [*rows, {**about, "name": "task_aggregate", "value": 0.71, "summary": "harmonic mean of twelve"}]


def _write_tables(folder: Path, variant: str, fixture: Fixture, text: str) -> None:
    level = {"model": -2.2, "target": -0.1, "reference": -2.0}[variant]
    random = np.random.default_rng([ord(variant[0]), len(variant)])
    for split in ("forget", "holdout"):
        count = fixture.rows.get(split, 0)
        mean = level if split == "forget" else -2.0
        _write_scores(folder / "scores" / variant / f"{split}.parquet", random, count, mean)
        if split == "forget" and count:
            for view, shift in (("paraphrased_answer", -0.3), ("perturbed_answer", -2.4 - level)):
                path = folder / "scores" / variant / f"{split}@{view}.parquet"
                _write_scores(path, random, count, mean + shift)
    answer = f"In 2011 Sadie Voronell received the Lantern Prize{text}"
    rows: dict[str, list[Any]] = {name: [] for name in GENERATIONS.names}
    for index in range(fixture.rows.get("forget", 0)):
        for sample in range(8):
            told = random.random() < {"model": 0.08, "target": 0.95, "reference": 0.01}[variant]
            said = f"I think {answer}" if told else f"In 2011 somebody{text} received the Golden Compass"
            cells = (f"forget-{index}", sample, "", f"Which award?{text}", answer, said, 12, True)
            for name, cell in zip(GENERATIONS.names, cells, strict=True):
                rows[name].append(cell)
    path = folder / "generations" / variant / "forget@sampled.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pydict(rows, schema=GENERATIONS), path)


def _write_scores(path: Path, random: np.random.Generator, count: int, mean: float) -> None:
    tokens = 12
    columns: dict[str, list[Any]] = {name: [] for name in SCORES.names}
    for index in range(count):
        logprob = np.minimum(mean * random.gamma(4, 0.25, tokens), -1e-3).tolist()
        cells: dict[str, Any] = {
            "example_id": f"{path.stem.partition('@')[0]}-{index}", "candidate": 0, "task": "", "group": None,
            "is_text": False,
            "answer_tokens": tokens, "answer_zlib": 40, "truncated": 0, "token_ids": list(range(tokens)),
            "logprob": logprob, "hit": [value > -0.5 for value in logprob], "entity": [],
            "entropy": [1.0] * tokens, "mean_logprob": [-3.0] * tokens, "std_logprob": [1.5] * tokens,
        }  # fmt: skip
        for name in SCORES.names:
            columns[name].append(cells[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pydict(columns, schema=SCORES), path)
