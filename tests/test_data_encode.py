"""Templates, encoding and collation on small tokenizers that are built here."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from expunge.data.collate import pad_left_prompts, pad_right
from expunge.data.encode import Encoded, encode, truncation_note
from expunge.data.example import Example
from expunge.data.template import PLAIN, needs_space, resolve_template
from expunge.errors import UserError

CORPUS = [
    "Question: where does the author live? Answer: in the old town by the river.",
    "The answer to the question is the name of the author of the letter.",
    "user assistant system Be brief. What is the phone number? 555 0142",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: as Llama 2: BOS in the text, a blank before the answer, no generation prompt of its own, no system role
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
#: a template without an end-of-turn token
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`plain`, `bos`, `chatml`, `inst`, `bare` (byte-level BPE) and `metaspace` (as SentencePiece, with BOS)."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    settings: dict[str, Any] = {"vocab_size": 400, "special_tokens": special, "show_progress": False}
    if kind == "metaspace":
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token="</s>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.normalizer = normalizers.Sequence([])
        core.decoder = decoders.Sequence(
            [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        settings["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(**settings))
    if kind == "metaspace":
        described = json.loads(core.to_str())
        vocabulary = described["model"]["vocab"]
        vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
        core = Tokenizer.from_str(json.dumps(described))
    names = {"eos_token": "<|im_end|>" if kind == "chatml" else "</s>", "pad_token": "</s>"}
    if kind in ("bos", "inst", "metaspace"):
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
        names["bos_token"] = "<s>"
    fast = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = {"chatml": CHATML, "inst": INST, "bare": BARE}.get(kind)
    return fast


KINDS = ["plain", "bos", "chatml", "inst", "bare", "metaspace"]

EXAMPLES = [
    Example("ascii", "Where does the author live?", "in the old town"),
    Example("japanese", "著者はどこに住んでいますか?", "川のそばの古い町です。"),
    Example("emoji", "Which animals? 🦔🦊", "👩‍👩‍👧 and 🐝🐝"),
    Example("arabic", "أين يعيش الكاتب؟", "في المدينة القديمة"),
    Example("braces", "What is {prompt} or {answer} or {0}?", "{x} and {{y}}"),
    Example("spaces", "The answer is ", " the name"),
    Example("newlines", "Line one\n\nLine two:\n", "first\n\nsecond"),
    Example("empty prompt", "", "the name of the author"),
    Example("one token", "a", "b"),
    Example("turns", "What is the phone number?", "555 0142", turns=(("user", "hello"), ("assistant", "hi"))),
    Example("empty turn", "Who?", "the author", turns=(("user", ""), ("assistant", ""))),
    Example("text", "", "The author lives by the river. 川", is_text=True),
]
TEMPLATES = ["auto", "raw", PLAIN, "Q {prompt} A:\n{answer}", "<s>{prompt} => {answer}</s>", "{prompt}{answer}"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_ids_are_what_generation_is_given_and_the_rest_is_the_answer(kind: str, name: str) -> None:
    tok = tokenizer(kind)
    template = resolve_template(name, tok)
    rows = encode(EXAMPLES, tok, template, 512)
    assert [row.example for row in rows] == EXAMPLES
    for row in rows:
        rendered = template.render(row.example)
        ids = row.input_ids.tolist()
        assert row.input_ids.dtype == np.int32
        assert 1 <= row.prompt_tokens < len(ids)
        assert row.truncated == 0
        assert len(ids) == row.prompt_tokens + row.answer_tokens + len(row.terminator_ids)
        assert tok.bos_token is None or ids.count(tok.bos_token_id) <= 1
        said = tok.decode(ids[row.prompt_tokens : row.prompt_tokens + row.answer_tokens])
        if row.example.is_text:
            assert row.prompt_tokens == 1
            assert tok.decode(ids, skip_special_tokens=True) == row.example.answer
            assert row.terminator_ids == [tok.eos_token_id]
            continue
        doubled = not template.adds_prefix or rendered.prompt.startswith("<s>")
        given = tok(rendered.prompt, add_special_tokens=not doubled)["input_ids"]
        if given:
            assert ids[: row.prompt_tokens] == given
            # a decoder of the SentencePiece kind drops the first blank of what it is given
            assert said.lstrip(" ") == rendered.answer.lstrip(" ")
        assert tok.decode(row.terminator_ids) == rendered.terminator
        assert len(row.terminator_ids) == 1
        whole = tok.decode(ids[: row.prompt_tokens + row.answer_tokens], skip_special_tokens=False)
        assert whole.removeprefix("<s>").lstrip(" ") == (rendered.prompt + rendered.answer).removeprefix("<s>").lstrip(
            " "
        )


@pytest.mark.parametrize("kind", ["chatml", "inst", "bare"])
def test_chat_prompts_equal_apply_chat_template(kind: str) -> None:
    tok = tokenizer(kind)
    rows = encode(EXAMPLES[:-1], tok, resolve_template("auto", tok), 512)
    for row in rows:
        turns = [{"role": r, "content": c} for r, c in (*row.example.turns, ("user", row.example.prompt))]
        given = tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row.input_ids[: row.prompt_tokens].tolist() == given


@pytest.mark.parametrize(
    ("kind", "name", "prompt", "answer", "terminator"),
    [
        ("chatml", "auto", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A", "<|im_end|>"),
        ("inst", "chat", "<s>[INST] Q [/INST]", " A", "</s>"),
        ("bare", "chat", "user: Q\nassistant: ", "A", "</s>"),
        ("plain", "auto", "Question: Q\nAnswer:", " A", "</s>"),
        ("chatml", "raw", "Q", " A", "<|im_end|>"),
        ("plain", "### {prompt}\n### {answer} <|im_end|>\n", "### Q\n###", " A", " <|im_end|>"),
        ("plain", "Q: {prompt}\\nA: {answer}", "Q: Q\nA:", " A", "</s>"),
        ("plain", "{prompt}, again {prompt}:\n{answer}", "Q, again Q:\n", "A", "</s>"),
    ],
)
def test_rendered_texts(kind: str, name: str, prompt: str, answer: str, terminator: str) -> None:
    rendered = resolve_template(name, tokenizer(kind)).render(Example("x", "Q", "A"))
    assert (rendered.prompt, rendered.answer, rendered.terminator) == (prompt, answer, terminator)


CHAT_HISTORY = "".join(
    f"<|im_start|>{role}\n{said}<|im_end|>\n"
    for role, said in (("system", "Be brief."), ("user", "one"), ("assistant", "1"))
)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("Q {prompt}\nA {answer}", "Be brief.\nQ one\nA 1\nQ two\nA"),
        ("raw", "Be brief.\none\n1\ntwo"),
        ("chat", CHAT_HISTORY + "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_turns_come_before_the_prompt(name: str, prompt: str) -> None:
    turns = (("system", "Be brief."), ("user", "one"), ("assistant", "1"))
    rendered = resolve_template(name, tokenizer("chatml")).render(Example("x", "two", "2", turns=turns))
    assert rendered.prompt == prompt


def test_the_answer_is_tokenised_as_in_running_text() -> None:
    tok = tokenizer("plain")
    row = encode([Example("x", "Where?", "the author")], tok, resolve_template("auto", tok), 512)[0]
    running = tok("Question: Where?\nAnswer: the author")["input_ids"]
    assert row.input_ids.tolist() == [*running, tok.eos_token_id]


def test_where_joint_tokens_cross_the_boundary_the_prompt_stays_whole() -> None:
    tok = tokenizer("plain")
    template = resolve_template("{prompt}{answer}", tok)
    crossing = Example("x", "Where is the auth", "or of it")
    assert (
        tok("Where is the author of it")["input_ids"][: len(tok(crossing.prompt)["input_ids"])]
        != tok(crossing.prompt)["input_ids"]
    )
    row = encode([crossing], tok, template, 512)[0]
    assert row.input_ids[: row.prompt_tokens].tolist() == tok(crossing.prompt)["input_ids"]
    assert tok.decode(row.input_ids[row.prompt_tokens :], skip_special_tokens=True) == "or of it"


@pytest.mark.parametrize(
    ("prompt", "answer", "space"),
    [
        ("The phone", "number", True),
        ("The phone ", "number", False),
        ("The phone\n", "number", False),
        ("The phone", " number", False),
        ("The phone", ", and", False),
        ("The phone", "…", False),
        ("The phone", "(old)", True),
        ("He said", '"yes"', True),
        ("Two minus three is", "-1", True),
        ("", "number", False),
        ("住所は", "町です", False),
        ("電話番号は?", "555", True),
        ("住所", "555", False),
        ("Where?", "東京", False),
        ("ที่อยู่", "เมือง", False),
        ("カタカナ", "ｶﾀｶﾅ", False),
        ("주소는", "서울", True),
        ("أين", "هنا", True),
        ("Где", "здесь", True),
    ],
)
def test_raw_puts_a_space_where_the_script_has_one(prompt: str, answer: str, space: bool) -> None:
    assert needs_space(prompt, answer) is space
    rendered = resolve_template("raw", tokenizer("plain")).render(Example("x", prompt, answer))
    assert rendered.prompt + rendered.answer == prompt + (" " if space else "") + answer


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("plain", "chat", "has no chat template"),
        ("plain", "{prompt}", "must contain"),
        ("plain", "{answer} {prompt}", "must contain"),
        ("plain", "{prompt} {answer} {answer}", "must contain"),
    ],
)
def test_a_template_that_cannot_be(kind: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve_template(name, tokenizer(kind))


def test_a_turn_that_the_chat_template_refuses_is_named() -> None:
    tok = tokenizer("inst")
    good = Example("a", "Q", "A", source="f.jsonl:1")
    bad = Example("b", "Q", "A", turns=(("system", "Be brief."),), source="f.jsonl:2")
    with pytest.raises(UserError, match=r"f\.jsonl:2: .*refuses.*\(system, user\).*no system role"):
        encode([good, bad], tok, resolve_template("auto", tok), 64)


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ nope() }}", "cannot be used"), ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not show")],
)
def test_a_chat_template_that_cannot_be_used(template: str, message: str) -> None:
    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer("plain").backend_tokenizer, eos_token="</s>")
    tok.chat_template = template
    with pytest.raises(UserError, match=message):
        resolve_template("chat", tok)


LONG = Example("long", "Where does the author of the letter live now?", "in the old town by the river")


@pytest.mark.parametrize("kind", ["plain", "bos", "chatml"])
def test_every_length_cuts_the_prompt_first_and_counts_the_cut(kind: str) -> None:
    tok = tokenizer(kind)
    template = resolve_template("raw", tok)
    whole = encode([LONG], tok, template, 512)[0]
    prompt = whole.input_ids[: whole.prompt_tokens].tolist()
    answer = whole.input_ids[whole.prompt_tokens : whole.prompt_tokens + whole.answer_tokens].tolist()
    for limit in range(2, len(whole.input_ids) + 2):
        row = encode([LONG], tok, template, limit)[0]
        ids = row.input_ids.tolist()
        assert len(ids) == min(limit, len(whole.input_ids))
        assert row.truncated == len(whole.input_ids) - len(ids)
        kept = ids[: row.prompt_tokens]
        tail = kept[1:] if kind == "bos" and len(kept) > 1 else kept
        assert not tail or prompt[-len(tail) :] == tail
        if kind == "bos" and len(kept) > 1:
            assert kept[0] == tok.bos_token_id
        assert ids[row.prompt_tokens :] == (answer + whole.terminator_ids)[: len(ids) - row.prompt_tokens]
        if row.prompt_tokens > 1:
            assert row.terminator_ids == whole.terminator_ids  # the prompt goes before the answer does


def test_long_texts_lose_their_end_and_the_note_counts_them() -> None:
    tok = tokenizer("bos")
    rows = encode([Example("t", "", CORPUS[0], is_text=True), LONG, EXAMPLES[8]], tok, resolve_template("raw", tok), 12)
    assert rows[0].input_ids[:2].tolist() == tok(CORPUS[0])["input_ids"][:2]
    assert rows[0].terminator_ids == []
    lost = rows[0].truncated + rows[1].truncated
    assert truncation_note(rows) == f"2 of 3 rows were cut at 12 tokens ({lost} tokens lost; 1 row within the answer)"
    assert truncation_note(rows[2:]) is None


def encoded(ids: list[int], prompt: int) -> Encoded:
    return Encoded(Example("x", "p", "a"), np.asarray(ids, dtype=np.int32), prompt, len(ids) - prompt - 1, 0)


def test_pad_right_closed_form() -> None:
    # The pad id 0 is also a token of the text: the mask comes from lengths.
    batch = pad_right([encoded([5, 0, 7, 8], 2), encoded([9, 0], 1), encoded([1, 2, 3], 2)], [4, 0, 9], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 0, 7, 8], [9, 0, 0, 0], [1, 2, 3, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.supervised.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert batch.targets.tolist() == [7, 8, 0, 3]
    assert batch.row.tolist() == [0, 0, 1, 2]
    assert batch.lengths.tolist() == [2, 1, 1]
    assert batch.index.tolist() == [4, 0, 9]
    assert len(batch) == 3
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.targets, batch.row, batch.index)} == {
        torch.int64
    }
    moved = batch.to("meta")
    assert moved.supervised.device.type == "meta"
    assert moved.supervised.shape == (3, 4)


def test_pad_right_matches_a_plain_loop_over_real_rows() -> None:
    tok = tokenizer("chatml")
    rows = encode(EXAMPLES, tok, resolve_template("auto", tok), 64)
    batch = pad_right(rows, range(len(rows)), pad_id=tok.pad_token_id)
    targets, owners = [], []
    for i, row in enumerate(rows):
        for p in range(row.prompt_tokens - 1, len(row.input_ids) - 1):
            assert batch.supervised[i, p]
            targets.append(int(row.input_ids[p + 1]))
            owners.append(i)
    assert batch.targets.tolist() == targets
    assert batch.row.tolist() == owners
    assert int(batch.supervised.sum()) == len(targets) == int(batch.lengths.sum())


def test_pad_left_prompts_closed_form() -> None:
    ids, mask = pad_left_prompts([encoded([5, 6, 7, 8], 3), encoded([9, 4], 1)], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(("rows", "index"), [([], []), ([encoded([1, 2], 1)], [0, 1])])
def test_no_batch(rows: list[Encoded], index: list[int]) -> None:
    with pytest.raises(ValueError, match="no batch"):
        pad_right(rows, index, 0)
