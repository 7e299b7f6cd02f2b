"""The choices in which public scorers differ, as one object, so that published numbers can be compared with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from expunge.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Convention:
    """How rows become tokens, and tokens and texts become numbers. `expunge` is the default; the others are public."""

    name: str
    summary: str
    #: template instead of the configured one; None leaves it to the recipe
    template: str | None = None
    #: what is supervised after the answer: the template's own end of turn, EOS, both, or nothing
    terminator: Literal["template", "eos", "template+eos", "none"] = "template"
    #: blank between prompt and answer: as running text has it, or none
    joined: bool = False
    #: real tokens that equal the pad token are masked out, as in collators that rebuild the mask from ids
    masks_pad_tokens: bool = False
    #: probability, perplexity, truth ratio and membership inference count the terminator
    scores_terminator: bool = False
    #: exact memorization, extraction strength and Min-K% look at every label but the last, whatever that is
    matches_labels_but_last: bool = False
    #: extraction strength is never below 1/T
    extraction_floor: bool = False
    #: truth ratio averages the log-probabilities of several answers, not their probabilities
    averages_losses: bool = False
    #: what is added to denominators of probabilities
    epsilon: float = 0.0
    #: which of ROUGE-L stands in aggregates
    rouge: Literal["recall", "f1"] = "recall"
    #: Porter stemmer in ROUGE
    stemmed: bool = True
    #: rouge-score's own tokenizer for every script (it drops all but ASCII letters and digits)
    ascii_words: bool = False
    #: tokens that are generated; None leaves it to the recipe
    max_new_tokens: int | None = None
    #: generated text ends before the first of these
    stops: tuple[str, ...] = ()
    #: generated text is cut at the length of the answer
    stops_at_answer: bool = False
    #: part of the tokens that Min-K% and Min-K%++ look at
    min_k: float = 0.2
    #: whether this is what the source itself computes
    official: bool = True

    def describe(self) -> dict[str, str]:
        """Label → text, for `expunge list conventions`: what differs from the default."""
        described = {"summary": self.summary}
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                described[field.name] = repr(value) if isinstance(value, str) else str(value)
        return described


#: The default: answer tokens only, no floor, every script.
EXPUNGE = Convention("expunge", "answer tokens alone, terminator left out, words of every script", official=False)

CONVENTIONS = {
    convention.name: convention
    for convention in (
        EXPUNGE,
        Convention(
            "open-unlearning",
            "OpenUnlearning: EOS is appended to the chat template and scored, mask rebuilt from ids, floor 1/T",
            terminator="template+eos",
            masks_pad_tokens=True,
            scores_terminator=True,
            matches_labels_but_last=True,
            extraction_floor=True,
            averages_losses=True,
            epsilon=1e-10,
            ascii_words=True,
            max_new_tokens=200,
            min_k=0.4,
        ),
        Convention(
            "tofu",
            "TOFU's own code: EOS is scored, ROUGE-L recall of up to 200 new tokens",
            terminator="eos",
            scores_terminator=True,
            averages_losses=True,
            ascii_words=True,
            max_new_tokens=200,
            min_k=0.4,
        ),
        Convention(
            "muse",
            "MUSE's own code: raw text, ROUGE-L F1 without stemmer, 128 new tokens, Min-40%",
            template="raw",
            rouge="f1",
            stemmed=False,
            ascii_words=True,
            max_new_tokens=128,
            stops=("\nQuestion", "Question:"),  # its questions stand after examples, and a model goes on with another
            min_k=0.4,
        ),
        Convention(
            "semeval",
            "SemEval-2025 Task 4's script: raw prompt, nothing between prompt and output, 256 new tokens",
            template="raw",
            terminator="eos",
            joined=True,
            ascii_words=True,
            max_new_tokens=256,
        ),
        Convention(
            "semeval-stop",
            "as semeval, but generated text is cut at the answer's length: not the official score",
            template="raw",
            terminator="eos",
            joined=True,
            ascii_words=True,
            max_new_tokens=256,
            stops_at_answer=True,
            official=False,
        ),
        Convention(
            "running-text",
            "raw prompts that the answer continues, whatever the template; answer tokens alone",
            template="raw",
            official=False,
        ),
    )
}


def convention_of(name: str) -> Convention:
    """The convention of that name. Raises UserError with the near name if there is none."""
    if name not in CONVENTIONS:
        raise UserError(f"unknown convention '{name}'", did_you_mean(name, CONVENTIONS))
    return CONVENTIONS[name]
