"""The model card (README.md) of a result: counts, digests and evidence, never a word of what was forgotten."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from expunge.report.answers import answers
from expunge.report.judgement import Verdict
from expunge.report.provenance import in_words, notes, repeat_command, short
from expunge.report.records import RunRecord, mapping, read_run
from expunge.report.tables import ARROWS, main_columns, variant_label, variant_note
from expunge.report.text import clean, grouped, human, interval, number, percent
from expunge.report.verdict import forgotten, kept, outcome

# Aliases have no meaning on a hub; this is what they stand for.
_HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(run: Path) -> str:
    """The README.md of a run's result: YAML front matter for a hub, then Markdown. Raises UserError without a run."""
    record = read_run(run)
    parts = [
        _front_matter(record),
        f"# {_cell(record.name)}: a model after unlearning",
        outcome(record, forgotten(record), kept(record)),
        "**Evidence of tests, not proof of deletion**: the numbers below say what these tests could still draw out.",
        "## What was removed",
        _removed(record),
        "## Verdicts",
        "\n".join(map(_verdict, answers(record))),
        "## Evidence",
        _evidence(record),
        "## How it was made",
        _recipe(record),
        "## Limits",
        _limits(record),
        "## Reproduce",
        f"```sh\n{repeat_command()}\n```",
        "The resolved recipe, the environment and all digests stand in the run directory that this model came from"
        + (
            f" (recipe sha256 `{short(record.info.get('recipe_digest'))}`)."
            if record.info.get("recipe_digest")
            else "."
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(record: RunRecord) -> str:
    # whoever publishes the model knows its licence; nothing here may guess it
    fields: dict[str, object] = {"license": "unknown"}
    base = _base_model(record)
    if base:
        fields["base_model"] = base
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    methods = list(dict.fromkeys(entry.method for entry in record.recipe.unlearn)) if record.recipe else []
    fields["tags"] = ["expunge", "machine-unlearning", *methods]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _base_model(record: RunRecord) -> str | None:
    """A hub id if the model came from a hub; a folder on someone's disk is none of the reader's business."""
    if record.recipe is None:
        return None
    name = record.recipe.model.id
    name = _HUB_IDS.get(name, name)
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _removed(record: RunRecord) -> str:
    rows = []
    for name, part in mapping(record.info.get("data")).items():
        part = mapping(part)
        count = grouped(part["rows"]) if isinstance(part.get("rows"), int) else "–"
        use = {"forget": "to be forgotten", "retain": "to be kept"}.get(record.role(name), "evaluated only")
        rows.append(f"| {_cell(human(name))} | {use} | {count} | `{_cell(str(part.get('digest') or '–'))}` |")
    if not rows:
        return "The record of this run does not say how many rows it was given."
    head = "| Rows | Use | Count | sha256 |\n|---|---|---:|---|\n"
    return head + "\n".join(rows) + "\n\nThe rows themselves are not part of this card, on purpose."


def _verdict(verdict: Verdict) -> str:
    answer = verdict.question if verdict.informs else f"{verdict.question} {verdict.answer.capitalize()}"
    value = f" {verdict.estimate()} {verdict.measured}." if verdict.value is not None else ""
    return f"- **{answer}**{':' if verdict.informs else '.'}{value} {verdict.rule}"


def _evidence(record: RunRecord) -> str:
    columns = main_columns(record)
    if not columns:
        return "Nothing was measured."
    directions = {(m.split, m.metric): ARROWS.get(m.direction, "") for m in record.measures}
    heads = [
        f"{human(metric)}, {human(split).lower()} {directions[split, metric]}".rstrip() for split, metric in columns
    ]
    lines = [f"| Model | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for variant in record.variants:
        cells = []
        for split, metric in columns:
            measure = record.get(variant, split, metric)
            shown = interval(measure.ci_low, measure.ci_high) if measure else ""
            cells.append(f"{number(measure.value)}{f' ({shown})' if shown else ''}" if measure else "–")
        note = variant_note(record, variant)
        label = _cell(variant_label(record, variant) + (f" ({note})" if note else ""))
        lines.append(f"| {f'**{label}**' if variant == record.result else label} | {' | '.join(cells)} |")
    return (
        "\n".join(lines) + "\n\nIn parentheses: 95% intervals from drawing rows anew. Arrows show the better direction."
    )


def _recipe(record: RunRecord) -> str:
    lines = [(name, words) for name, words in in_words(record) if name not in ("Model", "Data")]
    base = _base_model(record)
    start = [f"- Base model: {base or 'a local model'}"] if record.recipe else []
    noted = [f"- Noted: {_cell(note)}" for note in notes(record) if note.startswith("unlearn/")]
    return "\n".join([*start, *(f"- {name}: {_cell(words)}" for name, words in lines), *noted])


def _limits(record: RunRecord) -> str:
    said = [
        "Knowledge was looked for with the wording that was trained on, greedily. Other wordings, sampling, hints, "
        "further training or quantization may bring back what seems gone.",
        f"One run with seed {record.seed}; the intervals do not cover other seeds.",
        "The model may be worse at things that nobody measured here, and is fit for no use that its base is unfit for.",
    ]
    if record.reference is None:
        said.append("No reference model was available: how much can be guessed without having learnt it is unknown.")
    limit = percent(record.thresholds.retain_kept)
    said.append(
        f"The thresholds ({number(record.thresholds.forget_extraction)} forget, {limit} kept) were set in the recipe."
    )
    return "\n".join(f"- {words}" for words in said)


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell or a line, nor become markup."""
    flat = re.sub(r"\s+", " ", clean(text))
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", flat)
