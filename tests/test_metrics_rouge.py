"""ROUGE-L: the rouge-score library as oracle for ASCII, hand-made cases for the scripts that it drops."""

from __future__ import annotations

import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from expunge.metrics.base import METRICS
from expunge.metrics.rouge import lcs_length, words
from test_metrics import generations_table


def both(answer: str, generated: str) -> tuple[float, float]:
    table = generations_table((answer, generated))
    return tuple(float(METRICS.get(name).function(table)[0]) for name in ("rouge_l_recall", "rouge_l_f1"))


def random_texts(count: int) -> list[str]:
    choice = random.Random(0)
    pieces = [
        "the",
        "The",
        "cats",
        "running",
        "ran",
        "U.S.",
        "it's",
        "snake_case",
        "x",
        "3.5",
        "nationally",
        "a-b",
        "?!",
        "\n",
        "\t",
    ]
    return [" ".join(choice.choices(pieces, k=choice.randrange(25))) for _ in range(count)]


def test_equals_rouge_score_on_ascii():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts = random_texts(200)
    for answer, generated in zip(texts, reversed(texts), strict=True):
        expected = scorer.score(answer, generated)["rougeL"]
        recall, f1 = both(answer, generated)
        if not words(answer):
            assert np.isnan([recall, f1]).all()
            continue
        assert recall == pytest.approx(expected.recall, abs=1e-12)
        assert f1 == pytest.approx(expected.fmeasure, abs=1e-12)


def test_lcs_against_the_table():
    choice = random.Random(1)
    for _ in range(200):
        first, second = (choice.choices("abcd", k=choice.randrange(30)) for _ in range(2))
        table = np.zeros((len(first) + 1, len(second) + 1), int)
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        assert lcs_length(first, second) == table[-1, -1]


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("東京に住む。", ["東", "京", "に", "住", "む"]),
        ("彼女は1987年、Kyotoで生まれた", ["彼", "女", "は", "1987", "年", "kyoto", "で", "生", "ま", "れ", "た"]),
        ("ラーメン、人々", ["ラ", "ー", "メ", "ン", "人", "々"]),
        ("ﾗｰﾒﾝ ＡＢＣ", ["ラ", "ー", "メ", "ン", "abc"]),
        ("José lives in São Paulo", ["josé", "live", "in", "são", "paulo"]),
        ("Jose\u0301", ["josé"]),
        ("Она живёт в Москве", ["она", "живёт", "в", "москве"]),
        ("서울에 산다", ["서울에", "산다"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("running “home” — ☀️ now", ["run", "home", "now"]),
        ("☀️", []),
        ("\u0301", []),
        ("snake_case é", ["snake", "case", "é"]),
        ("was hers é", ["was", "her", "é"]),
    ],
)
def test_units_of_other_scripts(text, units):
    assert words(text) == units


@pytest.mark.parametrize(
    ("answer", "generated", "recall", "f1"),
    [
        ("東京に住む", "東京に住む", 1, 1),
        ("東京に住む", "大阪に住む", 3 / 5, 3 / 5),
        ("東京に住む", "彼は東京に住むと言う", 1, 2 * 5 / 15),
        ("東京に住む", "", 0, 0),
        ("東京に住む", "Tokyo", 0, 0),
        ("José", "Jose", 0, 0),
    ],
)
def test_other_scripts_are_scored(answer, generated, recall, f1):
    assert both(answer, generated) == pytest.approx((recall, f1))


@pytest.mark.parametrize("answer", ["", "  ", "?!", "☀️"])
def test_an_answer_without_words_is_unscored(answer):
    assert np.isnan(both(answer, "anything")).all()
