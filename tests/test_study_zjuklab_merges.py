"""The merge table of the study `zjuklab`: what it holds, that a row is the merge it says, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expunge.errors import UserError
from expunge.merging.registry import MERGES
from expunge.merging.run import merge_models
from expunge.models.tiny import build_tiny, write_tiny
from expunge.pipeline.progress import Reporter
from expunge.pipeline.resolve import resolve
from expunge.pipeline.semeval import Official
from expunge.pipeline.stages import Variant, model_digest
from expunge.recipe import ModelConfig, load_recipe
from expunge.runs.store import RunDirectory
from expunge.studies import zjuklab_merges
from expunge.studies.base import STUDIES, build_options
from expunge.studies.zjuklab_merges import PEFT, PUBLISHED, merge_table, planned, settings
from expunge.studies.zjuklab_record import OVER, UNDER, Scores, Specialist
from expunge.studies.zjuklab_scores import Pace
from merging_models import adapter

pytestmark = pytest.mark.usefixtures("quick_disk")


def options(**given: Any) -> Any:
    chosen = {"model": "tiny", "methods": "linear,ties", "densities": "0.5", "trials": "0", "limit": "1"}
    return build_options(STUDIES.get("zjuklab"), {**chosen, **given})


# ---------------------------------------------------------------- what the table holds


def test_every_method_stands_at_both_norms_and_as_peft_has_it() -> None:
    methods = ["linear", "slerp", "ties", "dare_ties"]
    table = settings(options(methods=",".join(methods), densities="0.6,0.8"))
    assert table[0] == PUBLISHED
    assert len({made.name for made in table}) == len(table) == planned(options(methods=methods, densities=(0.6, 0.8)))
    expected = {
        (method, density, scope, match)
        for method in methods
        for density in ((0.6, 0.8) if method in ("ties", "dare_ties") else (1.0,))
        for scope in ("tensor", "factor")
        for match in ("none", "tensor")
        if scope == "tensor" or method in PEFT
    }
    assert {(made.method, made.density, made.scope, made.scale_match) for made in table} == expected
    assert all((made.own == PEFT[made.method]) == (made.scope == "factor") for made in table if made.method in PEFT)
    assert planned(options(trials="3")) == planned(options()) + 1


@pytest.mark.parametrize(
    ("method", "sentence"), [("tie", "unknown merge method"), ("linear", "merges at least 3 models")]
)
def test_methods_that_do_not_merge_two_models_are_refused(
    method: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method in MERGES:
        monkeypatch.setitem(MERGES._entries, method, replace(MERGES.get(method), models=(3, None)))
    with pytest.raises(UserError, match=sentence):
        planned(options(methods=method))


# ---------------------------------------------------------------- on adapters of a small model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Specialist]]:
    """A base, and two adapters on it."""
    folder = tmp_path_factory.mktemp("models")
    base = write_tiny(folder / "base")
    pair = []
    for name, seed in ((OVER, 1), (UNDER, 2)):
        adapter(build_tiny()[0], folder / name, seed, str(base), r=2, lora_alpha=2)
        pair.append(Specialist(name, 42, str(folder / name), 4, Scores({})))
    return base, pair


class Table:
    """A ground, as far as merges need one."""

    def __init__(self, folder: Path, base: Path) -> None:
        tree = {
            "model": str(base),
            "data": {"benchmark": "fictitious:40", "template": "raw", "max_length": 96},
            "unlearn": [{"name": "trial", "method": "npo"}],
            "evaluate": {"metrics": ["extraction_strength"], "generate": None, "bootstrap": 100},
        }
        self.recipe = load_recipe(tree)
        self.resolved = resolve(self.recipe)
        self.folder, self.late = folder, False
        self.target = Variant("target", ModelConfig(id=str(base)), model_digest(base))

    def official(self, **settings: Any) -> Official:
        seen = self.resolved
        given = {"limit": 1, "new_tokens": 4, "general": [], "max_length": 96, **settings}
        return Official(seen.splits, seen.rows, seen.tokenizer, seen.template, self.recipe.evaluate, **given)

    @contextmanager
    def ground(self) -> Iterator[Any]:
        with RunDirectory(self.folder, self.recipe) as directory:
            yield SimpleNamespace(
                directory=directory,
                stages=SimpleNamespace(reporter=Reporter(quiet=True)),
                resolved=self.resolved,
                whole=self.resolved,
                remarks=[],
                time_is_up=lambda: self.late,
            )


@pytest.fixture
def table(models: tuple[Path, list[Specialist]], tmp_path: Path) -> Table:
    return Table(tmp_path / "run", models[0])


def counted(official: Official) -> list[int]:
    """Grows whenever a model is scored."""
    calls: list[int] = []
    score: Callable[..., Any] = official.score

    def count(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return score(*given, **named)

    official.score = count  # type: ignore[method-assign]
    return calls


def test_each_row_is_scored_as_the_merge_on_disk(
    table: Table, models: tuple[Path, list[Specialist]], tmp_path: Path
) -> None:
    base, pair = models
    official, asked = table.official(), options()
    pace = Pace({"merge": planned(asked)})
    with table.ground() as ground:
        found = merge_table(ground, asked, official, pair, table.target, pace=pace)
    assert ground.remarks == []
    assert len({repr(merged.scores) for merged in found}) > 2, "the merges are different models"
    assert len(pace.seconds["merge"]) == len(found) == planned(asked)
    assert [dict(merged.settings).get("published") for merged in found].count(True) == 1
    for number, (merged, made) in enumerate(zip(found, settings(asked), strict=True)):
        out = tmp_path / f"merged{number}"
        written = merge_models(
            [one.path for one in pair], out, base=base, method=merged.method, weights=[1.0, 1.0],
            density=merged.density, parameters={**made.own, "scope": merged.scope, "scale_match": merged.scale_match},
        )  # fmt: skip
        assert merged.scores.values == official.score(ModelConfig(id=str(out))).values
        assert merged.norm == pytest.approx(written.statistics["merged_norm"])
        assert merged.mean_norm == pytest.approx(sum(written.statistics["delta_norms"]) / 2)
        assert merged.scores.answers, "samples stand beside the scores"
        assert not merged.searched
    matched = {(one.method, one.scope): one for one in found if one.scale_match == "tensor"}
    plain = {(one.method, one.scope): one for one in found if one.scale_match == "none"}
    assert plain["linear", "factor"].norm > 1.5 * plain["linear", "factor"].mean_norm, "PEFT's sum is no mean"
    for one in matched.values():  # per tensor, so that of the whole model lies close to it
        assert one.norm == pytest.approx(one.mean_norm, rel=0.05)


def test_a_table_goes_on_where_it_was(table: Table, models: tuple[Path, list[Specialist]]) -> None:
    pair, asked, official = models[1], options(methods="linear"), table.official()
    calls = counted(official)
    with table.ground() as ground:
        table.late = True
        assert merge_table(ground, asked, official, pair, table.target) == []
        table.late = False
        first = merge_table(ground, asked, official, pair, table.target)
    assert len(calls) == len(first) == planned(asked)
    with table.ground() as ground:
        again = merge_table(ground, asked, official, pair, table.target)
    assert (again, len(calls)) == (first, planned(asked))
    other = table.official(new_tokens=3)
    with table.ground() as ground:
        others = counted(other)
        merge_table(ground, asked, other, pair, table.target)
        swapped = [replace(pair[0], path=pair[1].path), replace(pair[1], path=pair[0].path)]
        merge_table(ground, asked, other, swapped, table.target)
    assert len(others) == 2 * planned(asked), "other questions or models are measured anew"


def test_seeds_are_merged_apart_and_a_lone_specialist_not_at_all(
    table: Table, models: tuple[Path, list[Specialist]]
) -> None:
    pair, asked = models[1], options(methods="linear")
    several = [*pair, *(replace(one, seed=43) for one in pair), replace(pair[0], seed=44)]
    with table.ground() as ground:
        found = merge_table(ground, asked, table.official(), several, table.target)
    assert [merged.seed for merged in found] == [42] * planned(asked) + [43] * planned(asked)


def test_a_merge_that_can_not_be_made_is_left_out(
    table: Table, models: tuple[Path, list[Specialist]], tmp_path: Path
) -> None:
    base, pair = models
    adapter(build_tiny()[0], tmp_path / "other", 5, str(base), r=3, lora_alpha=3)
    with table.ground() as ground:
        unlike = [pair[0], replace(pair[1], path=str(tmp_path / "other"))]
        found = merge_table(ground, options(), table.official(), unlike, table.target)
    assert {merged.scope for merged in found} == {"tensor"}
    assert len(ground.remarks) == planned(options()) - len(found)
    assert all("equal ranks" in remark for remark in ground.remarks)


def test_the_searched_merge_comes_last_and_goes_on(
    table: Table, models: tuple[Path, list[Specialist]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zjuklab_merges, "KEPT", "retain:probability")  # of a model that was taught nothing
    pair, asked, official = models[1], options(methods="linear", trials="1", keep=0.1), table.official()
    calls = counted(official)
    with table.ground() as ground:
        found = merge_table(ground, asked, official, pair, table.target)
    assert all(remark.startswith("Search of seed 42: ") for remark in ground.remarks)
    assert "rows of the membership score" in ground.remarks[-1], "fictitious has no rows but those of the score"
    *others, searched = found
    assert searched.searched
    assert not any(merged.searched for merged in others)
    assert (searched.scope, searched.scale_match) == ("tensor", "none")
    assert searched.settings["tried"] >= 4  # type: ignore[operator]
    assert (table.folder / "merges" / "seed42" / "searched" / "search" / "search.json").is_file()
    with table.ground() as ground:
        assert merge_table(ground, asked, official, pair, table.target) == found
    assert len(calls) == planned(asked)


def test_nothing_is_searched_where_there_is_nothing_to_keep(
    table: Table, models: tuple[Path, list[Specialist]]
) -> None:
    asked = options(methods="linear", trials="1")
    with table.ground() as ground:
        found = merge_table(ground, asked, table.official(), models[1], table.target)
    assert len(found) == planned(asked) - 1
    assert ["nothing to keep" in remark for remark in ground.remarks] == [True]
