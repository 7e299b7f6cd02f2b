"""Every objective: its closed form, its gradient, its parts, its declaration, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.data.collate import Batch, pad_right
from expunge.errors import UserError
from expunge.methods.base import OBJECTIVES, Objective, build_objective
from expunge.methods.step import Memory, Step, Totals
from expunge.models.passes import Forward
from expunge.models.reference import Needs, ReferenceCache, build_reference
from expunge.models.tiny import build_tiny
from method_cases import FORMS, HALF, OVER_STEPS, SIDES, known, outputs, step
from training_rows import rows, supervised

ALL = sorted(OBJECTIVES.names())
CASES = [(name, given) for name, (_, settings) in FORMS.items() for given in ({}, *settings)]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in given.items()) or 'default'}" for name, given in CASES]


def build(name: str, given: dict[str, Any] | None = None) -> Objective:
    """The objective; one that steers a layer steers the first."""
    fields: Any = dataclasses.fields(OBJECTIVES.get(name))  # type: ignore[arg-type]
    layer = {"layer": 0} if any(item.name == "layer" for item in fields) else {}
    return build_objective(name, {**layer, **(given or {})})


def total(terms: dict[str, Tensor]) -> Tensor:
    """What the trainer adds up."""
    return torch.stack([value for name, value in terms.items() if not name.startswith("monitor")]).sum()


@pytest.mark.parametrize("chosen", [None, "half"])
@pytest.mark.parametrize(("name", "given"), CASES, ids=IDS)
def test_terms_equal_their_closed_forms(name: str, given: dict[str, Any], chosen: str | None) -> None:
    mask = HALF if chosen else None
    terms = build(name, given).loss(step(*outputs(), selected=None if mask is None else torch.from_numpy(mask)))
    expected = FORMS[name][0](known(mask), **given)
    expected = expected if isinstance(expected, dict) else {"forget": expected}
    assert {term: value.item() for term, value in terms.items()} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_parameter_has_a_closed_form_that_it_changes(name: str) -> None:
    form, settings = FORMS[name]
    fields: Any = dataclasses.fields(OBJECTIVES.get(name))  # type: ignore[arg-type]
    assert {key for given in settings for key in given} == {f.name for f in fields} - OVER_STEPS.get(name, set())
    sides = known()
    default = form(sides)
    for given in settings:
        assert form(sides, **given) != pytest.approx(default, rel=1e-4), given


class Replayed:
    """Stop-gradients as constants: what was detached in the first pass is returned in the later ones, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[Tensor] = []
        self.playing: Iterator[Tensor] | None = None
        detach = torch.Tensor.detach

        def replay(tensor: Tensor) -> Tensor:
            if self.playing is not None:
                return next(self.playing)
            self.kept.append(detach(tensor))
            return self.kept[-1]

        monkeypatch.setattr(torch.Tensor, "detach", replay)


@pytest.mark.parametrize("name", ALL)
def test_gradient_matches_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build(name)
    given = [tensor.requires_grad_() for tensor in outputs()]
    total(objective.loss(step(*given))).backward()
    tensor = given[0] if objective.hidden_layer() is None else given[1]
    gradient = tensor.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        replayed = Replayed(monkeypatch)
        total(objective.loss(step(*given)))
        for _ in range(3):
            direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            values = []
            for shift in (1e-5, -1e-5):
                moved = [value + shift * direction if value is tensor else value for value in given]
                replayed.playing = iter(replayed.kept)
                values.append(total(objective.loss(step(*moved))).item())
            slope, expected = (values[0] - values[1]) / 2e-5, (gradient * direction).sum().item()
            assert slope == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_parts_of_a_step_add_up(name: str) -> None:
    objective = build(name)

    def terms_and_gradient(parts: list[dict[str, list[int]] | None]) -> tuple[dict[str, float], list[Tensor]]:
        given = [tensor.requires_grad_() for tensor in outputs()]
        added: dict[str, float] = {}
        for part in parts:
            terms = objective.loss(step(*given, part=part))
            total(terms).backward()
            for term, value in terms.items():
                added[term] = added.get(term, 0.0) + value.item()
        return added, [torch.zeros_like(t) if t.grad is None else t.grad for t in given]

    whole, gradients = terms_and_gradient([None])
    split = [{"forget": [2], "retain": [0, 1]}, {"forget": [1, 0], "retain": []}]
    parts, added = terms_and_gradient(split)
    assert parts == pytest.approx(whole, rel=1e-9)
    for one, other in zip(gradients, added, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_row_of_which_nothing_is_selected_harms_nothing(name: str) -> None:
    objective = build(name)
    lengths = supervised(SIDES["forget"])
    selected = torch.arange(sum(lengths)) >= lengths[0]
    given = [tensor.requires_grad_() for tensor in outputs()]
    total(objective.loss(step(*given, selected=selected))).backward()
    for gradient in (tensor.grad for tensor in given):
        if gradient is not None:
            assert gradient.isfinite().all()
            assert (gradient[: lengths[0]] == 0).all()


class Model:
    """A tiny model, another that it started as, and a step over rows of very different lengths."""

    def __init__(self) -> None:
        self.model, self.start = build_tiny(0)[0], build_tiny(1)[0]
        shortest = {"forget": 6, "forget_alternatives": 12, "retain": 20, "retain_alternatives": 6}
        self.sides = {
            side: rows(2, seed=number, shortest=size, longest=size + 30)
            for number, (side, size) in enumerate(shortest.items())
        }
        self.every = [row for side in self.sides.values() for row in side]
        numbers = range(len(self.every))
        needs = Needs(numbers, numbers, numbers, 0)
        self.cache: ReferenceCache = build_reference(self.start, self.every, needs)

    def terms(self, objective: Objective, numbers: list[int], wider: int = 0, packs: bool = False) -> dict[str, float]:
        """Terms of the loss over these rows, with `wider` columns of garbage behind the padding, or several a line."""
        batch = pad_right([self.every[number] for number in numbers], numbers, 0)
        if wider:
            batch = widened(batch, wider)
        begin, counts, totals = 0, {}, {}
        for side, there in self.sides.items():
            counts[side] = sum(begin <= number < begin + len(there) for number in numbers)
            totals[side] = sum(supervised(there))
            begin += len(there)
        generator = torch.Generator().manual_seed(4)
        memory = Memory(means={name: torch.randn(128, generator=generator) for name in ("forget", "anchors")})
        forward = Forward(self.model, batch, 0, packs=packs)
        whole = Totals({side: len(there) for side, there in self.sides.items()}, totals)
        with torch.no_grad():
            made = objective.loss(Step(forward, counts, self.cache, None, whole, 1.0, memory=memory))
        return {term: value.item() for term, value in made.items()}


def widened(batch: Batch, columns: int) -> Batch:
    """The same rows with further padded columns, whose ids are anything."""
    size = (len(batch), columns)
    garbage = torch.randint(3, 500, size, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(
        batch,
        input_ids=torch.cat([batch.input_ids, garbage], 1),
        attention_mask=torch.cat([batch.attention_mask, torch.zeros(size, dtype=torch.int64)], 1),
        supervised=torch.cat([batch.supervised, torch.zeros(size, dtype=torch.bool)], 1),
    )


@pytest.fixture(scope="module")
def trained() -> Model:
    return Model()


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name: str, trained: Model) -> None:
    objective = build(name)
    together = trained.terms(objective, list(range(8)))
    assert trained.terms(objective, list(range(8)), wider=9) == pytest.approx(together, rel=1e-4)
    assert trained.terms(objective, list(range(8)), packs=True) == pytest.approx(together, rel=1e-4)
    # a row of each side at a time: alternatives go with their rows
    single = [trained.terms(objective, [row, row + 2, row + 4, row + 6]) for row in range(2)]
    assert {term: single[0][term] + single[1][term] for term in together} == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_declaration_is_complete(name: str) -> None:
    cls = OBJECTIVES.get(name)
    described, about = cls.describe(), cls.about
    assert about.name == name
    assert all(described[key] for key in ("summary", "loss", "paper", "kind", "needs"))
    assert about.kind in ("removes", "suppresses")
    assert len(about.idea.split()) <= 12
    assert about.rates
    assert all(0 < rate < 1 for rate in about.rates)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert described[f"parameter {field.name}"].split(": ")[1], field.name


@pytest.mark.parametrize("name", sorted(FORMS))
def test_an_objective_reads_only_what_it_declares(name: str) -> None:
    """Alternatives, retain rows and the start model are at hand in a run only if the declaration asks for them."""
    objective, about = build(name), OBJECTIVES.get(name).about
    made = step(*outputs())
    if about.alternatives is None:
        made.forget._alternatives = None
    if not about.retain_alternatives:
        made.retain._alternatives = None
    if not about.reference:
        made.forget._cache._logprobs.values = None
    if not about.distribution:
        made.forget._cache._vectors.values = None
    if not about.retain:
        del made.retain
    assert total(objective.loss(made)).isfinite()


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("npoo", {}, "did you mean 'npo'"),
        ("npo", {"bta": 1}, "did you mean 'beta'"),
        ("npo", {"beta": -1}, "greater than 0"),
        ("npo", {"level": "word"}, "'sequence', 'mean' or 'token'"),
        ("rmu", {"layer": "x"}, "valid integer"),
        ("eul", {"power": 3}, "1 or 2"),
        ("flat", {"divergence": "wasserstein"}, "'total_variation', 'kl', 'js' or 'pearson'"),
        ("pdu", {"epsilon": -0.1}, "greater than or equal to 0"),
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
