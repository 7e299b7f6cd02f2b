"""What a loss sees of its rows: means, retain terms, temperature, cap, quantile, and logits in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from expunge.methods import step as step_module
from expunge.methods.base import build_objective
from expunge.methods.step import ForgetView
from method_cases import FORGET_TOKENS, FORMS, HALF, SIDES, TOKENS, WIDTH, Side, known, log_softmax, outputs, step
from method_steps import random_outputs
from training_rows import supervised

LENGTHS = supervised(SIDES["forget"])


def test_retain_terms_are_means_over_their_own_tokens() -> None:
    made, retain = step(*outputs()), known()["retain"]
    _, logits, start = retain.flat
    reference, current = log_softmax(start), log_softmax(logits)
    assert made.retain.nll().item() == pytest.approx(-np.concatenate(retain.logp).mean(), rel=1e-12)
    divergence = (np.exp(reference) * (reference - current)).sum(-1).mean()
    assert made.retain.kl().item() == pytest.approx(divergence, rel=1e-12)


def test_what_rows_say_of_themselves() -> None:
    forget = step(*outputs(), selected=torch.from_numpy(HALF)).forget
    halves = [int(part.sum()) for part in np.split(HALF, np.cumsum(LENGTHS)[:-1])]
    assert len(forget) == 3
    assert forget.lengths.tolist() == halves
    assert forget.first.tolist() == [0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]]
    assert forget.total_tokens == sum(halves)
    assert forget.sequence_logprobs.tolist() == pytest.approx([p.sum() for p in known(HALF)["forget"].logp])
    assert forget.alternatives.sequence_logprobs.tolist() == pytest.approx(
        [part.sum() for part in known()["forget_alternatives"].logp]
    )


def test_scale_multiplies_every_mean() -> None:
    one, two = (step(*outputs(), scale=scale) for scale in (1.0, 2.0))
    assert two.forget.nll().item() == pytest.approx(2 * one.forget.nll().item())
    assert two.retain.kl().item() == pytest.approx(2 * one.retain.kl().item())


@pytest.mark.parametrize("name", sorted(FORMS))
def test_temperature_divides_the_logits_of_the_forget_answers(name: str) -> None:
    """arXiv 2406.09179; both models' distributions are those of softmax(z / T)."""
    made = step(*outputs(), view=ForgetView(temperature=2.0))
    expected = FORMS[name][0](known(temperature=2.0))
    expected = expected if isinstance(expected, dict) else {"forget": expected}
    made_terms = build_objective(name, {}).loss(made)
    assert {term: value.item() for term, value in made_terms.items()} == pytest.approx(expected, rel=1e-9)


def lowest(side: Side, part: float) -> np.ndarray:
    """A mask over the forget tokens: the given part of each answer, those of lowest loss."""
    masks = []
    for logp in side.logp:
        chosen = np.zeros(len(logp), bool)
        chosen[np.argsort(-logp, kind="stable")[: math.ceil(part * len(logp))]] = True
        masks.append(chosen)
    return np.concatenate(masks)


@pytest.mark.parametrize("part", [0.8, 0.3, 0.01])
def test_quantile_keeps_the_tokens_of_lowest_loss(part: float) -> None:
    made = step(*outputs(), view=ForgetView(quantile=part)).forget
    assert made.weight.bool().numpy().tolist() == lowest(known()["forget"], part).tolist()
    kept = known(lowest(known()["forget"], part))["forget"]
    assert made.mean_per_row(made.token_logprobs).tolist() == pytest.approx([part.mean() for part in kept.logp])


def test_quantile_counts_selected_tokens_alone() -> None:
    made = step(*outputs(), selected=torch.from_numpy(HALF), view=ForgetView(quantile=0.5)).forget
    expected = HALF.copy()
    expected[HALF] = lowest(known(HALF)["forget"], 0.5)
    assert made.weight.bool().numpy().tolist() == expected.tolist()


def test_cap_leaves_out_rows_that_have_passed_it() -> None:
    losses = [-part.mean() for part in known()["forget"].logp]
    for cap in (min(losses) - 0.1, np.mean(sorted(losses)[:2]), max(losses) + 0.1):
        made = step(*outputs(), view=ForgetView(cap=float(cap))).forget
        assert made.weight.tolist() == np.repeat([float(loss < cap) for loss in losses], LENGTHS).tolist()


def test_cap_is_about_the_tokens_that_the_loss_sees() -> None:
    losses = [-part.mean() for part in known(HALF)["forget"].logp]
    cap = float(np.mean(sorted(losses)[:2]))
    made = step(*outputs(), selected=torch.from_numpy(HALF), view=ForgetView(cap=cap)).forget
    assert made.weight.tolist() == (HALF * np.repeat([loss < cap for loss in losses], LENGTHS)).tolist()


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"idk_nll", "idk_ap", "finetune"}))
def test_excluded_tokens_have_no_gradient(name: str) -> None:
    logits, hidden = outputs()
    logits.requires_grad_()
    losses = [-part[mask].mean() for part, mask in zip(known()["forget"].logp, split(0.6), strict=True)]
    view = ForgetView(cap=float(np.mean(sorted(losses)[1:])), quantile=0.6)
    made = step(logits, hidden, view=view)
    seen = made.forget.weight.bool()
    assert 0 < seen.sum() < FORGET_TOKENS
    build_objective(name, {}).loss(made)["forget"].backward()
    assert logits.grad is not None
    touched = logits.grad[:FORGET_TOKENS].abs().sum(-1) > 0
    assert not touched[~seen].any()
    assert touched[seen].any()


def split(part: float) -> list[np.ndarray]:
    return np.split(lowest(known()["forget"], part), np.cumsum(LENGTHS)[:-1])


@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_the_view_is_of_the_forget_side_alone(retain: str) -> None:
    view = ForgetView(temperature=3.0, cap=1.0, quantile=0.2)
    plain, viewed = (getattr(step(*outputs(), view=v).retain, retain)().item() for v in (ForgetView(), view))
    assert viewed == pytest.approx(plain, rel=1e-12)


Function = Callable[..., Tensor]


def spread(logits: Tensor, targets: Tensor, start: Tensor | None = None) -> Tensor:
    """Something of all logits, the target, and the start model's logits."""
    own = logits.gather(-1, targets[:, None])[:, 0] * logits.softmax(-1).square().sum(-1)
    return own if start is None else own + (logits * start.sigmoid()).sum(-1)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 512])
def test_logits_in_pieces_give_what_whole_ones_give(
    piece: int, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "PIECE", piece)
    gradients, values = [], []
    for whole in (False, True):
        logits, hidden = outputs()
        logits.requires_grad_()
        rows = step(logits, hidden).forget
        if whole:
            start = rows._cache.head_logits(rows._cache.head_inputs(rows.index, logits.device))
            made = spread(rows.logits, rows.targets, start if reference else None)
        else:
            made = rows.over_logits(spread, reference=reference)
        rows.mean_tokens(made).backward()
        assert logits.grad is not None
        gradients.append(logits.grad)
        values.append(made.detach())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_half_precision_logits_are_wide_in_a_piece() -> None:
    logits, hidden = outputs(torch.bfloat16)
    seen: list[torch.dtype] = []

    def function(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return logits.logsumexp(-1)

    assert step(logits, hidden, memory=None).forget.over_logits(function).dtype == torch.float32
    assert set(seen) == {torch.float32}


def kept_bytes(run: Callable[[], Tensor], known: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass beside the storage of a known tensor."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    storages.pop(known.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("name", ["ceu", "ihl", "max_entropy", "pdu", "undial"])
def test_losses_over_the_vocabulary_keep_no_copy_of_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "PIECE", 4)
    logits, hidden = random_outputs(TOKENS, 5000, WIDTH)
    logits.requires_grad_()
    made = step(logits, hidden)
    forget = made.forget
    size = forget.logits.numel() * forget.logits.element_size()
    assert kept_bytes(lambda: spread(forget.logits, forget.targets).sum(), made.forget._forward.logits) >= size
    loss = build_objective(name, {}).loss
    assert kept_bytes(lambda: loss(made)["forget"], made.forget._forward.logits) < size / 20
