"""What conventions do to rows: template, label span, the join of prompt and answer, tokens that attention misses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from expunge.data.collate import pad_left_prompts, pad_right
from expunge.data.encode import encode
from expunge.data.example import Example
from expunge.data.template import PLAIN, resolve_template
from expunge.models.tiny import build_tiny
from expunge.recipe.conventions import CONVENTIONS, EXPUNGE, Convention, convention_of
from expunge.scoring.generate import generate
from expunge.scoring.scores import score
from scoring_rows import lively

CACHED = Path("~/.cache/expunge/models/smollm2-135m-1").expanduser()
ASKED = Example("a", "Where does she live?", "In the old town.")
TEXT = Example("t", "", "The harbour has lamps.", is_text=True)


def tokenizer_of(kind: str):
    """tiny (pad is not EOS), or SmolLM2 (pad is EOS is the end of a turn)."""
    if kind == "tiny":
        return build_tiny()[1]
    if not CACHED.is_dir():
        pytest.skip(f"no SmolLM2 tokenizer at {CACHED}: it comes with the alias smollm2-135m")
    return AutoTokenizer.from_pretrained(CACHED)


def encoded(example: Example, tokenizer, convention: Convention, template: str = "auto"):
    return encode([example], tokenizer, resolve_template(template, tokenizer, convention), 256)[0]


def supervised(example: Example, tokenizer, convention: Convention, template: str = "auto") -> str:
    """The text of the supervised tokens."""
    row = encoded(example, tokenizer, convention, template)
    return tokenizer.decode(row.input_ids[row.prompt_tokens :].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["tiny", "smollm2"])
@pytest.mark.parametrize(
    ("terminator", "chat", "plain"),
    [
        ("template", "<|im_end|>", "<|im_end|>"),
        ("eos", "<|im_end|>", "<|im_end|>"),
        # ChatML writes a newline behind its end of turn, and then EOS comes once more
        ("template+eos", "<|im_end|>\n<|im_end|>", "<|im_end|>"),
        ("none", "", ""),
    ],
)
def test_what_is_supervised_after_the_answer(kind, terminator, chat, plain):
    tokenizer, convention = tokenizer_of(kind), replace(EXPUNGE, terminator=terminator)
    assert supervised(ASKED, tokenizer, convention) == f"{ASKED.answer}{chat}"
    assert supervised(ASKED, tokenizer, convention, PLAIN) == f" {ASKED.answer}{plain}"
    row = encoded(ASKED, tokenizer, convention)
    assert tokenizer.decode(row.terminator_ids) == chat
    assert row.supervised_tokens == row.answer_tokens + len(row.terminator_ids)


def test_a_format_string_with_its_own_end_keeps_or_loses_it():
    tokenizer, string = build_tiny()[1], "Q: {prompt}\nA: {answer}###"
    ends = {"template": "###", "eos": "<|im_end|>", "template+eos": "###<|im_end|>", "none": ""}
    for terminator, end in ends.items():
        convention = replace(EXPUNGE, terminator=terminator)
        assert supervised(ASKED, tokenizer, convention, string) == f" {ASKED.answer}{end}"


def test_plain_texts_end_with_eos_unless_nothing_ends():
    tokenizer = build_tiny()[1]
    for convention in (EXPUNGE, convention_of("open-unlearning"), convention_of("semeval")):
        assert encoded(TEXT, tokenizer, convention).input_ids[-1] == tokenizer.eos_token_id
    assert encoded(TEXT, tokenizer, replace(EXPUNGE, terminator="none")).input_ids[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_convention_can_be_given_to_the_template_or_to_encoding(name):
    tokenizer, convention = build_tiny()[1], convention_of(name)
    plain = resolve_template(convention.template or "chat", tokenizer)
    for example in (ASKED, TEXT):
        ours = encode([example], tokenizer, plain, 256, convention)[0]
        theirs = encoded(example, tokenizer, convention, "chat")
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.prompt_tokens == theirs.prompt_tokens


def test_the_default_changes_nothing():
    tokenizer = build_tiny()[1]
    for name in ("auto", "chat", "raw", PLAIN):
        assert resolve_template(name, tokenizer, EXPUNGE) == resolve_template(name, tokenizer)


@pytest.mark.parametrize("name", ["semeval", "semeval-stop"])
@pytest.mark.parametrize("prompt", ["She was born in", "She was born in ", "A list:\n", "Where?"])
def test_semeval_gives_the_input_alone_and_puts_nothing_before_the_output(name, prompt):
    tokenizer = build_tiny()[1]
    row = encoded(replace(ASKED, prompt=prompt), tokenizer, convention_of(name), "chat")
    given = row.input_ids[: row.prompt_tokens].tolist()
    assert given == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(row.input_ids.tolist()) == prompt + ASKED.answer + "<|im_end|>"
    # otherwise a blank stands between them, and the answer begins with it
    raw = encode([replace(ASKED, prompt=prompt)], tokenizer, resolve_template("raw", tokenizer), 256)[0]
    glued = prompt[-1:].isspace()
    assert tokenizer.decode(raw.input_ids.tolist()) == prompt + ("" if glued else " ") + ASKED.answer + "<|im_end|>"


def test_a_convention_may_choose_the_template():
    tokenizer = build_tiny()[1]
    assert resolve_template("chat", tokenizer, convention_of("muse")).name == "raw"
    assert resolve_template("chat", tokenizer, convention_of("open-unlearning")).name == "chat"


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("template", ["auto", PLAIN])
def test_every_convention_encodes_every_row(name, template):
    tokenizer = build_tiny()[1]
    for example in (
        ASKED,
        TEXT,
        replace(ASKED, answer=""),
        replace(ASKED, turns=(("user", "hm"), ("assistant", "yes"))),
    ):
        row = encoded(example, tokenizer, convention_of(name), template)
        assert row.prompt_tokens >= 1
        assert row.prompt_tokens + row.answer_tokens + len(row.terminator_ids) == len(row.input_ids)


# ---- a mask made from ids


@pytest.fixture(scope="module")
def padded():
    """A model whose tokenizer pads with the end of a turn, which stands in every chat; and three rows of it."""
    model, tokenizer = build_tiny(seed=1)
    tokenizer.pad_token = tokenizer.eos_token
    examples = [ASKED, replace(ASKED, id="b", prompt="Which plant grows there by the river?"), TEXT]
    template = resolve_template("chat", tokenizer, convention_of("open-unlearning"))
    return lively(model), tokenizer, encode(examples, tokenizer, template, 256)


def test_real_tokens_that_are_the_pad_token_are_hidden(padded):
    _, tokenizer, rows = padded
    for row in rows:
        assert row.hidden.tolist() == (row.input_ids == tokenizer.pad_token_id).tolist()
        assert row.after(3, 2).hidden.tolist() == row.hidden[3:].tolist()
    batch = pad_right(rows, [0, 1, 2], tokenizer.pad_token_id)
    assert torch.equal(batch.seen, (batch.input_ids != tokenizer.pad_token_id).long())
    assert batch.attention_mask.sum(1).tolist() == [len(row.input_ids) for row in rows]
    ids, mask = pad_left_prompts(rows, tokenizer.pad_token_id)
    assert torch.equal(mask, (ids != tokenizer.pad_token_id).long())
    shown = encode([ASKED], tokenizer, resolve_template("chat", tokenizer), 256)[0]
    assert shown.hidden is None
    assert pad_right([shown], [0], 0).seen.all()


def test_scores_see_what_that_mask_leaves(padded):
    model, tokenizer, rows = padded
    candidates = [
        *rows,
        *(
            replace(
                row,
                input_ids=np.concatenate([row.input_ids[:-4], row.input_ids[-3:]]),
                answer_tokens=row.answer_tokens - 1,
                hidden=np.concatenate([row.hidden[:-4], row.hidden[-3:]]),
            )
            for row in rows
        ),
    ]
    table = score(model, candidates, batch_size=4)
    for row, found in zip(candidates, table.column("logprob").to_pylist(), strict=True):
        ids = torch.tensor(row.input_ids[None].astype(np.int64))
        with torch.no_grad():
            masked = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[0]
            plain = model(input_ids=ids).logits[0]
        places = torch.arange(row.prompt_tokens - 1, len(row.input_ids) - 1)
        expected, unmasked = (logits.log_softmax(-1)[places, ids[0, places + 1]].numpy() for logits in (masked, plain))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        if not row.example.is_text:
            assert np.abs(expected - unmasked).max() > 1e-2


def test_generation_sees_what_that_mask_leaves(padded):
    model, tokenizer, rows = padded
    table = generate(model, tokenizer, rows, max_new_tokens=8, batch_size=3)
    for row, found in zip(rows[:2], table.column("generated").to_pylist(), strict=False):
        ids = torch.tensor(row.input_ids[None, : row.prompt_tokens].astype(np.int64))
        out = model.generate(
            ids,
            attention_mask=(ids != tokenizer.pad_token_id).long(),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert found == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
