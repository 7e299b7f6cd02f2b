"""KL drift from the target, out of the scoring pass, against whole distributions of two models side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from expunge.models.tiny import build_tiny
from expunge.scoring import divergence
from expunge.scoring.divergence import TargetStates, incomparable, kl_divergence
from expunge.scoring.scores import score, score_tables
from expunge.scoring.tables import DIVERGENCE
from scoring_rows import END, lively, random_rows, row
from test_scoring_architectures import KINDS, build
from test_scoring_shared import candidates


def disturbed(model, seed: int = 5):
    """The model with other weights, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0)
    return model


def whole_kl(target, model, r) -> np.ndarray:
    """KL(target ‖ model) at the supervised tokens of one row, from all logits of both models, in float64."""
    ids = torch.tensor(r.input_ids[None].astype(np.int64))
    with torch.no_grad():
        q, p = (softmax(m(input_ids=ids).logits[0].double().numpy(), axis=-1) for m in (target, model))
    return rel_entr(q, p).sum(-1)[r.prompt_tokens - 1 : -1]


def lists(table) -> list[np.ndarray]:
    return [np.array(values) for values in table.column("kl").to_pylist()]


def kept(model, rows, folder=None, **options) -> TargetStates:
    states = TargetStates(folder, **options)
    score_tables(model, rows, batch_size=4, keep=states)
    assert states.problem is None
    return states


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_distributions_of_two_models(kind):
    rows = candidates(12)
    target, model = build(kind), disturbed(build(kind))
    states = kept(target, rows)
    tables = score_tables(model, rows, batch_size=5, against=states)
    table = tables["divergence"]
    assert table.schema == DIVERGENCE
    assert table.column("example_id").to_pylist() == [r.example.id for r in rows]
    for found, r in zip(lists(table), rows, strict=True):
        expected = whole_kl(target, model, r)
        assert expected.max() > 0.001
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)
    plain = score(model, rows, batch_size=5)
    assert tables["scores"].equals(plain), "the comparison must not change the scores"


def test_float64_is_exact():
    rows = random_rows(6, longest=15)
    target, model = (lively(build_tiny(seed)[0]).double() for seed in (0, 1))
    found = lists(score_tables(model, rows, batch_size=3, against=kept(target, rows))["divergence"])
    for values, r in zip(found, rows, strict=True):
        np.testing.assert_allclose(values, whole_kl(target, model, r), rtol=1e-6, atol=1e-9)  # the table is float32


def test_the_target_is_not_away_from_itself():
    model, rows = lively(build_tiny()[0]), random_rows(9)
    states = kept(model, rows)
    for values in lists(score_tables(model, rows, batch_size=7, against=states)["divergence"]):
        assert len(values)
        assert values.max() <= 1e-6


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_pieces_change_nothing(monkeypatch, piece):
    rows = random_rows(5)
    target, model = (lively(build_tiny(seed)[0]) for seed in (0, 1))
    states = kept(target, rows)
    expected = lists(score_tables(model, rows, batch_size=5, against=states)["divergence"])
    sizes: list[int] = []
    whole = divergence.kl_divergence
    monkeypatch.setattr(divergence, "kl_divergence", lambda q, p: (sizes.append(len(q)), whole(q, p))[1])
    monkeypatch.setattr(divergence, "PIECE", piece)
    found = lists(score_tables(model, rows, batch_size=5, against=states)["divergence"])
    assert max(sizes) <= piece
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-6)


def test_the_same_model_may_be_changed_afterwards_and_rows_come_in_any_order():
    rows = random_rows(8)
    model = lively(build_tiny()[0])
    states = kept(model, rows[:5])
    score_tables(model, rows[5:], batch_size=2, keep=states)  # a second set
    disturbed(model)
    target = lively(build_tiny()[0])
    chosen = [rows[6], rows[0], row("unknown", [5, 6, 7], [8, 9], [END]), rows[3]]
    found = lists(score_tables(model, chosen, batch_size=3, against=states)["divergence"])
    assert [len(values) for values in found] == [
        rows[6].supervised_tokens,
        rows[0].supervised_tokens,
        0,
        rows[3].supervised_tokens,
    ]
    for i in (0, 1, 3):
        np.testing.assert_allclose(found[i], whole_kl(target, model, chosen[i]), rtol=1e-3, atol=2e-5)


def test_only_what_is_wanted_is_kept():
    model, rows = lively(build_tiny()[0]), random_rows(6)
    states = kept(model, rows, wanted=lambda r: r.example.id in ("r1", "r4"))
    assert [states.knows(r) for r in rows] == [False, True, False, False, True, False]
    found = lists(score_tables(disturbed(model), rows, batch_size=3, against=states)["divergence"])
    assert [len(values) > 0 for values in found] == [states.knows(r) for r in rows]


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GPT2"])
def test_states_survive_a_folder(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("expunge.models.storage.RAM_LIMIT", 0)  # the vectors lie in a file even before they are saved
    rows = random_rows(7, longest=20)
    states = kept(build(kind), rows, tmp_path / "work")
    states.save(tmp_path / "kept")
    model = disturbed(build(kind))
    expected = score_tables(model, rows, batch_size=3, against=states)["divergence"]
    found = score_tables(model, rows, batch_size=3, against=TargetStates.load(tmp_path / "kept"))["divergence"]
    assert found.equals(expected)


def test_what_cannot_be_compared_is_left_out_with_a_reason():
    rows = random_rows(3)
    target, model = build_tiny()[0], build_tiny(1)[0]
    states = kept(target, rows)
    assert incomparable(model, rows, states) is None
    others = random_rows(3, seed=9)
    assert "did not see" in incomparable(model, others, states)
    model.resize_token_embeddings(600)
    assert "600" in incomparable(model, rows, states)
    assert set(score_tables(model, rows, batch_size=2, against=states)) == {"scores"}
    assert set(score_tables(target, others, batch_size=2, against=states)) == {"scores"}
    assert "not kept" in incomparable(target, rows, TargetStates())


def test_an_architecture_with_a_head_of_its_own_is_noticed(tmp_path):
    model, rows = build_tiny()[0], random_rows(3)

    def scaled(_, __, output):
        output.logits = output.logits * 3 + 1
        return output

    model.register_forward_hook(scaled)
    states = TargetStates()
    score_tables(model, rows, batch_size=2, keep=states)
    assert "unknown way" in incomparable(model, rows, states)
    with pytest.raises(ValueError, match="unknown way"):
        states.save(tmp_path)


def test_known_divergences():
    log = torch.log
    uniform, half = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    np.testing.assert_allclose(kl_divergence(half, uniform), [np.log(2)], rtol=1e-6)
    skewed = log(torch.tensor([[0.7, 0.1, 0.1, 0.1]]))
    np.testing.assert_allclose(
        kl_divergence(uniform, skewed), [0.25 * (np.log(0.25 / 0.7) + 3 * np.log(2.5))], rtol=1e-5
    )
    # tokens that the model rules out: large, not infinite
    ruled_out = float(kl_divergence(uniform, half)[0])
    assert 1000 < ruled_out < np.inf
    assert torch.isnan(kl_divergence(uniform, torch.full((1, 4), torch.nan))).all()
