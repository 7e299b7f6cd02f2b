"""Where the specialists of `zjuklab` lie: phases of a training, and the two task vectors, from folders."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expunge.studies import zjuklab_geometry as geometry
from expunge.studies.zjuklab_record import OVER, UNDER
from merging_models import adapter, llama, rewrite, save
from zjuklab_found import MODULES


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters of steps 0, 4, 8 and 12 of a training that goes one way and then another."""
    folder = tmp_path_factory.mktemp("kept")
    save(llama(0), folder / "base")
    for step in (0, 4, 8, 12):
        adapter(llama(0), folder / str(step), 3, str(folder / "base"))

    def moved_to(step: int, early: float, late: float) -> None:
        def change(tensors: dict[str, Any]) -> None:
            for number, (name, tensor) in enumerate(tensors.items()):
                tensor.mul_(early if ".lora_B" in name and number % 4 < 2 else late if ".lora_B" in name else 1.0)

        rewrite(folder / str(step), change)

    for step, place in {0: (0.0, 0.0), 4: (1.0, 0.0), 8: (1.0, 0.0), 12: (1.0, 1.0)}.items():
        moved_to(step, *place)
    return folder


def ground_on(base: Path) -> Any:
    """A ground whose target is that folder."""
    lines: list[str] = []
    bar = nullcontext(lambda count=1, note="": None)
    reporter = SimpleNamespace(line=lines.append, bar=lambda label, total: bar)
    target = SimpleNamespace(config=SimpleNamespace(id=str(base)))
    return SimpleNamespace(stages=SimpleNamespace(reporter=reporter), variants={"target": target}, lines=lines)


@pytest.mark.parametrize(("inflection", "step"), [(4, 4), (7, 4), (8, 8), (99, 8), (1, 4)])
def test_turns_part_a_training_at_a_kept_step(kept: Path, inflection: int, step: int) -> None:
    ground = ground_on(kept / "base")
    snapshots = {OVER: {at: kept / str(at) for at in (0, 4, 8, 12)}, UNDER: {12: kept / "12"}}
    (turn,) = geometry.turns(ground, None, snapshots, {OVER: inflection, UNDER: 3})
    assert (turn.specialist, turn.inflection, turn.last) == (OVER, step, 12)
    # the two phases change different parameters: they are at right angles, and the whole lies between
    assert turn.first_later == pytest.approx(90, abs=1e-3)
    assert turn.first_whole + turn.later_whole == pytest.approx(90, abs=1e-3)
    assert turn.factors["first_later"] == pytest.approx(90, abs=1e-3)
    assert len(ground.lines) == 1


def test_without_a_beginning_there_are_no_angles_of_factors(kept: Path) -> None:
    snapshots = {OVER: {at: kept / str(at) for at in (4, 12)}}
    (turn,) = geometry.turns(ground_on(kept / "base"), None, snapshots, {OVER: 4})
    assert turn.factors == {}


def test_groups_and_the_cosine_of_factors_come_from_the_folders(kept: Path) -> None:
    made = geometry.groups(ground_on(kept / "base"), kept / "12", kept / "12", kept / "base")
    assert {(one.layer, one.module) for one in made} == set(itertools.product((0, 1), MODULES))
    for one in made:
        assert (one.cosine, one.overlap, one.conflict) == pytest.approx((1, 1, 0), abs=1e-9)
        assert 1 <= one.rank[0] <= 4
        assert one.rank[0] == one.rank[1]
    # of a model and itself both merges keep 80%: of the product here, of its factors there
    assert 0.8 < geometry.factor_cosine(kept / "12", kept / "12", kept / "base") < 1
