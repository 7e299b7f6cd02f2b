"""Exact selection by magnitude: against a stable sort, within a tensor and over a whole model."""

from __future__ import annotations

import pytest
import torch

from expunge.merging.selection import CHUNK, cut, kept_count, kept_over_model, trimmed


def brute_trim(values: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` largest magnitudes by a stable sort; the first of equals win."""
    order = values.reshape(-1).abs().argsort(descending=True, stable=True)[:keep]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order] = True
    return values.reshape(-1) * mask


def awkward(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(5000, generator=generator)
    return {
        "normal": normal,
        "equal": torch.full((5000,), 0.25),
        "zeros": torch.zeros(5000),
        "few values": torch.randint(-3, 4, (5000,), generator=generator).float(),
        "mostly zero": torch.where(normal.abs() > 1.5, normal, torch.zeros(())),
        "bfloat16": normal.bfloat16().float(),
        "subnormal": normal * 1e-42,
        "huge": normal * 5e37,
        "mixed scales": normal * torch.logspace(-40, 30, 5000),
        "over chunks": torch.randint(-40, 41, (2 * CHUNK + 77,), generator=generator).float(),
    }[name]


CASES = [
    "normal",
    "equal",
    "zeros",
    "few values",
    "mostly zero",
    "bfloat16",
    "subnormal",
    "huge",
    "mixed scales",
    "over chunks",
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("density", [0.0001, 0.2, 0.5, 0.8, 0.999, 1.0])
def test_cut_keeps_exactly_the_largest_and_the_first_of_equals(name, density):
    values = awkward(name)
    keep = kept_count(values.numel(), density)
    at = cut(values, keep)
    got = torch.cat(
        [
            trimmed(piece, start, at)
            for start, piece in zip(range(0, values.numel(), CHUNK), values.split(CHUNK), strict=True)
        ]
    )
    assert torch.equal(got, brute_trim(values, keep))


@pytest.mark.parametrize(
    ("numel", "density", "kept"), [(100, 0.29, 29), (10, 0.7, 7), (3, 0.5, 2), (7, 1.0, 7), (4, 0.0, 0)]
)
def test_kept_count_is_the_nearest_whole_number(numel, density, kept):
    # int(0.29 * 100) is 28, which is what truncation would keep
    assert kept_count(numel, density) == kept


@pytest.mark.parametrize("name", ["normal", "few values", "mostly zero", "zeros"])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.8, 1.0])
def test_one_threshold_over_the_model_equals_one_cut_through_the_flattened_model(name, density):
    flat = awkward(name)
    pieces = dict(zip("abcd", flat.split([1000, 1, 2999, 1000]), strict=True))
    flat = torch.cat([flat[:1000], torch.zeros(500), flat[1000:]])  # a tensor that this model does not change
    sizes = {"a": 1000, "untouched": 500, "b": 1, "c": 2999, "d": 1000}
    kept = kept_over_model(pieces.get, sizes, density)
    assert sum(kept.values()) == kept_count(5500, density)
    expected = brute_trim(flat, kept_count(5500, density)).split(list(sizes.values()))
    for (part, numel), whole in zip(sizes.items(), expected, strict=True):
        values = pieces.get(part, torch.zeros(numel))
        assert torch.equal(trimmed(values, 0, cut(values, kept[part])), whole)
        assert kept_count(numel, kept[part] / numel) == kept[part]  # a density carries the count exactly
