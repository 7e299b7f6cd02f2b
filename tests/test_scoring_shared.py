"""Prompts that rows share go through the model once, and no number changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from expunge.models.tiny import build_tiny
from expunge.scoring.distributed import shard
from expunge.scoring.generate import Drawing, Sampling, generate
from expunge.scoring.scores import score
from expunge.scoring.shared_prompts import continues_prompts, prompt_groups
from scoring_rows import END, lively, random_rows, row
from test_scoring_architectures import KINDS, build
from test_scoring_scores import NUMBERS, flat, plain_scores


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = build_tiny(seed=1)
    return lively(model), tokenizer


def candidates(prefix: int = 0, seed: int = 3, answers: int = 4):
    """Rows of which some share a prompt, in mixed order, and some do not; all begin with `prefix` equal tokens."""
    start = list(range(20, 20 + prefix))
    generator = np.random.default_rng(seed)
    rows = []
    for i, plain in enumerate(random_rows(7, seed=seed, longest=18)):
        prompt = start + plain.input_ids[: plain.prompt_tokens].tolist()
        for number in range(answers if i % 3 else 1):
            answer = generator.integers(3, 500, generator.integers(1, 14)).tolist()
            made = row(f"c{i}", prompt, answer, [END])
            rows.append(replace(made, example=replace(made.example, candidate=number)))
    return [rows[i] for i in generator.permutation(len(rows))]


def assert_equals_plain(table, model, rows):
    """Every number as an unpadded forward of each row gives it."""
    expected = [plain_scores(model, r) for r in rows]
    for name in NUMBERS:
        values = np.concatenate([e[name] for e in expected])
        np.testing.assert_allclose(flat(table, name), values, atol=1e-5, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(flat(table, "hit"), np.concatenate([e["hit"] for e in expected]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [0, 12], ids=["nothing else shared", "shared beginning"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_candidates_score_as_by_themselves(kind, prefix, batch_size):
    model, rows = build(kind), candidates(prefix)
    assert continues_prompts(model) == (kind != "Mamba")
    assert len(prompt_groups(rows)) > 2
    table = score(model, rows, batch_size=batch_size)
    assert table.column("example_id").to_pylist() == [r.example.id for r in rows]
    assert table.column("candidate").to_pylist() == [r.example.candidate for r in rows]
    assert_equals_plain(table, model, rows)


def seen_tokens(model, work) -> list[int]:
    """Tokens of each forward of the model, padding included."""
    seen: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        work()
    finally:
        handle.remove()
    return seen


def test_a_prompt_goes_through_the_model_once(tiny):
    model = tiny[0]
    assert continues_prompts(model)
    rows = [row(f"a{i}", list(range(30, 90)), list(range(100 + i, 110 + i)), [END]) for i in range(6)]
    # without its last token, which each candidate needs to predict its first; of a candidate the last is not needed
    prompt, others = seen_tokens(model, lambda: score(model, rows, batch_size=6))[-2:]
    assert prompt + others <= 59 + 6 * 11
    mixed = [*rows, row("b", [7] * 20, [8] * 5, [END])]
    sizes = seen_tokens(model, lambda: score(model, mixed, batch_size=8))
    assert sum(sizes) == (20 + 5) + 59 + 6 * 11


def test_nothing_is_shared_where_it_would_not_pay():
    short = [row(f"s{i}", [5, 6], [7, 8], [END]) for i in range(3)]
    assert prompt_groups(short) == []
    assert prompt_groups(short * 4) == [list(range(12))]
    texts = [row(f"t{i}", [5], [7 + i] * 30, [END], is_text=True) for i in range(50)]
    assert prompt_groups(texts) == []
    assert prompt_groups([row("nothing", [5] * 20, [], [])] * 2) == []


def test_a_model_whose_cache_cannot_be_continued_scores_whole_rows(tiny, monkeypatch):
    model, rows = tiny[0], candidates()
    monkeypatch.setattr("expunge.scoring.shared_prompts.continues_prompts", lambda _: False)
    longest = max(seen_tokens(model, lambda: score(model, rows, batch_size=1)))
    assert longest == max(len(r.input_ids) for r in rows) - 1
    assert_equals_plain(score(model, rows, batch_size=4), model, rows)


def test_broken_weights_are_not_remembered():
    model = build_tiny()[0]
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        assert not continues_prompts(model)
        weight.copy_(kept)
    assert continues_prompts(model)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_get_whole_prompts(ranks):
    rows = candidates(answers=9, prefix=8)
    parts = [shard(rows, rank, ranks) for rank in range(ranks)]
    homes = [{r.example.id for r in part} for part in parts]
    assert sum(map(len, homes)) == len({r.example.id for r in rows})
    assert sorted(map(id, (r for part in parts for r in part))) == sorted(map(id, rows))


# ---- decoding


def by_transformers(model, tokenizer, rows, limit: int) -> list[str]:
    """Greedy texts, one prompt at a time."""
    config = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=END, pad_token_id=0)
    said = []
    for r in rows:
        ids = torch.from_numpy(r.input_ids[None, : r.prompt_tokens].astype(np.int64))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, r.prompt_tokens :]
        said.append(tokenizer.decode(out, skip_special_tokens=True))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_greedy_texts_are_those_of_transformers(tiny, batch_size):
    model, tokenizer = tiny
    rows = candidates(12)
    table = generate(model, tokenizer, rows, max_new_tokens=80, batch_size=batch_size)
    expected = by_transformers(model, tokenizer, rows, 80)
    assert table.column("generated").to_pylist() == expected
    assert len(set(expected)) > 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [0, 12])
def test_rows_that_enter_late_say_what_they_say_alone(kind, prefix):
    model, tokenizer = build(kind), build_tiny()[1]
    rows = candidates(prefix, answers=2)
    done: list[int] = []
    # limits of their own, so that places become free at different times
    table = generate(model, tokenizer, rows, max_new_tokens=14, batch_size=3, margin=2, progress=done.append)
    assert sum(done) == len(rows)
    for r, found, new in zip(
        rows, table.column("generated").to_pylist(), table.column("new_tokens").to_pylist(), strict=True
    ):
        tokens = r.input_ids[: r.prompt_tokens].tolist()
        for _ in range(min(14, r.answer_tokens + 2)):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            if tokens[-1] == END:
                tokens.pop()
                break
        assert new == len(tokens) - r.prompt_tokens
        assert found == tokenizer.decode(tokens[r.prompt_tokens :], skip_special_tokens=True)


def test_rows_that_have_ended_leave_the_batch(tiny):
    model, tokenizer = tiny
    assert continues_prompts(model)
    plain = random_rows(8, seed=5, longest=12)
    said = []
    for r in plain:
        ids = torch.from_numpy(r.input_ids[None, : r.prompt_tokens].astype(np.int64))
        config = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=None)
        said.append(model.generate(ids, generation_config=config)[0, r.prompt_tokens :].tolist())
    rows = [
        row(r.example.id, r.input_ids[: r.prompt_tokens].tolist(), [9], tokens[i : i + 2])
        for i, (r, tokens) in enumerate(zip(plain, said, strict=True))
    ]
    sizes = seen_tokens(model, lambda: generate(model, tokenizer, rows, max_new_tokens=20, batch_size=8))
    steps = sizes[1:]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == 8
    assert steps[-1] <= 2
    table = generate(model, tokenizer, rows, max_new_tokens=20, batch_size=8)
    for i, tokens in enumerate(said):
        end = next(j for j in range(19) if tokens[j : j + 2] == tokens[i : i + 2] or tokens[j] == END)
        assert table.column("new_tokens")[i].as_py() == end


def test_samples_do_not_depend_on_batches_order_or_number(tiny):
    model, tokenizer = tiny
    rows = random_rows(5, seed=9, longest=14)

    def texts(chosen, count=3, batch_size=4, seed=0):
        sampling = Sampling(0.8, seed, count)
        table = generate(model, tokenizer, chosen, max_new_tokens=10, batch_size=batch_size, sampling=sampling)
        keys = zip(table.column("example_id").to_pylist(), table.column("candidate").to_pylist(), strict=True)
        return dict(zip(keys, table.column("generated").to_pylist(), strict=True))

    first = texts(rows)
    assert list(first) == [(r.example.id, i) for r in rows for i in range(3)]
    assert texts(rows[::-1], batch_size=15) == first
    assert texts(rows[2:3]) == {key: text for key, text in first.items() if key[0] == "r2"}
    more = texts(rows, count=5, batch_size=1)
    assert {key: more[key] for key in first} == first
    assert len(set(first.values())) == len(first)
    assert texts(rows, seed=1) != first
    # the rows of other processes: each sample as a row of its own
    apart = [replace(r, example=replace(r.example, candidate=i)) for r in rows for i in range(3)]
    assert texts(apart, count=1) == first


def test_samples_of_a_model_without_a_cache_are_drawn_alike(tiny, monkeypatch):
    model, tokenizer = tiny
    rows, settings = random_rows(5, seed=9, longest=14), {"max_new_tokens": 10, "batch_size": 4}
    own = generate(model, tokenizer, rows, sampling=Sampling(1.0, 0, 2), **settings)
    monkeypatch.setattr("expunge.scoring.generate.continues_prompts", lambda _: False)
    assert generate(model, tokenizer, rows, sampling=Sampling(1.0, 0, 2), **settings).equals(own)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_models_distribution(temperature):
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 2.0, -1.0]])
    count = 20_000
    numbers = np.random.default_rng(0).random((count, 1))
    draw = Drawing(numbers.__getitem__, Sampling(temperature))
    drawn = draw(range(count), [0] * count, logits.expand(count, -1)).tolist()
    found = Counter(drawn)
    expected = (logits[0] / temperature).softmax(-1) * count
    assert found[2] == 0
    keep = [0, 1, 3, 4]
    assert chisquare([found[i] for i in keep], expected[keep].numpy(), sum_check=False).pvalue > 1e-3


def test_a_draw_never_falls_behind_the_last_token():
    draw = Drawing(np.array([[0.0], [np.nextafter(1.0, 0.0)]]).__getitem__, Sampling())
    logits = torch.full((2, 4), -torch.inf)
    logits[:, 1] = 0.0
    assert draw(range(2), [0, 0], logits).tolist() == [1, 1]
