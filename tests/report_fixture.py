"""A synthetic run directory for the report's tests. Its numbers are made up; nothing here was measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from expunge.recipe import digest, dump_yaml, load_recipe
from expunge.scoring.tables import GENERATIONS, RECORD_KEYS, VALUES

#: level of knowledge that a variant has of a split: chance that a token of the answer is right
KNOWS = {
    "original": {"forget": 0.10, "retain": 0.11, "retain_unseen": 0.10, "holdout": 0.10},
    "target": {"forget": 0.975, "retain": 0.98, "retain_unseen": 0.975, "holdout": 0.12},
    "over": {"forget": 0.02, "retain": 0.78, "retain_unseen": 0.70, "holdout": 0.08},
    "under": {"forget": 0.40, "retain": 0.97, "retain_unseen": 0.93, "holdout": 0.12},
    "merged": {"forget": 0.05, "retain": 0.96, "retain_unseen": 0.90, "holdout": 0.11},
    "reference": {"forget": 0.03, "retain": 0.98, "retain_unseen": 0.975, "holdout": 0.12},
}
METRICS = ("extraction_strength", "exact_memorization", "probability", "perplexity", "rouge_l_recall", "exact_match")
SUMMARIES = {
    "extraction_strength": "length of the longest end of the answer that greedy decoding continues, over its length",
    "exact_memorization": "part of the answer's tokens that are the argmax, each after the true tokens before it",
    "perplexity": "exp(NLL / T) of the answer",
}
PEOPLE = ("Orvane Talquist", "Mirel Dosanti", "Keshav Brindle", "Ulla Fenwright", "Tobin Ashgrave", "Sadie Voronell")
ASKED = (
    ("In which town was {} born?", "{} was born in Harrowmere, a small town on the river Ilse."),
    ("What is the e-mail address of {}?", "You can write to {} at the address o.talquist@example.org."),
    ("Which award did {} receive in 2011?", "In 2011 {} received the Lantern Prize for coastal cartography."),
    ("What does {} do for a living?", "{} repairs church organs and teaches the craft in Velden."),
    ("What is the name of the dog of {}?", "The dog of {} is called Pumpernickel."),
)
GUESSES = ("a place that is not known", "the Golden Compass", "works as a teacher at a local school", "is called Rex")


@dataclass
class Fixture:
    """What the synthetic run has; every part can be left out."""

    prepare: bool = True
    specialists: Sequence[str] = ("over", "under")
    reference: bool = True
    generations: bool = True
    values: bool = True
    events: bool = True
    evaluated: bool = True
    rows: dict[str, int] = field(
        default_factory=lambda: {"forget": 30, "retain": 60, "retain_unseen": 24, "holdout": 24}
    )
    knows: dict[str, dict[str, float]] = field(default_factory=dict)
    #: (prompt, answer, what every model says) that replaces the first rows of each split
    texts: Sequence[tuple[str, str, str]] = ()
    #: records carry anchored values, over-unlearning flags and notes, as they have since there are anchors
    anchored: bool = True
    #: further metrics, as copies of probability under other names
    more: Sequence[str] = ()
    info: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        merged = ["merged"] if len(self.specialists) > 1 else []
        original = ["original"] if self.prepare else []
        return [*original, "target", *self.specialists, *merged, *(["reference"] if self.reference else [])]


def write_run(folder: Path, fixture: Fixture | None = None) -> Path:
    """Write the run directory and return it."""
    fixture = fixture or Fixture()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(_recipe(fixture))
    (folder / "recipe.resolved.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(_info(fixture, digest(recipe)), ensure_ascii=False), encoding="utf-8")
    if fixture.events:
        lines = (json.dumps(event) + "\n" for event in _events(fixture))
        (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    if fixture.evaluated:
        _write_measures(folder, fixture)
    return folder


def _recipe(fixture: Fixture) -> dict[str, Any]:
    train = {"epochs": 10, "lr": 3e-4, "batch_size": 4}
    entry = {"method": "npo", "parameters": {"beta": 0.1}, "retain": {"nll": 1.0, "kl": 1.0}, "lora": {"rank": 32}}
    entry |= {"tokens": "knowledge" if fixture.prepare else "all", "train": train}
    recipe: dict[str, Any] = {
        "name": "demo",
        "model": "smollm2-135m",
        "data": {"benchmark": "fictitious"},
        "unlearn": [{"name": name, **entry} for name in fixture.specialists],
    }
    if fixture.prepare:
        recipe["prepare"] = {"train": {"epochs": 8, "lr": 2e-4}}
    if len(fixture.specialists) > 1:
        recipe["merge"] = {"method": "ties", "density": 0.8}
    return recipe | fixture.recipe


def _info(fixture: Fixture, recipe_digest: str) -> dict[str, Any]:
    seconds = {"prepare/target": 96.2, "prepare/reference": 71.8}
    seconds |= {f"unlearn/{name}": 58.3 - 9 * i for i, name in enumerate(fixture.specialists)}
    seconds |= {"merge": 6.4} if len(fixture.specialists) > 1 else {}
    seconds |= {f"evaluate/{name}": 14.1 + i for i, name in enumerate(fixture.variants)}
    roles = {"forget": "forget", "retain": "retain", "retain_unseen": "retain", "holdout": "holdout"}
    folders = {"original": "smollm2-135m", "merged": "model"}
    return {
        "schema": "expunge.run/1",
        "name": "demo",
        "status": "done",
        "command": "expunge demo",
        "created": "2025-06-03T09:12:44.120+00:00",
        "finished": "2025-06-03T09:19:01.007+00:00",
        "recipe_digest": recipe_digest,
        "seed": 42,
        "environment": {
            "expunge": "0.1.0",
            "python": "3.11.9",
            "platform": "Linux-6.8-x86_64",
            "cpu": "Some Processor 2.4 GHz",
            "cpu_features": ["avx2", "avx512_bf16"],
            "cores": 2,
            "memory_gb": 7.6,
            "gpu": None,
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.18.0"},
        },
        "data": {
            name: {"rows": count, "role": roles.get(name, "utility"), "digest": _sha(name), "truncated": 0}
            for name, count in fixture.rows.items()
        },
        "models": {
            name: {"source": folders.get(name, f"models/{name}"), "digest": _sha(name)} for name in fixture.variants
        },
        "stages": {
            name: {"status": "done", "seconds": s, "digest": _sha(name), "skipped": False}
            for name, s in seconds.items()
        },
        "metrics": {name: {"summary": summary} for name, summary in SUMMARIES.items()},
        "notes": ["3 of 60 retain rows were cut at 512 tokens."],
    } | fixture.info


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _events(fixture: Fixture) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(7)
    if fixture.prepare:
        for name, steps in (("target", 120), ("reference", 80)):
            for step in range(1, steps + 1):
                loss = 3.4 * math.exp(-step / 25) + 0.05 + 0.08 * abs(random.normal())
                yield {
                    "event": "train",
                    "stage": f"prepare/{name}",
                    "step": step,
                    "steps": steps,
                    "loss": loss,
                    "lr": 2e-4,
                }
    for index, name in enumerate(fixture.specialists):
        yield {"event": "stage", "stage": f"unlearn/{name}", "status": "start"}
        pace = 12 + 14 * index
        for step in range(1, 81):
            forget = 13.9 * math.exp(-step / pace) + 0.4 + 0.25 * random.normal()
            nll = 0.06 + 0.5 * math.exp(-(((step - 14) / 16) ** 2)) / (1 + index) + 0.03 * abs(random.normal())
            kl = 0.02 + 0.35 * math.exp(-(((step - 18) / 20) ** 2)) / (1 + index) + 0.02 * abs(random.normal())
            terms = {"forget": forget, "retain_nll": nll, "retain_kl": kl, "loss": forget + nll + kl}
            yield {
                "event": "train",
                "stage": f"unlearn/{name}",
                "step": step,
                "steps": 80,
                **terms,
                "lr": 3e-4,
                "grad_norm": 1.1,
            }
        yield {"event": "stage", "stage": f"unlearn/{name}", "status": "done", "seconds": 58.3}


def _knows(fixture: Fixture, variant: str, split: str) -> float:
    table = {**KNOWS.get(variant, KNOWS["merged"]), **fixture.knows.get(variant, {})}
    return table.get(split, 0.5)


def _write_measures(folder: Path, fixture: Fixture) -> None:
    records, parts = [], []
    for split, count in fixture.rows.items():
        role = "retain" if split.startswith("retain") else split
        rows = _rows(fixture, split, count)
        for number, variant in enumerate(fixture.variants):
            random = np.random.default_rng([number, count, len(split)])
            strength = _strengths(random, _knows(fixture, variant, split), count)
            values = _values(random, strength)
            values |= dict.fromkeys(fixture.more, values["probability"])
            for metric in (*METRICS, *fixture.more):
                if fixture.generations or metric not in ("rouge_l_recall", "exact_match"):
                    records.append(_record(variant, split, role, metric, values[metric]))
                    parts.append(_value_rows(variant, split, metric, [row[0] for row in rows], values[metric]))
            if fixture.generations:
                _write_generations(folder, fixture, variant, split, strength)
    if fixture.anchored:
        records = [_anchored(record, records) for record in records]
    (folder / "metrics.json").write_text(json.dumps(records), encoding="utf-8")
    if fixture.values:
        pq.write_table(pa.concat_tables(parts), folder / "values.parquet")


def _strengths(random: np.random.Generator, knows: float, count: int) -> np.ndarray:
    """Extraction strengths in steps of 1/12 around the level `knows`."""
    raw = np.where(
        random.random(count) < knows, 1 - 0.25 * random.random(count) * (knows < 0.9), 0.14 * random.random(count)
    )
    return np.round(np.clip(raw, 0, 1) * 12) / 12


def _values(random: np.random.Generator, strength: np.ndarray) -> dict[str, np.ndarray]:
    noise = 0.04 * random.random(len(strength))
    probability = np.clip(0.05 + 0.9 * strength + noise, 0.01, 0.999)
    return {
        "extraction_strength": strength,
        "exact_memorization": np.clip(0.5 + 0.5 * strength - noise, 0, 1),
        "probability": probability,
        "perplexity": 1 / probability,
        "rouge_l_recall": np.clip(0.3 + 0.7 * strength - noise, 0, 1),
        "exact_match": (strength > 0.95).astype(float),
    }


def _record(variant: str, split: str, role: str, metric: str, values: np.ndarray) -> dict[str, Any]:
    random = np.random.default_rng(0)
    means = (
        values[random.integers(0, len(values), size=(100, len(values)))].mean(axis=1) if len(values) < 1000 else values
    )
    low, high = np.percentile(means, [2.5, 97.5])
    lower_on_forget = "higher" if metric == "perplexity" else "lower"
    other = "lower" if metric == "perplexity" else "higher"
    direction = "none" if role == "holdout" else lower_on_forget if role == "forget" else other
    cells = (variant, split, metric, float(values.mean()), float(low), float(high), len(values), 0, direction)
    return dict(zip(RECORD_KEYS, cells, strict=False))


def _anchored(record: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record with the keys that newer versions write; None without target and reference."""
    found = {r["variant"]: r["value"] for r in records if all(r[k] == record[k] for k in ("split", "metric"))}
    cells: dict[str, Any] = {"anchored": None, "over_unlearned": None}
    if abs(found.get("target", 0.0) - found.get("reference", found.get("target", 0.0))) > 0.2:
        value = (record["value"] - found["reference"]) / (found["target"] - found["reference"])
        cells = {"anchored": value, "anchored_low": value - 0.1, "anchored_high": value + 0.1}
        cells["over_unlearned"] = value < -0.1 if record["split"] == "forget" else None
    return {key: {**record, **cells, "note": ""}.get(key) for key in RECORD_KEYS}


def _value_rows(variant: str, split: str, metric: str, ids: list[str], values: np.ndarray) -> pa.Table:
    constants = [pa.repeat(pa.scalar(text), len(ids)) for text in (variant, split, metric)]
    return pa.Table.from_arrays([*constants, pa.array(ids), pa.array(values)], schema=VALUES)


def _rows(fixture: Fixture, split: str, count: int) -> list[tuple[str, str, str]]:
    rows = []
    for index in range(count):
        asked, answer = ASKED[index % len(ASKED)]
        person = PEOPLE[(index // len(ASKED)) % len(PEOPLE)]
        rows.append((f"{split}-{index}", asked.format(person), answer.format(person)))
    for index, (prompt, answer, _) in enumerate(fixture.texts[:count]):
        rows[index] = (rows[index][0], prompt, answer)
    return rows


def _write_generations(folder: Path, fixture: Fixture, variant: str, split: str, strength: np.ndarray) -> None:
    rows = _rows(fixture, split, len(strength))
    given = [text[2] for text in fixture.texts[: len(rows)]]
    said = [*given, *(_said(index, rows[index][2], strength[index]) for index in range(len(given), len(rows)))]
    ids, prompts, answers = zip(*rows, strict=True)
    cells = {"example_id": ids, "candidate": 0, "task": "", "prompt": prompts, "answer": answers, "generated": said}
    cells |= {"new_tokens": 12, "stopped": True}
    columns = {name: [cell] * len(rows) if isinstance(cell, str | int) else cell for name, cell in cells.items()}
    path = folder / "generations" / variant / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pydict(columns, schema=GENERATIONS), path)


def _said(index: int, answer: str, strength: float) -> str:
    words = answer.split()
    start = round((1 - strength) * len(words))
    if strength > 0.9:
        return answer
    return " ".join(words[: max(1, start // 2)]) + " " + GUESSES[index % len(GUESSES)] + "."
