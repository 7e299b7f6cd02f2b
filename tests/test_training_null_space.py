"""Updates outside the directions that retain rows use: the projector, the optimizer, whole trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from expunge.errors import UserError
from expunge.models.load import load_model
from expunge.models.lora import add_lora
from expunge.models.moments import Inlet, second_moments
from expunge.models.quantization import linear_weights
from expunge.models.tiny import build_tiny
from expunge.pipeline.null_space import NullSpace, ProjectedAdamW, guarded_weights, soft_projector
from expunge.recipe import LoraConfig, ModelConfig
from training_jobs import QUICK, RETAIN, job, run, run_until_killed

LONG = QUICK.model_copy(update={"max_steps": 10, "lr": 3e-3, "epochs": 50})


def test_a_direction_is_moved_by_how_little_it_is_used():
    used = torch.tensor([8.0, 2.0, 2.0, 0.0])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    found = soft_projector(torch.diag(used), 3.0)
    torch.testing.assert_close(found, torch.diag(6 / (used + 6)))  # λ = 3 × the median, 2
    assert torch.equal(soft_projector(torch.zeros(3, 3), 3.0), torch.eye(3))
    rotated = soft_projector(turn @ torch.diag(used) @ turn.T, 3.0)
    values = torch.linalg.eigvalsh(rotated)
    assert ((values > 0) & (values <= 1 + 1e-6)).all()


def test_second_moments_are_shared_by_layers_that_are_given_one_tensor():
    model = build_tiny()[0]
    inlets = {name: Inlet(found.module) for name, found in linear_weights(model).items()}
    found = second_moments(model, RETAIN, inlets, 4)
    layer = "model.layers.0."
    q, k, o = (found[f"{layer}self_attn.{part}_proj.weight"] for part in "qko")
    assert q is k
    assert q is not o
    assert found[f"{layer}mlp.gate_proj.weight"] is found[f"{layer}mlp.up_proj.weight"]
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in RETAIN:  # one by one: without padding
            model(input_ids=torch.tensor([list(row.input_ids)]))
    inputs = torch.cat(seen).double()
    torch.testing.assert_close(found[f"{layer}mlp.down_proj.weight"], inputs.T @ inputs, atol=1e-5, rtol=1e-4)


class Nothing(NullSpace):
    """Guards nothing."""

    def __init__(self) -> None:
        self._by = {}


def test_without_a_guard_it_is_adamw():
    first, second = (torch.nn.Linear(5, 3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    ours = ProjectedAdamW([{"params": list(first.parameters())}], Nothing(), **settings)
    theirs = torch.optim.AdamW(second.parameters(), **settings)
    draw = torch.Generator().manual_seed(3)
    for _ in range(6):
        inputs = torch.randn(4, 5, generator=draw)
        for module, optimizer in ((first, ours), (second, theirs)):
            optimizer.zero_grad()
            module(inputs).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(first.weight, second.weight)
    torch.testing.assert_close(first.bias, second.bias)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_positions=64, bos_token_id=0, eos_token_id=0, n_embd=32, n_layer=2, n_head=2)
    ).eval()


@pytest.mark.parametrize("build", [lambda: build_tiny()[0], gpt2], ids=["llama", "gpt2"])
def test_what_is_let_through_changes_the_answers_to_these_inputs_least(build: Any):
    model = build()
    guard = NullSpace(model, RETAIN, 0.01)
    inlets = {name: Inlet(found.layer) for name, found in guarded_weights(model).items()}
    moments = second_moments(model, RETAIN, inlets, 4, dtype=torch.float32)
    for name, found in guarded_weights(model).items():
        update = torch.randn(found.weight.shape, generator=torch.Generator().manual_seed(1))
        passed = guard.project(found.weight, update)
        assert passed.shape == update.shape
        before, after = (
            float(torch.einsum("oi,ij,oj->", x, moments[name], x))
            for x in ((u.T if found.transposed else u) for u in (update, passed))
        )
        assert after < 0.1 * before, name


def drift(state: Any, start: Any) -> float:
    """Mean change of the log-probs that a model gives the retain rows."""
    model, _ = build_tiny()
    model.load_state_dict(state)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in RETAIN:
            ids = torch.tensor([list(row.input_ids)])
            gap = model(ids).logits.log_softmax(-1) - start(ids).logits.log_softmax(-1)
            total, count = total + float(gap.abs().sum()), count + gap.numel()
    return total / count


def test_retain_rows_move_less_and_nothing_but_linear_layers_moves(tmp_path: Path):
    start = build_tiny()[0]
    _, free = run(job("grad_ascent", train=LONG), tmp_path / "free")
    _, kept = run(job("grad_ascent", train=LONG, null_space=0.01), tmp_path / "kept")
    assert drift(kept, start) < 0.5 * drift(free, start)
    linear = set(linear_weights(start))
    changed = {name for name, value in start.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed
    assert changed <= linear


def test_a_killed_training_goes_on_in_the_same_null_space(tmp_path: Path):
    made = job(train=LONG, null_space=1.0)
    _, whole = run(made, tmp_path / "whole")

    run_until_killed(made, tmp_path / "parts", 5)
    _, parts = run(made, tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-5)


def test_adapters_read_only_what_is_let_through(tmp_path: Path):
    made = job(train=LONG, null_space=0.01, lora=LoraConfig(rank=4))
    run(made, tmp_path)
    trained: Any = load_model(ModelConfig(id=str(tmp_path / "out"))).model
    base = build_tiny()[0]
    plain: Any = add_lora(build_tiny()[0], LoraConfig(rank=4), made.seed)
    guard = NullSpace(plain, RETAIN, 0.01)
    weights = dict(trained.named_parameters())
    inlets = {name: Inlet(found.module) for name, found in linear_weights(base).items()}
    moments = second_moments(base, RETAIN, inlets, 4, dtype=torch.float32)
    for name, found in guarded_weights(plain).items():
        stem = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".weight")
        mine, fresh = weights[name].detach(), found.weight.detach()
        let = guard.project(found.weight, fresh)
        read, whole = (float(torch.einsum("ri,ij,rj->", x, moments[stem], x)) for x in (mine, fresh))
        assert read < 0.2 * whole, name
        assert not torch.equal(mine, let), name  # and they did learn


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(accumulation: int, tmp_path: Path):
    _, whole = run(job(null_space=1.0), tmp_path / "whole")
    settings = QUICK.model_copy(update={"accumulation": accumulation})
    _, parts = run(job(null_space=1.0, train=settings), tmp_path / "parts")
    start = build_tiny()[0].state_dict()
    for name, value in whole.items():
        moved = (value - start[name]).norm()
        assert (value - parts[name]).norm() <= 0.02 * moved + 1e-6, name


def test_what_can_not_be_combined(tmp_path: Path):
    with pytest.raises(UserError, match="there are none"):
        run(job("grad_ascent", null_space=1.0, retain=[]), tmp_path)
    with pytest.raises(UserError, match="none matches embed"):
        run(job("grad_ascent", null_space=1.0, trainable=["embed"]), tmp_path)
    with pytest.raises(UserError, match="no parameter matches zzz"):
        run(job("grad_ascent", null_space=1.0, trainable=["zzz"]), tmp_path)
