"""What bounds a training from outside: strength that has to stay, and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge import api
from expunge.errors import UserError
from expunge.metrics.base import Values
from expunge.models.load import load_model
from expunge.pipeline.calibration_passes import FORGET, CalibrationRows, Passes, strengths
from expunge.pipeline.clock import Clock
from expunge.pipeline.entries import held_out
from expunge.pipeline.job import Keep
from expunge.pipeline.keeping import EPSILON, scale_for
from expunge.pipeline.training import fit, train
from expunge.recipe import LoraConfig, ModelConfig, UnlearnConfig
from expunge.scoring.scores import score
from test_unlearn_entries import recipe
from training_jobs import QUICK, RETAIN, job, run, run_until_killed, taught
from training_rows import rows

HELD = RETAIN[:6]
LONG = QUICK.model_copy(update={"max_steps": 12, "lr": 2e-3, "epochs": 50})


def strength(model: Any) -> float:
    """Mean extraction strength on the held-out rows."""
    return float(strengths(score(model, HELD, batch_size=8)).mean())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model: Any = load_model(ModelConfig(id=str(folder))).model
    return dict((model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).state_dict())


# ---------------------------------------------------------------- keep


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["weights", "adapters"])
def test_an_update_is_scaled_down_until_enough_is_kept(lora: LoraConfig | None, tmp_path: Path) -> None:
    # plain ascent without any retain term loses the held-out rows; half of their strength has to stay
    long = LONG if lora is None else LONG.model_copy(update={"lr": 5e-2})
    made = job("grad_ascent", model=taught(), train=long, lora=lora, weights={"forget": 1.0, "nll": 0.0, "kl": 0.0})
    train(made, tmp_path / "whole")
    told = train(job_with(made, Keep(0.5, HELD)), tmp_path / "kept")
    start: Any = load_model(taught()).model
    assert "scaled by" in told["note"]
    assert "6 held-out retain rows" in told["note"]
    alpha = float(told["note"].split("scaled by ")[1].split(":")[0])
    assert 0 < alpha < 1
    first, whole, kept = start.state_dict(), weights(tmp_path / "whole" / "out"), weights(tmp_path / "kept" / "out")
    moved = [name for name in first if not torch.equal(first[name], whole[name])]
    assert moved
    for name in first:
        line = first[name] + alpha * (whole[name] - first[name])
        torch.testing.assert_close(kept[name], line, atol=EPSILON * 1e-1, rtol=0)
    loaded: Any = load_model(ModelConfig(id=str(tmp_path / "kept" / "out"))).model
    wanted = 0.5 * strength(start)
    assert strength(loaded) >= wanted - 1e-6
    ruined: Any = load_model(ModelConfig(id=str(tmp_path / "whole" / "out"))).model
    assert strength(ruined) < wanted


def job_with(made: Any, keep: Keep) -> Any:
    from dataclasses import replace

    return replace(made, keep=keep)


def test_an_update_that_keeps_enough_is_left_as_it_is(tmp_path: Path) -> None:
    made = job(model=taught())
    _, plain = run(made, tmp_path / "plain")
    told = train(job_with(made, Keep(0.01, HELD)), tmp_path / "kept")
    assert told["note"].startswith("the update is kept whole")
    for name, tensor in weights(tmp_path / "kept" / "out").items():
        assert torch.equal(tensor, plain[name]), name


def test_rows_that_the_start_model_does_not_know_hold_nothing(tmp_path: Path) -> None:
    told = train(job(keep=Keep(0.95, rows(4, seed=9))), tmp_path)
    assert "nothing to hold the update against" in told["note"]


class Told(Passes):
    """Passes of a model whose strengths are told: a row breaks at its own α, forget rows fall in a straight line."""

    def __init__(self, breaks: list[float], gone_at: float, end: float = 0.0, rows: bool = True) -> None:
        super().__init__(lambda: pytest.fail("nothing is mixed"), CalibrationRows(HELD, HELD if rows else ()))
        self.breaks, self.gone_at, self.end = np.array(breaks), gone_at, end

    def values(self, alpha: float, kind: str) -> Values:
        if kind == FORGET:
            return np.array([max(self.end, 1 - (1 - self.end) * alpha / self.gone_at)])
        return (alpha < self.breaks).astype(float)


NEVER = 2.0
#: Breaking points of held-out rows, α at which forget rows are gone, what stays of them → the factor at 0.95, and
#: whether it is larger than the one at which these rows keep as much.
FEW = {
    "every row stays": ([NEVER] * 22, 0.7, 0.0, 1.0, False),
    "enough is kept where forget rows are gone": ([0.5, 0.9, 0.95] + [NEVER] * 19, 0.5, 0.0, 0.9, False),
    "one row too many, and rows leave it open": ([0.4, 0.5] + [NEVER] * 20, 0.7, 0.0, 0.97 * 0.7, True),
    "they leave it open only just": ([0.4, 0.5, 0.6] + [NEVER] * 19, 0.55, 0.0, 0.97 * 0.55, True),
    "they forbid more": ([0.4, 0.5, 0.6] + [NEVER] * 19, 0.7, 0.0, 0.6, True),
    "they forbid any": ([0.4, 0.4, 0.4] + [NEVER] * 19, 0.7, 0.0, 0.4, False),
    "one row of eight": ([0.4] + [NEVER] * 7, 0.7, 0.0, 0.97 * 0.7, True),
    "the whole update leaves as much": ([0.4, 0.5] + [NEVER] * 20, 1e-3, 0.8, 0.5, False),
}


@pytest.mark.parametrize(("breaks", "gone_at", "end", "wanted", "further"), FEW.values(), ids=FEW)
def test_few_rows_do_not_bring_forget_rows_back(
    breaks: list[float], gone_at: float, end: float, wanted: float, further: bool
) -> None:
    keep = Keep(0.95, [HELD[0]] * len(breaks))
    alpha, words = scale_for(Told(breaks, gone_at, end), keep)
    assert alpha == pytest.approx(wanted, abs=1.5 * EPSILON)
    assert ("leave the factor open" in words) == further
    assert "tell little" not in words
    enough, _ = scale_for(Told(breaks, gone_at, end, rows=False), keep)  # without forget rows to look at
    assert (alpha > enough) == further


@pytest.mark.parametrize("held", [1, 7])
def test_so_few_held_out_rows_that_they_guard_little_are_told(held: int) -> None:
    _, words = scale_for(Told([NEVER] * held, 0.7), Keep(0.95, [HELD[0]] * held))
    assert "fewer than 8 rows tell little of what stays: give more retain rows" in words


def test_rows_are_held_out_of_training_unless_there_is_a_split_for_it() -> None:
    entry, some = UnlearnConfig(keep=0.9), {"retain": RETAIN}
    trained, held = held_out(entry, some)
    assert (len(trained), len(held)) == (13, 3)
    assert not {id(row) for row in trained} & {id(row) for row in held}
    assert held_out(entry, {**some, "validation": HELD}) == (RETAIN, HELD)
    assert held_out(UnlearnConfig(), some) == (RETAIN, ())


def test_a_run_says_what_was_kept_and_is_not_run_again(tmp_path: Path) -> None:
    made = recipe(tmp_path, keep=0.9)
    result = api.run(made, output=tmp_path / "out", quiet=True)
    assert "held-out retain row" in (tmp_path / "out" / "run.json").read_text()
    assert "held-out retain rows keep 90.0% of their strength" in result.report.read_text()
    assert api.run(made, output=tmp_path / "out", quiet=True).skipped_all


def test_keep_needs_rows(tmp_path: Path) -> None:
    made = recipe(tmp_path, keep=0.9, retain="none")
    bare = made.model_copy(update={"data": made.data.model_copy(update={"retain": None})})
    with pytest.raises(UserError, match="held out of training, and there are 0 retain rows"):
        api.run(bare, output=tmp_path / "out", quiet=True)


# ---------------------------------------------------------------- minutes


def test_enough_time_changes_nothing(tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"schedule": "linear", "warmup": 0.25})
    free, first = run(job(train=settings), tmp_path / "free")
    bound, second = run(job(train=settings.model_copy(update={"minutes": 1e6})), tmp_path / "bound")
    assert free == bound
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_ends_with_its_time(tmp_path: Path) -> None:
    told = train(job(train=LONG.model_copy(update={"minutes": 1e-6})), tmp_path)
    assert told == {"steps": 1, "note": "stopped after 1 of 12 steps: the time was over"}


def test_the_learning_rate_runs_on_the_clock_where_that_is_ahead(tmp_path: Path, monkeypatch: Any) -> None:
    # each step takes a quarter of the time, and the plan has twelve: three times too many
    monkeypatch.setattr(Clock, "read", lambda clock: clock.share * clock.limit + 15.0 if clock.limit else 0.0)
    rates: list[float] = []
    from transformers import TrainerCallback

    class Rates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
            rates.append(lr_scheduler.get_last_lr()[0])

    settings = LONG.model_copy(update={"minutes": 1.0, "schedule": "linear"})
    with fit(job(train=settings), tmp_path, callbacks=[Rates()]) as fitted:
        assert fitted.steps == 4
    # the rate is set before a step's time is known: it is one step behind the clock, never ahead of the plan
    assert rates == pytest.approx([LONG.lr * left / 12 for left in (11, 9, 6, 3)])


def test_the_time_before_a_kill_is_counted(tmp_path: Path) -> None:
    settings = LONG.model_copy(update={"minutes": 5.0})

    run_until_killed(job(train=settings), tmp_path, 4)
    from expunge.pipeline.trainer import remembered

    (checkpoint,) = sorted((tmp_path / "checkpoints").glob("checkpoint-2"))
    assert 0 < remembered(checkpoint)["seconds"] < 300
    clock = Clock(300.0, {"seconds": 250.0})
    assert clock.read() >= 250


def test_chunks_and_time_are_not_combined(tmp_path: Path) -> None:
    made = recipe(tmp_path, method="sugd", parameters={"chunk": 2, "layers": 1}, train={"minutes": 1, "batch_size": 1})
    with pytest.raises(UserError, match="would leave the last chunks out"):
        api.run(made, output=tmp_path / "out", quiet=True)
