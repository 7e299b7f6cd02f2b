"""Neighbours of rows: what counts as a name, what becomes of it, and what stays as it was."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.data.encode import encode
from expunge.data.example import Example
from expunge.data.neighbours import as_text, neighbours, surprising_words, words_in
from expunge.data.spans import token_spans
from expunge.data.template import resolve_template
from expunge.models.load import load_tokenizer
from expunge.recipe import ModelConfig

NAMES = {"Orla", "Venn", "Tessaly", "ヴェネツィア", "花子", "1971"}
ROW = Example("r1", "Where was Orla Venn born?", "Orla was born in Tessaly Bay in 1971.", extra={"entities": ["Orla"]})


def words_of(text: str) -> list[str]:
    return text.replace("?", "").replace(".", "").split()


def test_only_names_change_and_one_name_becomes_one_other():
    made = neighbours([ROW], NAMES, 3, seed=1)
    assert len(made) == 3
    assert len({row.id for row in made}) == 3
    for row in made:
        prompt, answer = words_of(row.prompt), words_of(row.answer)
        assert [prompt[i] for i in (0, 1, 4)] == ["Where", "was", "born"]
        assert [answer[i] for i in (1, 2, 3, 5, 6)] == ["was", "born", "in", "Bay", "in"]
        assert prompt[2] == answer[0] != "Orla"  # the same name wherever it stands
        assert prompt[2][0].isupper()
        assert answer[7].isdigit()
        assert len(answer[7]) == 4
        assert row.extra == {}


def test_the_same_seed_gives_the_same_neighbours_and_another_one_others():
    assert neighbours([ROW], NAMES, 2, 1) == neighbours([ROW], NAMES, 2, 1)
    assert neighbours([ROW], NAMES, 2, 1) != neighbours([ROW], NAMES, 2, 2)


@pytest.mark.parametrize(
    ("row", "count"),
    [
        (Example("a", "Where was she born?", "In Tessaly."), 0),  # asked the same as the forget row: no stranger
        (Example("b", "", "Orla was born.", is_text=True), 1),
        (Example("c", "And when?", "In 1971.", turns=(("user", "Who is Orla?"), ("assistant", "A keeper."))), 1),
        (Example("d", "花子さんはどこで生まれましたか。", "ヴェネツィアです。"), 1),
    ],
    ids=["no name in the prompt", "text", "conversation", "Japanese"],
)
def test_a_row_has_a_neighbour_where_its_prompt_holds_a_name(row, count):
    made = neighbours([row], NAMES, 1, 3)
    assert len(made) == count
    for found in made:
        assert not NAMES & set(words_of(" ".join((found.prompt, found.answer, *(text for _, text in found.turns)))))
        assert (found.is_text, len(found.turns)) == (row.is_text, len(row.turns))


def test_names_are_the_words_that_surprise_and_numbers():
    tokenizer = load_tokenizer(ModelConfig(id="tiny"))
    rows = encode([as_text(ROW)], tokenizer, resolve_template("raw", tokenizer), 128)
    text, spans = rows[0].example.answer, token_spans(rows[0], tokenizer)
    values = np.full(rows[0].supervised_tokens, -0.1, dtype=np.float32)
    begin = text.index("Tessaly")
    inside = (spans[:, 0] < begin + 7) & (spans[:, 1] > begin)
    values[: len(spans)][inside] = -13.0 / inside.sum()  # the word as a whole passes the threshold of 12
    assert surprising_words(rows, [values], tokenizer) == {"Tessaly", "1971"}
    assert surprising_words(rows, [values], tokenizer, threshold=-14.0) == {"1971"}


def test_the_words_of_a_text_are_those_that_are_renamed():
    assert words_in("Born 21 May 1979, in 東京タワー town.") == [
        "Born",
        "21",
        "May",
        "1979",
        "in",
        "東京",
        "タワー",
        "town",
    ]
