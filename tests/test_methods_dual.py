"""The dual variable of pdu, followed over steps (arXiv 2506.05314)."""

from __future__ import annotations

import pytest

from expunge.methods.base import build_objective
from expunge.methods.step import Memory
from method_cases import known, outputs, pdu, step

NLL = pdu(known())["monitor_retain_nll"]
SETTINGS = {"epsilon": 2.0, "dual": 10.0, "dual_rate": 3.0}


def weights(epochs: list[int], losses: list[float], memory: Memory | None = None, **settings: object) -> list[float]:
    """The weight of the constraint in each step; `losses` are the retain NLLs that the steps end with."""
    objective, memory = build_objective("pdu", {**SETTINGS, **settings}), memory or Memory()
    seen = []
    for epoch, loss in zip(epochs, losses, strict=True):
        for _ in range(2):  # micro-batches of one step see the same weight
            terms = objective.loss(step(*outputs(), memory=memory, epoch=epoch))
            seen.append(terms["retain_constraint"].item() / NLL)
        objective.after_step(memory, {"forget": 1.0, "monitor_retain_nll": loss})
        assert seen[-1] == pytest.approx(seen[-2], rel=1e-12)
        seen.pop()
    return seen


def test_it_rises_while_the_constraint_is_broken_and_falls_while_it_holds() -> None:
    made = weights([0, 0, 0, 0], [3.0, 2.5, 1.0, 0.0], warmup=0)
    assert made == pytest.approx([10, 10 + 3, 13 + 1.5, 14.5 - 3])


def test_it_never_becomes_negative() -> None:
    assert weights([0, 0, 0], [-5.0, 2.5, 2.0], warmup=0) == pytest.approx([10, 0, 1.5])


def test_it_stays_put_in_the_warm_up() -> None:
    assert weights([0, 1, 2, 2, 3], [3.0] * 5, warmup=2) == pytest.approx([10, 10, 10, 13, 16])


def test_by_epoch_it_moves_with_the_mean_of_the_epoch() -> None:
    made = weights([0, 0, 1, 1, 2], [3.0, 4.0, 2.0, 1.0, 9.0], update="epoch", warmup=0)
    assert made == pytest.approx([10, 10, 14.5, 14.5, 13])


def test_by_epoch_it_stays_put_until_the_warm_up_is_over() -> None:
    made = weights([0, 1, 2, 3], [3.0, 4.0, 5.0, 2.0], update="epoch", warmup=2)
    assert made == pytest.approx([10, 10, 16, 25])


@pytest.mark.parametrize("update", ["step", "epoch"])
def test_a_resumed_training_goes_on_where_it_stopped(update: str) -> None:
    """Everything lives in numbers that a checkpoint keeps."""
    epochs, losses = [0, 0, 1, 1, 2, 2], [3.0, 4.0, 1.0, 2.5, 3.5, 3.0]
    whole = weights(epochs, losses, update=update, warmup=1)
    for stop in range(1, 6):
        memory = Memory()
        before = weights(epochs[:stop], losses[:stop], memory, update=update, warmup=1)
        kept = Memory(numbers={name: float(value) for name, value in memory.numbers.items()})
        after = weights(epochs[stop:], losses[stop:], kept, update=update, warmup=1)
        assert before + after == pytest.approx(whole)
