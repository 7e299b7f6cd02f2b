"""Metrics of generated text under every convention: rouge-score, nltk and scipy as oracles, closed forms."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from nltk import FreqDist, ngrams
from rouge_score.rouge_scorer import RougeScorer

from expunge.metrics.base import METRICS, Resampling, evaluate_metrics
from expunge.metrics.texts import cut_at_answer, units, until_stop, words
from expunge.recipe.conventions import CONVENTIONS, EXPUNGE, convention_of
from metric_tables import generations_table, shelf

ROUGES = ("rouge_l_recall", "rouge_l_f1")
FLUENCY = ("token_entropy", "repetition", "ngram_entropy")


def values(name, table, convention=EXPUNGE):
    return METRICS.get(name).compute([table], convention)


def texts(count, seed=0):
    choice = random.Random(seed)
    pieces = [
        "the",
        "The",
        "cats",
        "running",
        "ran",
        "it's",
        "nationally",
        "José",
        "naïve",
        "東京",
        "x1",
        "?!",
        "\n",
        "Ünal",
    ]
    return [" ".join(choice.choices(pieces, k=choice.randrange(20))) for _ in range(count)]


@pytest.mark.parametrize("name", [name for name, convention in CONVENTIONS.items() if convention.official])
def test_public_conventions_equal_rouge_score_in_every_script(name):
    convention = convention_of(name)
    scorer = RougeScorer(["rougeL"], use_stemmer=convention.stemmed)
    pairs = [*zip(texts(150), texts(150, seed=1), strict=True), ("東京", "東京"), ("", "words"), ("words", "")]
    recall, f1 = (values(rouge, generations_table(*pairs), convention) for rouge in ROUGES)
    expected = [scorer.score(answer, said)["rougeL"] for answer, said in pairs]
    np.testing.assert_allclose(recall, [score.recall for score in expected], atol=1e-12)
    np.testing.assert_allclose(f1, [score.fmeasure for score in expected], atol=1e-12)
    which = {"recall": recall, "f1": f1}[convention.rouge]
    np.testing.assert_array_equal(values("rouge_l", generations_table(*pairs), convention), which)


def test_stemming_is_a_choice():
    table = generations_table(("she was running", "she runs"))
    plain = replace(EXPUNGE, stemmed=False)
    assert (values("rouge_l_recall", table), values("rouge_l_recall", table, plain)) == (2 / 3, 1 / 3)
    assert words("Kästen running", stemmed=False) == ["kästen", "running"]
    assert words("Kästen running") == ["kästen", "run"]


@pytest.mark.parametrize(
    ("said", "stops", "left"),
    [
        ("Paris\nQuestion: next", ("\nQuestion:",), "Paris"),
        ("Paris\n\nthen Q: x", ("Q:", "\n\n"), "Paris"),
        ("Paris", ("\n",), "Paris"),
        ("\nParis", ("\n",), ""),
        ("Paris", (), "Paris"),
        ("Paris", ("",), "Paris"),
    ],
)
def test_text_ends_before_the_first_stop(said, stops, left):
    convention = replace(EXPUNGE, stops=stops)
    assert until_stop(said, convention) == left
    table = generations_table(("Paris", said))
    assert values("exact_match", table, convention)[0] == (left == "Paris")
    assert values("rouge_l_recall", table, convention)[0] == (left == "Paris")


@pytest.mark.parametrize(
    ("said", "answer", "left"),
    [
        ("Paris is nice", "Paris", "Paris"),
        (" \n Paris.", " Paris ", "Paris"),
        ("Par", "Paris", "Par"),
        ("", "Paris", ""),
        ("東京です", "東京", "東京"),
    ],
)
def test_cut_at_the_answers_length(said, answer, left):
    assert cut_at_answer(said, answer, convention_of("semeval-stop")) == left
    assert cut_at_answer(said, answer, convention_of("semeval")) == said


def test_stopping_at_the_answer_forgives_a_missing_end():
    table = generations_table(("472-555", "472-555 is the number"), ("472-555", "It is 472-555"))
    assert values("exact_match", table, convention_of("semeval")).tolist() == [0, 0]
    assert values("exact_match", table, convention_of("semeval-stop")).tolist() == [1, 0]
    assert values("rouge_l_recall", table, convention_of("semeval-stop")).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["expunge", "semeval"])
def test_exact_match_is_the_equality_of_semeval(name):
    parts = ["Paris", "paris", " PARIS\n", "Paris.", "straße", "STRASSE", "İzmir", "i̇zmir", "\tΣίσυφος", "σίσυφος"]
    pairs = [(answer, said) for answer in parts for said in [*parts, ""]]
    expected = [answer.strip().lower() == said.strip().lower() for answer, said in pairs]
    assert values("exact_match", generations_table(*pairs), convention_of(name)).tolist() == expected
    assert np.isnan(values("exact_match", generations_table((" ", "x"))))


def test_paraphrases_count_by_their_mean_and_by_the_worst():
    pairs = [("a b", "a b"), ("a b", "a"), ("c", "d"), ("?", "?"), ("e", "e")]
    table = generations_table(*pairs, example_id=["x", "x", "y", "z", "x"], candidate=[0, 1, 0, 0, 2])
    np.testing.assert_allclose(values("rouge_l_recall_paraphrase", table), [2.5 / 3, 0, np.nan])
    np.testing.assert_array_equal(values("rouge_l_recall_paraphrase_worst", table), [1, 0, np.nan])


def test_the_prompt_before_the_text_changes_nothing_but_the_table():
    table = generations_table(("a b", "a b c"), ("a", "b"))
    plain = values("rouge_l_recall", table)
    np.testing.assert_array_equal(values("rouge_l_recall_jailbreak", table), plain)
    assert METRICS.get("rouge_l_recall_jailbreak").needs == ("generations/jailbreak",)
    assert METRICS.get("rouge_l_recall_paraphrase").needs == ("generations/paraphrase",)


@pytest.mark.parametrize(
    ("answer", "said", "there"),
    [
        ("Paris", "It is in paris, I think.", 1),
        ("Paris", "A Parisian one", 0),
        ("472-555-0115", "call 472 555 0115 now", 1),
        ("472-555-0115", "call 472 555 0116 now", 0),
        ("New York", "new\nYORK", 1),
        ("New York", "York New", 0),
        ("東京", "私は東京に住む", 1),
        ("José", "jose", 0),
        ("café", "café", 1),  # e and its accent, as one code point and as two
        ("...", "...", np.nan),
        ("", "x", np.nan),
        ("x", "", 0),
    ],
)
def test_whether_the_answer_stands_in_the_text(answer, said, there):
    np.testing.assert_array_equal(values("answer_accuracy", generations_table((answer, said))), [there])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It's 3.5!", ["it", "'", "s", "3", ".", "5", "!"]),
        ("!!!", ["!"] * 3),
        ("東京。", ["東", "京", "。"]),
        (" \n", []),
    ],
)
def test_units_are_words_and_signs(text, found):
    assert units(text) == found


def spoken(*outputs):
    return generations_table(*(("answer", output) for output in outputs))


def test_fluency_of_a_collapsed_and_a_lively_text():
    lively = "Seven quiet rivers cross this valley before they meet an old stone bridge."
    table = spoken("6 " * 60, "!" * 60, lively, "", "Paris", "6 6 6")
    entropy, repeated, weighted = (values(name, table) for name in FLUENCY)
    np.testing.assert_allclose(repeated, [1 - 1 / 57, 1 - 1 / 57, 0, 0, 0, 0])
    np.testing.assert_allclose(entropy, [0, 0, 1, 0, 0, 0], atol=1e-12)
    assert (weighted[[0, 1, 3, 4, 5]] == 0).all()
    assert weighted[2] > 3
    assert not np.signbit(np.concatenate([entropy, repeated, weighted])).any()  # "-0" is no way to print nothing


def test_token_entropy_in_closed_form_and_beside_scipy():
    np.testing.assert_allclose(values("token_entropy", spoken("a a b b", "a b", "a a a b")), [0.5, 1, 0.40563906])
    for text in filter(None, texts(50)):
        counts = list(FreqDist(units(text)).values())
        n = sum(counts)
        expected = scipy.stats.entropy(counts, base=2) / np.log2(n) if n > 1 else 0
        assert values("token_entropy", spoken(text))[0] == pytest.approx(expected, abs=1e-12)


def test_ngram_entropy_is_the_public_fluency():
    def entropy(found, size):
        counts = list(FreqDist(ngrams(found, size)).values())
        return scipy.stats.entropy(counts, base=2) if counts else 0.0

    for text in texts(50):
        found = units(text)
        expected = np.mean([entropy(found, 2) * 2 / 3, entropy(found, 3) * 4 / 3])
        assert values("ngram_entropy", spoken(text))[0] == pytest.approx(expected, abs=1e-12)


def test_repetition_against_counting():
    for text in texts(50, seed=3):
        runs = list(ngrams(units(text), 4))
        expected = 1 - len(set(runs)) / len(runs) if runs else 0
        assert values("repetition", spoken(text))[0] == pytest.approx(expected)


def test_fluency_looks_at_the_whole_text_but_ends_at_stops():
    table = generations_table(("a", "one two one two one two one two"))
    assert values("repetition", table, convention_of("semeval-stop"))[0] == values("repetition", table)[0] == 1 - 2 / 5
    assert values("repetition", table, replace(EXPUNGE, stops=("two",)))[0] == 0


def test_text_is_to_stay_fluent_on_every_split():
    for name in FLUENCY:
        wanted = "lower" if name == "repetition" else "higher"
        entry = METRICS.get(name)
        assert [entry.direction(role) for role in ("forget", "retain", "utility")] == [wanted] * 3
        assert entry.direction("holdout") == "none"


def test_records_tell_the_convention_apart():
    given = shelf(generations=generations_table(("Paris", "Paris is nice"), ("Rome", "Rome")))
    found = {
        name: evaluate_metrics(given, "retain", ["exact_match"], Resampling(50), "v", "s", convention_of(name))[0][0]
        for name in ("semeval", "semeval-stop")
    }
    assert (found["semeval"]["value"], found["semeval-stop"]["value"]) == (0.5, 1.0)
