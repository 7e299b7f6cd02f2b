"""Which supervised tokens belong to the entities that a row names in its answer.

A row names them in its column `entities`: a list of texts that stand in the answer (every occurrence counts), or of
[start, end) character offsets into the answer, or of both; one text alone and the JSON text of a list do as well.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.data.cells import entries
from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.data.registry import RowError
from expunge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENTITIES = "entities"

_HINT = (
    f"give each row a column '{ENTITIES}': a list of texts exactly as they stand in its answer, "
    "or of [start, end) character offsets into it; or leave the selection out: --set unlearn.0.tokens=all"
)
_UNDECODED = "\ufffd"  # what decoders write for bytes that are no whole character yet
_BLANK_SIGNS = "Ġ▁ "  # how the tokens of the two families write a blank
_CONTEXT = 8  # tokens before the answer that may be decoded too: decoders drop the blank of what comes first

Span = tuple[int, int]  # characters [begin, end)


def entity_spans(example: Example) -> list[Span]:
    """Characters [begin, end) of the answer that are entities, without blanks at their ends; sorted.

    Raises RowError if the row names none, or one that its answer lacks.
    """
    named = entries(example.extra.get(ENTITIES))
    if not named:
        raise RowError(f"no {ENTITIES} are named" if ENTITIES in example.extra else f"no column '{ENTITIES}'")
    return sorted({_trimmed(span, example.answer) for entity in named for span in _places(entity, example.answer)})


def entity_masks(rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """`entity_mask` of every row. Raises UserError, with the first place, if there are rows without a chosen token."""
    masks: list[np.ndarray] = []
    problems: list[str] = []
    for row in rows:
        try:
            masks.append(_mask(row, tokenizer))
        except RowError as error:
            problems.append(f"{row.example.place}: {error}")
    if len(problems) == 1:
        raise UserError(problems[0], _HINT)
    if problems:
        raise UserError(
            f"{problems[0]} (the first of {len(problems)} rows, out of {len(rows)}, without an entity to choose)", _HINT
        )
    return masks


def entity_mask(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bool [supervised tokens]: the token has a character of an entity. The terminator never has.

    Raises UserError if the row names no entity, names one that its answer lacks, or has all of them cut off.
    """
    return entity_masks([row], tokenizer)[0]


def token_spans(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Int [answer tokens, 2]: the characters [begin, end) of the answer that each supervised answer token stands for.

    Tokens that share the bytes of a character all have that character. Blanks before the answer are below 0.
    Raises RowError if neither the tokenizer's offsets nor its decoder lead back to the answer.
    """
    for find in (spans_by_offsets, spans_by_decoding):
        spans = find(row, tokenizer)
        if spans is not None:
            return spans
    raise RowError("the tokenizer does not lead back to the answer's text, so that no entity can be found in it")


def spans_by_offsets(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """`token_spans` from a fast tokenizer's offsets; None unless it gives the row's own ids and covers the text."""
    if not tokenizer.is_fast:
        return None
    answer, end = row.example.answer, row.prompt_tokens + row.answer_tokens
    for first in _first_tokens(row):
        ids: list[int] = row.input_ids[first:end].tolist()
        for anchor, lead in _surroundings(ids, answer, tokenizer):
            text = anchor + lead + answer
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets: list[Span] = found["offset_mapping"]
            skipped = next((i for i, (_, stop) in enumerate(offsets) if stop > len(anchor)), 0) if anchor else 0
            theirs: list[int] = found["input_ids"][skipped:]
            if theirs[: len(ids)] != ids or len(theirs) - len(ids) > row.truncated:
                continue
            tokens: list[str] = tokenizer.convert_ids_to_tokens(theirs)
            spans = _covering(offsets[skipped:], tokens, text, len(anchor))
            if spans is not None:
                return _supervised(spans[: len(ids)], row, first) - len(anchor + lead)
    return None


def spans_by_decoding(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """`token_spans` by decoding one token more at a time; None if the decoder does not give the answer back."""
    answer, end = row.example.answer, row.prompt_tokens + row.answer_tokens
    if _UNDECODED in answer:
        return None  # it can't be told from a character of which bytes are missing
    for first in _first_tokens(row):
        before = _context(row.input_ids[:first].tolist(), tokenizer)
        spans, said = _decoded(row.input_ids[before:end].tolist(), first - before, tokenizer)
        lead = _blanks(said) - _blanks(answer)
        if not said.strip():
            lead = max(0, lead)  # the answer was cut before its first word
        body, wanted = said[max(0, lead) :], answer[max(0, -lead) :]
        if body == wanted or (row.truncated and wanted.startswith(body)):
            return _supervised(spans, row, first) - lead
    return None


def _mask(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    entities = entity_spans(row.example)
    spans = token_spans(row, tokenizer)
    mask = np.zeros(row.supervised_tokens, dtype=bool)
    for begin, end in entities:
        mask[: len(spans)] |= (spans[:, 0] < end) & (spans[:, 1] > begin) & (spans[:, 0] < spans[:, 1])
    if not mask.any():
        cut = "they were cut off (data.max_length)" if row.truncated else "they are in the text's first token"
        raise RowError(f"no entity is in the supervised tokens: {cut}")
    return mask


def _places(entity: Any, answer: str) -> Iterator[Span]:
    if isinstance(entity, str):
        if not entity:
            raise RowError("an entity is blank")
        begin = answer.find(entity)
        if begin < 0:
            raise RowError(f"the entity '{_short(entity)}' is not in the answer")
        while begin >= 0:
            yield begin, begin + len(entity)
            begin = answer.find(entity, begin + 1)
        return
    if not (isinstance(entity, list | tuple) and len(entity) == 2 and all(type(end) is int for end in entity)):
        raise RowError(f"the entity {_short(repr(entity))} is neither a text nor [start, end]")
    begin, end = entity
    if not 0 <= begin < end <= len(answer):
        raise RowError(f"the entity [{begin}, {end}] is not within the answer's {len(answer)} characters")
    yield begin, end


def _trimmed(span: Span, answer: str) -> Span:
    """Blanks around an entity are no knowledge, and tokenizers disagree about whose they are."""
    said = answer[slice(*span)]
    if not said.strip():
        raise RowError("an entity is blank")
    return span[0] + _blanks(said), span[1] - (len(said) - len(said.rstrip()))


def _first_tokens(row: Encoded) -> list[int]:
    """Where the answer's tokens may begin: of a text without BOS, the first one is called its prompt."""
    bare = row.prompt_tokens == 1 and (row.example.is_text or not row.example.prompt.strip())
    return [0, 1] if bare else [row.prompt_tokens]


def _surroundings(ids: list[int], answer: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """What may stand before the answer: a newline in place of the prompt, and blanks that belong to the answer."""
    said = _text(ids, tokenizer)
    blanks = "" if answer[:1].isspace() else said[: _blanks(said)]
    for anchor in ("", "\n"):
        # decoders of the SentencePiece kind drop the first blank
        for lead in dict.fromkeys((blanks, " " + blanks, "")):
            yield anchor, lead


def _covering(offsets: Sequence[Span], tokens: Sequence[str], text: str, start: int) -> list[Span] | None:
    """The offsets from `start` on with what tokenizers leave out put right; None where they skip or blur the text."""
    spans: list[Span] = []
    reached = start
    following = [*(begin for begin, _ in offsets[1:]), len(text)]
    for (begin, end), token, after in zip(offsets, tokens, following, strict=True):
        if after < end and not token.strip(_BLANK_SIGNS):
            end = begin  # a blank that is not in the text, put on what comes after it
        if spans:
            reached = _composed(spans, text, begin)
        if begin > reached:
            # a blank that was trimmed: the token's own, if it begins with one and no token of blanks lies between
            own = token[:1] in _BLANK_SIGNS and not (spans and spans[-1][0] == spans[-1][1])
            if not own or text[reached:begin].strip():
                return None
            begin = reached
        # two tokens may share a character, of which each has some bytes, but no more than one
        if end < reached or reached - begin > 1:
            return None
        spans.append((begin, end))
        reached = end
    return spans if spans and _composed(spans, text, len(text)) == len(text) else None


def _composed(spans: list[Span], text: str, until: int) -> int:
    """Hand the characters up to `until` to the last tokens if NFC makes them one with those tokens' last character.

    Normalizers that compose leave such characters without a token. Returns where the spans end.
    """
    reached = spans[-1][1]
    if reached < until and len(unicodedata.normalize("NFC", text[reached - 1 : until])) == 1:
        for place in range(len(spans) - 1, -1, -1):
            if spans[place][1] != reached:
                break
            spans[place] = spans[place][0], until
        return until
    return reached


def _decoded(ids: Sequence[int], first: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Span], str]:
    """Characters of each token from `first` on, and their text. Tokens within a character wait for its end."""
    spans: list[Span] = []
    said = ""
    window, read = 0, first  # what is decoded begins at `window`; tokens before `read` are done
    while read < len(ids):
        known = len(_text(ids[window:read], tokenizer))
        texts: list[str] = []
        for stop in range(read + 1, len(ids) + 1):
            texts.append(_text(ids[window:stop], tokenizer))
            if not texts[-1].endswith(_UNDECODED):
                break
        whole = texts[-1].rstrip(_UNDECODED)  # of the last characters, a cut may have left a part
        begin = known
        for text in texts:
            complete = max(known, _common(text, whole))
            end = complete + (len(text) > complete)  # one more: the character that is begun
            spans.append((len(said) + begin - known, len(said) + end - known))
            begin = complete
        said += whole[known:]
        window, read = read, read + len(texts)
    return spans, said


def _context(prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The token of the prompt from which to decode: half a character (of a cut prompt) could spoil what follows it."""
    for size in range(1, min(len(prompt), _CONTEXT) + 1):
        text = _text(prompt[-size:], tokenizer)
        if text and _UNDECODED not in text:
            return len(prompt) - size
    return len(prompt)


def _supervised(spans: Sequence[Span], row: Encoded, first: int) -> np.ndarray:
    return np.asarray(spans[row.prompt_tokens - first :], dtype=np.int64).reshape(-1, 2)


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _common(first: str, second: str) -> int:
    """Characters with which both begin."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip())


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
