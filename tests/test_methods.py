"""Every objective: its declaration, its closed form, its gradient, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from expunge.data.collate import pad_right
from expunge.errors import UserError
from expunge.methods.base import OBJECTIVES, build_objective
from expunge.methods.step import Forward, Step, Totals
from expunge.models.reference import ReferenceCache
from expunge.models.tiny import build_tiny
from training_rows import rows

VOCABULARY, WIDTH = 11, 5
FORGET, RETAIN = rows(3, seed=1, vocabulary=VOCABULARY), rows(2, seed=2, vocabulary=VOCABULARY)
ALL = sorted(OBJECTIVES.names())


def make_step(logits: torch.Tensor, hidden: torch.Tensor, selected: torch.Tensor | None = None) -> tuple[Step, Any]:
    """A step over given logits and hidden states; the start model is another random one."""
    batch = pad_right([*FORGET, *RETAIN], [0, 1, 2, 0, 1], 0)
    forward = Forward(torch.nn.Identity(), batch, 0, True, False)
    forward.__dict__["_outputs"] = (logits, hidden)
    generator = torch.Generator().manual_seed(9)
    caches = []
    for side in (FORGET, RETAIN):
        cache, start = ReferenceCache(), 0
        for number, row in enumerate(side):
            cache._offsets[number] = (start, start + row.supervised_tokens)
            start += row.supervised_tokens
        drawn = torch.randn(start + VOCABULARY, WIDTH + 1, generator=generator, dtype=torch.float64).to(logits.dtype)
        cache._logprobs = drawn[:start, WIDTH] - 3
        cache._vectors, weight = drawn[:start, :WIDTH], drawn[start:, :WIDTH]
        cache._head = lambda vectors, weight=weight: vectors @ weight.T
        caches.append(cache)
    count = sum(row.supervised_tokens for row in FORGET) if selected is None else int(selected.sum())
    totals = Totals(3, count, 2, sum(row.supervised_tokens for row in RETAIN))
    return Step(forward, 3, *caches, selected, totals, 1.0), caches


def random_logits(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    count = sum(row.supervised_tokens for row in [*FORGET, *RETAIN])
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(count, VOCABULARY + WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return drawn[:, :VOCABULARY].contiguous(), drawn[:, VOCABULARY:].contiguous()


def by_hand(selected: np.ndarray | None = None) -> dict[str, Any]:
    """Token log-probs of both models per row, computed without torch."""
    logits, _ = random_logits(torch.float64)
    _, caches = make_step(*random_logits(torch.float64))
    values = logits.numpy()
    logp = values - np.log(np.exp(values).sum(-1, keepdims=True))
    out: dict[str, Any] = {"forget": [], "reference": [], "retain": []}
    at = 0
    for side, name in ((FORGET, "forget"), (RETAIN, "retain")):
        for row in side:
            targets = row.input_ids[row.prompt_tokens :]
            out[name].append(logp[np.arange(at, at + len(targets)), targets])
            at += len(targets)
    reference = caches[0]._logprobs.numpy()
    for row in FORGET:
        out["reference"].append(reference[: row.supervised_tokens])
        reference = reference[row.supervised_tokens :]
    if selected is not None:
        for name in ("forget", "reference"):
            parts = np.split(selected, np.cumsum([len(part) for part in out[name]])[:-1])
            out[name] = [part[mask] for part, mask in zip(out[name], parts, strict=True)]
    return out


def log_sigmoid(value: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-value))


def closed_forms(known: dict[str, Any]) -> dict[str, float]:
    forget, reference = known["forget"], known["reference"]
    every = np.concatenate(forget)
    ratio = np.array([p.sum() - r.sum() for p, r in zip(forget, reference, strict=True)])
    lengths = np.array([max(len(p), 1) for p in forget])
    sums = np.array([p.sum() for p in forget])
    return {
        "grad_ascent": every.mean(),
        "grad_diff": every.mean(),
        "npo": (-2 / 0.1 * log_sigmoid(-0.1 * ratio)).mean(),
        "simnpo": (-2 / 4.5 * log_sigmoid(-4.5 * sums / lengths)).mean(),
    }


@pytest.mark.parametrize("chosen", [None, "half"])
@pytest.mark.parametrize("name", ["grad_ascent", "grad_diff", "npo", "simnpo"])
def test_forget_loss_equals_its_closed_form(name: str, chosen: str | None) -> None:
    count = sum(row.supervised_tokens for row in FORGET)
    mask = None if chosen is None else np.arange(count) % 2 == 0
    step, _ = make_step(*random_logits(), selected=None if mask is None else torch.from_numpy(mask))
    loss = build_objective(name, {}).loss(step)["forget"]
    assert loss.item() == pytest.approx(closed_forms(by_hand(mask))[name], rel=1e-5)


def test_npo_levels_agree_with_their_definitions() -> None:
    known = by_hand()
    step, _ = make_step(*random_logits())
    ratios = [p - r for p, r in zip(known["forget"], known["reference"], strict=True)]
    mean = np.array([ratio.mean() for ratio in ratios])
    expected = {
        "mean": (-20 * log_sigmoid(-0.1 * mean)).mean(),
        "token": (-20 * log_sigmoid(-0.1 * np.concatenate(ratios))).mean(),
    }
    for level, value in expected.items():
        assert build_objective("npo", {"level": level}).loss(step)["forget"].item() == pytest.approx(value, rel=1e-5)


def test_npo_approaches_gradient_ascent_as_beta_vanishes() -> None:
    """arXiv 2404.05868, proposition 1: the gradients meet up to the constant that the loss starts from."""
    gradients = []
    for name, parameters in (("npo", {"beta": 1e-4}), ("grad_ascent", {})):
        logits, hidden = random_logits(torch.float64)
        logits.requires_grad_()
        step, _ = make_step(logits, hidden)
        build_objective(name, parameters).loss(step)["forget"].backward()
        assert logits.grad is not None
        gradients.append(logits.grad / logits.grad.norm())
    per_token = gradients[0].abs().sum()
    assert per_token > 0
    cosine = (gradients[0] * gradients[1]).sum()
    assert cosine > 0.97  # ascent averages over tokens, npo over rows: the same direction but for row lengths


def test_rmu_steers_forget_states_and_holds_retain_states() -> None:
    objective: Any = build_objective("rmu", {"coefficient": 2.0, "alpha": 10.0, "layer": 0})
    logits, hidden = random_logits()
    step, caches = make_step(logits, hidden)
    cut = sum(row.supervised_tokens for row in FORGET)
    goal = 2.0 * objective.direction(WIDTH)
    terms = objective.loss(step)
    assert objective.direction(WIDTH).norm().item() == pytest.approx(1.0)
    assert terms["forget"].item() == pytest.approx((hidden[:cut] - goal).square().mean().item(), rel=1e-5)
    held = (hidden[cut:] - caches[1]._vectors).square().mean().item()
    assert terms["retain_hidden"].item() == pytest.approx(10.0 * held, rel=1e-5)


def test_retain_terms_are_means_over_their_own_tokens() -> None:
    logits, hidden = random_logits()
    step, caches = make_step(logits, hidden)
    cut = sum(row.supervised_tokens for row in FORGET)
    assert step.retain.nll().item() == pytest.approx(-np.concatenate(by_hand()["retain"]).mean(), rel=1e-5)
    reference = torch.log_softmax(caches[1]._head(caches[1]._vectors), -1)
    current = torch.log_softmax(logits[cut:], -1)
    expected = (reference.exp() * (reference - current)).sum(-1).mean().item()
    assert step.retain.kl().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_gradient_matches_finite_differences(name: str) -> None:
    objective = build_objective(name, {"layer": 0} if name == "rmu" else {})
    logits, hidden = random_logits(torch.float64)

    def loss(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        terms = objective.loss(make_step(z, h)[0])
        return torch.stack([value.double() for value in terms.values()]).sum()

    z, h = logits.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss(z, h).backward()
    tensor, gradient = (h, h.grad) if name == "rmu" else (z, z.grad)
    assert gradient is not None
    for place in [(0, 1), (3, 2), (7, 4)]:
        shift = torch.zeros_like(tensor)
        shift[place] = 1e-2  # losses are computed in float32: a smaller step drowns in rounding
        args = (lambda d: (z, h + d)) if name == "rmu" else (lambda d: (z + d, h))
        slope = (loss(*args(shift)) - loss(*args(-shift))).item() / 2e-2
        assert slope == pytest.approx(gradient[place].item(), rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_declaration_is_complete(name: str) -> None:
    cls = OBJECTIVES.get(name)
    described = cls.describe()
    assert cls.about.name == name
    assert all(described[key] for key in ("summary", "loss", "paper", "kind", "needs"))
    assert len(cls.about.idea.split()) <= 12
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert described[f"parameter {field.name}"].split(": ")[1], field.name


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("npoo", {}, "did you mean 'npo'"),
        ("npo", {"bta": 1}, "did you mean 'beta'"),
        ("npo", {"beta": -1}, "greater than 0"),
        ("npo", {"level": "word"}, "'sequence', 'mean' or 'token'"),
        ("rmu", {"layer": "x"}, "valid integer"),
    ],
)
def test_wrong_settings_get_one_sentence(name: str, parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        build_objective(name, parameters)
    assert says in str(error.value)


def test_a_layer_that_does_not_exist_is_refused_before_training() -> None:
    model, _ = build_tiny()
    with pytest.raises(UserError, match="layers 0 to 1"):
        build_objective("rmu", {"layer": 2}).check(model)
