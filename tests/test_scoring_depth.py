"""Depth measures: patching a model with itself does nothing, with the reference it gives the reference."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from expunge.models.load import load_model
from expunge.models.token_logprobs import token_logprobs
from expunge.recipe import ModelConfig
from expunge.scoring.depth import (
    answer_logits,
    answer_masks,
    layer_states,
    layers_table,
    linear_cka,
    logit_errors,
    patched_falls,
    restored_window,
)
from expunge.scoring.tables import LAYERS
from scoring_rows import lively, random_rows


@pytest.fixture(scope="module")
def models():
    target = lively(load_model(ModelConfig(id="tiny")).model)
    reference = copy.deepcopy(target)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return target, reference


@pytest.fixture(scope="module")
def rows():
    return random_rows(11, seed=3, longest=12)


@pytest.fixture(scope="module")
def masks(rows):
    return answer_masks(rows, [np.zeros(0, dtype=bool)] * len(rows))


def mean_logprobs(model, row, mask):
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, row.prompt_tokens - 1 : -1]
    return float(token_logprobs(logits, ids[0, row.prompt_tokens :])[torch.from_numpy(mask)].mean())


def test_states_are_those_of_the_layers(models, rows, masks):
    states = layer_states(models[0], rows, masks)
    row = rows[4]
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        hidden = models[0](input_ids=ids, output_hidden_states=True).hidden_states
    start = sum(int(mask.sum()) for mask in masks[:4])
    mine = states[0, start : start + int(masks[4].sum())]
    expected = hidden[1][0, row.prompt_tokens - 1 : row.prompt_tokens - 1 + row.answer_tokens]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_patching_with_oneself_changes_nothing(models, rows, masks):
    states = layer_states(models[0], rows, masks)
    falls = patched_falls(models[0], rows, masks, {"self": states})["self"]
    assert falls.shape == (len(rows), states.shape[0])
    torch.testing.assert_close(falls, torch.zeros_like(falls), atol=1e-4, rtol=0)


def test_patching_the_last_layer_gives_the_others_states_to_the_own_head(models, rows, masks):
    target, reference = models
    states = layer_states(reference, rows, masks)
    falls = patched_falls(target, rows, masks, {"reference": states})["reference"]
    head = copy.deepcopy(reference)
    head.lm_head.weight = target.lm_head.weight
    head.model.norm.weight = target.model.norm.weight
    for place in (0, 5, 10):
        row, mask = rows[place], masks[place]
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            captured = []
            handle = reference.model.layers[-1].register_forward_hook(lambda _, __, out, c=captured: c.append(out))
            reference(input_ids=ids)
            handle.remove()
            hidden = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
            logits = target.lm_head(target.model.norm(hidden))[0, row.prompt_tokens - 1 : -1]
        said = token_logprobs(logits, ids[0, row.prompt_tokens :])[torch.from_numpy(mask)].mean()
        expected = mean_logprobs(target, row, mask) - float(said)
        assert float(falls[place, -1]) == pytest.approx(expected, abs=1e-3)


def test_restoring_every_layer_of_a_model_that_differs_there_alone(models, rows, masks):
    target, _ = models
    changed = copy.deepcopy(target)
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.mlp.down_proj.weight.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in changed.state_dict().items()}
    logits = answer_logits(target, rows, masks)
    tensors = dict(target.named_parameters())
    plain = logit_errors(changed, rows, masks, logits)
    with restored_window(changed, range(len(changed.model.layers)), tensors.__getitem__):
        whole = logit_errors(changed, rows, masks, logits)
    assert float(plain.min()) > 0
    assert float(whole.max()) < 1e-8
    assert all(torch.equal(tensor, before[name]) for name, tensor in changed.state_dict().items())


def test_cka_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    y = torch.randn(40, 6, generator=generator)
    few, wide = torch.randn(5, 9, generator=generator), torch.randn(5, 9, generator=generator)
    for one, two in ((x, y), (few, wide)):
        a, b = (states.double() - states.double().mean(0) for states in (one, two))
        expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
        assert linear_cka(one, two) == pytest.approx(float(expected))
    assert np.isnan(linear_cka(torch.ones(4, 3), y[:4, :3]))


def test_masks_and_table(rows):
    entity = np.zeros(rows[0].supervised_tokens, dtype=bool)
    entity[0] = True
    masks = answer_masks(rows[:2], [entity, np.zeros(0, dtype=bool)])
    assert masks[0].sum() == 1
    assert masks[1].sum() == rows[1].answer_tokens
    table = layers_table(["a", "b"], {"m": torch.tensor([[1.0, 2.0], [float("nan"), 4.0]])}, {"cka": [0.5, 0.25]})
    assert table.schema == LAYERS
    assert table.column("value").to_pylist() == [1.0, 2.0, 4.0, 0.5, 0.25]
    assert table.column("example_id").to_pylist() == ["a", "a", "b", "", ""]
