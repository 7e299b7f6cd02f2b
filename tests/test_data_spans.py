"""Entity masks: tokens against characters, over tokenizers × templates × texts × lengths, with bytes as the oracle."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from expunge.data.encode import Encoded, encode
from expunge.data.example import Example
from expunge.data.load import load_examples
from expunge.data.registry import RowError
from expunge.data.spans import (
    entity_mask,
    entity_masks,
    entity_spans,
    spans_by_decoding,
    spans_by_offsets,
    token_spans,
)
from expunge.data.template import resolve_template
from expunge.errors import UserError
from expunge.models.tiny import CORPUS, build_tokenizer
from expunge.recipe import SourceConfig
from test_data_encode import EXAMPLES, tokenizer
from test_data_real import data_folder

CACHED = Path("~/.cache/expunge/models/smollm2-135m-1").expanduser()

#: kinds built by the encoding's own tests, and those of `built`
FROM_ENCODE = ["plain", "bos", "chatml", "inst", "bare", "metaspace"]
BUILT = ["tiny", "trimmed", "unigram", "llama"]
TEMPLATES = ["auto", "raw", "{prompt}{answer}", "Q {prompt} A:\n{answer}"]
ROWS = [
    *EXAMPLES,
    Example("double blanks", "Where?", "in  the   old\ttown "),
    Example("blank first", "Where?", "  in the town"),
    Example("moved blanks", "Where?   ", "in the town"),
    Example("joined bytes", "川は?", "は川町 a川b 🦔🦊x"),
    Example("after kanji", "川", "川川"),
    Example("replacement", "Which sign?", "the \ufffd or \ufffd\ufffd, says 川"),
    Example("combining", "Which word?", "cafe\u0301 and か\u3099"),
    Example("blank text", "", "  The author 川\n\n lives.", is_text=True),
]


@cache
def fast(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer by name; `smollm2` is skipped where it is not cached."""
    if kind == "smollm2":
        if not CACHED.is_dir():
            pytest.skip(f"no SmolLM2 tokenizer at {CACHED}: it comes with the alias smollm2-135m")
        return AutoTokenizer.from_pretrained(CACHED)
    if kind == "tiny":
        return build_tokenizer()
    return built(kind) if kind in BUILT else tokenizer(kind)


def built(kind: str) -> PreTrainedTokenizerFast:
    """`trimmed` (byte-level, offsets without blanks), `unigram` and `llama` (as SentencePiece, with byte fallback)."""
    special = ["<s>", "</s>", "<unk>"]
    names = {"eos_token": "</s>", "pad_token": "</s>"}
    if kind == "trimmed":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core.train_from_iterator(
            [CORPUS], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        )
        core.post_processor = processors.ByteLevel(trim_offsets=True)
        return PreTrainedTokenizerFast(tokenizer_object=core, **names)
    pieces = sorted({*CORPUS, "▁", "▁the", "▁to", "wn", "▁a", "▁in", "an", "th", "ing"} - {" "})
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    if kind == "unigram":
        core = Tokenizer(models.Unigram([(token, -float(len(token) < 2)) for token in tokens], 2, byte_fallback=True))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    else:
        vocabulary = {token: place for place, token in enumerate(tokens)}
        merges = [("t", "h"), ("a", "n"), ("w", "n"), ("▁", "a")]
        core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        names["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


@cache
def byte_of_sign() -> dict[str, int]:
    """The bytes behind the signs in which byte-level BPE writes them (as GPT-2 chose them)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def token_bytes(tok: PreTrainedTokenizerFast, token_id: int) -> bytes:
    token: str = tok.convert_ids_to_tokens(token_id)
    if token_id in tok.all_special_ids:
        return token.encode()
    if tok.convert_tokens_to_ids("<0x0A>") not in (None, tok.unk_token_id):
        return bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
    return bytes(byte_of_sign()[sign] for sign in token)


def characters_by_bytes(row: Encoded, tok: PreTrainedTokenizerFast, text: str) -> list[set[int]]:
    """Characters of the answer that each supervised answer token shares a byte with; `text` ends in the answer."""
    end = row.prompt_tokens + row.answer_tokens
    first = row.prompt_tokens
    if first == 1 and not row.example.prompt.strip() and row.input_ids[0] != tok.bos_token_id:
        first = 0
    pieces = [token_bytes(tok, i) for i in row.input_ids[first:end].tolist()]
    joined, whole = b"".join(pieces), text.encode()
    extra = next(count for count in (0, 1) if whole.startswith(joined[count:]))  # a blank that the tokenizer put there
    assert row.truncated or joined[extra:] == whole
    gap = len(text) - len(row.example.answer)
    owner = [place - gap for place, char in enumerate(text) for _ in char.encode()]
    found, at = [], -extra
    for piece in pieces:
        found.append({owner[place] for place in range(max(0, at), at + len(piece))} - set(range(-gap, 0)))
        at += len(piece)
    return found[row.prompt_tokens - first :]


def checked_routes(row: Encoded, tok: PreTrainedTokenizerFast, text: str) -> tuple[bool, bool]:
    """Whether each of the two ways gave an answer; the ones that did are held against the bytes."""
    expected = characters_by_bytes(row, tok, text)
    inside = set(range(len(row.example.answer)))
    routes = spans_by_offsets(row, tok), spans_by_decoding(row, tok)
    for spans in routes:
        assert spans is None or [set(range(*span)) & inside for span in spans.tolist()] == expected
    return routes[0] is not None, routes[1] is not None


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", [*FROM_ENCODE, *BUILT, "smollm2"])
def test_both_ways_agree_with_the_bytes_of_the_tokens(kind: str, name: str) -> None:
    tok = fast(kind)
    template = resolve_template(name, tok)
    by_offsets = 0
    for row in encode(ROWS, tok, template, 512):
        text = row.example.answer if row.example.is_text else template.render(row.example).answer
        offsets, decoding = checked_routes(row, tok, text)
        assert decoding == ("\ufffd" not in row.example.answer), row.example.id
        by_offsets += offsets
    # a unigram model puts the bytes of several unknown characters at the same place, and such offsets are not used
    assert by_offsets >= (8 if kind == "unigram" else len(ROWS) - 3)


CUT = [
    Example("ascii", "Where does the author live?", "in the old town by the river"),
    Example("scripts", "川は?", " a川町b 🦔🦊 d"),
    Example("text", "", "The 川町 author 🦔 lives.", is_text=True),
]


@pytest.mark.parametrize("kind", ["chatml", "inst", "metaspace", *BUILT])
def test_cut_answers_of_every_length(kind: str) -> None:
    tok = fast(kind)
    template = resolve_template("auto", tok)
    for example in CUT:
        text = example.answer if example.is_text else template.render(example).answer
        longest = len(encode([example], tok, template, 512)[0].input_ids)
        for limit in range(2, longest + 1):
            row = encode([example], tok, template, limit)[0]
            assert (row.truncated > 0) == (limit < longest)
            assert checked_routes(row, tok, text)[1], limit


class _Plain:
    """A tokenizer that is not fast: it has no offsets."""

    is_fast = False

    def __init__(self, tok: PreTrainedTokenizerFast) -> None:
        self.tok = tok

    def decode(self, ids: list[int], **settings: Any) -> str:
        return self.tok.decode(ids, **settings)


@pytest.mark.parametrize("kind", ["tiny", "inst", "llama", "smollm2"])
def test_a_tokenizer_without_offsets_gives_the_same_masks(kind: str) -> None:
    tok = fast(kind)
    example = Example("x", "Where?", "in 川町, the old town 🦔", extra={"entities": ["町", "old", "🦔"]})
    row = encode([example], tok, resolve_template("auto", tok), 512)[0]
    slow: Any = _Plain(tok)
    assert entity_mask(row, slow).tolist() == entity_mask(row, tok).tolist()
    assert 5 <= entity_mask(row, tok).sum() < row.answer_tokens


@pytest.mark.parametrize(
    ("normalizer", "answer", "chosen"),
    [
        (normalizers.NFC(), "cafe\u0301 x", {3, 4}),
        (normalizers.NFC(), "か\u3099 x", {0, 1}),
        (normalizers.NFC(), "a か\u3099", {2, 3}),
        (normalizers.NFC(), "\u1112\u1161\u11ab x", {0, 1, 2}),
        (normalizers.Lowercase(), "The CAFÉ x", {7}),
        (normalizers.NFKC(), "the ﬁn x", {4}),
        (normalizers.NFKC(), "№ ½ x", {2}),
    ],
)
def test_tokenizers_that_rewrite_the_text(normalizer: Any, answer: str, chosen: set[int]) -> None:
    core = Tokenizer.from_str(fast("plain").backend_tokenizer.to_str())
    core.normalizer = normalizer
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    extra = {"entities": [[min(chosen), max(chosen) + 1]]}
    row = encode([Example("x", "Which?", answer, extra=extra)], tok, resolve_template("raw", tok), 64)[0]
    spans, mask = token_spans(row, tok), entity_mask(row, tok)
    for (begin, end), hit in zip(spans.tolist(), mask.tolist(), strict=False):
        assert hit == bool(chosen & set(range(begin, end)))
    said = tok.decode(row.input_ids[row.prompt_tokens :][mask]).strip()
    assert said == normalizer.normalize_str(answer[min(chosen) : max(chosen) + 1])
    assert mask.sum() >= 2  # the bytes of what it was rewritten to


def test_a_decoder_that_leads_nowhere_is_told() -> None:
    core = Tokenizer.from_str(fast("plain").backend_tokenizer.to_str())
    core.normalizer = normalizers.Replace("town", "city")
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    slow: Any = _Plain(tok)
    example = Example("x", "Where?", "in the old town", extra={"entities": ["town"]}, source="f.jsonl:1")
    row = encode([example], tok, resolve_template("raw", tok), 64)[0]
    for either in (tok, slow):  # the offsets of what was replaced are wrong
        with pytest.raises(UserError, match=r"f\.jsonl:1: the tokenizer does not lead back"):
            entity_mask(row, either)


# ---------------------------------------------------------------- what rows name


@pytest.mark.parametrize(
    ("entities", "spans"),
    [
        (["Ada"], [(0, 3), (16, 19)]),
        (["Ada", "Bay"], [(0, 3), (12, 15), (16, 19)]),
        ("Bay", [(12, 15)]),
        ('["Bay", "Tess"]', [(7, 11), (12, 15)]),
        ([[7, 15]], [(7, 15)]),
        ([(7, 15), "Ada"], [(0, 3), (7, 15), (16, 19)]),
        ("[[0, 3]]", [(0, 3)]),
        (["Tess Bay", "Tess Bay"], [(7, 15)]),
        (["y A"], [(14, 17)]),
        ([" Bay ", [6, 12]], [(7, 11), (12, 15)]),
    ],
)
def test_entities_by_text_and_by_offset(entities: Any, spans: list[tuple[int, int]]) -> None:
    assert entity_spans(Example("x", "Q", "Ada of Tess Bay Ada", extra={"entities": entities})) == spans


def test_occurrences_may_overlap() -> None:
    assert entity_spans(Example("x", "Q", "aaab", extra={"entities": "aa"})) == [(0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({}, "no column 'entities'"),
        ({"entities": None}, "no entities are named"),
        ({"entities": []}, "no entities are named"),
        ({"entities": float("nan")}, "no entities are named"),
        ({"entities": ""}, "no entities are named"),
        ({"entities": ["Bay", " "]}, "an entity is blank"),
        ({"entities": ["Bay", ""]}, "an entity is blank"),
        ({"entities": [[2, 3]]}, "an entity is blank"),
        ({"entities": ["bay"]}, "the entity 'bay' is not in the answer"),
        ({"entities": ["Bay", "x" * 99]}, f"the entity '{'x' * 59}…' is not in the answer"),
        ({"entities": [3, 5]}, "the entity 3 is neither"),
        ({"entities": [[1, 2, 3]]}, "is neither a text nor"),
        ({"entities": [[True, 2]]}, "is neither a text nor"),
        ({"entities": [{"start": 0}]}, "is neither a text nor"),
        ({"entities": [[2, 2]]}, "the entity [2, 2] is not within the answer's 12 characters"),
        ({"entities": [[0, 13]]}, "is not within"),
        ({"entities": [[-3, 2]]}, "is not within"),
    ],
)
def test_entities_that_cannot_be_used(extra: dict[str, Any], problem: str) -> None:
    tok = fast("tiny")
    good = Example("a", "Q", "In Tess Bay.", extra={"entities": ["Bay"]}, source="f.jsonl:1")
    bad = Example("b", "Q", "In Tess Bay.", extra=extra, source="f.jsonl:2")
    with pytest.raises(RowError) as told:
        entity_spans(bad)
    assert problem in str(told.value)
    rows = encode([good, bad, bad], tok, resolve_template("auto", tok), 64)
    with pytest.raises(UserError) as one:
        entity_masks(rows[:2], tok)
    assert one.value.message == f"f.jsonl:2: {told.value}"
    assert "column 'entities'" in one.value.hint
    with pytest.raises(UserError, match=r"^f\.jsonl:2: .* \(the first of 2 rows, out of 3, without an entity"):
        entity_masks(rows, tok)


def test_entities_that_are_cut_off_are_told() -> None:
    tok = fast("tiny")
    example = Example("a", "Q", "in the old town by the river", extra={"entities": ["river"]}, source="f.jsonl:1")
    template = resolve_template("raw", tok)
    whole = encode([example], tok, template, 64)[0]
    with pytest.raises(UserError, match=r"f\.jsonl:1: .*cut off \(data\.max_length\)"):
        entity_mask(encode([example], tok, template, len(whole.input_ids) // 2)[0], tok)
    text = Example("t", "", "Question: which plant", is_text=True, extra={"entities": ["Qu"]})
    row = encode([text], tok, template, 64)[0]
    with pytest.raises(UserError, match=r"row t: .*first token"):
        entity_mask(row, tok)


@pytest.mark.parametrize("kind", ["tiny", "smollm2", "metaspace"])
def test_masks_read_as_their_entities(kind: str) -> None:
    tok = fast(kind)
    examples = [
        Example("first", "Who?", "Brelorn Quelula of Wrinmere", extra={"entities": ["Brelorn Quelula"]}),
        Example("last", "Where?", "In Wrinmere", extra={"entities": ["Wrinmere"]}),
        Example("all", "Which?", "472-555-0115", extra={"entities": ["472-555-0115"]}),
        Example("text", "", "The bees of Wrinmere sing.", is_text=True, extra={"entities": ["Wrinmere"]}),
    ]
    rows = encode(examples, tok, resolve_template("raw", tok), 64)
    for row, mask in zip(rows, entity_masks(rows, tok), strict=True):
        assert mask.dtype == np.bool_
        assert mask.shape == (row.supervised_tokens,)
        assert not mask[row.answer_tokens :].any()
        said = tok.decode(row.input_ids[row.prompt_tokens :][mask]).strip()
        assert row.example.extra["entities"][0] in said
        assert len(said) <= len(row.example.extra["entities"][0]) + 4  # the rest of a token that holds more


@pytest.mark.parametrize("kind", ["tiny", "smollm2"])
@pytest.mark.parametrize("file", ["tofu/forget01.jsonl", "lume/forget_val.jsonl", "lume/mia/train_member.jsonl"])
def test_published_rows_are_placed_alike_both_ways(file: str, kind: str) -> None:
    path = data_folder() / file
    tok = fast(kind)
    examples = load_examples(SourceConfig(path=str(path), limit=40))
    named = [replace(row, extra={"entities": [row.answer.split()[-1]]}) for row in examples]
    rows = encode(named, tok, resolve_template("auto", tok), 100_000)
    for row, mask in zip(rows, entity_masks(rows, tok), strict=True):
        offsets, decoded = spans_by_offsets(row, tok), spans_by_decoding(row, tok)
        assert offsets is not None
        assert decoded is not None
        assert offsets.tolist() == decoded.tolist()
        last = np.flatnonzero(mask)[-1]
        assert last == row.answer_tokens - 1 or not row.example.answer[int(offsets[last, 1]) :].strip()
        assert row.example.extra["entities"][0] in tok.decode(row.input_ids[row.prompt_tokens :][mask])
