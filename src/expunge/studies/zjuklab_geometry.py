"""Where the specialists of `zjuklab` lie in the space of weights: angles of their trainings' phases, and each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.studies.zjuklab_record import Group, Turn

if TYPE_CHECKING:
    from expunge.studies.base import StudyOptions
    from expunge.studies.ground import Ground

#: Part of a tensor's elements that counts as large: what TIES keeps by default (arXiv:2306.01708).
KEPT = 0.2


def turns(
    ground: Ground,
    options: StudyOptions,
    snapshots: Mapping[str, Mapping[int, Path]],
    inflections: Mapping[str, int],
) -> list[Turn]:
    """The angles of every specialist's phases; `snapshots`: specialist → step → adapter, `inflections`: → step.

    The inflection is the last kept step up to the given one. Angles of A and B need the adapter of step 0.
    """
    from expunge.merging.perspective import angles, factor_angles

    base = _base(ground)
    found = []
    for name, kept in snapshots.items():
        later = sorted(step for step in kept if step > 0)
        if name not in inflections or len(later) < 2:
            continue
        last = later[-1]
        turn = max((step for step in later[:-1] if step <= inflections[name]), default=later[0])
        between = angles(kept[turn], kept[last], base=base)
        factors = factor_angles(kept[turn], kept[last], kept[0], base) if 0 in kept else {}
        ground.stages.reporter.line(f"    angles/{name}: {between['first_later']:.1f}° at step {turn}")
        found.append(Turn(name, turn, last, **between, factors=factors))
    return found


def groups(ground: Ground, over: Path, under: Path, base: Path) -> list[Group]:
    """The specialists' task vectors compared module by module."""
    from expunge.merging.inputs import open_inputs
    from expunge.merging.perspective import compare

    opened = open_inputs([over, under], base)
    try:
        whole = sum(info.numel for info in opened.tensors().values() if info.merges)
        with ground.stages.reporter.bar("compare task vectors", whole) as tick:
            compared = compare(opened, KEPT, advance=tick)
    finally:
        opened.close()
    return [
        Group(one.layer, one.module, one.norms, one.cosine, one.overlap, one.conflict, one.rank, one.conflict_kept)
        for one in compared
    ]


def factor_cosine(over: Path, under: Path, base: Path) -> float:
    """Cosine between the published merge of LoRA's factors and the same merge of the weights."""
    from dataclasses import replace

    from expunge.merging.inputs import open_inputs
    from expunge.merging.merger import Merger
    from expunge.merging.perspective import cosine
    from expunge.studies.zjuklab_merges import PUBLISHED

    opened = open_inputs([over, under], base)
    try:
        factors, weights = (Merger(opened, replace(PUBLISHED, scope=scope).plan()) for scope in ("factor", "tensor"))
        for merger in (factors, weights):
            merger.prepare()
        return cosine(factors, weights)
    finally:
        opened.close()


def _base(ground: Ground) -> Path:
    """The folder of the target, on which the specialists were trained."""
    from expunge.merging.inputs import resolve

    return resolve(ground.variants["target"].config.id)
