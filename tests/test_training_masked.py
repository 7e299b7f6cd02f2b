"""Training inside a mask: what lies outside keeps its bits, what lies inside is trained as it would be without one."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from expunge.localize.masks import Mask
from expunge.models.tiny import build_tiny
from expunge.pipeline import training
from expunge.pipeline.job import Watched
from expunge.pipeline.masked import Masked
from expunge.pipeline.trainer import UnlearnTrainer
from expunge.recipe import ModelConfig, StopRule
from training_jobs import QUICK, RETAIN, TINY, job, run
from training_masks import DOWN, UP, assert_kept, changed, mask_of, random_mask, shapes, unchanged, weights

DECAYED = QUICK.model_copy(update={"weight_decay": 0.5, "schedule": "linear", "lr": 2e-3})
TRAINABLE = {"trainable": ["."]}


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Each training ends in a collection of garbage, which would look at every imported module again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`tiny` with a twentieth of its weights at −0, which a careless zero turns into 0."""
    folder = tmp_path_factory.mktemp("start")
    model, tokenizer = build_tiny()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < 0.05, -0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


STOP = {
    "train": DECAYED.model_copy(update={"max_steps": 8, "lr": 5e-3, "epochs": 9}),
    "watched": {"retain": Watched("retain", RETAIN[:6])},
    "stop_when": [StopRule(metric="nll", split="retain", above=64.7, every=1)],
}
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "fine-tuning": (None, {}),
    "npo, decay, schedule": ("npo", {"train": DECAYED}),
    "npo, accumulation": ("npo", {"train": DECAYED.model_copy(update={"accumulation": 4})}),
    "autocast": ("npo", {"train": DECAYED.model_copy(update={"precision": "bfloat16"})}),
    "checkpointing": ("npo", {"train": DECAYED.model_copy(update={"gradient_checkpointing": True})}),
    "sam": ("grad_diff", {"sam": 0.5, "train": DECAYED}),
    "projection": ("grad_diff", {"gradient_projection": True, "train": DECAYED}),
    "both": ("grad_diff", {"gradient_projection": True, "sam": 0.5, "train": DECAYED}),
    "stop": ("grad_ascent", STOP),
    "combined": ("task_negation", {"train": DECAYED}),
    "several combined": ("negmerge", {}),
    "steering": ("rmu", TRAINABLE),
    "chunks": ("sugd", {**TRAINABLE, "train": DECAYED.model_copy(update={"batch_size": 1})}),
    "alternatives": ("dpo", {"train": DECAYED}),
    "retain rows alone": ("finetune", {"train": DECAYED}),
}


#: All run in the long suite.
QUICKER = [(case, "float32") for case in CASES] + [
    (case, "bfloat16") for case in ("npo, decay, schedule", "both", "stop")
]


def every(quick: list[tuple[str, str]]) -> list[Any]:
    """All cases in both dtypes; those that are not among the quick ones are slow."""
    pairs = [(case, dtype) for case in CASES for dtype in ("float32", "bfloat16")]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("case", "dtype"), every(QUICKER))
def test_weights_outside_keep_their_bits(case: str, dtype: Any, start: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    config, mask = ModelConfig(id=start, dtype=dtype), random_mask()
    made = job(name, **{"model": config, "mask": mask, **changes})
    _, after = run(made, tmp_path)
    before = weights(config)
    assert_kept(before, after, mask)
    trained = {entry for entry, inside in mask.inside.items() if inside.any()}
    if name == "rmu":  # nothing above the steered layer, whose last norm and head are not in the mask either
        trained = {entry for entry in trained if not unchanged(before[entry], after[entry]).all()}
        assert DOWN in trained
    moved = changed(before, after)
    # around a norm's 1 the spacing of bfloat16 is wider than these steps
    assert {entry for entry in trained if dtype == "float32" or "norm" not in entry} <= moved <= trained
    if case == "stop":
        kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))["step"]
        assert 0 < kept < 7, "a model that has been trained was put back in the place of a later one"


@pytest.mark.parametrize(("case", "dtype"), every([("npo, decay, schedule", "bfloat16"), ("both", "float32")]))
def test_a_mask_of_everything_is_no_mask(case: str, dtype: Any, start: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    made = job(name, **{"model": ModelConfig(id=start, dtype=dtype), **changes})
    everything = Mask({entry: torch.ones(shape, dtype=torch.bool) for entry, shape in shapes().items()})
    curve, free = run(made, tmp_path / "free")
    same, inside = run(replace(made, mask=everything), tmp_path / "masked")
    assert same == curve
    assert all(unchanged(free[entry], inside[entry]).all() for entry in free)


@pytest.mark.parametrize("name", ["npo", pytest.param("task_negation", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_inside_its_mask(name: str, start: str, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, terms: Mapping[str, float]) -> None:
        if step == 3:
            raise Killed

    made = job(name, model=ModelConfig(id=start), mask=random_mask(), train=DECAYED)
    _, whole = run(made, tmp_path / "whole")
    with pytest.raises(Killed):
        training.train(made, tmp_path / "killed", on_step=kill)
    curve, after = run(made, tmp_path / "killed")
    assert len(curve) == 2, "the first two steps are not made again"
    assert_kept(weights(made.model), after, random_mask())
    for entry, tensor in whole.items():
        torch.testing.assert_close(after[entry], tensor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broadcast", [True, False])
def test_inside_the_step_is_that_of_adamw(dtype: torch.dtype, broadcast: bool) -> None:
    """Adam is elementwise: with the same gradients, inside is what AdamW makes of a whole model, decay included."""
    generator = torch.Generator().manual_seed(0)

    def model() -> nn.Module:
        made = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.linspace(-2, 3, parameter.numel()).view_as(parameter))
        return made.to(dtype)

    free, kept, before = model(), model(), dict(model().named_parameters())
    shape = (1, 6) if broadcast else (5, 6)
    inside = {"0.weight": torch.rand(shape, generator=generator) < 0.5, "0.bias": torch.ones(5, dtype=torch.bool)}
    inside["1.weight"] = torch.rand(4, 5, generator=generator) < 0.5
    inside["2.weight"] = torch.rand(3, 4, generator=generator) < 0.5  # never gets a gradient
    optimizers = []
    for made in (free, kept):
        groups = [{"params": [made[0].weight, made[1].weight, made[2].weight], "weight_decay": 0.7}]  # type: ignore[index]
        groups.append({"params": [made[0].bias], "weight_decay": 0.2})  # type: ignore[index]
        optimizers.append(torch.optim.AdamW(groups, lr=0.05, foreach=False))
    masked = Masked(kept, Mask(inside))
    masked.take_over_decay(optimizers[1])
    for step in range(5):
        for one, other in zip(free[:2].parameters(), kept[:2].parameters(), strict=True):  # type: ignore[index]
            one.grad = torch.randn(one.shape, generator=generator).to(dtype)
            other.grad = one.grad.clone()
        kept[1].weight.grad[~inside["1.weight"]] = torch.inf  # type: ignore[index]
        masked.keep_gradients_inside()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (step + 1)
            optimizer.step()
    after, wanted = dict(kept.named_parameters()), dict(free.named_parameters())
    for name, start in before.items():
        expected = torch.where(inside[name], wanted[name], start)
        assert unchanged(after[name], expected).all(), name
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["2.weight"], before["2.weight"]), "AdamW leaves what has no gradient alone"


def test_gradients_are_clipped_by_their_length_inside(tmp_path: Path) -> None:
    lengths, mask = [], random_mask()

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert all(
                (gradient[~mask.inside[name].expand_as(gradient)] == 0).all() for name, gradient in gradients.items()
            )
            lengths.append(torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item())

    made = job("npo", mask=mask, train=DECAYED.model_copy(update={"max_grad_norm": 1e-2, "accumulation": 2}))
    training.train(made, tmp_path, callbacks=[Look()])
    assert lengths == pytest.approx([1e-2] * 4, rel=1e-3)


def test_the_ascent_of_sam_stays_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, mask, moved = weights(TINY), random_mask(), []
    backward = UnlearnTrainer._backward_side

    def look(trainer: Any, model: Any, inputs: Any, side: str, record: bool) -> None:
        if side == "forget" and not record:  # the pass at the top of the ascent, and not of a step before
            now = dict(model.named_parameters())
            assert_kept(before, now, mask)
            difference = torch.cat([(now[name] - start).flatten() for name, start in before.items()])
            moved.append(difference.norm().item())
        backward(trainer, model, inputs, side, record)

    monkeypatch.setattr(UnlearnTrainer, "_backward_side", look)
    run(job("grad_diff", sam=0.25, mask=mask, train=QUICK.model_copy(update={"max_steps": 1})), tmp_path)
    assert moved == pytest.approx([0.25], rel=1e-4), "all of the radius is spent inside"


@pytest.mark.parametrize("kind", ["value vectors", pytest.param("layer", marks=pytest.mark.slow)])
def test_layers_below_the_mask_run_once(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    upper = [name for name in shapes() if name.startswith("model.layers.1.")]
    columns = Mask({DOWN: torch.arange(384)[None] % 10 == 0})
    made = job("npo", mask=columns if kind == "value vectors" else mask_of(*upper))
    made = replace(made, train=QUICK.model_copy(update={"max_steps": 8, "epochs": 9}))
    opened = []

    def spy(*given: Any) -> Any:
        opened.append(open_prefix(*given))
        return opened[-1]

    open_prefix = training.open_prefix
    monkeypatch.setattr(training, "open_prefix", spy)
    curve, after = run(made, tmp_path / "prefix")
    assert [prefix.depth for prefix in opened] == [1]
    assert all(opened[0]._known[row] for row in made.plan().rows("forget", "retain")), "and their states were kept"
    monkeypatch.setattr(training, "open_prefix", lambda *_: None)
    slow, wanted = run(made, tmp_path / "whole")
    for left, right in zip(curve, slow, strict=True):
        assert left == pytest.approx(right, rel=2e-4, abs=2e-5)
    before = weights(TINY)
    assert_kept(before, after, made.mask or columns)
    for name in changed(before, wanted):
        assert (after[name] - wanted[name]).norm() <= 0.02 * (wanted[name] - before[name]).norm() + 1e-6


def test_what_is_outside_has_no_gradient_and_no_moments(tmp_path: Path) -> None:
    held = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            held.append(sum(parameter.grad is not None for parameter in model.parameters()))

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            held.append(sum(len(found) for found in optimizer.state.values()))

    one = QUICK.model_copy(update={"max_steps": 1})
    mask = Mask({DOWN: torch.arange(384)[None] < 3, UP: torch.zeros(1, 1, dtype=torch.bool)})
    training.train(job("npo", mask=mask, train=one), tmp_path, callbacks=[Look()])
    assert held == [1, 3], "one parameter has a gradient, and exp_avg, exp_avg_sq and step in the optimizer"
