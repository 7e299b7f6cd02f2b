"""From scores to a mask: pooling, exact densities, ties, and the mask file."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.errors import UserError
from expunge.localize import choose as choosing
from expunge.localize.choose import choose, mask_of, unit_scores
from expunge.localize.masks import Mask, everything_but, read_mask
from expunge.localize.units import FLAT, Family, Slab, units_of
from expunge.models.tiny import build_tiny
from localize_models import architecture

UNITS = ("weight", "value_vector", "neuron", "head", "module", "layer")
STRATA = ("model", "layer", "tensor")


@pytest.fixture(scope="module", params=["GroupedLlama", "GPT2", "GPTNeoX"])
def model(request):
    return architecture(request.param)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 2000 weights: what streams is streamed."""
    monkeypatch.setattr(choosing, "BLOCK", 2000)


def random_scores(model, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(own.shape, generator=generator) for name, own in model.named_parameters()}


def marks(families: list[Family], family: int, unit: int) -> Mask:
    """The mask of one unit."""
    chosen = [torch.zeros(own.count, dtype=torch.bool) for own in families]
    chosen[family][unit] = True
    return mask_of(families, chosen)


def owned_scores(mask: Mask, scores: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scores of all weights in the mask."""
    return torch.cat([scores[name][bits.expand(scores[name].shape)] for name, bits in mask.inside.items()])


def place_of(families: list[Family], number: int) -> tuple[int, int]:
    for family, own in enumerate(families):
        if number < own.count:
            return family, number
        number -= own.count
    raise AssertionError("there are fewer units")


@pytest.mark.parametrize("block", [1 << 20, 1000])
@pytest.mark.parametrize("pool", ["mean", "top"])
@pytest.mark.parametrize("unit", UNITS)
def test_a_units_score_is_pooled_from_the_weights_that_its_mask_holds(model, unit, pool, block, monkeypatch):
    monkeypatch.setattr(choosing, "BLOCK", block)
    families, scores = units_of(model, unit), random_scores(model)
    pooled = unit_scores(families, scores, pool)
    assert [own.shape for own in pooled] == [(family.count,) for family in families]
    assert all(own.dtype == torch.float32 for own in pooled)
    total = sum(family.count for family in families)
    for number in {0, 1, total // 2, total - 1} & set(range(total)):
        family, place = place_of(families, number)
        owned = owned_scores(marks(families, family, place), scores).double()
        assert len(owned) == families[family].weights
        best = owned if pool == "mean" else owned.sort(descending=True).values[: math.ceil(len(owned) / 10)]
        assert float(pooled[family][place]) == pytest.approx(float(best.mean()), abs=1e-6)


@pytest.mark.parametrize("pool", ["mean", "top"])
@pytest.mark.parametrize("unit", UNITS)
def test_scores_that_broadcast_count_as_if_they_were_written_out(model, unit, pool, small_blocks):
    families = units_of(model, unit)
    generator = torch.Generator().manual_seed(1)
    scores = {}
    for number, (name, own) in enumerate(model.named_parameters()):
        kept = [1 if (number >> axis) % 2 else size for axis, size in enumerate(own.shape)]
        scores[name] = torch.rand(kept, generator=generator)
    shapes = {name: own.shape for name, own in model.named_parameters()}
    assert any(own.shape != shapes[name] for name, own in scores.items())
    whole = {name: own.expand(shapes[name]).clone() for name, own in scores.items()}
    for short, full in zip(unit_scores(families, scores, pool), unit_scores(families, whole, pool), strict=True):
        torch.testing.assert_close(short, full)


def test_only_weights_with_scores_are_pooled_and_families_without_any_are_never_chosen():
    model, _ = build_tiny()
    families, scores = units_of(model, "neuron"), random_scores(model)
    kept = {name: own for name, own in scores.items() if name == "model.layers.1.mlp.down_proj.weight"}
    pooled = unit_scores(families, kept, "mean")
    assert pooled[0] is None
    torch.testing.assert_close(pooled[1], kept["model.layers.1.mlp.down_proj.weight"].mean(0))
    for density, expected in ((0.25, 192), (0.5, 384), (1.0, 384)):  # all units count, those without scores too
        chosen = choose(families, pooled, density, "model")
        assert [int(own.sum()) for own in chosen] == [0, expected]
    by_layer = choose(families, pooled, 0.25, "layer")
    assert [int(own.sum()) for own in by_layer] == [0, 96]
    with pytest.raises(UserError, match="none of the units has a score"):
        choose(families, [None, None], 0.5, "model")


@pytest.mark.parametrize("density", [1e-9, 0.1, 1 / 3, 0.999])
@pytest.mark.parametrize("strata", STRATA)
@pytest.mark.parametrize("unit", UNITS)
def test_the_density_is_exact_in_every_stratum_and_the_largest_are_chosen(model, unit, strata, density, small_blocks):
    families, scores = units_of(model, unit), random_scores(model, seed=2)
    pooled = unit_scores(families, scores, "mean")
    chosen = choose(families, pooled, density, strata)
    assert all(own.dtype == torch.bool and own.shape == (f.count,) for own, f in zip(chosen, families, strict=True))
    groups = {
        "model": [range(len(families))],
        "layer": [[i for i, f in enumerate(families) if f.layer == layer] for layer in (0, 1)],
        "tensor": [[i] for i in range(len(families))],
    }[strata]
    for group in groups:
        picked, values = torch.cat([chosen[i] for i in group]), torch.cat([pooled[i] for i in group])
        wanted = max(1, round(density * len(values)))
        assert int(picked.sum()) == wanted
        best = torch.topk(values, wanted)
        assert torch.equal(values[picked].sort().values, best.values.sort().values)
        if values.unique().numel() == values.numel():
            assert torch.equal(picked.nonzero().flatten(), best.indices.sort().values)
    mask = mask_of(families, chosen)
    inside, total = mask.weights(model)
    assert inside == sum(int(own.sum()) * f.weights for own, f in zip(chosen, families, strict=True))
    assert total == sum(own.numel() for own in model.parameters())


def family(name: str, count: int, layer: int | None = 0) -> Family:
    return Family(name, layer, name, count, (Slab(name, 0, 1, shape=(count, 2)),))


VALUES = {
    "ties in order": ([1.0, 2.0, 2.0, 2.0, 0.0], 2, [1, 2]),
    "all the same": ([3.0] * 5, 3, [0, 1, 2]),
    "minus zero is zero": ([-0.0, 0.0, -0.0, 0.0, -1.0], 2, [0, 1]),
    "below zero": ([-1.0, -3.0, -2.0, -1e-30, -1e30], 2, [0, 3]),
    "extremes of float32": ([3.4e38, -3.4e38, 1e-45, 0.0, -1e-45], 3, [0, 2, 3]),
    "neighbours in the last bit": ([1.0, 1.0000001, 0.99999994, 1.0000002, 1.0], 3, [0, 1, 3]),
}


@pytest.mark.parametrize("block", [1, 2, 100])
@pytest.mark.parametrize("case", VALUES)
def test_the_threshold_is_exact_and_ties_go_by_place(case, block, monkeypatch):
    monkeypatch.setattr(choosing, "BLOCK", block)
    values, wanted, expected = VALUES[case]
    scores = [torch.tensor(values[:2]), torch.tensor(values[2:])]
    chosen = choose([family("a", 2), family("b", 3)], scores, wanted / 5, "model")
    assert torch.cat(chosen).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_many_scores_with_many_ties_agree_with_a_stable_sort(seed, small_blocks):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-20, 20, (1000,), generator=generator).float() * 0.25
    wanted = int(torch.randint(1, 1000, (1,), generator=generator))
    families = [family("a", 300), family("b", 700, layer=None)]
    chosen = torch.cat(choose(families, list(values.split([300, 700])), wanted / 1000, "model"))
    order = values.sort(descending=True, stable=True).indices
    assert torch.equal(chosen.nonzero().flatten(), order[:wanted].sort().values)


def test_what_lies_outside_of_the_layers_is_a_stratum_of_its_own():
    families = [family("in", 10, 0), family("out", 10, None), family("beside", 10, None)]
    scores = [torch.zeros(10), torch.zeros(10), torch.ones(10)]
    assert [int(own.sum()) for own in choose(families, scores, 0.2, "layer")] == [2, 0, 4]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_scores_that_are_no_numbers_are_refused_by_name(value):
    model, _ = build_tiny()
    for unit in UNITS:
        scores = random_scores(model)
        name = f"model.layers.1.{'self_attn.o_proj' if unit == 'head' else 'mlp.down_proj'}.weight"
        scores[name][3, 7] = value
        for pool in ("mean", "top"):
            with pytest.raises(UserError, match=f"scores of {name} are infinite or not a number"):
                unit_scores(units_of(model, unit), scores, pool)
    with pytest.raises(UserError, match="scores of a are infinite"):
        choose([family("a", 3)], [torch.tensor([1.0, value, 2.0])], 0.5, "model")


def test_a_mean_that_overflows_is_refused():
    scores = unit_scores([family("a", 3)], {"a": torch.full((3, 2), 3e38)}, "mean")
    with pytest.raises(UserError, match="infinite"):
        choose([family("a", 3)], scores, 0.5, "model")


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, math.nan])
def test_a_density_outside_of_its_range_is_refused(density):
    with pytest.raises(UserError, match="density"):
        choose([family("a", 3)], [torch.ones(3)], density, "model")


def test_scores_in_half_precision_are_pooled_and_chosen_in_float32():
    scores = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    (pooled,) = unit_scores([family("a", 64)], {"a": scores}, "mean")
    torch.testing.assert_close(pooled, scores.float().mean(1))
    (chosen,) = choose([family("a", 64)], [scores[:, 0]], 0.25, "model")
    assert int(chosen.sum()) == 16
    assert scores[chosen, 0].min() >= scores[~chosen, 0].max()


MEMORY = """
import resource, torch
from expunge.localize.choose import choose, mask_of, unit_scores
from expunge.localize.units import FLAT, Family, Slab

shape, count = (4096, 4096), 6
families = [Family(str(i), i, "w", 4096 * 4096, (Slab(str(i), FLAT, 1, shape=shape),)) for i in range(count)]
saliency = {str(i): torch.rand(shape) for i in range(count)}
choose(families[:1], [torch.rand(4096 * 4096)], 0.5, "model")  # what a choice takes once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mask = mask_of(families, choose(families, unit_scores(families, saliency, "mean"), 0.1, "model"))
assert sum(int(bits.sum()) for bits in mask.inside.values()) == round(0.1 * count * 4096 * 4096)
bits = count * 4096 * 4096
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024 - bits)
"""


@pytest.mark.slow
def test_a_choice_among_single_weights_holds_their_bits_and_no_second_copy_of_the_scores():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    more, one_matrix = int(done.stdout), 4 * 4096 * 4096
    assert more < 2 * one_matrix  # of the six that have scores


def test_scores_of_single_weights_are_a_view():
    scores = torch.rand(4, 6)
    weights = [Family("w", 0, "w", 24, (Slab("w", FLAT, 1, shape=(4, 6)),))]
    (pooled,) = unit_scores(weights, {"w": scores}, "top")
    assert pooled.data_ptr() == scores.data_ptr()


# ---- the mask


@pytest.fixture
def mask(model) -> Mask:
    families = units_of(model, "neuron")
    chosen = choose(families, unit_scores(families, random_scores(model), "mean"), 0.3, "model")
    return mask_of(families, chosen, {"by": "random", "density": 0.3, "unit": "neuron"})


def test_a_mask_is_as_broadcast_as_it_can_be_and_holds_no_empty_parameter(model):
    families = units_of(model, "value_vector")
    chosen = [
        torch.arange(own.count) < 3 if own.layer else torch.zeros(own.count, dtype=torch.bool) for own in families
    ]
    mask = mask_of(families, chosen)
    (name,) = mask.inside
    assert name == families[1].slabs[0].parameter
    assert sorted(mask.inside[name].shape) == [1, families[1].count]
    assert mask.weights(model)[0] == 3 * 32
    whole = mask_of(units_of(model, "layer"), [torch.tensor([True]), torch.tensor([False])])
    assert all(bits.numel() == 1 for bits in whole.inside.values())


def test_written_and_read_back_it_is_the_same(model, mask, tmp_path):
    mask.write(tmp_path / "m.safetensors")
    again = read_mask(tmp_path / "m.safetensors")
    assert again.inside.keys() == mask.inside.keys()
    for name, bits in mask.inside.items():
        assert again.inside[name].dtype == torch.bool
        assert torch.equal(again.inside[name], bits)
    assert again.about == mask.about == {"by": "random", "density": 0.3, "unit": "neuron"}
    assert again.digest == mask.digest
    assert again.weights(model) == mask.weights(model)
    size = sum(-(-bits.numel() // 8) for bits in mask.inside.values())
    assert size <= (tmp_path / "m.safetensors").stat().st_size < size + 200 * (len(mask.inside) + 4)


def test_the_digest_is_of_names_shapes_and_bits_alone(mask):
    assert Mask(mask.inside, {"by": "other"}).digest == mask.digest
    assert Mask(dict(reversed(mask.inside.items()))).digest == mask.digest
    name, bits = next(iter(mask.inside.items()))
    flipped = bits.clone()
    flipped.view(-1)[0] ^= True
    others = [
        {**mask.inside, name: flipped},
        {**mask.inside, name: bits.reshape(-1)},
        {own: value for own, value in mask.inside.items() if own != name},
        {f"{own}x": value for own, value in mask.inside.items()},
    ]
    assert len({mask.digest, *(Mask(other).digest for other in others)}) == 5


def test_inside_and_outside_make_the_whole(model, mask):
    bound = mask.bound(model)
    outside = dict(everything_but(mask, model))
    assert list(outside) == [name for name, _ in model.named_parameters()]
    left = 0
    for name, own in model.named_parameters():
        bits = outside[name].expand(own.shape)
        inside = bound[name].expand(own.shape) if name in bound else torch.zeros_like(bits)
        assert torch.equal(bits, ~inside)
        left += int(bits.sum())
    inside, total = mask.weights(model)
    assert left == total - inside


def test_a_mask_of_another_model_is_refused(model, mask):
    other = architecture("Phi3")
    with pytest.raises(UserError, match="mask is of another model: this one has no"):
        mask.bound(other)
    name, bits = next(iter(mask.inside.items()))
    longer = torch.cat([bits.reshape(-1), torch.ones(1, dtype=torch.bool)])
    with pytest.raises(UserError, match="as the shape of"):
        Mask({name: longer.reshape([-1 if size > 1 else 1 for size in bits.shape])}).bound(model)
    with pytest.raises(UserError, match="as the shape of"):
        Mask({name: bits.unsqueeze(0)}).bound(model)


def test_an_empty_mask_is_refused(model, tmp_path):
    name = next(name for name, _ in model.named_parameters())
    for empty in (Mask({}), Mask({name: torch.zeros(1, 1, dtype=torch.bool)}), Mask({"x": torch.zeros(1).bool()})):
        empty.write(tmp_path / "m.safetensors")
        for mask in (empty, read_mask(tmp_path / "m.safetensors")):
            with pytest.raises(UserError, match="the mask is empty"):
                mask.bound(model)


def damaged(kind: str, good: bytes, tensors: dict[str, torch.Tensor], metadata: dict[str, str], file) -> None:
    name = next(iter(tensors))
    if kind == "cut short":
        file.write_bytes(good[: len(good) // 2])
    elif kind == "no tensors at all":
        file.write_bytes(b"not a mask")
    elif kind == "a bit flipped":
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 16]))
    elif kind == "a tensor too short":
        save_file(tensors | {name: tensors[name][:-1].clone()}, file, metadata)
    elif kind == "a tensor missing":
        save_file({own: bits for own, bits in tensors.items() if own != name}, file, metadata)
    elif kind == "a tensor of floats":
        save_file(tensors | {name: tensors[name].float()}, file, metadata)
    elif kind == "shapes that are none":
        save_file(tensors, file, metadata | {"shapes": json.dumps([1])})
    else:
        save_file(tensors, file, {key: value for key, value in metadata.items() if key != "digest"})


@pytest.mark.parametrize(
    "kind",
    [
        "cut short",
        "no tensors at all",
        "a bit flipped",
        "a tensor too short",
        "a tensor missing",
        "a tensor of floats",
        "shapes that are none",
        "no digest",
    ],
)
def test_a_damaged_file_is_refused(mask, kind, tmp_path):
    from safetensors import safe_open

    file = tmp_path / "m.safetensors"
    mask.write(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    damaged(kind, file.read_bytes(), load_file(file), metadata, file)
    with pytest.raises(UserError, match="is damaged"):
        read_mask(file)


def test_other_files_are_no_masks(tmp_path):
    with pytest.raises(UserError, match="no mask at"):
        read_mask(tmp_path / "nowhere")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="no mask of expunge"):
        read_mask(tmp_path / "weights.safetensors")


def test_a_model_on_another_dtype_has_the_same_mask(model, mask):
    half = copy.deepcopy(model).bfloat16()
    assert mask.weights(half) == mask.weights(model)
