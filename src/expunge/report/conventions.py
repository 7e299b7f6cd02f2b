"""What a convention of counting means for the numbers of a page, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.recipe.conventions import CONVENTIONS, EXPUNGE, Convention

_TERMINATORS = {
    "template": "the template's own end of turn stands after each answer",
    "eos": "the end-of-text token stands after each answer",
    "template+eos": "the template's end of turn and the end-of-text token stand after each answer",
    "none": "nothing stands after an answer",
}


def convention_named(given: Any) -> Convention:
    """The convention of a record, which may hold its name or all of its fields; `expunge` where it holds neither."""
    name = given.get("name") if isinstance(given, Mapping) else given
    return CONVENTIONS.get(str(name), EXPUNGE)


def consequences(convention: Convention) -> list[str]:
    """What counts otherwise than by default, each in a sentence; empty for the default itself."""
    found = []
    for name, words in _words(convention).items():
        if getattr(convention, name) != getattr(EXPUNGE, name):
            found.append(f"{words[:1].upper()}{words[1:]}.")
    return found


def in_words(convention: Convention) -> str:
    """The convention in a sentence."""
    return f"Numbers are counted under the convention {convention.name}: {convention.summary}."


def _words(convention: Convention) -> dict[str, str]:
    share = f"{100 * convention.min_k:g}%"
    return {
        "template": f"prompts are put into the template {convention.template}, whatever the model was trained with",
        "terminator": _TERMINATORS[convention.terminator],
        "joined": "nothing stands between prompt and answer that the text itself does not have",
        "masks_pad_tokens": "real tokens that equal the padding token are left out",
        "scores_terminator": "probability, perplexity, truth ratio and membership inference count the terminator too, "
        "so that whether a model stops moves them",
        "matches_labels_but_last": "exact memorization, extraction strength and Min-K% look at all labels but the last",
        "extraction_floor": "extraction strength is never below 1/T, which flatters nobody and lifts short answers",
        "averages_losses": "truth ratio averages the losses of several answers, not their probabilities",
        "epsilon": f"{convention.epsilon:g} is added to denominators of probabilities",
        "rouge": f"ROUGE-L stands as {convention.rouge} in aggregates",
        "stemmed": "ROUGE-L compares words as they stand, without a stemmer",
        "ascii_words": "ROUGE-L sees ASCII letters and digits alone: text in other scripts scores 0",
        "max_new_tokens": f"answers may be {convention.max_new_tokens} tokens long; with recall, long rambling looks "
        "like knowledge, and an empty answer like forgetting",
        "stops": "generated text ends before certain words",
        "stops_at_answer": "generated text is cut at the answer's length, which the official score does not do",
        "min_k": f"Min-K% looks at the least likely {share} of the tokens",
    }
