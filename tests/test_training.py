"""Training runs on `tiny`: the same numbers however a step is split, packed, interrupted or repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.data.collate import pad_right
from expunge.errors import UserError
from expunge.methods.base import OBJECTIVES
from expunge.methods.step import SIDES
from expunge.models.forward import capture_layer, truncated
from expunge.models.load import load_model
from expunge.models.packing import pack_rows, supports_packing
from expunge.models.passes import Forward
from expunge.models.tiny import build_tiny
from expunge.models.token_logprobs import token_logprobs
from expunge.pipeline.plan import make_plan
from expunge.pipeline.training import train
from expunge.recipe import LoraConfig, ModelConfig, TrainConfig
from training_jobs import FORGET, QUICK, RETAIN, Curve, job, run, taught
from training_rows import rows


def assert_same(
    first: tuple[Curve, Mapping[str, torch.Tensor]], second: tuple[Curve, Mapping[str, torch.Tensor]]
) -> None:
    for left, right in zip(first[0], second[0], strict=True):
        assert left == pytest.approx(right, rel=2e-4, abs=2e-5)
    start = build_tiny()[0].state_dict()
    for name, tensor in first[1].items():
        # Adam turns rounding of a gradient near zero into a step, so single weights may differ: the change may not
        moved = (tensor - start[name]).norm().item()
        assert (tensor - second[1][name]).norm().item() <= 0.02 * moved + 1e-6, name


@pytest.mark.parametrize("name", [None, *OBJECTIVES.names()])
def test_accumulation_changes_nothing(name: str | None, tmp_path: Path) -> None:
    whole = run(job(name), tmp_path / "whole")
    parts = run(job(name, train=QUICK.model_copy(update={"accumulation": 4})), tmp_path / "parts")
    assert_same(whole, parts)
    trainings = job(name).objective.variations(QUICK) if name else [QUICK]  # type: ignore[union-attr]
    assert len(whole[0]) == 4 * len(trainings)


def forget_nll(folder: str) -> float:
    """Mean token NLL of the forget rows under a saved model."""
    model: Any = load_model(ModelConfig(id=folder)).model
    batch = pad_right(FORGET, range(len(FORGET)), 0)
    with torch.no_grad():
        return -token_logprobs(Forward(model, batch).logits, batch.targets).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_unlearning_makes_the_forget_rows_less_likely(name: str, tmp_path: Path) -> None:
    long = QUICK.model_copy(
        update={"max_steps": 30, "lr": 3e-3, "epochs": 50, "batch_size": 8, "checkpoint_every": 100}
    )
    run(job(name, model=taught(), train=long), tmp_path)
    before, after = (forget_nll(folder) for folder in (taught().id, str(tmp_path / "out")))
    assert after > 1.1 * before


def test_lora_starts_at_the_start_model_and_leaves_it_untouched(tmp_path: Path) -> None:
    made = job(lora=LoraConfig(rank=4), weights={"forget": 1.0, "nll": 1.0, "kl": 1.0})
    curve, _ = run(made, tmp_path)
    # at the first step the model is its own reference: npo is (2/β)·log 2 and the divergence is 0
    assert curve[0]["forget"] == pytest.approx(20 * 0.693147, rel=1e-4)
    assert curve[0]["retain_kl"] == pytest.approx(0.0, abs=1e-5)
    assert curve[-1]["retain_kl"] > 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_kl_reference_stays_the_start_model_under_full_fine_tuning(lora: LoraConfig | None, tmp_path: Path) -> None:
    """The cached head inputs and head copy against a second model, held here only to check."""
    from expunge.methods.step import Rows
    from expunge.models.lora import add_lora
    from expunge.models.reference import Needs, build_reference

    start, _ = build_tiny()
    model: Any = build_tiny()[0] if lora is None else add_lora(build_tiny()[0], lora, seed=0)
    cache = build_reference(model, RETAIN, Needs(distributions=range(8)), batch_size=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    batch = pad_right(RETAIN[:8], range(8), 0)
    forward = Forward(model, batch, None, True, packs=False)
    total = int(batch.lengths.sum())
    got = Rows(forward, slice(0, 8), cache, None, 8, total, 1.0).kl()
    with torch.no_grad():
        reference = torch.log_softmax(start(input_ids=batch.input_ids).logits[batch.supervised], -1)
        current = torch.log_softmax(forward.logits, -1)
    expected = (reference.exp() * (reference - current)).sum(-1).mean()
    torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-6)
    assert expected > 1e-4


def test_packed_rows_give_the_logits_of_padded_rows() -> None:
    model, _ = build_tiny()
    assert supports_packing(model)
    uneven = sorted(rows(6, seed=4, shortest=6, longest=60), key=lambda row: len(row.input_ids))
    batch = pad_right(uneven, range(6), 0)
    lines = pack_rows(batch.input_ids, batch.attention_mask.bool(), 128)
    assert lines is not None
    assert 1 < len(lines.input_ids) < 6, "several lines, each of several rows"
    packed, padded = (Forward(model, batch, 1, True, packs) for packs in (True, False))
    torch.testing.assert_close(packed.logits, padded.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.hidden, padded.hidden, rtol=1e-4, atol=1e-4)


def test_truncated_forward_gives_the_layer_and_restores_the_model() -> None:
    model, _ = build_tiny()
    ids = torch.randint(3, 500, (2, 9))
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        sink: list[torch.Tensor] = []
        with capture_layer(model, 0, sink), truncated(model, 0):
            model(input_ids=ids)
        torch.testing.assert_close(sink[0], states[1])
    assert len(model.model.layers) == 2


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, terms: Mapping[str, float]) -> None:
        if step == 3:
            raise Killed

    whole = run(job(train=QUICK.model_copy(update={"schedule": "linear"})), tmp_path / "whole")
    again = job(train=QUICK.model_copy(update={"schedule": "linear"}))
    with pytest.raises(Killed):
        train(again, tmp_path / "killed", on_step=kill)
    curve, weights = run(again, tmp_path / "killed")
    assert len(curve) == 2, "steps 1 and 2 were in the checkpoint"
    for name, tensor in whole[1].items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.1)])
def test_same_seed_same_weights(lora: LoraConfig | None, tmp_path: Path) -> None:
    digests = []
    for attempt in ("first", "second"):
        train(job(lora=lora), tmp_path / attempt)
        file = tmp_path / attempt / "out" / ("model.safetensors" if lora is None else "adapter_model.safetensors")
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_rmu_trains_three_matrices_at_most(tmp_path: Path) -> None:
    before = dict(build_tiny()[0].state_dict())
    _, after = run(job("rmu"), tmp_path)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}


def test_non_finite_loss_stops_with_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    wild = QUICK.model_copy(update={"lr": 1e30, "max_grad_norm": 1e30, "max_steps": 10, "checkpoint_every": 1})
    with pytest.raises(UserError) as error:
        train(job("grad_ascent", train=wild), tmp_path)
    assert "not finite at step" in error.value.message
    assert "lower train.lr" in error.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainable": [r"no\.such"]}, "no parameter matches"),
        ({"lora": LoraConfig(targets=["downproj"])}, "no linear layer 'downproj'"),
        ({"train": QUICK.model_copy(update={"accumulation": 64})}, "can't be split into 64 parts"),
    ],
)
def test_mistakes_are_found_before_the_first_step(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        train(job(**changes), tmp_path)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["npo", "idk_ap"])
def test_plan_gives_every_process_its_part_of_the_same_steps(name: str, world: int, accumulation: int) -> None:
    sides = job(name).sides
    settings = TrainConfig(epochs=3, batch_size=6, accumulation=accumulation)
    alone = make_plan(sides, TrainConfig(epochs=3, batch_size=6), 5, retain_batch=9)
    plan = make_plan(sides, settings, 5, retain_batch=9, world=world)
    parts = world * accumulation
    assert plan.steps == alone.steps == 4
    assert len(plan.micro_batches) == plan.steps * parts
    for step, whole in enumerate(alone.micro_batches):
        split = plan.micro_batches[step * parts : (step + 1) * parts]
        for side in SIDES:
            assert sorted(i for part in split for i in part.rows[side]) == sorted(whole.rows[side])
        assert all(part.totals == whole.totals for part in split)
        assert all(part.rows["forget"] or part.rows["retain"] for part in split)
        for part in (whole, *split):
            for side, others in (("forget", "forget_alternatives"), ("retain", "retain_alternatives")):
                own = [row for row in part.rows[side] if row in sides.alternatives]
                pairs = zip(own, part.rows[others], strict=True)
                assert all(other in sides.alternatives[row] for row, other in pairs), "each row has its own beside it"
    assert set(alone.rows("forget")) == set(sides.forget), "every forget row is met"
    assert set(alone.rows("retain")) == set(sides.retain), "every retain row is met"
    if sides.alternatives:
        assert set(alone.rows("forget_alternatives", "retain_alternatives")) == {
            i for row, others in sides.alternatives.items() for i in others if row in {*sides.forget, *sides.retain}
        }, "every alternative is met"


def test_chunks_are_trained_on_one_after_another() -> None:
    plan = make_plan(job().sides, TrainConfig(epochs=2, batch_size=2), 5, retain_ratio=3, chunk=3)
    assert plan.restarts == (0, 3, 6)
    assert plan.steps == 8
    seen = [set(batch.rows["forget"]) for batch in plan.micro_batches]
    assert set.union(*seen[:3]) == {0, 1, 2}
    assert set.union(*seen[3:6]) == {3, 4, 5}
    assert set.union(*seen[6:]) == {6, 7}
    assert all(len(batch.rows["retain"]) == 6 for batch in plan.micro_batches)
