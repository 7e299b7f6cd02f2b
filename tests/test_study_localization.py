"""The study `localization`: options, the closed-form match, and whole runs on `tiny`, interrupted and repeated."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import expunge.studies.localizing.trials as trials
from expunge import api
from expunge.errors import UserError
from expunge.localize.masks import Mask, read_mask
from expunge.methods.base import build_objective
from expunge.models.drift import tensors_of
from expunge.models.quantization import linear_weights
from expunge.models.tiny import build_tiny
from expunge.pipeline.localize import MASK
from expunge.pipeline.progress import Reporter
from expunge.pipeline.training import fit, fit_further
from expunge.studies.base import STUDIES, build_options
from expunge.studies.localization import look_steps, region_rate, relearn_steps
from expunge.studies.localization_record import ORACLE, RANDOM, Found
from expunge.studies.localizing import matching, regions, run
from expunge.studies.localizing.cost import Clock
from merging_models import gpt2
from study_fixture import options_and_recipe
from training_jobs import TINY, job
from training_rows import rows

pytestmark = pytest.mark.usefixtures("quick_disk")

SMALL = ["prepare.train.epochs=4", "prepare.train.checkpoint_every=1000", "evaluate.bootstrap=100"]
GIVEN = {
    "benchmark": "fictitious:40",
    "density": "0.1",
    "regions": "oracle,random,gradient",
    "seeds": "1",
    "methods": "wga,rmu",
    "attributions": "gradient",
    "steps": "3",
    "looks": "2",
    "batch": "4",
    "inject_epochs": "2",
    "relearn": "2",
}


class Killed(BaseException):
    """As if the process had been."""


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("steps", "looks", "expected"),
    [(16, 5, [1, 4, 7, 11, 16]), (30, 5, [3, 8, 14, 21, 30]), (2, 5, [1, 2]), (7, 1, [7])],
)
def test_looks_are_closer_together_at_the_beginning(steps: int, looks: int, expected: list[int]) -> None:
    assert look_steps(steps, looks) == expected


@pytest.mark.parametrize(
    ("steps", "looks", "expected"), [(8, 2, [4, 8]), (8, 9, [1, 2, 4, 8]), (1, 3, [1]), (0, 2, [])]
)
def test_relearning_is_looked_at_after_its_half(steps: int, looks: int, expected: list[int]) -> None:
    assert relearn_steps(steps, looks) == expected


def test_a_larger_model_has_a_lower_rate() -> None:
    real = build_options(STUDIES.get("localization"), {"model": "some/model"})
    rates = [region_rate(real, size) for size in (10**8, 135_000_000, 7 * 10**9)]
    assert rates[:2] == [1e-3, 1e-3]
    assert rates[2] == pytest.approx(1e-3 * math.sqrt(1.35e8 / 7e9), rel=0.05)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"regions": "oracle,everywhere"}, "'everywhere' is none of oracle, random, gradient"),
        ({"density": "0.6"}, "--density"),
        ({"density": "0"}, "--density"),
        ({"steps": "1"}, "--steps"),
        ({"forget": "f.jsonl"}, "--retain"),
    ],
)
def test_options_that_can_not_be(given: dict[str, str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        build_options(STUDIES.get("localization"), {"model": "tiny", **given})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"attributions": "complement"}, "is a control"),
        ({"attributions": "layer_gradient_norm"}, "can't tell units of the kind value_vector apart"),
        ({"attributions": "gradeint"}, "unknown attribution"),
        ({"methods": "npo,ngo"}, "unknown method 'ngo'"),
        ({"methods": "rmu", "parameters": "rmu.layer=2"}, "layer 2 does not exist"),
        ({"methods": "wga", "parameters": "npo.beta=1"}, "not among those studied"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(given: dict[str, str], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        study(tmp_path / "out", **{"regions": "oracle", **given})
    assert not (tmp_path / "out").exists()


def test_regions_are_the_true_one_first() -> None:
    options, recipe = options_and_recipe("localization", attributions="wagle,gradient")
    assert (options.where, options.part, recipe.data.benchmark) == ((ORACLE, RANDOM, "wagle"), 0.25, "fictitious:80")
    options, recipe = options_and_recipe("localization", attributions="wagle,gradient", model="smollm2-135m")
    assert (options.part, recipe.data.benchmark) == (0.1, "fictitious")
    assert options.where == (ORACLE, RANDOM, "wagle", "gradient")
    options, _ = options_and_recipe("localization", regions="random,oracle")
    assert options.where == (ORACLE, RANDOM)


def test_what_is_taught() -> None:
    own = {"forget": "f.jsonl", "retain": "r.jsonl"}
    assert options_and_recipe("localization")[1].prepare is not None
    assert options_and_recipe("localization", **own)[1].prepare is not None
    assert options_and_recipe("localization", reference="tiny", **own)[1].prepare is None
    train = options_and_recipe("localization", steps="12", model="smollm2-135m")[1].unlearn[0].train
    assert (train.max_steps, train.weight_decay, train.precision) == (12, 0.0, "bfloat16")


def test_an_estimate_comes_before_the_first_piece(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock({"training": 4, "injection": 1, "control": 0}, Reporter(console=Console(width=200)))
    clock.begin({"training": 30.0, "injection": 60.0})
    assert clock.left == 4 * 30 + 60
    clock.done("injection", 120.0)  # twice as long as was guessed: so are the others
    assert clock.left == 4 * 60
    for seconds in (10.0, 20.0):
        clock.done("training", seconds)
    assert clock.left == 2 * 15
    assert clock.progress == {"training": (4, 2), "injection": (1, 1)}
    said = capsys.readouterr().out
    assert "4 trainings, 1 injection: about 3 min" in said
    assert "[1/5] about 4 min" in said


# ---------------------------------------------------------------- the match in closed form

ROWS = rows(6, seed=3)


def tiny() -> Any:
    """The model alone."""
    return build_tiny()[0]


def random_mask(model: Any, kind: str, chosen: Callable[[int], bool]) -> Mask:
    """A mask of the value vectors whose place in their matrix is chosen; `kind`: the last matrix of an MLP."""
    inside = {}
    for name, linear in linear_weights(model).items():
        if kind in name:
            bits = torch.tensor([chosen(i) for i in range(linear.oriented(linear.weight).shape[1])])
            inside[name] = linear.oriented(bits[None, :])
    return Mask(inside)


@pytest.mark.parametrize(("free", "held"), [(5, 3), (1, 1), (12, 4)])
def test_the_match_is_the_least_squares_solution(free: int, held: int) -> None:
    generator = torch.Generator().manual_seed(free)
    inputs = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    order = torch.randperm(16, generator=generator)
    own, lacking = order[:free], order[free : free + held]
    difference = torch.randn(7, held, generator=generator, dtype=torch.float64)
    fit_ = matching.solve(difference, inputs.T @ inputs, lacking, own, 1e-2)
    # the same as rows of zeros that pull the change to 0: an ordinary least-squares problem
    weight = (1e-2 * inputs[:, own].square().sum(0).mean()) ** 0.5
    wide = torch.cat([inputs[:, own], weight * torch.eye(free, dtype=torch.float64)])
    goal = torch.cat([inputs[:, lacking] @ difference.T, torch.zeros(free, 7, dtype=torch.float64)])
    expected = torch.linalg.lstsq(wide, goal).solution.T
    torch.testing.assert_close(fit_.change.double(), expected, atol=1e-6, rtol=1e-5)
    rest = inputs[:, lacking] @ difference.T - inputs[:, own] @ expected.T
    assert fit_.before == pytest.approx(float((inputs[:, lacking] @ difference.T).square().sum()))
    assert fit_.after == pytest.approx(float(rest.square().sum()))


def test_nothing_can_be_matched_without_free_columns_or_with_columns_that_were_never_used() -> None:
    moments = torch.diag(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    nothing, held = torch.zeros(0, dtype=torch.int64), torch.tensor([0])
    for own in (nothing, torch.tensor([1, 2])):
        found = matching.solve(torch.ones(4, 1), moments, held, own, 1e-4)
        assert found.change.shape == (4, len(own))
        assert not found.change.any()
        assert found.before == found.after == 8.0


@pytest.mark.parametrize(("build", "kind"), [(tiny, "down_proj"), (gpt2, "mlp.c_proj")])
def test_a_region_is_matched_and_given_back(build: Callable[[], Any], kind: str) -> None:
    reference, injected = build(), build()
    some = [replace(row, input_ids=row.input_ids % reference.config.vocab_size) for row in ROWS]
    truth, other = (random_mask(reference, kind, set(range(start, 999, 4)).__contains__) for start in (0, 1))
    held, elsewhere = matching.columns(truth), matching.columns(other)
    linear = linear_weights(injected)
    with torch.no_grad():
        for name, own in held.items():
            matrix = linear[name].oriented(linear[name].weight)
            matrix[:, own] += 0.05 * torch.randn(len(matrix), len(own), generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in injected.state_dict().items()}
    known = matching.union(held, elsewhere)
    moments = matching.second_moments(reference, some, known, 2, lambda count: None)
    for name, value in matching.second_moments(injected, some, known, 4, lambda count: None).items():
        moments[name] += value
    wanted, residuals = matching.take(reference, held), {}
    for region, own in ((ORACLE, held), (RANDOM, elsewhere)):
        with matching.matched(injected, wanted, moments, known, held, own, 1e-9) as moved:
            residuals[region] = moved.residual
            changed = {name for name, tensor in injected.state_dict().items() if not tensor.equal(before[name])}
            assert {name for name in changed if name in held} == set(held)
            if region == ORACLE:
                for name, tensor in reference.state_dict().items():
                    torch.testing.assert_close(injected.state_dict()[name], tensor, atol=2e-3, rtol=0)
        assert all(tensor.equal(before[name]) for name, tensor in injected.state_dict().items())
    assert residuals[ORACLE] < 1e-3
    assert residuals[ORACLE] < residuals[RANDOM] < 1


def test_second_moments_are_those_of_the_inputs() -> None:
    model = build_tiny()[0]
    chosen = {name: torch.tensor([3, 1, 200]) for name in linear_weights(model) if "down_proj" in name}
    found = matching.second_moments(model, ROWS, chosen, 4, lambda count: None)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in chosen}
    for name, linear in linear_weights(model).items():
        if name in chosen:
            linear.module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
    with torch.no_grad():
        for row in ROWS:  # one by one: without padding
            model(input_ids=torch.tensor([list(row.input_ids)]))
    for name, own in chosen.items():
        inputs = torch.cat(seen[name])[:, own].double()
        torch.testing.assert_close(found[name], inputs.T @ inputs, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- pieces


def test_where_an_update_landed() -> None:
    before, after = build_tiny()[0], build_tiny()[0]
    region = random_mask(before, "down_proj", lambda i: i % 2 == 0)
    truth = random_mask(before, "down_proj", lambda i: i % 4 == 0)
    with torch.no_grad():
        for name, linear in linear_weights(after).items():
            if name in region.inside:
                linear.weight[:, 0::4] += 0.3
                linear.weight[:, 2::4] += 0.1
    inside, norm = trials.landed(tensors_of(before), after, region, truth)
    assert inside == pytest.approx(9 / 10)
    squares = [
        (float((linear.weight - linear_weights(before)[name].weight)[:, ::2].detach().square().sum()),
         float(linear_weights(before)[name].weight[:, ::2].detach().square().sum()))
        for name, linear in linear_weights(after).items()
        if name in region.inside
    ]  # fmt: skip
    assert norm == pytest.approx((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5, rel=1e-4)
    assert trials.landed(tensors_of(before), before, region, truth) == (None, None)


def test_relearning_in_memory_is_relearning_from_disk(tmp_path: Path) -> None:
    mask = random_mask(build_tiny()[0], "down_proj", lambda i: i % 5 == 0)
    first, again = job("wga", mask=mask), job(None)
    with fit(first, tmp_path / "first") as fitted:
        fitted.model.save_pretrained(tmp_path / "kept")
        fitted.tokenizer.save_pretrained(tmp_path / "kept")
        made = fit_further(again, fitted, tmp_path / "again")
        whole = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        assert all(parameter.requires_grad for parameter in made.model.parameters())
    with fit(replace(again, model=TINY.model_copy(update={"id": str(tmp_path / "kept")})), tmp_path / "other") as fresh:
        for name, tensor in fresh.model.state_dict().items():
            torch.testing.assert_close(whole[name], tensor)


def test_a_method_that_reads_below_a_region_can_not_unlearn_in_it() -> None:
    above = random_mask(build_tiny()[0], "layers.1.mlp.down_proj", lambda i: i % 3 == 0)
    made = trials.Trials(SimpleNamespace(), SimpleNamespace(relearn=0, relearn_looks=1), None, 1.0)  # type: ignore[arg-type]
    low = replace(job("rmu", mask=above), objective=build_objective("rmu", {"layer": 0}))
    said = made._unlearned(None, low, low, [], Path(), lambda *_: None)  # type: ignore[arg-type]
    assert "reads layer 0" in said["failed"]


# ---------------------------------------------------------------- whole studies


def study(folder: Path, **given: Any) -> Any:
    asked = {**GIVEN, **given}
    return api.study("localization", model="tiny", output=folder, overrides=SMALL, quiet=True, **asked)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Found]:
    folder = tmp_path_factory.mktemp("localization") / "out"
    with kept() as found:
        result = study(folder)
    return folder, result, found[0]


class kept:
    """Within it, what a study found is kept."""

    def __enter__(self) -> list[Found]:
        self.found: list[Found] = []
        self.before = run.Pieces.found

        def found(pieces: Any) -> Found:
            self.found.append(self.before(pieces))
            return self.found[-1]

        run.Pieces.found = found  # type: ignore[method-assign, assignment]
        return self.found

    def __exit__(self, *_: Any) -> None:
        run.Pieces.found = self.before  # type: ignore[method-assign]


def masks(folder: Path, seed: int = 42) -> dict[str, Mask]:
    return {place.name: read_mask(place / MASK) for place in (folder / "masks" / f"seed{seed}").iterdir()}


def test_the_regions_are_exact_and_the_random_one_is_disjoint(whole: tuple[Path, Any, Found]) -> None:
    folder, _, found = whole
    made = masks(folder)
    assert set(made) == {ORACLE, RANDOM, "gradient"}
    for mask in made.values():
        assert sum(int(bits.sum()) for bits in mask.inside.values()) == round(0.1 * 768) == found.injected[0].units
    assert found.pool == 768
    for name, bits in made[RANDOM].inside.items():
        assert not (bits & made[ORACLE].inside.get(name, torch.zeros_like(bits))).any()
    assert found.injected[0].weights == 77 * 128


def test_what_is_injected_is_inside_the_region(whole: tuple[Path, Any, Found]) -> None:
    folder, _, _ = whole
    reference, injected = (
        load_file(folder / place / "model.safetensors") for place in ("models/reference", "injected/seed42")
    )
    truth, changed = masks(folder)[ORACLE], 0
    for name, tensor in injected.items():
        differs = tensor != reference[name]
        inside = truth.inside.get(name)
        assert not (differs if inside is None else differs & ~inside).any()
        changed += int(differs.sum())
    assert changed > 0


def test_every_run_is_there(whole: tuple[Path, Any, Found]) -> None:
    folder, result, found = whole
    assert [(made.method, made.region) for made in found.runs] == [
        (method, region) for where in ((ORACLE, RANDOM), ("gradient",)) for method in ("wga", "rmu") for region in where
    ]
    start = found.injected[0].after
    for made in found.runs:
        assert [look.step for look in made.looks] == [0, *look_steps(3, 2)]
        assert made.looks[0] == start
        assert [look.step for look in made.relearned] == [0, 1, 2]
        assert made.relearned[0].forget == made.looks[-1].forget
        assert made.failed == ""
        assert made.energy_inside == {ORACLE: 1.0, RANDOM: 0.0}.get(made.region, made.energy_inside)
        assert 0 <= made.energy_inside <= 1
        assert made.update_norm > 0
    assert [control.seed for control in found.controls] == [42]
    assert [look.step for look in found.controls[0].looks] == [0, 1, 2]
    assert found.reference.forget_quality == 0.0
    assert found.compared == "truth ratio"
    assert {made.region for made in found.matchings} == {ORACLE, RANDOM}
    oracle = next(made for made in found.matchings if made.region == ORACLE)
    assert oracle.residual < 1e-3
    assert oracle.look.retain == pytest.approx(found.reference.retain, abs=0.05)
    assert all(done == planned for planned, done in found.progress.values())
    assert not [file for file in folder.rglob("*.safetensors") if file.parts[-3] in ("trials", "controls", "matched")]
    assert not (folder / ".work").exists()
    assert result.document.answer in (folder / "report.html").read_text().replace("&#39;", "'")


def test_how_well_an_attribution_found_the_region(whole: tuple[Path, Any, Found]) -> None:
    folder, _, found = whole
    made = masks(folder)
    (one,) = found.attributed
    both = sum(
        int((bits & made["gradient"].inside[name]).sum())
        for name, bits in made[ORACLE].inside.items()
        if name in made["gradient"].inside
    )
    assert one.precision == pytest.approx(both / 77)
    assert one.chance == pytest.approx(77 / 768)
    assert 0 <= one.auc <= 1


def test_the_looks_are_the_definition(whole: tuple[Path, Any, Found]) -> None:
    """Extraction strength by its definition, from the tables."""
    folder, _, found = whole
    values = []
    place = folder / "trials" / "wga-oracle-seed42" / "looks" / "000003" / "forget.parquet"
    for row in pq.read_table(place).to_pylist():
        hits = row["hit"][: row["answer_tokens"]]
        suffix = next((k for k, hit in enumerate(reversed(hits)) if not hit), len(hits))
        values.append(suffix / len(hits))
    made = next(one for one in found.runs if (one.method, one.region) == ("wga", ORACLE))
    assert made.looks[-1].forget == pytest.approx(sum(values) / len(values))


def test_a_second_run_does_nothing(whole: tuple[Path, Any, Found], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result, found = whole

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a piece was made again")

    monkeypatch.setattr(trials, "fit", refuse)
    monkeypatch.setattr(regions, "localize", refuse)
    with kept() as again:
        second = study(folder)
    assert second.skipped_all
    assert again[0] == found
    assert second.document.answer == result.document.answer


def test_a_killed_study_goes_on_where_it_was(
    whole: tuple[Path, Any, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "out")
    for name in ("trials/wga-random-seed42", "trials/rmu-random-seed42", "controls", "masks/seed42/gradient"):
        shutil.rmtree(folder / name)
    looked: list[Path] = []
    write = run.Measure.write

    def killed(self: Any, model: Any, tokenizer: Any, place: Path) -> None:
        if len(looked) == 3:  # in the middle of a training
            raise Killed
        looked.append(place)
        write(self, model, tokenizer, place)

    monkeypatch.setattr(run.Measure, "write", killed)
    with pytest.raises(Killed):
        study(folder)
    monkeypatch.setattr(run.Measure, "write", write)
    with kept() as again:
        study(folder)

    def strip(found: Found) -> Any:
        return [(made.method, made.region, made.looks, made.relearned, made.energy_inside) for made in found.runs]

    assert strip(again[0]) == strip(whole[2])
    assert again[0].controls == whole[2].controls
    assert not (folder / ".work").exists()


def test_time_that_is_up_leaves_a_page(whole: tuple[Path, Any, Found], tmp_path: Path) -> None:
    shutil.copytree(whole[0] / "models", tmp_path / "out" / "models")
    shutil.copy(whole[0] / "run.json", tmp_path / "out")
    result = study(tmp_path / "out", minutes="1e-9")
    assert result.document.done < result.document.planned
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_training_that_diverges_is_a_result(whole: tuple[Path, Any, Found], tmp_path: Path) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "out")
    with kept() as found:
        study(folder, rate="1e39", methods="wga", attributions="", regions="oracle,random")
    assert {made.region for made in found[0].runs} == {ORACLE, RANDOM}
    assert all(made.failed and not made.looks and not made.relearned for made in found[0].runs)
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
