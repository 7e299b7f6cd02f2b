"""Attacks on hidden states: lenses, probes and ablated directions."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attack_world import attack, everything, layers_of, logits, same, tiny, world
from expunge.attacks.direction_ablation import direction, without_outliers
from expunge.attacks.lens import PartialSoftmax, Translator
from expunge.attacks.states import all_but_first, last_of_prompt, layer_states, prompt
from expunge.data.collate import pad_right
from expunge.errors import UserError
from expunge.models.forward import decoder_layers
from expunge.models.reference import Head
from expunge.models.tiny import build_tiny
from expunge.scoring.scores import score
from scoring_rows import END, random_rows, row


def test_the_logit_lens_is_the_models_own_norm_and_head():
    model, made = tiny(), attack("logit_lens", {"depths": [0.5, 1.0]})
    plain, states = logits(model), layers_of(model)
    half, whole = made.points()
    with made.applied(model, whole, world()):
        assert torch.equal(logits(model), plain)
    with made.applied(model, half, world()):
        with torch.no_grad():
            expected = model.lm_head(model.model.norm(states[0][0]))
        torch.testing.assert_close(logits(model), expected)
        assert not torch.allclose(logits(model), plain, atol=0.1)


@pytest.mark.parametrize("name", ["logit_lens", "trained_lens"])
def test_rows_that_begin_alike_are_scored_as_alone_through_a_lens(name):
    model, made, around = tiny(), attack(name, {"depths": [0.5]}), world()
    start = list(range(20, 36))
    rows = [row(f"p{i}", [*start, 40 + i], [5 + i, 9, 11], [END]) for i in range(4)]
    with made.applied(model, made.points()[0], around):
        together = score(model, rows, batch_size=4)
        for place, one in enumerate(rows):
            alone = score(model, [one], batch_size=1)
            np.testing.assert_allclose(
                together["logprob"][place].as_py(), alone["logprob"][0].as_py(), atol=1e-4, rtol=1e-4
            )


def taught(model: Any, rows: list[Any], steps: int = 40) -> Any:
    """The model after it learnt the rows."""
    batch = pad_right(rows, range(len(rows)), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.supervised]
        loss = torch.nn.functional.cross_entropy(states, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model


def mean_nll(model: Any, rows: list[Any]) -> float:
    table = score(model, rows, batch_size=8)
    return -float(np.concatenate([np.array(v) for v in table["logprob"].to_pylist()]).mean())


@pytest.mark.parametrize("candidates", [8192, 160], ids=["whole vocabulary", "drawn"])
def test_the_trained_lens_reads_more_than_the_logit_lens_and_trains_nothing_else(candidates):
    # answers that follow from the last prompt token, so that there is something to be read in rows it did not see
    rows = [row(f"r{i}", [3 + i % 9, 20 + i % 9], [60 + i % 9, 80 + i % 9, 100 + i % 9], [END]) for i in range(40)]
    model = taught(build_tiny()[0], rows)
    around = world(rows={"retain": rows[:30], "forget": rows[30:]})
    settings = {"depths": [0.5, 1.0], "steps": 30, "candidates": candidates}
    lens, probe = attack("logit_lens", {"depths": [0.5, 1.0]}), attack("trained_lens", settings)
    point, last = lens.points()
    before = everything(model)
    with lens.applied(model, point, around):
        unread = [mean_nll(model, around.rows[split]) for split in ("retain", "forget")]
    with probe.applied(model, point, around):
        read = [mean_nll(model, around.rows[split]) for split in ("retain", "forget")]
        kept = logits(model)
    assert all(after < 0.7 * plain for after, plain in zip(read, unread, strict=True)), (read, unread)
    assert same(before, everything(model))
    plain = mean_nll(model, rows)
    with probe.applied(model, last, around):  # at the last layer there is nothing to lose
        assert mean_nll(model, rows) < plain + 0.01
    others = replace(around, rows={**around.rows, "forget": random_rows(3)})
    with probe.applied(model, point, others):
        assert torch.equal(logits(model), kept)  # forget rows are not read


def test_a_probe_that_training_spoils_is_not_taken():
    rows = random_rows(12, longest=12)
    model, around = tiny(), world(rows={"retain": rows})
    wild, still = (attack("trained_lens", {"depths": [0.5], "steps": steps, "lr": 3.0}) for steps in (5, 0))
    (point,) = wild.points()
    with still.applied(model, point, around):
        start = logits(model)
    with wild.applied(model, point, around):
        assert torch.equal(logits(model), start)


def test_drawn_tokens_stand_for_the_whole_vocabulary():
    draw = torch.Generator().manual_seed(0)
    head = Head(torch.randn(400, 16, generator=draw) / 4, torch.randn(400, generator=draw) / 4)
    vectors, targets = torch.randn(50, 16, generator=draw), torch.randint(30, (50,), generator=draw)
    exact = float(torch.nn.functional.cross_entropy(head(vectors), targets))
    whole, part = (PartialSoftmax.over(head, targets, candidates) for candidates in (400, 100))
    assert float(whole.nll(vectors, targets, draw)) == pytest.approx(exact, rel=1e-5)
    drawn = [float(part.nll(vectors, targets, draw)) for _ in range(50)]
    assert np.std(drawn) > 0
    assert np.mean(drawn) == pytest.approx(exact, abs=0.02)


def test_states_are_read_again_when_the_weights_changed():
    model, around = tiny(), world()
    made = attack("trained_lens", {"depths": [0.5], "steps": 0})
    (point,) = made.points()
    with made.applied(model, point, around):
        before = logits(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)  # above the layer that is read: only the goal moves
    with made.applied(model, point, around):
        changed = logits(model)
    fresh = attack("trained_lens", {"depths": [0.5], "steps": 0})
    with fresh.applied(model, point, around):
        assert torch.equal(logits(model), changed)
    assert not torch.allclose(before, changed, atol=1e-3)


def test_the_regression_finds_an_affine_map():
    draw = torch.Generator().manual_seed(0)
    states, matrix = torch.randn(4000, 8, generator=draw) + 3, torch.randn(8, 8, generator=draw)
    goal = states @ matrix + 0.5
    probe = Translator.regression(states, goal)
    assert float((probe(states) - goal).norm() / goal.norm()) < 0.02  # but for the ridge
    identity = Translator.identity(states)
    assert torch.equal(identity(states), states)
    same_goal = Translator.regression(states, states)
    assert float(same_goal.change.abs().max()) == float(same_goal.shift.abs().max()) == 0


@pytest.mark.parametrize("to", ["zero", "mean"])
def test_ablated_states_have_no_part_of_their_own_along_the_direction(to):
    model, around = tiny(), world()
    made = attack("direction_ablation", {"to": to, "tokens": "last"})
    with around.open_reference() as reference:
        means = []
        for one in (model, reference):
            where = [r.prompt_tokens - 1 for r in around.rows["forget"]]
            ids = [torch.from_numpy(r.input_ids[: place + 1].astype(np.int64))[None]
                   for r, place in zip(around.rows["forget"], where, strict=True)]  # fmt: skip
            with torch.no_grad():
                found = [one(input_ids=i, output_hidden_states=True).hidden_states[1][0, -1] for i in ids]
            means.append(torch.stack(found).mean(0))
    expected = (means[0] - means[1]) / (means[0] - means[1]).norm()
    by_label = {point.label: point for point in made.points()}
    plain = layers_of(model)
    with made.applied(model, by_label["all"], around):
        ablated = layers_of(model)
    assert float((plain[0] @ expected).abs().max()) > 0.1
    left = float(means[1] @ expected) if to == "mean" else 0
    along = ablated[0] @ expected
    torch.testing.assert_close(along, torch.full_like(along, left), atol=1e-4, rtol=0)
    goal = plain[0] - (plain[0] @ expected - left)[..., None] * expected
    torch.testing.assert_close(ablated[0], goal, atol=1e-4, rtol=0)
    with made.applied(model, by_label["last-third"], around):
        upper = layers_of(model)
    assert torch.equal(upper[0], plain[0])
    assert not torch.equal(upper[1], plain[1])


def test_nothing_is_ablated_where_nothing_differs():
    model = tiny()
    made, around = attack("direction_ablation", {}), world(open_reference=lambda: nullcontext(tiny()))
    plain = logits(model)
    for point in made.points():
        with made.applied(model, point, around):
            assert torch.equal(logits(model), plain)


def test_without_a_reference_the_models_own_retain_rows_take_its_place():
    model, around = tiny(), world(open_reference=None)
    made = attack("direction_ablation", {})
    plain = logits(model)
    with made.applied(model, made.points()[-1], around):
        assert not torch.allclose(logits(model), plain, atol=1e-3)
    alone = replace(around, rows={"forget": around.rows["forget"]})
    with pytest.raises(UserError, match="reference model or retain rows"), made.applied(model, made.points()[0], alone):
        pass


def test_outliers_do_not_set_a_direction():
    draw = torch.Generator().manual_seed(0)
    others = torch.randn(40, 6, generator=draw)
    states = others + torch.tensor([1.0, 0, 0, 0, 0, 0])
    states[7, 3] += 500
    kept = without_outliers(states, others)
    assert len(kept[0]) == 39
    torch.testing.assert_close(direction(*kept), torch.tensor([1.0, 0, 0, 0, 0, 0]), atol=1e-5, rtol=0)
    assert len(without_outliers(states[:1], others[:1])[0]) == 1
    assert torch.equal(direction(others, others), torch.zeros(6))


def test_states_stand_at_the_tokens_asked_for():
    model, rows = tiny(), [row("a", [5, 6, 7], [8, 9], [END]), row("b", [11], [12], [END])]
    cases = {last_of_prompt: [8, 12], prompt: [7, 8, 12], all_but_first: [7, 8, 9, END, 12, END]}
    for where, following in cases.items():
        found = layer_states(model, rows, [0, 1], where)
        assert found.following.tolist() == following
        assert [len(states) for states in found.layers] == [len(following)] * 2
    assert found.supervised.tolist() == [False, True, True, True, True, True]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, END]]), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found.layers[0][:4], states[0, 1:5])


def test_depth_names_the_last_layer_that_runs():
    model, made = tiny(), attack("logit_lens", {"depths": [0.01, 0.5, 0.51, 1.0]})
    for point, expected in zip(made.points(), [1, 1, 2, 2], strict=True):
        with made.applied(model, point, world()):
            assert len(model.model.layers) == expected
    assert len(decoder_layers(model)) == 2
