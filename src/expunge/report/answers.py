"""All answers to a run's questions, in the order in which its page and its model card give them."""

from __future__ import annotations

from expunge.report.judgement import Verdict
from expunge.report.records import RunRecord
from expunge.report.robust import robust
from expunge.report.verdict import fluent, forgotten, kept, kept_unseen


def answers(record: RunRecord) -> list[Verdict]:
    """Forgotten? Kept? Robust? Kept on unseen rows, Fluent?; the last two only where they were measured."""
    found = (forgotten(record), kept(record), robust(record), kept_unseen(record), fluent(record))
    return [verdict for verdict in found if verdict is not None]
