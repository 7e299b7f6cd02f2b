"""The weight perspective: closed forms, and agreement with dense linear algebra on whole state dicts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expunge.errors import UserError
from expunge.merging.inputs import open_inputs
from expunge.merging.merger import Merger
from expunge.merging.perspective import (
    OUTSIDE,
    Compared,
    angles,
    angles_of,
    compare,
    cosine,
    effective_rank,
    factor_angles,
    group_of,
    inner_products,
)
from expunge.merging.plan import plan_merge
from merging_models import adapter, llama, rewrite, save, weights, write_three

PAIRS = ("first_later", "first_whole", "later_whole")


def degrees(one: torch.Tensor, two: torch.Tensor) -> float:
    return math.degrees(math.acos(float((one @ two) / one.norm() / two.norm())))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def expected(start: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> list[float]:
    early, late, whole = first - start, last - first, last - start
    return [degrees(early, late), degrees(early, whole), degrees(late, whole)]


def values(found: dict[str, float]) -> list[float]:
    assert tuple(found) == PAIRS
    return list(found.values())


def changed(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """ΔW of every parameter of an adapter, by its factors and alpha / r = 2."""
    factors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, tensor in weights(base).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        pair = [factors.get(f"{key}{side}.weight") for side in "AB"]
        found[name] = torch.zeros_like(tensor) if pair[0] is None else 2.0 * (pair[1].double() @ pair[0].double())
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two specialists, and adapters `p`, `q` and `r` on the base."""
    folder = write_three(tmp_path_factory.mktemp("perspective"))
    for seed, name in enumerate("pqr"):
        adapter(llama(0), folder / name, seed, str(folder / "base"))
    return folder


# ------------------------------------------------------------ angles


@pytest.mark.parametrize(
    ("products", "started", "wanted"),
    [
        ([[1, 1], [1, 2]], False, [90, 45, 45]),  # e1, then e1 + e2: a right turn
        ([[1, 2], [2, 4]], False, [0, 0, 0]),  # straight on
        ([[4, 2], [2, 1]], False, [180, 0, 180]),  # half-way back
        ([[1, 1, 1], [1, 2, 2], [1, 2, 3]], True, [90, 45, 45]),  # the same turn away from the origin
        ([[1, 0], [0, 0]], False, [180, None, None]),  # back to the start: the whole has no direction
    ],
)
def test_angles_of_known_turns(products: list[list[float]], started: bool, wanted: list[float | None]) -> None:
    found = values(angles_of(torch.tensor(products, dtype=torch.float64), started))
    for angle, want in zip(found, wanted, strict=True):
        assert math.isnan(angle) if want is None else angle == pytest.approx(want, abs=1e-6)


def test_angles_of_checkpoints_are_those_of_their_flattened_weights(folders: Path) -> None:
    points = [flat(weights(folders / name)) for name in ("base", "a", "b")]
    found = angles(folders / "a", folders / "b", start=folders / "base")
    assert values(found) == pytest.approx(expected(*points), abs=1e-3)
    assert angles(folders / "a", folders / "b", base=folders / "base") == pytest.approx(found)


def test_angles_of_adapters_are_those_of_their_products(folders: Path) -> None:
    zero, one, two, three = (
        torch.zeros(1),
        *(flat(changed(folders / name, folders / "base")) for name in "pqr"),
    )
    assert values(angles(folders / "p", folders / "q")) == pytest.approx(expected(zero, one, two), abs=1e-4)
    found = angles(folders / "q", folders / "r", start=folders / "p")
    assert values(found) == pytest.approx(expected(one, two, three), abs=1e-4)


def test_angles_of_factors_are_those_of_the_stored_tensors(folders: Path) -> None:
    points = [flat(load_file(folders / name / "adapter_model.safetensors")) for name in "pqr"]
    found = factor_angles(folders / "q", folders / "r", folders / "p")
    assert values(found) == pytest.approx(expected(*points), abs=1e-4)


def test_ranks_may_differ_for_weights_but_not_for_factors(folders: Path, tmp_path: Path) -> None:
    wide = adapter(llama(0), tmp_path / "wide", 7, str(folders / "base"), r=6, lora_alpha=12)
    points = [torch.zeros(1), *(flat(changed(folder, folders / "base")) for folder in (folders / "p", wide))]
    assert values(angles(folders / "p", wide)) == pytest.approx(expected(*points), abs=1e-4)
    with pytest.raises(UserError, match="rank"):
        factor_angles(folders / "q", wide, folders / "p")


def test_an_adapter_is_compared_with_a_checkpoint_by_its_weights(folders: Path) -> None:
    opened = open_inputs([folders / "p", folders / "a"], folders / "base")
    base = flat(weights(folders / "base"))
    points = torch.stack([flat(changed(folders / "p", folders / "base")), flat(weights(folders / "a")) - base])
    torch.testing.assert_close(inner_products(opened), points @ points.T, rtol=1e-6, atol=1e-6)


def test_checkpoints_without_a_start_are_refused(folders: Path) -> None:
    with pytest.raises(UserError, match="start"):
        angles(folders / "a", folders / "b")


# ------------------------------------------------------------ effective rank


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [
        (torch.eye(5), 5.0),
        (torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 4.0)), 1.0),
        (torch.zeros(3, 4), 0.0),
        (torch.diag(torch.tensor([3.0, 1.0])), math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))),
        (torch.stack([torch.eye(4), torch.outer(torch.ones(4), torch.ones(4))]), 2.5),  # a mean over experts
    ],
    ids=["identity", "outer", "zero", "three to one", "stack"],
)
def test_effective_rank_in_closed_form(matrix: torch.Tensor, rank: float) -> None:
    assert effective_rank(matrix) == pytest.approx(rank, rel=1e-5)
    assert effective_rank(matrix.mT) == pytest.approx(rank, rel=1e-5)


def test_effective_rank_is_that_of_the_singular_values() -> None:
    matrix = torch.randn(40, 23, generator=torch.Generator().manual_seed(1))
    singular = torch.linalg.svdvals(matrix.double())
    shares = singular / singular.sum()
    assert effective_rank(matrix) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-9)


# ------------------------------------------------------------ module by module


def dense(one: torch.Tensor, two: torch.Tensor, kept: float) -> list[float]:
    """Norms, cosine, overlap, conflict and conflict of the kept, by sorting."""
    flats = [one.double().reshape(-1), two.double().reshape(-1)]
    large = [set(x.abs().argsort(descending=True)[: round(kept * x.numel())].tolist()) for x in flats]
    product = flats[0] * flats[1]
    inside = sorted(large[0] & large[1])
    return [
        float(flats[0].norm()),
        float(flats[1].norm()),
        float(product.sum() / flats[0].norm() / flats[1].norm()),
        len(inside) / len(large[0] | large[1]),
        float((product < 0).sum() / (product != 0).sum()),
        float((product[inside] < 0).float().mean()),
    ]


def numbers(found: Compared) -> list[float]:
    return [*found.norms, found.cosine, found.overlap, found.conflict, found.conflict_kept]


def by_place(found: list[Compared]) -> dict[tuple[int, str], Compared]:
    return {(one.layer, one.module): one for one in found}


@pytest.mark.parametrize("kept", [0.2, 0.5, 1.0])
def test_checkpoints_compare_as_dense_tensors_do(folders: Path, kept: float) -> None:
    found = by_place(compare(open_inputs([folders / "a", folders / "b"], folders / "base"), kept))
    base, one, two = (weights(folders / name) for name in ("base", "a", "b"))
    assert set(found) == {group_of(name) for name in base}
    for name, tensor in base.items():
        place = found[group_of(name)]
        deltas = [one[name] - tensor, two[name] - tensor]
        assert numbers(place) == pytest.approx(dense(*deltas, kept), rel=1e-5, nan_ok=True), name
        if tensor.dim() == 2:
            assert place.rank == pytest.approx([effective_rank(delta) for delta in deltas], rel=1e-6)
        else:
            assert all(map(math.isnan, place.rank))


def test_adapters_compare_as_their_products_do(folders: Path) -> None:
    found = by_place(compare(open_inputs([folders / "p", folders / "q"], None)))
    one, two = (changed(folders / name, folders / "base") for name in "pq")
    touched = {name for name, tensor in one.items() if tensor.any()}
    assert set(found) == {group_of(name) for name in touched}
    for name in touched:
        place = found[group_of(name)]
        assert numbers(place) == pytest.approx(
            dense(one[name].float(), two[name].float(), 0.2), rel=1e-4, nan_ok=True
        ), name
        assert place.rank == pytest.approx([effective_rank(delta[name]) for delta in (one, two)], rel=1e-6)
        assert max(place.rank) <= 4


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda tensor: tensor, {"cosine": 1.0, "overlap": 1.0, "conflict": 0.0, "conflict_kept": 0.0}),
        (lambda tensor: -2 * tensor, {"cosine": -1.0, "overlap": 1.0, "conflict": 1.0, "conflict_kept": 1.0}),
        (lambda tensor: 0 * tensor, {"cosine": math.nan, "overlap": 0.0, "conflict": math.nan}),
    ],
    ids=["itself", "its opposite", "nothing"],
)
def test_closed_forms(folders: Path, tmp_path: Path, change: Callable, wanted: dict[str, float]) -> None:
    base, first, other = (llama(0) for _ in range(3))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameters in zip(*(model.parameters() for model in (base, first, other)), strict=True):
            step = torch.randn(parameters[0].shape) / 64
            parameters[1].add_(step)
            parameters[2].add_(change(step))
    for name, model in {"base": base, "first": first, "other": other}.items():
        save(model, tmp_path / name)
    for found in compare(open_inputs([tmp_path / "first", tmp_path / "other"], tmp_path / "base"), ranks=False):
        for name, value in wanted.items():
            assert getattr(found, name) == pytest.approx(value, abs=1e-3, nan_ok=True), (found.layer, name)


def test_only_two_are_compared(folders: Path) -> None:
    with pytest.raises(UserError, match="two models"):
        compare(open_inputs([folders / name for name in "pqr"], None))


def test_the_cosine_of_two_merges_is_that_of_their_weights(folders: Path) -> None:
    inputs = [folders / "p", folders / "q"]
    exact, apart = (
        Merger(open_inputs(inputs, None), plan_merge("linear", 2, [0.5, 0.5], parameters={"scope": scope}))
        for scope in ("tensor", "factor")
    )
    for merger in (exact, apart):
        merger.prepare()
    assert cosine(exact, exact) == pytest.approx(1.0, abs=1e-9)
    vectors = [
        torch.cat([delta.double().reshape(-1) for name in merger.names if (delta := merger.delta(name)) is not None])
        for merger in (exact, apart)
    ]
    wanted = float(vectors[0] @ vectors[1] / vectors[0].norm() / vectors[1].norm())
    assert cosine(exact, apart) == pytest.approx(wanted, abs=1e-6)
    assert wanted < 0.9  # adapters of other starts: the factors' merge is another one


def test_dora_is_compared_by_its_difference_not_by_its_factors(folders: Path, tmp_path: Path) -> None:
    turned = adapter(llama(0), tmp_path / "dora", 5, str(folders / "base"), use_dora=True)
    opened = open_inputs([turned, folders / "p"], None)
    deltas = [
        torch.cat(
            [
                torch.zeros(info.numel)
                if (delta := model.delta(name, opened.base.read(name))) is None
                else delta.reshape(-1)
                for name, info in opened.tensors().items()
            ]
        ).double()
        for model in opened.models
    ]
    wanted = torch.stack(deltas) @ torch.stack(deltas).T
    torch.testing.assert_close(inner_products(opened), wanted, rtol=1e-6, atol=1e-6)
    for found in compare(opened):
        assert found.rank[1] <= 4 < found.rank[0] or found.norms[0] == 0


@pytest.mark.parametrize("name", ["a", "p"])
def test_a_model_with_nan_is_named(folders: Path, tmp_path: Path, name: str) -> None:
    copied = Path(shutil.copytree(folders / name, tmp_path / "broken"))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if "layers.0" in key and ("lora_B" in key or name == "a"))
        tensors[key].view(-1)[0] = math.nan

    opened = open_inputs([rewrite(copied, spoil), folders / ("b" if name == "a" else "q")], folders / "base")
    for measure in (inner_products, compare):
        with pytest.raises(UserError, match=r"layers\.0.*broken holds NaN"):
            measure(opened)


def test_places_of_parameters() -> None:
    assert group_of("model.layers.7.self_attn.q_proj.weight") == (7, "q_proj")
    assert group_of("model.layers.0.mlp.experts.3.down_proj.bias") == (0, "down_proj")
    assert group_of("model.embed_tokens.weight") == (OUTSIDE, "embed_tokens")
    assert group_of("model.norm.weight") == (OUTSIDE, "norm")
