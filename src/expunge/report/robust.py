"""Robust?, for a run: from the attacks that lie in its folder attacks/."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from expunge.report.attack_page import attack_document, overall, rule
from expunge.report.attack_record import AttackRecord, holds_attack, read_attack
from expunge.report.document import Section
from expunge.report.judgement import Verdict
from expunge.report.records import RunRecord
from expunge.report.text import plural

FOLDER = "attacks"
QUESTION = "Robust?"


def attacks_on(record: RunRecord) -> list[AttackRecord]:
    """The attacks in `attacks/` of a run, or in the folders below it. Raises UserError for a broken record."""
    root = Path(record.path) / FOLDER
    folders = [root, *sorted(path for path in root.glob("*") if path.is_dir())] if root.is_dir() else []
    return [read_attack(folder) for folder in folders if holds_attack(folder)]


def robust(record: RunRecord) -> Verdict:
    """The verdict over all attacks on a run's result: no if any says no, yes if all say yes."""
    found = [overall(attack) for attack in attacks_on(record)]
    margin = record.thresholds.robust_margin
    if not found:
        remark = f"No attack was run. One is: {command(record)}"
        return Verdict(QUESTION, "not measured", None, None, None, margin, "margin", rule(margin), (remark,))
    order = {"no": 0, "not shown": 1, "no evidence": 2, "yes": 3}
    worst = min(found, key=lambda verdict: (order.get(verdict.answer, 1), -(verdict.value or 0.0)))
    if len(found) > 1:
        worst = replace(worst, remarks=(*worst.remarks, f"The least favourable of {plural(len(found), 'audit')}."))
    return worst


def command(record: RunRecord) -> str:
    """What to type to attack the result of a run, as far as it can be known from its record."""
    data = record.recipe.data if record.recipe is not None else None
    rows = f"--benchmark {data.benchmark}" if data is not None and data.benchmark else "--forget FILE --retain FILE"
    known = [name for name in ("target", "reference") if name in record.variants]
    models = "".join(f" --{name} {name.upper()}" for name in known)
    return f"expunge attack RUN/model{models} {rows} -o RUN/{FOLDER}"


def attack_sections(record: RunRecord) -> list[Section]:
    """What the page of a run shows of its attacks: every attack, and its curve."""
    sections = []
    for attack in attacks_on(record):
        each, *rest = attack_document(attack).sections
        curves = [section for section in rest if section.figures]
        lead = f"{rule(attack.robust_margin)} All points stand in the page of the attack itself."
        sections.append(each.model_copy(update={"title": "Under attack", "lead": lead}))
        sections += [section.model_copy(update={"title": "Attacks against their budget"}) for section in curves]
    return sections
