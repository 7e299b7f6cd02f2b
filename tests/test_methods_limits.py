"""What objectives become at the ends of their parameters and of the logits, and what others compute for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.methods.base import build_objective
from expunge.methods.step import Step, Totals
from expunge.models.passes import Forward
from expunge.models.reference import Needs, build_reference
from expunge.models.tiny import build_tiny, build_tokenizer
from method_cases import EVERY, FORGET_TOKENS, FORMS, SIDES, TOKENS, VOCABULARY, WIDTH, known, outputs, step
from method_steps import Start, random_start
from training_rows import supervised

#: A logit beside which all others vanish.
SURE = 60.0
TARGETS = torch.from_numpy(known()["forget"].flat[0]).long()


def forget_loss(name: str, logits: Tensor, start: Start | None = None, **parameters: Any) -> Tensor:
    return build_objective(name, parameters).loss(step(logits, outputs()[1], start=start))["forget"]


def gradient(name: str, logits: Tensor | None = None, start: Start | None = None, **parameters: Any) -> Tensor:
    """Of the forget loss over the logits."""
    logits = (outputs()[0] if logits is None else logits).clone().requires_grad_()
    forget_loss(name, logits, start, **parameters).backward()
    assert logits.grad is not None
    return logits.grad


def started_here(logits: Tensor) -> Start:
    """A start model whose logits are the given ones: its head is the identity."""
    width = torch.eye(VOCABULARY, dtype=logits.dtype)
    return Start(logits, width, outputs()[1])


def one_hot(tokens: Tensor) -> Tensor:
    """Logits of a model that is sure of these tokens at the forget positions, and random elsewhere."""
    logits = outputs()[0]
    logits[:FORGET_TOKENS] = SURE * torch.nn.functional.one_hot(tokens, VOCABULARY)
    return logits


def flat_logits() -> Tensor:
    logits = outputs()[0]
    logits[:FORGET_TOKENS] = 1.5
    return logits


OTHERS = (TARGETS + 1) % VOCABULARY


@pytest.mark.parametrize(
    ("name", "parameters", "logits", "expected"),
    [
        ("max_entropy", {"coefficient": 1}, flat_logits(), 0),
        ("max_entropy", {"coefficient": 1, "divergence": "uniform"}, flat_logits(), 0),
        ("max_entropy", {"coefficient": 1}, one_hot(TARGETS), math.log(VOCABULARY)),
        ("max_entropy", {"coefficient": 1}, one_hot(OTHERS), math.log(VOCABULARY)),
        ("pdu", {}, flat_logits(), 0),
        ("pdu", {}, one_hot(TARGETS), (SURE * (1 - 1 / VOCABULARY)) ** 2),
        ("ceu", {}, flat_logits(), math.log(VOCABULARY)),
        ("ceu", {}, one_hot(OTHERS), 0),
        ("ceu", {}, one_hot(TARGETS), SURE),
        ("ihl", {}, one_hot(TARGETS), 2),
        ("ihl", {}, one_hot(OTHERS), 0),
        ("ihl", {}, flat_logits(), 1),
        ("undial", {"beta": 1e4}, flat_logits(), math.log(VOCABULARY)),
        ("likelihood_capped_ga", {"cap": 3}, one_hot(TARGETS), 3),
        ("likelihood_capped_ga", {"cap": 3}, one_hot(OTHERS), 0),
        ("eul", {}, one_hot(OTHERS), 1 / SURE),
        ("wga", {}, one_hot(OTHERS), 0),
        ("satimp", {}, one_hot(TARGETS), 0),
        ("wtnpo", {}, one_hot(OTHERS), 0),
    ],
)
def test_values_at_the_ends(name: str, parameters: dict[str, Any], logits: Tensor, expected: float) -> None:
    assert forget_loss(name, logits, **parameters).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("logits", [one_hot(TARGETS), one_hot(OTHERS), flat_logits()], ids=["known", "gone", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["eul", "satimp", "wga", "wtnpo", "ceu", "undial", "ihl", "flat", "npo", "dpo", "pdu"])
def test_gradients_are_finite_at_the_ends(name: str, dtype: torch.dtype, logits: Tensor) -> None:
    given = logits.clone().to(dtype).requires_grad_()
    build_objective(name, {}).loss(step(given, outputs(dtype)[1]))["forget"].backward()
    assert given.grad is not None
    assert given.grad.isfinite().all()


SAME_GRADIENT: list[tuple[str, tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = [
    ("no weight", ("wga", {"beta": 0}), ("grad_ascent", {})),
    ("no weight at all", ("satimp", {"beta1": 0, "beta2": 0}), ("grad_ascent", {})),
    ("saturation alone", ("satimp", {"beta1": 2, "beta2": 0}), ("wga", {"beta": 2})),
    ("the weight of npo", ("wtnpo", {"beta": 0.7, "alpha": 0}), ("npo", {"beta": 0.7, "level": "token"})),
    ("a cap out of reach", ("likelihood_capped_ga", {"cap": 1e6}), ("simnpo", {"beta": 1e-7, "coefficient": 1})),
    ("no preference yet", ("npo", {"beta": 1e-7, "level": "token"}), ("grad_ascent", {})),
]


@pytest.mark.parametrize(("one", "other"), [case[1:] for case in SAME_GRADIENT], ids=[c[0] for c in SAME_GRADIENT])
def test_objectives_that_share_a_gradient(one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]) -> None:
    gradients = [gradient(name, **parameters) for name, parameters in (one, other)]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_wtnpo_weighs_with_the_probability_alone_where_the_model_is_the_start_model() -> None:
    """2p^(β+α) / (p^β + p^β) = p^α."""
    logits = outputs()[0]
    here = gradient("wtnpo", start=started_here(logits), beta=4.0, alpha=1.5)
    torch.testing.assert_close(here, gradient("wga", beta=1.5))


def test_npo_approaches_gradient_ascent_as_beta_vanishes() -> None:
    """arXiv 2404.05868, proposition 1: the gradient of the sum over each answer's tokens."""
    lengths = torch.tensor(supervised(SIDES["forget"]))
    of_sums = gradient("grad_ascent") * FORGET_TOKENS / len(lengths)
    torch.testing.assert_close(gradient("npo", beta=1e-7), of_sums, rtol=1e-5, atol=1e-8)


def test_undial_without_lowering_is_distillation() -> None:
    """β = 0: the cross-entropy is KL(start ‖ model) plus the start model's entropy."""
    made = step(*outputs())
    start = random_start(TOKENS, VOCABULARY, WIDTH, torch.float64).logits[:FORGET_TOKENS].log_softmax(-1)
    entropy = -(start.exp() * start).sum(-1).mean()
    loss = build_objective("undial", {"beta": 0}).loss(made)["forget"]
    assert loss.item() == pytest.approx((made.forget.kl() + entropy).item(), rel=1e-9)


def test_undial_of_the_model_itself_is_ceu_as_beta_grows() -> None:
    logits = outputs()[0]
    start = started_here(logits.clone())
    torch.testing.assert_close(gradient("undial", start=start, beta=1e4), gradient("ceu"))


def test_ceu_pulls_the_target_by_its_probability() -> None:
    """arXiv 2503.01224: the gradient is p − softmax(z without target): p at the target, and no more elsewhere."""
    made = gradient("ceu")[:FORGET_TOKENS] * FORGET_TOKENS
    p = outputs()[0][:FORGET_TOKENS].softmax(-1).gather(-1, TARGETS[:, None])
    torch.testing.assert_close(made.gather(-1, TARGETS[:, None]), p)
    torch.testing.assert_close(made.sum(-1), torch.zeros(FORGET_TOKENS, dtype=torch.float64))


def test_flat_can_tell_the_answers_apart_only_if_the_template_is_likelier() -> None:
    """Each divergence falls as the template becomes likely, and rises as the forget answer does."""
    for divergence in ("total_variation", "kl", "js", "pearson"):
        logp = gradient("flat", divergence=divergence)
        lengths = supervised(EVERY)
        at = sum(lengths[:3])
        template = torch.cat([torch.from_numpy(part) for part in known()["forget_alternatives"].targets]).long()
        own = logp.gather(-1, torch.cat([TARGETS, template, torch.zeros(TOKENS - at - len(template)).long()])[:, None])
        assert (own[:at] > 0).all(), divergence
        assert (own[at : at + len(template)] < 0).all(), divergence


def test_rows_past_the_cap_are_left_alone() -> None:
    """arXiv 2406.09179: of three rows, the one whose mean NLL lies above the cap has no gradient."""
    losses = [-part.mean() for part in known()["forget"].logp]
    cap = sorted(losses)[1] + 1e-6
    made = gradient("likelihood_capped_ga", cap=cap)[:FORGET_TOKENS].split(supervised(SIDES["forget"]))
    assert [bool(part.any()) for part in made] == [bool(loss < cap) for loss in losses]


def test_eul_counts_only_rows_of_which_it_sees_something() -> None:
    lengths = supervised(SIDES["forget"])
    selected = torch.arange(FORGET_TOKENS) >= lengths[0]
    made = build_objective("eul", {}).loss(step(*outputs(), selected=selected))["forget"]
    assert made.item() == pytest.approx(sum(-1 / part.mean() for part in known()["forget"].logp[1:]) / 3)


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"finetune"}))
def test_a_step_makes_known_answers_less_likely(name: str) -> None:
    """A model that is fairly sure of the forget answers, moved a little against the gradient of the forget loss."""
    logits = outputs()[0]
    logits[torch.arange(FORGET_TOKENS), TARGETS] += 4
    slope = gradient(name, logits, started_here(logits))
    before, after = (step(z, outputs()[1]).forget for z in (logits, logits - 1e-4 * slope / slope.norm()))
    if name in ("idk_nll", "idk_ap"):  # they only make declining likelier
        before, after = before.alternatives, after.alternatives
        assert after.nll() < before.nll()
    else:
        assert after.nll() > before.nll()


def test_dpo_equals_trl(tmp_path: Path) -> None:
    """Loss and gradient of trl's DPOTrainer, on its own batch, times the 2/β of the unlearning papers."""
    beta, trained, model, start = 0.3, build_tiny(0)[0], build_tiny(0)[0], build_tiny(1)[0]
    won, lost, expected = by_trl(trained, build_tiny(1)[0], beta, tmp_path)
    sides = {"forget": lost, "forget_alternatives": won}
    every = [*lost, *won]
    cache = build_reference(start, every, Needs(logprobs=range(6)))
    totals = Totals(dict.fromkeys(sides, 3), {side: sum(supervised(rows)) for side, rows in sides.items()})
    made = Step(Forward(model, pad_right(every, range(6), 0)), dict.fromkeys(sides, 3), cache, None, totals, 1.0)
    loss = build_objective("dpo", {"beta": beta}).loss(made)["forget"]
    loss.backward()
    assert loss.item() == pytest.approx(2 / beta * expected, rel=1e-5)
    for ours, theirs in zip(model.parameters(), trained.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, 2 / beta * theirs.grad, rtol=1e-3, atol=1e-5)


def by_trl(model: Any, start: Any, beta: float, folder: Path) -> tuple[list[Encoded], list[Encoded], float]:
    """Preferred rows, other rows and the loss of a batch of trl; leaves its gradient in the model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = [
        {"prompt": "Question: who is she? Answer:", "chosen": " I do not know.", "rejected": " The author."},
        {"prompt": "Where?", "chosen": " no", "rejected": " In the old town, by the river."},
        {"prompt": "He can be reached", "chosen": " at the office", "rejected": " at 900-11"},
    ]
    given = {"per_device_train_batch_size": 3, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    trainer = DPOTrainer(
        model,
        ref_model=start,
        args=DPOConfig(str(folder), beta=beta, **given),
        train_dataset=Dataset.from_list(data),
        processing_class=build_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    columns = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    rows = [encoded(*row) for row in zip(*columns, strict=True)]
    return rows[:3], rows[3:], loss.item()


def encoded(ids: Tensor, present: Tensor, completion: Tensor) -> Encoded:
    """A row of trl's batch as one of ours."""
    length, prompt = int(present.sum()), int(present.sum() - completion.sum())
    row = ids[:length].to(torch.int32).numpy()
    return Encoded(Example(id="0", prompt="p", answer="a"), row, prompt, length - prompt - 1, 0)
