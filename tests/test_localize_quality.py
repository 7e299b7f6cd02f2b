"""How well a known region is found: masks, scores and updates against naive counts, scikit-learn and an injection."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from expunge.localize.choose import choose, mask_of
from expunge.localize.evidence import Evidence
from expunge.localize.masks import Mask
from expunge.localize.quality import agreement, auc, energy_inside, inside, overlap, precision, recall
from expunge.localize.units import units_of
from localize_evidence import MODELS, dense, evidence, model, region_of, scores, shapes
from merging_models import llama
from training_rows import rows

# ---- quality


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("unit", "other"), [("weight", "value_vector"), ("neuron", "value_vector"), ("head", "module")]
)
def test_agreement_is_that_of_the_weights(unit: str, other: str, name: str) -> None:
    network = model(name)
    mask, truth = region_of(network, unit, 0.4), region_of(network, other, 0.5, seed=9)
    both, either = dense(mask, network) & dense(truth, network), dense(mask, network) | dense(truth, network)
    found = agreement(mask, truth, shapes(network))
    assert (found.both, found.mask, found.truth) == (
        both.sum(),
        dense(mask, network).sum(),
        dense(truth, network).sum(),
    )
    assert found.both > 0
    assert precision(mask, truth, shapes(network)) == pytest.approx(float(both.sum() / dense(mask, network).sum()))
    assert recall(mask, truth, shapes(network)) == pytest.approx(float(both.sum() / dense(truth, network).sum()))
    assert overlap(mask, truth, shapes(network)) == pytest.approx(float(both.sum() / either.sum()))


@pytest.mark.parametrize("unit", ["weight", "value_vector", "head", "module"])
@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_auc_is_that_of_scikit_learn(levels: int, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.localize.quality._PIECE", 1000)
    network = model("gpt2")
    families = units_of(network, unit)
    truth = region_of(network, unit)
    generator = torch.Generator().manual_seed(levels)
    drawn: list[Tensor | None] = [
        torch.randint(levels, (family.count,), generator=generator).float() for family in families
    ]
    labels = inside(truth, families)
    wanted = roc_auc_score(torch.cat(labels).numpy(), torch.cat([own for own in drawn if own is not None]).numpy())
    assert auc(drawn, truth, families) == pytest.approx(wanted, abs=1e-9)
    first = drawn[0]
    drawn[0] = None  # a family without scores does not count
    if unit != "module":
        rest = [own for own in drawn if own is not None]
        assert auc(drawn, truth, families) == pytest.approx(roc_auc_score(torch.cat(labels[1:]), torch.cat(rest)))
    drawn[0] = first
    everything = mask_of(families, [torch.ones(family.count, dtype=torch.bool) for family in families])
    assert auc(drawn, everything, families) is None
    assert auc(drawn, Mask({}), families) is None


def test_units_of_another_kind_count_as_inside_by_most_of_their_weights() -> None:
    network = model("llama")
    vectors, neurons = units_of(network, "value_vector"), units_of(network, "neuron")
    truth = region_of(network, "neuron")
    labels = inside(truth, neurons)
    assert [own.tolist() for own in inside(truth, vectors)] == [own.tolist() for own in labels]
    columns = mask_of(vectors, labels)  # a value vector is a third of its neuron
    assert not torch.cat(inside(columns, neurons)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_inside_is_the_part_of_squared_change(dtype: torch.dtype) -> None:
    network = model("gpt2")
    region = region_of(network, "neuron")
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (name, own.detach().to(dtype), own.detach().to(dtype) + torch.randn(own.shape, generator=generator).to(dtype))
        for name, own in network.named_parameters()
    ]
    change = torch.cat([(after.double() - before.double()).flatten() for _, before, after in pairs])
    wanted = change[dense(region, network)].square().sum() / change.square().sum()
    assert energy_inside(iter(pairs), region) == pytest.approx(float(wanted), rel=1e-5)
    assert energy_inside([(name, before, before) for name, before, _ in pairs], region) is None
    within = [(name, b, b + region.inside.get(name, torch.tensor(False)).to(dtype)) for name, b, _ in pairs]
    assert energy_inside(within, region) == 1


# ---- is knowledge found where it was put?


INJECTED = {
    "forget": rows(6, 10, vocabulary=60, longest=12),
    "retain": rows(12, 100, vocabulary=60, longest=12),
}


@cache
def injected() -> tuple[Any, Mask]:
    """A model that has learnt the retain rows with all weights, then the forget rows with 10% of the value vectors."""
    network = llama(0, intermediate_size=128)
    given = evidence(network, "value_vector", INJECTED, batch_size=16)
    named = dict(network.named_parameters())
    train(given, "retain", {name: torch.ones(()) for name in named}, 40, 3e-3)
    region = region_of(network, "value_vector", 0.1)
    train(given, "forget", dict(region.inside), 20, 2e-2)
    return network, region


def train(given: Evidence, split: str, masks: dict[str, Tensor], steps: int, rate: float) -> None:
    parameters = [dict(given.model.named_parameters())[name] for name in masks]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    tokens = sum(row.supervised_tokens for row in given.rows[split])
    for _ in range(steps):
        with given.only(parameters):
            (forward,) = given.batches(split)
            gradients = torch.autograd.grad(given.loss(forward) / tokens, parameters)
        for parameter, gradient, mask in zip(parameters, gradients, masks.values(), strict=True):
            parameter.grad = gradient * mask
        optimizer.step()


#: AUC of the region among 256 value vectors; by lot it has a standard deviation of 0.06.
FOUND = {
    "oracle": (1.0, 1.0, {}),
    "complement": (0.0, 0.0, {}),
    "random": (0.3, 0.7, {}),
    "gradient_times_weight": (0.85, 1.0, {}),
    "wagle": (0.85, 1.0, {"mu": 100.0}),
    "activations": (0.85, 1.0, {}),
    "klue": (0.62, 1.0, {}),
}


@pytest.mark.parametrize("by", FOUND)
def test_knowledge_is_found_where_it_was_put(by: str) -> None:
    network, region = injected()
    low, high, settings = FOUND[by]
    given = evidence(network, "value_vector", INJECTED, region=region, seed=7)
    found = auc(scores(by, given, **settings), region, given.families)
    assert found is not None
    assert low <= found <= high


def test_the_gradient_alone_is_small_where_training_came_to_rest() -> None:
    """Adam has gone down every direction of the region, and of no other part: |g_f| finds the region from below."""
    network, region = injected()
    given = evidence(network, "value_vector", INJECTED, region=region)
    assert (auc(scores("gradient", given), region, given.families) or 1) < 0.4


def test_a_choice_by_scores_of_the_region_has_its_precision() -> None:
    network, region = injected()
    given = evidence(network, "value_vector", INJECTED, region=region)
    chosen = choose(given.families, scores("gradient_times_weight", given), 0.1, "model")
    mask = mask_of(given.families, chosen)
    assert precision(mask, region, shapes(network)) > 0.6
    assert precision(mask, region, shapes(network)) == pytest.approx(recall(mask, region, shapes(network)))
