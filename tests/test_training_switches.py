"""What is orthogonal to objectives: kept prefixes, wrappers of gradients, chunks, memory, checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.data.collate import pad_right
from expunge.errors import UserError
from expunge.methods.base import OBJECTIVES, WeightObjective
from expunge.methods.step import ForgetView
from expunge.models import prefix as prefixes
from expunge.models import storage
from expunge.models.passes import Forward
from expunge.models.prefix import Prefix, frozen_depth
from expunge.models.tiny import build_tiny
from expunge.pipeline import training
from expunge.pipeline.gradients import two_sided
from expunge.pipeline.training import train
from expunge.recipe import LoraConfig, RelearningConfig, TrainConfig
from training_jobs import QUICK, RETAIN, job, run

LAST_LAYER = [r"layers\.1\.", r"\.norm\."]
LONG = QUICK.model_copy(update={"max_steps": 8})


def forward_all(model: Any, batch: Any, kept: Prefix | None, packs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    made = Forward(model, batch, 1, True, packs, kept)
    return made.logits, made.hidden


@pytest.mark.parametrize("packs", [True, False])
def test_a_kept_prefix_gives_the_same_logits_from_ram_and_from_a_file(
    packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build_tiny()
    batch, again = pad_right(RETAIN[:6], range(6), 0), pad_right(RETAIN[3:9], range(3, 9), 0)
    plain = [forward_all(model, rows, None, packs) for rows in (batch, again)]
    for limit in (1 << 30, 0):
        monkeypatch.setattr(storage, "RAM_LIMIT", limit)
        kept = Prefix(1, [len(row.input_ids) for row in RETAIN], 128, tmp_path / "prefix.bin")
        for rows, expected in zip((batch, again, batch), (*plain, plain[0]), strict=True):
            for got, wanted in zip(forward_all(model, rows, kept, packs), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert sum(kept._known) == 9
        assert (tmp_path / "prefix.bin").exists() == (limit == 0)
    assert "forward" not in vars(model.model.layers[0]), "the model is as it was"


def test_frozen_layers_do_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build_tiny()
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(0))
    kept = Prefix(1, [len(row.input_ids) for row in RETAIN], 128)
    inner = type(model.model.layers[0].mlp).forward
    ran = []
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: ran.append(self) or inner(self, x))
    for _ in range(3):
        _ = Forward(model, pad_right(RETAIN[:4], range(4), 0), None, True, True, kept).logits
    assert ran.count(model.model.layers[0].mlp) == 1
    assert ran.count(model.model.layers[1].mlp) == 3


@pytest.mark.parametrize(
    ("patterns", "depth"),
    [
        ([r"layers\.1\."], 1),
        ([r"layers\.0\."], 0),
        ([r"model\.norm"], 2),
        ([r"embed_tokens"], 0),
        ([r"layers\.1\.mlp\.down_proj", r"norm"], 0),
    ],
)
def test_frozen_depth_counts_layers_below_the_first_trained_parameter(patterns: list[str], depth: int) -> None:
    model = training.prepare_parameters(build_tiny()[0], job(trainable=patterns))
    assert frozen_depth(model) == depth


@pytest.mark.parametrize("name", ["npo", "rmu", "grad_diff", "undial"])
def test_training_is_the_same_with_and_without_the_kept_prefix(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = [r"layers\.1\.mlp\.down_proj"]
    opened = []
    real = prefixes.open_prefix
    monkeypatch.setattr(training, "open_prefix", lambda *a: opened.append(real(*a)) or opened[-1])
    made = job(name, trainable=patterns, train=LONG, weights={"forget": 1.0, "nll": 1.0, "kl": 1.0})
    kept = run(made, tmp_path / "kept")
    assert opened[0].depth == 1
    monkeypatch.setattr(training, "open_prefix", lambda *a: None)
    plain = run(made, tmp_path / "plain")
    for left, right in zip(kept[0], plain[0], strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)


def quadratic(forget: torch.Tensor, retain: torch.Tensor, start: torch.Tensor) -> tuple[Any, Any]:
    """A parameter, and a backward of ½(θ−a)ᵀF(θ−a) and ½(θ−b)ᵀ(θ−b) with diagonal F."""
    parameter = start.clone().requires_grad_()

    def backward(side: str) -> None:
        target, scale = (retain, torch.ones(2)) if side == "retain" else (forget, torch.tensor([4.0, 1.0]))
        (0.5 * (scale * (parameter - target).square()).sum()).backward()

    return parameter, backward


def test_sam_takes_the_forget_gradient_up_its_own_direction() -> None:
    forget, retain, start = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.5, 0.5])
    parameter, backward = quadratic(forget, retain, start)
    two_sided([parameter], backward, rho=0.1)
    plain = torch.tensor([4.0, 1.0]) * (start - forget)
    moved = start + 0.1 * plain / plain.norm()
    expected = torch.tensor([4.0, 1.0]) * (moved - forget) + (start - retain)
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, expected)
    assert torch.equal(parameter.detach(), start), "the parameters are back exactly"


@pytest.mark.parametrize("rho", [None, 0.1])
def test_the_forget_gradient_is_taken_where_relearning_leads(rho: float | None) -> None:
    forget, retain, start = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.5, 0.5])
    parameter, backward = quadratic(forget, retain, start)
    two_sided([parameter], backward, rho=rho, relearning=RelearningConfig(steps=3, lr=0.1))
    moved = start - 0.3 * (start - forget).sign()  # no step crosses the goal
    curve = torch.tensor([4.0, 1.0])
    if rho is not None:
        plain = curve * (moved - forget)
        moved = moved + rho * plain / plain.norm()
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, curve * (moved - forget) + (start - retain))
    assert torch.equal(parameter.detach(), start), "the parameters are back exactly"


@pytest.mark.parametrize("name", ["npo", "rmu", "erase"])
def test_looking_ahead_at_relearning_does_not_depend_on_how_a_step_is_split(name: str, tmp_path: Path) -> None:
    ahead = {"relearning": RelearningConfig(steps=2, lr=1e-3)}
    whole, _ = run(job(name, **ahead), tmp_path / "whole")
    parts, _ = run(job(name, **ahead, train=QUICK.model_copy(update={"accumulation": 4})), tmp_path / "parts")
    plain, _ = run(job(name), tmp_path / "plain")
    for left, right in zip(whole, parts, strict=True):
        assert left == pytest.approx(right, rel=5e-3, abs=2e-3)  # the sign of a gradient near zero
    assert whole[-1] != plain[-1]


@pytest.mark.parametrize("conflict", [True, False])
def test_projection_takes_out_what_points_against_the_retain_gradient(conflict: bool) -> None:
    start = torch.tensor([0.5, 0.5])
    forget = torch.tensor([1.0, 0.0]) if conflict else torch.tensor([0.0, 0.0])
    parameter, backward = quadratic(forget, torch.tensor([0.0, 0.4]), start)
    two_sided([parameter], backward, project=True)
    f = torch.tensor([4.0, 1.0]) * (start - forget)
    r = start - torch.tensor([0.0, 0.4])
    assert (f @ r < 0) == conflict
    projected = f - (f @ r) / (r @ r) * r if conflict else f
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, projected + r)
    if conflict:
        assert abs(float((parameter.grad - r) @ r)) < 1e-6


@pytest.mark.parametrize(
    "wrapper", [{"sam": 0.05}, {"gradient_projection": True}, {"sam": 0.05, "gradient_projection": True}]
)
@pytest.mark.parametrize("name", ["npo", "rmu", "grad_diff"])
def test_wrappers_do_not_depend_on_how_a_step_is_split(name: str, wrapper: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = run(job(name, **wrapper), tmp_path / "whole")
    parts, _ = run(job(name, **wrapper, train=QUICK.model_copy(update={"accumulation": 4})), tmp_path / "parts")
    plain, _ = run(job(name), tmp_path / "plain")
    for left, right in zip(whole, parts, strict=True):
        assert left == pytest.approx(right, rel=5e-4, abs=2e-4)
    assert whole[0] == pytest.approx(plain[0], rel=1e-4, abs=1e-5), "what is reported is the loss at the parameters"
    if "sam" in wrapper:
        assert whole[-1] != plain[-1], "but the step is another one"


def test_a_vanishing_sam_radius_is_no_wrapper(tmp_path: Path) -> None:
    _, wrapped = run(job("grad_diff", sam=1e-9), tmp_path / "sam")
    _, plain = run(job("grad_diff"), tmp_path / "plain")
    start = build_tiny()[0].state_dict()
    for name, tensor in plain.items():
        assert (tensor - wrapped[name]).norm() <= 0.02 * (tensor - start[name]).norm() + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_gradient_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    whole, _ = run(job(name), tmp_path / "whole")
    spared, _ = run(job(name, train=QUICK.model_copy(update={"gradient_checkpointing": True})), tmp_path / "spared")
    for left, right in zip(whole, spared, strict=True):
        assert left == pytest.approx(right, rel=2e-4, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in OBJECTIVES.names() if not issubclass(OBJECTIVES.get(name), WeightObjective)]
)
def test_every_objective_trains_adapters(name: str, tmp_path: Path) -> None:
    curve, _ = run(job(name, lora=LoraConfig(rank=4)), tmp_path)
    assert len(curve) >= 4
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_chunk_starts_with_a_fresh_optimizer_and_schedule(tmp_path: Path) -> None:
    """Two chunks in one run against two runs, the second from the first one's model."""
    from dataclasses import replace

    from expunge.recipe import ModelConfig

    settings = TrainConfig(epochs=1, lr=1e-3, batch_size=4, precision="float32", schedule="linear", max_grad_norm=1e9)
    whole = job("sugd", train=settings, retain_batch=1, trainable=["."])
    object.__setattr__(whole.objective, "chunk", 4)
    chunked = whole.plan()
    assert chunked.restarts == (0, 1)
    _, together = run(whole, tmp_path / "whole")
    start = whole.model
    for part, chunk in enumerate((range(4), range(4, 8))):
        rows = chunked.micro_batches[part].rows["retain"]
        retain = [whole.rows[row] for row in rows]
        single = replace(whole, model=start, forget=[whole.forget[i] for i in chunk], retain=retain)
        _, weights = run(single, tmp_path / f"part-{part}")
        start = ModelConfig(id=str(tmp_path / f"part-{part}" / "out"))
    first = build_tiny()[0].state_dict()
    for name, tensor in together.items():
        moved = (tensor - first[name]).norm()
        assert (tensor - weights[name]).norm() <= 0.02 * moved + 1e-6, name


@pytest.mark.parametrize("name", ["pdu", "adaptive_rmu"])
def test_what_an_objective_remembers_survives_a_kill(name: str, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, terms: Mapping[str, float]) -> None:
        if step == 6:
            raise Killed

    made = job(name, train=LONG)
    if name == "adaptive_rmu":
        object.__setattr__(made.objective, "drift", True)
    whole, _ = run(made, tmp_path / "whole")
    with pytest.raises(Killed):
        train(made, tmp_path / "killed", on_step=kill)
    curve, _ = run(made, tmp_path / "killed")
    assert len(curve) == 4
    for left, right in zip(whole[4:], curve, strict=True):
        assert left == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("rmu", {"view": ForgetView(cap=2.0)}, "`cap` is about log-probs"),
        ("rmu", {"view": ForgetView(temperature=2.0)}, "`temperature` is about log-probs"),
        ("task_negation", {"lora": LoraConfig(rank=4)}, "changes whole weights"),
        ("task_negation", {"weights": {"nll": 1.0}}, "would subtract what a retain term taught"),
        ("task_negation", {"sam": 0.1}, "learns the forget rows first"),
        ("grad_ascent", {"gradient_projection": True}, "needs a retain term"),
    ],
)
def test_contradictions_are_refused_before_the_first_step(
    name: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        train(job(name, **changes), tmp_path)


@pytest.mark.parametrize("changes", [{"sam": 0.1}, {"gradient_projection": True}])
def test_sharded_training_is_refused_where_whole_gradients_are_needed(changes: dict[str, Any]) -> None:
    for kind in ("FSDP", "DEEPSPEED"):
        with pytest.raises(UserError, match="needs whole parameters"):
            training._check_sharding(job("npo", **changes), kind)
        training._check_sharding(job("npo"), kind)
        with pytest.raises(UserError, match="method task_negation needs whole parameters"):
            training._check_sharding(job("task_negation"), kind)
    training._check_sharding(job("npo", **changes), "MULTI_GPU")


def test_cap_stops_the_loss_of_rows_that_passed_it(tmp_path: Path) -> None:
    free, _ = run(job("grad_ascent", train=LONG), tmp_path / "free")
    start = -free[0]["forget"]
    capped, _ = run(job("grad_ascent", train=LONG, view=ForgetView(cap=start * 0.5)), tmp_path / "capped")
    assert all(step["forget"] == 0 for step in capped), "every row had passed it at the start"
