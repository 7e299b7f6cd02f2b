"""The audit of metrics: every attack on every checkpoint of a zoo, and what each metric said before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.attacks.base import Attack
from expunge.errors import UserError
from expunge.metrics.audit import FEWEST, AttackPointOf, Lookup, Reading, Trust, Zoo, reading, trust
from expunge.metrics.base import METRICS, Resampling
from expunge.pipeline.attack import attack_models
from expunge.pipeline.attack_summary import MODEL, REFERENCE, TARGET
from expunge.pipeline.attacked import FORGET
from expunge.pipeline.progress import Reporter
from expunge.recipe import DataConfig, EvaluateConfig, ModelConfig
from expunge.report.attack_record import AttackRecord
from expunge.report.audit_page import Findings, audit_document
from expunge.report.document import AUDIT, Document
from expunge.runs.atomic import write_json

#: Folder of the attacks inside an audit's.
ATTACKS = "attacks"
#: An unlearned model counts towards robustness if it keeps this part of the target's strength on the retain rows.
USABLE = 0.8
_RETAIN = "retain"
_MAIN = "extraction_strength"


@dataclass(frozen=True)
class Members:
    """The checkpoints of a zoo by name: unlearned ones, and further ones that hold, or never held, the knowledge."""

    unlearned: Mapping[str, ModelConfig]
    target: ModelConfig
    reference: ModelConfig
    knowing: Mapping[str, ModelConfig]
    lacking: Mapping[str, ModelConfig]

    def subjects(self) -> dict[str, ModelConfig]:
        """All of them as subjects of attacks; the first unlearned one is called `model` there."""
        first, *others = self.unlearned
        named = {MODEL: self.unlearned[first], TARGET: self.target, REFERENCE: self.reference}
        return named | {name: self.unlearned[name] for name in others} | dict(self.knowing) | dict(self.lacking)

    def zoo(self) -> Zoo:
        """Names by part."""
        return Zoo(tuple(self.unlearned), (TARGET, *self.knowing), (REFERENCE, *self.lacking))

    def check(self) -> None:
        """Raises UserError for too few checkpoints, and for names that stand for two of them."""
        count = len(self.subjects())
        if count < FEWEST:
            raise UserError(
                f"{count} checkpoints have no order to be kept; an audit needs at least {FEWEST}",
                "give more unlearned checkpoints, of several methods and strengths",
            )
        names = [*self.unlearned, *self.knowing, *self.lacking]
        for name in names:
            if names.count(name) > 1 or name in (MODEL, TARGET, REFERENCE):
                raise UserError(f"two checkpoints are called '{name}'", "name them apart: NAME=FOLDER")


def audit_metrics(
    members: Members,
    data: DataConfig,
    attacks: Sequence[Attack],
    config: EvaluateConfig,
    seed: int,
    output: Path,
    reporter: Reporter,
    *,
    limit: int | None = None,
) -> Document:
    """Attack every checkpoint, compare each metric before and after, and write audit.json. Raises UserError."""
    members.check()
    record = attack_models(members.subjects(), data, attacks, config, seed, output / ATTACKS, reporter, limit=limit)
    found = findings(record, members.zoo(), Resampling(config.bootstrap, seed))
    document = audit_document(found)
    write_json(output / AUDIT, document.to_json())
    return document


def findings(record: AttackRecord, zoo: Zoo, resampling: Resampling) -> Findings:
    """Readings of every metric under every point, and its standing, from a record of attacks on a zoo."""
    value = _lookup(record, zoo)
    points = [
        AttackPointOf(result.name, result.kind, point.label, point.informative is not False)
        for result in record.attacks
        for point in result.points
    ]
    readings: list[Reading] = []
    standing: list[Trust] = []
    target = value(_MAIN, TARGET, _RETAIN)

    def usable(name: str) -> bool:
        kept = value(_MAIN, name, _RETAIN)
        return target is None or kept is None or kept >= USABLE * target

    for name in _measured(record):
        entry = METRICS.get(name)
        mine = [reading(entry, FORGET, point, zoo, value, resampling) for point in points]
        found = [one for one in mine if one is not None]
        if not found:
            continue
        readings += found
        standing.append(trust(entry, FORGET, found, zoo, value, usable))
        if _RETAIN in record.splits:
            kept = [reading(entry, _RETAIN, point, zoo, value, resampling) for point in points]
            readings += [one for one in kept if one is not None]
    strengths = {name: (value(_MAIN, name, FORGET), value(_MAIN, name, _RETAIN)) for name in zoo.names}
    left_out = {" ".join(filter(None, (e.attack, e.point, e.subject))): e.reason for e in record.left_out}
    return Findings(tuple(readings), tuple(standing), zoo, strengths, tuple(points), left_out, record.seed, USABLE)


def _lookup(record: AttackRecord, zoo: Zoo) -> Lookup:
    """Values by metric, variant and split; the subject `model` goes by its own name."""
    records = [*record.records, *(row for result in record.attacks for p in result.points for row in p.records)]
    found: dict[tuple[str, str, str], Any] = {}
    for row in records:
        subject, attacked, rest = row["variant"].partition("~")
        subject = zoo.unlearned[0] if subject == MODEL else subject
        found[row["metric"], subject + attacked + rest, row["split"]] = row["value"]
    return lambda metric, variant, split: found.get((metric, variant, split))


def _measured(record: AttackRecord) -> list[str]:
    """Metrics of the forget rows, in the registry's order."""
    names = {row["metric"] for row in record.records if row["split"] == FORGET}
    return [name for name in METRICS.names() if name in names]
