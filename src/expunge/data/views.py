"""Other ways to ask the rows of a split: each view turns an example into candidates, from columns that rows bring.

A view's candidates keep the example's id and are numbered, so that metrics find them again beside the plain row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from expunge.data.cells import entries
from expunge.data.example import Example

#: What a reader is led to continue; appended to the prompt (arXiv:2406.09179).
JAILBREAK = "Sure, here is the answer:"

View = Callable[[Example], list[Example]]


def paraphrase(example: Example) -> list[Example]:
    """Paraphrased prompts with the original answer."""
    return _with_prompts(example, _texts(example, "paraphrased_question", "paraphrased_prompt", "paraphrases"))


def paraphrased_answer(example: Example) -> list[Example]:
    """The original prompt with paraphrased answers."""
    return _with_answers(example, _texts(example, "paraphrased_answer"))


def perturbed_answer(example: Example) -> list[Example]:
    """The original prompt with wrong answers of the same form."""
    return _with_answers(example, _texts(example, "perturbed_answer"))


def jailbreak(example: Example) -> list[Example]:
    """The prompt, and the beginning of a compliant reply after it."""
    return [] if example.is_text else [replace(example, prompt=f"{example.prompt} {JAILBREAK}")]


def related(example: Example) -> list[Example]:
    """Probes about the same facts, with their relation as `task`.

    The row's column `related` is a list of {prompt or question, answer, relation}; relations are paraphrase, reverse,
    one_hop, multi_hop (what has to go with the row) and same_answer (what has to stay).
    """
    probes = [probe for probe in entries(example.extra.get("related")) if isinstance(probe, Mapping)]
    return [
        replace(
            example,
            prompt=str(probe.get("prompt") or probe.get("question") or ""),
            answer=str(probe.get("answer") or ""),
            task=str(probe.get("relation") or "related"),
            candidate=number,
            extra={},
        )
        for number, probe in enumerate(probes)
    ]


VIEWS: dict[str, View] = {
    view.__name__: view for view in (paraphrase, paraphrased_answer, perturbed_answer, jailbreak, related)
}


def viewed(examples: Sequence[Example], view: str) -> list[Example]:
    """All candidates of the examples, in order; none for an example that lacks the columns."""
    return [candidate for example in examples for candidate in VIEWS[view](example)]


def _texts(example: Example, *columns: str) -> list[str]:
    """The texts in the first of these columns that the row has."""
    found: Iterator[Any] = (example.extra[name] for name in columns if name in example.extra)
    return [str(value) for value in entries(next(found, None)) if str(value).strip()]


def _with_prompts(example: Example, prompts: Sequence[str]) -> list[Example]:
    return [replace(example, prompt=prompt, candidate=number) for number, prompt in enumerate(prompts)]


def _with_answers(example: Example, answers: Sequence[str]) -> list[Example]:
    # the entities stand in the original answer
    extra = {key: value for key, value in example.extra.items() if key != "entities"}
    return [replace(example, answer=answer, candidate=number, extra=extra) for number, answer in enumerate(answers)]
