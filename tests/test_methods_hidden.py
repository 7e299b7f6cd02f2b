"""Objectives over hidden states and over weights: closed forms, gradients, and what the model becomes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expunge.data.collate import pad_right
from expunge.errors import UserError
from expunge.methods.base import build_objective
from expunge.methods.step import Memory, Step
from expunge.models.passes import Forward
from expunge.models.tiny import build_tiny
from expunge.pipeline.training import Job, fit
from expunge.recipe import ModelConfig, TrainConfig
from method_steps import make_step, random_outputs, random_start
from training_rows import rows, supervised

VOCABULARY, WIDTH = 11, 5
FORGET, RETAIN = rows(4, seed=1, vocabulary=VOCABULARY), rows(5, seed=2, vocabulary=VOCABULARY)
FORGET_TOKENS, RETAIN_TOKENS = supervised(FORGET), supervised(RETAIN)
TOKENS = sum(FORGET_TOKENS) + sum(RETAIN_TOKENS)
START = random_start(TOKENS, VOCABULARY, WIDTH, torch.float64)
LOGITS, HIDDEN = random_outputs(TOKENS, VOCABULARY, WIDTH, torch.float64)
MEANS = {"anchors": torch.linspace(-1, 1, WIDTH), "forget": torch.linspace(2, 0, WIDTH)}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rmu": ("rmu", {"coefficient": 2.0, "alpha": 10.0}),
    "rmu signed": ("rmu", {"coefficient": 2.0, "alpha": 10.0, "signed": True, "seed": 3}),
    "adaptive_rmu": ("adaptive_rmu", {"beta": 3.0, "alpha": 10.0}),
    "adaptive_rmu drift": ("adaptive_rmu", {"beta": 3.0, "alpha": 10.0, "drift": True}),
    "lunar": ("lunar", {"coefficient": 1.5}),
    "sugd": ("sugd", {"positive_factor": 0.5}),
    "task_negation": ("task_negation", {}),
    "negmerge": ("negmerge", {}),
}


def case(name: str) -> Any:
    method, parameters = CASES[name]
    return build_objective(method, parameters)


def step(logits: Tensor = LOGITS, hidden: Tensor = HIDDEN, **changes: Any) -> Step:
    memory = changes.pop("memory", None) or Memory(means=MEANS)
    return make_step(FORGET, RETAIN, logits, hidden, start=START, memory=memory, **changes)


def per_row(values: np.ndarray, tokens: Sequence[int]) -> list[np.ndarray]:
    """One array per row."""
    return np.split(values, np.cumsum(tokens)[:-1])


def by_hand(name: str, selected: np.ndarray) -> dict[str, float]:
    """The terms of a case in numpy; `selected` is bool over the forget tokens."""
    objective, cut = case(name), sum(FORGET_TOKENS)
    hidden, frozen = HIDDEN.numpy(), START.hidden.numpy()
    kept = ((hidden[cut:] - frozen[cut:]) ** 2).mean()
    if name.startswith(("rmu", "adaptive_rmu")):
        unit = objective.direction(WIDTH).double().numpy()
        lengths = np.full(cut, 2.0)
        if name.startswith("adaptive_rmu"):
            norms = per_row(np.linalg.norm(frozen[:cut], axis=1), FORGET_TOKENS)
            masks = per_row(selected, FORGET_TOKENS)
            means = [row[mask].mean() if mask.any() else 0.0 for row, mask in zip(norms, masks, strict=True)]
            lengths = np.repeat(3.0 * np.array(means), FORGET_TOKENS)
        gaps = ((hidden[:cut] - lengths[:, None] * unit) ** 2).mean(1)
        terms = {"forget": gaps[selected].mean(), "retain_hidden": 10.0 * kept}
        if "drift" in name:
            terms["monitor_norm"] = np.linalg.norm(hidden[:cut], axis=1)[selected].mean()
        return terms
    if name == "lunar":
        goal = frozen[:cut] + 1.5 * (MEANS["anchors"] - MEANS["forget"]).double().numpy()
        return {"forget": ((hidden[:cut] - goal) ** 2).mean(1)[selected].mean(), "retain_hidden": kept}
    targets = pad_right([*FORGET, *RETAIN], range(len(FORGET) + len(RETAIN)), 0).targets.numpy()
    values = LOGITS.numpy()
    losses = np.log(np.exp(values).sum(1)) - values[np.arange(TOKENS), targets]
    if name == "sugd":
        count = len(FORGET) + len(RETAIN)
        masks = per_row(selected, FORGET_TOKENS)
        pairs = zip(per_row(losses[:cut], FORGET_TOKENS), masks, strict=True)
        down = sum(row[mask].mean() if mask.any() else 0.0 for row, mask in pairs)
        up = sum(row.mean() for row in per_row(losses[cut:], RETAIN_TOKENS))
        return {"forget": -down / count, "retain": 0.5 * up / count}
    return {"forget": losses[:cut][selected].mean()}


def masks() -> list[np.ndarray]:
    """All forget tokens; every other one; none of the first row's."""
    everything = np.ones(sum(FORGET_TOKENS), dtype=bool)
    half = everything & (np.arange(len(everything)) % 2 == 0)
    lacking = everything.copy()
    lacking[: FORGET_TOKENS[0]] = False
    return [everything, half, lacking]


@pytest.mark.parametrize("selected", masks(), ids=["all", "half", "row left out"])
@pytest.mark.parametrize("name", CASES)
def test_terms_equal_their_closed_form(name: str, selected: np.ndarray) -> None:
    terms = case(name).loss(step(selected=torch.from_numpy(selected)))
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(by_hand(name, selected), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_finite_differences(name: str) -> None:
    objective = case(name)

    def added(logits: Tensor, hidden: Tensor) -> Tensor:
        terms = objective.loss(step(logits, hidden))
        return torch.stack([value for term, value in terms.items() if not term.startswith("monitor")]).sum()

    over_hidden = objective.hidden_layer() is not None
    inputs = (LOGITS.clone().requires_grad_(not over_hidden), HIDDEN.clone().requires_grad_(over_hidden))
    assert torch.autograd.gradcheck(added, inputs, fast_mode=True)
    gradient = torch.autograd.grad(added(*inputs), inputs[int(over_hidden)])[0]
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", CASES)
def test_unequal_micro_batches_add_up_to_the_step(name: str) -> None:
    """One micro-batch has the most of the forget rows, another no retain row, a third no forget row."""
    parts: list[dict[str, list[int]]] = [
        {"forget": [2, 0], "retain": [4]},
        {"forget": [1], "retain": []},
        {"forget": [], "retain": [0, 3]},
        {"forget": [3], "retain": [2, 1]},
    ]
    whole = case(name).loss(step())
    pieces = [case(name).loss(step(part=part)) for part in parts]
    for term, value in whole.items():
        assert sum(piece[term].item() for piece in pieces) == pytest.approx(value.item(), rel=1e-6), term


def test_sugd_is_the_factored_mean_over_one_batch() -> None:
    """With factor 1 it is a plain mean over the rows of CE with the forget rows' signs turned."""
    logits = LOGITS.clone().requires_grad_()
    terms = build_objective("sugd", {"positive_factor": 1.0}).loss(step(logits))
    targets = pad_right([*FORGET, *RETAIN], range(len(FORGET) + len(RETAIN)), 0).targets
    tokens = [*FORGET_TOKENS, *RETAIN_TOKENS]
    pairs = zip(LOGITS.split(tokens), targets.split(tokens), strict=True)
    losses = torch.stack([torch.nn.functional.cross_entropy(*pair) for pair in pairs])
    factors = torch.tensor([-1.0] * len(FORGET) + [1.0] * len(RETAIN), dtype=torch.float64)
    assert sum(terms.values()).item() == pytest.approx((factors * losses).mean().item(), rel=1e-6)  # type: ignore[union-attr]


def test_direction_is_one_unit_vector_per_seed() -> None:
    plain, signed, other = (
        build_objective("rmu", parameters).direction(64)  # type: ignore[attr-defined]
        for parameters in ({}, {"signed": True}, {"seed": 1})
    )
    for vector in (plain, signed, other):
        assert vector.norm().item() == pytest.approx(1.0)
    assert (plain >= 0).all()
    assert 0.2 < (signed < 0).float().mean() < 0.8
    assert not torch.allclose(plain, other)
    assert torch.equal(plain, build_objective("adaptive_rmu", {}).direction(64))  # type: ignore[attr-defined]


@pytest.mark.parametrize("drift", [False, True])
def test_adaptive_length_over_three_steps_and_two_epochs(drift: bool) -> None:
    """Without drift the frozen norm decides for good; with it, the next epoch starts from the norm last seen."""
    objective: Any = build_objective("adaptive_rmu", {"beta": 2.0, "drift": drift})
    memory = Memory()
    states = [HIDDEN * factor for factor in (1.0, 3.0, 5.0)]
    seen, norms = [], []
    for number, (hidden, epoch) in enumerate(zip(states, (0, 0, 1), strict=True)):
        made = step(hidden=hidden, memory=memory, number=number, epoch=epoch)
        terms = objective.loss(made)
        seen.append(objective.lengths(made))
        norms.append(hidden[: sum(FORGET_TOKENS)].norm(dim=-1).mean())
        objective.after_step(memory, {name: value.item() for name, value in terms.items()})
    frozen = START.hidden[: sum(FORGET_TOKENS)].norm(dim=-1).split(FORGET_TOKENS)
    published = 2.0 * torch.stack([row.mean() for row in frozen])
    assert torch.allclose(seen[0], published)
    assert torch.allclose(seen[1], published)
    if not drift:
        assert torch.allclose(seen[2], published)
        assert not memory.numbers
        return
    assert torch.allclose(seen[2], (2.0 * norms[1]).expand(len(FORGET)))
    later = step(hidden=states[0], memory=memory, number=3, epoch=1)  # the length holds for the whole epoch
    assert torch.allclose(objective.lengths(later), seen[2])
    resumed = Memory(numbers=dict(memory.numbers))
    again = step(hidden=states[0], memory=resumed, number=4, epoch=2)
    assert torch.allclose(objective.lengths(again), (2.0 * norms[2]).expand(len(FORGET)))


def test_task_negation_goes_as_far_back_as_training_went_forward() -> None:
    start = torch.tensor([1.0, -2.0, 0.5])
    trained = torch.tensor([1.5, -2.0, 0.0])
    objective = build_objective("task_negation", {"alpha": 2.0})
    assert torch.allclose(objective.combine(start, [trained]), torch.tensor([0.0, -2.0, 1.5]))


def test_negmerge_subtracts_what_all_fine_tunings_agree_on() -> None:
    start = torch.tensor([1.0, 1.0, 1.0, 1.0])
    changes = torch.tensor([[0.2, -0.1, 0.3, 0.0], [0.4, -0.5, -0.3, 0.2], [0.6, -0.3, 0.3, 0.4]])
    objective = build_objective("negmerge", {"alpha": 2.0})
    found = objective.combine(start, [start + change for change in changes])
    # up by 0.4 on average, down by 0.3, a quarrel, and one that did not move
    assert torch.allclose(found, torch.tensor([1 - 0.8, 1 + 0.6, 1.0, 1.0]))


def test_negmerge_of_equal_fine_tunings_is_task_negation() -> None:
    start, trained = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    both = [build_objective(name, {"alpha": 0.7}) for name in ("negmerge", "task_negation")]
    merged, negated = (objective.combine(start, [trained] * 3) for objective in both)
    assert torch.allclose(merged, negated, atol=1e-6)


@pytest.mark.parametrize("name", ["task_negation", "negmerge"])
def test_weights_keep_their_dtype_and_small_changes_count(name: str) -> None:
    """In bfloat16 neither 1 − α·2⁻⁸ nor a sum of such changes may be lost on the way."""
    start = torch.ones(3, dtype=torch.bfloat16)
    trained = start + torch.tensor([2**-7, 0, 2**-7], dtype=torch.bfloat16)
    found = build_objective(name, {"alpha": 4.0}).combine(start, [trained, trained])
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [1 - 2**-5, 1.0, 1 - 2**-5]


def test_negmerge_varies_rate_and_length_around_the_given() -> None:
    objective = build_objective("negmerge", {"rates": [0.5, 2], "epochs": [1, 2]})
    made = objective.variations(TrainConfig(lr=1e-4, epochs=3, max_steps=5, batch_size=7))
    assert [(train.lr, train.epochs, train.max_steps) for train in made] == [
        (5e-5, 3, 5), (2e-4, 3, 5), (5e-5, 6, 10), (2e-4, 6, 10)
    ]  # fmt: skip
    assert {train.batch_size for train in made} == {7}
    assert len(build_objective("negmerge", {}).variations(TrainConfig())) == 3
    assert build_objective("task_negation", {}).variations(TrainConfig()) == [TrainConfig()]


NAMES = [
    *(f"model.layers.{layer}.{part}.weight" for layer in range(12) for part in ("mlp.down_proj", "mlp.up_proj")),
    "model.layers.9.mlp.experts.7.down_proj.weight",
    "model.layers.7.mlp.experts.3.down_proj.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("rmu", {"layer": 7}, ["5.mlp.down_proj", "6.mlp.down_proj", "7.mlp.down_proj", "7.mlp.experts.3.down_proj"]),
        ("rmu", {"layer": 0}, ["0.mlp.down_proj"]),
        ("adaptive_rmu", {"layer": 1, "modules": "up_proj"}, ["0.mlp.up_proj", "1.mlp.up_proj"]),
        ("lunar", {"layer": 3}, ["3.mlp.down_proj"]),
        ("lunar", {"layer": 3, "modules": "up_proj|down_proj"}, ["3.mlp.down_proj", "3.mlp.up_proj"]),
        ("sugd", {"layers": 1}, ["11.mlp.down_proj", "11.mlp.up_proj"]),
    ],
)
def test_only_the_published_parameters_are_trained(name: str, parameters: dict[str, Any], expected: list[str]) -> None:
    (pattern,) = build_objective(name, parameters).trainable(12) or []
    found = [parameter for parameter in NAMES if re.search(pattern, parameter)]
    assert found == [f"model.layers.{part}.weight" for part in expected]


def test_sugd_trains_every_layer_of_a_shallow_model() -> None:
    (pattern,) = build_objective("sugd", {}).trainable(12) or []
    trained = {parameter.split(".")[2] for parameter in NAMES if re.search(pattern, parameter)}
    assert trained == {str(layer) for layer in range(4, 12)}
    (pattern,) = build_objective("sugd", {}).trainable(3) or []
    assert [name for name in NAMES if re.search(pattern, name)] == NAMES[:6]


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("rmu", {"layer": 2}, "rmu: layer 2 does not exist; the model has layers 0 to 1"),
        ("adaptive_rmu", {"layer": 9}, "adaptive_rmu: layer 9 does not exist; the model has layers 0 to 1"),
        ("lunar", {}, "lunar: layer 22 does not exist; the model has layers 0 to 1"),
        ("lunar", {}, "parameters.layer=1"),
        ("negmerge", {"rates": [1.0]}, "rates=[0.5,1,2]"),
        ("negmerge", {"rates": [1.0, 1.0]}, "ask for one"),
    ],
)
def test_what_a_model_or_setting_lacks_is_said_before_training(
    name: str, parameters: dict[str, Any], says: str
) -> None:
    objective = build_objective(name, parameters)
    model, _ = build_tiny()
    with pytest.raises(UserError) as error:
        objective.check(model)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["rmu", "adaptive_rmu", "lunar", "sugd"])
def test_a_model_without_decoder_layers_is_refused(name: str) -> None:
    model, _ = build_tiny()
    model.model.layers = torch.nn.ModuleList(list(model.model.layers)[:1])
    with pytest.raises(UserError, match="can't be found"):
        build_objective(name, {}).check(model)


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("adaptive_rmu", {"beta": 0}, "greater than 0"),
        ("adaptive_rmu", {"coefficient": 2}, "no parameter 'coefficient'"),
        ("rmu", {"modules": "mlp.[0-9"}, "pattern"),
        ("lunar", {"coeficient": 2}, "did you mean 'coefficient'"),
        ("task_negation", {"alpha": -1}, "greater than 0"),
        ("negmerge", {"rates": [0]}, "greater than 0"),
        ("sugd", {"chunk": 0}, "greater than 0"),
        ("sugd", {"layers": 0}, "greater than 0"),
    ],
)
def test_wrong_settings_get_one_sentence(name: str, parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        build_objective(name, parameters)
    assert says in str(error.value)


TRAIN = TrainConfig(epochs=30, lr=3e-3, batch_size=8, precision="float32", checkpoint_every=1000)
LONG_FORGET, LONG_RETAIN = rows(8, seed=1), rows(16, seed=2)


def job(name: str, parameters: dict[str, Any], **changes: Any) -> Job:
    weights = {"forget": 1.0, "nll": 0.0, "kl": 0.0}
    objective = build_objective(name, parameters)
    made = Job(ModelConfig(id="tiny"), LONG_RETAIN, TRAIN, 7, forget=LONG_FORGET, objective=objective, weights=weights)
    return replace(made, **changes)


@torch.no_grad()
def answer_loss(model: Any) -> float:
    """Mean token NLL of the forget answers."""
    batch = pad_right(LONG_FORGET, range(len(LONG_FORGET)), 0)
    return float(torch.nn.functional.cross_entropy(Forward(model, batch).logits, batch.targets))


@pytest.mark.parametrize(
    ("name", "parameters"), [("task_negation", {"alpha": 0.1}), ("negmerge", {"alpha": 0.1, "rates": [0.5, 1]})]
)
def test_negation_makes_the_forget_answers_less_likely(name: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    before = answer_loss(build_tiny()[0].eval())
    curve: list[float] = []
    with fit(job(name, parameters), tmp_path, on_step=lambda _, terms: curve.append(terms["forget"])) as fitted:
        assert curve[29] < curve[0]  # what is trained first is the opposite
        assert answer_loss(fitted.model) > before + 0.1
        assert fitted.steps == 30 * len(parameters.get("rates", [1]))


@torch.no_grad()
def test_lunar_moves_the_forget_states_towards_the_declined_prompts(tmp_path: Path) -> None:
    anchors = rows(6, seed=3)
    made = job("lunar", {"layer": 1, "coefficient": 1.0}, anchors=anchors, train=TRAIN.model_copy(update={"lr": 1e-2}))

    def mean_state(model: Any, chosen: Sequence[Any]) -> Tensor:
        batch = pad_right(chosen, range(len(chosen)), 0)
        return Forward(model, batch, 1, logits=False).hidden[batch.lengths.cumsum(0) - batch.lengths].mean(0)

    start = build_tiny()[0].eval()
    way = mean_state(start, anchors) - mean_state(start, LONG_FORGET)
    with torch.enable_grad(), fit(made, tmp_path) as fitted:
        model = fitted.model
    moved = mean_state(model, LONG_FORGET) - mean_state(start, LONG_FORGET)
    kept = mean_state(model, LONG_RETAIN) - mean_state(start, LONG_RETAIN)
    assert torch.cosine_similarity(moved, way, dim=0) > 0.8
    assert moved.norm() > 2 * kept.norm()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, start.get_parameter(n))]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


def test_drift_makes_the_goal_grow_from_epoch_to_epoch(tmp_path: Path) -> None:
    parameters = {"layer": 1, "beta": 3.0, "alpha": 1.0}
    train = TRAIN.model_copy(update={"epochs": 4, "lr": 3e-2})  # a step is an epoch
    losses: dict[bool, list[float]] = {}
    for drift in (False, True):
        curve: list[dict[str, float]] = []
        made = job("adaptive_rmu", {**parameters, "drift": drift}, train=train)
        with fit(made, tmp_path / str(drift), on_step=lambda _, terms, curve=curve: curve.append(dict(terms))):
            losses[drift] = [terms["forget"] for terms in curve]
    norms = [terms["monitor_norm"] for terms in curve]
    assert losses[True][0] == pytest.approx(losses[False][0])
    assert norms[-1] > 1.1 * norms[0]
    assert losses[True][-1] > 1.1 * losses[False][-1]
