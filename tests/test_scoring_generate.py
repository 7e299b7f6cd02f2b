"""The generation pass against greedy decoding of one prompt at a time."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge.data.encode import encode
from expunge.data.example import Example
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.models.tiny import build_tiny
from expunge.scoring.batches import generation_batches
from expunge.scoring.generate import TEXT_PROMPT_TOKENS, Sampling, generate
from expunge.scoring.scores import score
from expunge.scoring.tables import GENERATIONS
from scoring_rows import END, lively, random_rows, row


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = build_tiny(seed=1)
    return lively(model), tokenizer


def one_at_a_time(model, tokenizer, row, limit: int, ends: set[int]) -> tuple[str, int, bool]:
    """Text, number of tokens, stopped: no cache, no batch, no generate()."""
    tokens = row.input_ids[: row.prompt_tokens].tolist()
    said: list[int] = []
    while len(said) < limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([tokens + said])).logits[0, -1].argmax())
        if token in ends:
            return tokenizer.decode(said, skip_special_tokens=True), len(said), True
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True), len(said), False


def stopping(model, rows, limit: int, ends: set[int]):
    """Rows whose terminator is a token that the model says by itself, so that some of them end early."""
    said = [r.input_ids[: r.prompt_tokens].tolist() for r in rows]
    for tokens in said:
        for _ in range(limit):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return [tokens[r.prompt_tokens :] for tokens, r in zip(said, rows, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_one_prompt_at_a_time(tiny, batch_size):
    model, tokenizer = tiny
    rows = random_rows(7, longest=12)
    table = generate(model, tokenizer, rows, max_new_tokens=8, batch_size=batch_size)
    assert table.schema == GENERATIONS
    expected = [one_at_a_time(model, tokenizer, r, 8, {END}) for r in rows]
    assert list(zip(*(table.column(c).to_pylist() for c in ("generated", "new_tokens", "stopped")), strict=True)) == [
        tuple(e) for e in expected
    ]
    assert table.column("example_id").to_pylist() == [r.example.id for r in rows]
    assert table.column("prompt").to_pylist() == [r.example.prompt for r in rows]
    assert table.column("answer").to_pylist() == [r.example.answer for r in rows]


@pytest.mark.parametrize("size", [1, 2])
def test_stops_at_the_rows_own_terminator(tiny, size):
    model, tokenizer = tiny
    plain = random_rows(5, seed=5, longest=12)
    said = stopping(model, plain, 8, {END})
    # the terminator of each row is what the model says at places 3 and 4; the last row has none and runs on
    ends = [tokens[3 : 3 + size] for tokens in said[:-1]]
    rows = [
        row(r.example.id, r.input_ids[: r.prompt_tokens].tolist(), [9], e) for r, e in zip(plain, ends, strict=False)
    ]
    rows.append(row("endless", plain[-1].input_ids[: plain[-1].prompt_tokens].tolist(), [9], []))
    table = generate(model, tokenizer, rows, max_new_tokens=8, batch_size=5)
    for i, end in enumerate(ends):
        first = next(j for j in range(8) if said[i][j : j + size] == end)
        assert table.column("new_tokens")[i].as_py() == first
        assert table.column("stopped")[i].as_py()
        assert table.column("generated")[i].as_py() == tokenizer.decode(said[i][:first], skip_special_tokens=True)
    assert table.column("new_tokens")[4].as_py() == 8
    assert not table.column("stopped")[4].as_py()


def test_the_models_sampling_defaults_do_not_leak_in_and_nothing_warns(tiny, caplog):
    model, tokenizer = tiny
    rows = random_rows(4, longest=10)
    expected = generate(model, tokenizer, rows, max_new_tokens=6, batch_size=4)
    own = model.generation_config
    defaults = {"do_sample": True, "temperature": 2.0, "top_p": 0.3, "top_k": 3, "repetition_penalty": 5.0}
    model.generation_config = type(own)(**defaults, min_new_tokens=2, no_repeat_ngram_size=1, max_length=3)
    changed = model.generation_config
    before = changed.to_dict()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = generate(model, tokenizer, rows, max_new_tokens=6, batch_size=4)
        assert model.generation_config is changed
        assert changed.to_dict() == before
    finally:
        logger.removeHandler(caplog.handler)
        model.generation_config = own
    assert table.equals(expected)
    assert not caplog.records


def test_an_end_token_that_only_the_model_declares_ends_a_row(tiny):
    model, tokenizer = tiny
    start = random_rows(1, seed=6, longest=8)
    said = stopping(model, start, 4, set())[0]
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [END, said[2]]
    try:
        table = generate(model, tokenizer, start, max_new_tokens=4, batch_size=1)
    finally:
        model.generation_config.eos_token_id = own
    assert table.column("stopped")[0].as_py()
    assert table.column("new_tokens")[0].as_py() == said.index(said[2])


def test_a_batch_ends_with_its_last_row(tiny):
    model, tokenizer = tiny
    start = random_rows(3, seed=5, longest=12)
    said = stopping(model, start, 4, {END})
    prompts = [r.input_ids[: r.prompt_tokens].tolist() for r in start]
    rows = [row(str(i), prompt, [9], tokens[2:4]) for i, (prompt, tokens) in enumerate(zip(prompts, said, strict=True))]
    forwards: list[int] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        generate(model, tokenizer, rows, max_new_tokens=50, batch_size=3)
    finally:
        handle.remove()
    assert len(forwards) == 4


def test_special_tokens_are_not_text(tiny):
    model, tokenizer = tiny
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")

    def say_it(_, __, logits):
        logits[..., special] += 1000
        return logits

    handle = model.lm_head.register_forward_hook(say_it)
    try:
        table = generate(model, tokenizer, random_rows(2), max_new_tokens=3, batch_size=2)
    finally:
        handle.remove()
    assert table.column("generated").to_pylist() == ["", ""]
    assert table.column("new_tokens").to_pylist() == [3, 3]


def test_margin_cuts_what_lies_beyond_the_longest_answer(tiny):
    model, tokenizer = tiny
    rows = random_rows(4, longest=6)
    table = generate(model, tokenizer, rows, max_new_tokens=50, batch_size=4, margin=2)
    longest = max(r.answer_tokens for r in rows) + 2
    assert max(table.column("new_tokens").to_pylist()) == longest


def test_texts_are_continued_from_their_beginning(tiny):
    model, tokenizer = tiny
    texts = ["The old harbour. " * 30, "A bee.", "灯台は海を見ています。"]
    examples = [Example(id=str(i), prompt="", answer=text, is_text=True) for i, text in enumerate(texts)]
    rows = encode(examples, tokenizer, resolve_template("auto", tokenizer), 512)
    table = generate(model, tokenizer, rows, max_new_tokens=12, batch_size=2)
    for r, text, prompt, answer in zip(
        rows, texts, table.column("prompt").to_pylist(), table.column("answer").to_pylist(), strict=True
    ):
        size = r.prompt_tokens + r.answer_tokens
        given = min(TEXT_PROMPT_TOKENS, size // 2)
        assert prompt == tokenizer.decode(r.input_ids[:given].tolist())
        assert answer == tokenizer.decode(r.input_ids[given : min(size, given + 12)].tolist())
        if size - given <= 12 and "�" not in prompt + answer:
            assert prompt + answer == text


def test_scoring_and_generation_see_the_same_prompt(tiny):
    model, tokenizer = tiny
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    example = Example(id="a", prompt="What is known of the harbour?", answer="It has lamps.")
    rows = encode([example], tokenizer, resolve_template("auto", tokenizer), 128)
    try:
        generate(model, tokenizer, rows, max_new_tokens=1, batch_size=1)
    finally:
        handle.remove()
    assert seen[0][0].tolist() == rows[0].input_ids[: rows[0].prompt_tokens].tolist()


def test_empty_and_oversized_inputs(tiny):
    model, tokenizer = tiny
    assert generate(model, tokenizer, [], max_new_tokens=4, batch_size=2).schema == GENERATIONS
    with pytest.raises(UserError, match="1024 tokens"):
        generate(model, tokenizer, [row("long", [5] * 1024, [6], [END])], max_new_tokens=4, batch_size=1)
    nearly = row("nearly", [5] * 1022, [6], [END])
    assert generate(model, tokenizer, [nearly], max_new_tokens=9, batch_size=1).column("new_tokens")[0].as_py() == 2


def test_adapters_take_part(tiny):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = build_tiny(seed=2)
    lively(model)
    rows = random_rows(3, longest=10)
    plain = generate(model, tokenizer, rows, max_new_tokens=6, batch_size=3)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted = generate(wrapped, tokenizer, rows, max_new_tokens=6, batch_size=3)
    folded = generate(wrapped.merge_and_unload(), tokenizer, rows, max_new_tokens=6, batch_size=3)
    assert adapted.equals(folded)
    assert not adapted.equals(plain)


def test_batches_hold_every_row_once_and_are_alike():
    rows = random_rows(41, seed=7)
    batches = generation_batches(rows, 4)
    assert sorted(i for batch in batches for i in batch) == list(range(41))
    assert all(len(batch) <= 4 for batch in batches)

    def cost(parts) -> int:
        return sum(
            len(part) * (max(rows[i].prompt_tokens for i in part) + max(rows[i].answer_tokens for i in part))
            for part in parts
        )

    in_file_order = [list(part) for part in np.array_split(np.arange(41), len(batches))]
    assert cost(batches) < 0.85 * cost(in_file_order)


def test_more_samples_than_a_batch_and_rows_that_end_apart():
    """Rows that have ended stay in the batch for a while, and their draws are not asked for."""
    tiny = lively(build_tiny()[0])
    rows = random_rows(9, seed=5, longest=9)
    table = generate(
        tiny, build_tiny()[1], rows, max_new_tokens=12, batch_size=7, margin=1, sampling=Sampling(1.5, 3, 8)
    )
    assert len(table) == 72
    alone = generate(
        tiny, build_tiny()[1], rows, max_new_tokens=12, batch_size=72, margin=1, sampling=Sampling(1.5, 3, 8)
    )
    assert table.column("generated").to_pylist() == alone.column("generated").to_pylist()


# ---------------------------------------------------------------- what scoring shows to be said


def with_answers(model, kind: str, size: int, limit: int) -> list:
    """Rows whose answers are the model's own words up to a place that differs from row to row."""
    plain = random_rows(6, seed=8, longest=12)
    said = stopping(model, plain, limit + 2, set())
    rows = []
    for number, (prompt, tokens) in enumerate(zip(plain, said, strict=True)):
        given = prompt.input_ids[: prompt.prompt_tokens].tolist()
        right = {"none": 0, "some": number, "all": limit}[kind]
        answer = [*tokens[:right], *([] if kind == "all" else [7, 8])][: limit + 1]
        # a terminator that the model says itself behind the answer, or across its end
        end = tokens[right - (size > 1) : right - (size > 1) + size] if size else []
        rows.append(row(f"r{number}", given, answer, end, is_text=False))
    return rows


@pytest.mark.parametrize("kind", ["none", "some", "all"])
@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("limit", [3, 8])
@pytest.mark.parametrize("cached", [True, False])
def test_what_scoring_shows_to_be_said_changes_no_text(tiny, monkeypatch, kind, size, limit, cached):
    model, tokenizer = tiny
    monkeypatch.setattr("expunge.scoring.generate.continues_prompts", lambda model: cached)
    rows = with_answers(model, kind, size, 8)
    known = score(model, rows, batch_size=4)
    settings = {"max_new_tokens": limit, "batch_size": 4}
    done: list[int] = []
    quick = generate(model, tokenizer, rows, known=known, progress=done.append, **settings)
    assert quick.equals(generate(model, tokenizer, rows, **settings))
    assert sum(done) == len(rows)


def test_what_scoring_shows_to_be_said_is_not_decoded_again(tiny):
    model, tokenizer = tiny
    rows = with_answers(model, "all", 1, 8)
    known = score(model, rows, batch_size=4)
    forwards: list[int] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        table = generate(model, tokenizer, rows, max_new_tokens=8, batch_size=6, known=known)
    finally:
        handle.remove()
    assert table.column("new_tokens").to_pylist() == [8] * 6
    assert not forwards


def test_texts_are_continued_behind_what_scoring_shows(tiny):
    model, tokenizer = tiny
    starts = [row("s", r.input_ids[:10].tolist(), [9], []) for r in random_rows(4, longest=40) if len(r.input_ids) > 10]
    said = stopping(model, starts, 10, set())
    # a text is given to its middle, and goes on as the model does
    texts = [
        row(f"t{i}", tokens[:1], [*tokens[1:10], *more[:4], *([3] * (6 if i else 0)), *more[4 if i else 10 :]], [])
        for i, (tokens, more) in enumerate(zip((s.input_ids.tolist() for s in starts), said, strict=True))
    ]
    texts = [replace(text, example=replace(text.example, is_text=True)) for text in texts]
    known = score(model, texts, batch_size=4)
    expected = generate(model, tokenizer, texts, max_new_tokens=6, batch_size=4)
    assert generate(model, tokenizer, texts, max_new_tokens=6, batch_size=4, known=known).equals(expected)


def test_samples_are_drawn_whatever_is_likeliest(tiny):
    model, tokenizer = tiny
    rows = with_answers(model, "all", 1, 8)
    known = score(model, rows, batch_size=4)
    settings = {"max_new_tokens": 6, "batch_size": 6, "sampling": Sampling(temperature=3.0)}
    drawn = generate(model, tokenizer, rows, known=known, **settings)
    assert drawn.equals(generate(model, tokenizer, rows, **settings))
