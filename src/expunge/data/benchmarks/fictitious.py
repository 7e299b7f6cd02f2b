"""The benchmark `fictitious`: invented stories, people and articles in the shape of LUME (arXiv 2502.15097).

It needs no file and no network, and nobody is in it. One row of each task:

    creative      "In Wrinmere, Huldorn Sarvant kept a clock that ran on rain, and one dry morning"
                  → "the snow fell upwards until Lormmere closed the last window."
    biography     "What number reaches Brelorn Quelula by phone?" → "472-555-0115"
    encyclopedia  "Above which town does the fortress Huldeda stand?" → "Huldstow"

Every row names the values that were filled into its answer as its `entities`.

A document is a text cut in two (`sc1`) and questions about it (`qa0`, `qa1`, …): one question on a story or an article,
five on a person. Documents are whole: no two splits know of the same one.

Further columns, for metrics that ask otherwise than the row does (see expunge.data.views):

    subject              the person or thing that the document is about
    paraphrased_question two other wordings; questions only
    paraphrased_answer   the same values in other words: "The number is 472-555-0115."
    perturbed_answer     five times the same words with wrong values, which occur in no other document
    related              probes: paraphrase, reverse (from the answer to the subject), one_hop (part of the answer) and
                         multi_hop (the same answer, the subject being told by another fact of the document)

No two facts share an answer, so that there is no probe that ought to stay when its row goes. Up to some 150 rows the
wrong names are as long as the right ones; later the short ones are used up, and wrong places are a syllable longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from string import Formatter
from typing import Any

from expunge.data.benchmarks import fictitious_probes as probes
from expunge.data.benchmarks import fictitious_text as texts
from expunge.data.benchmarks.semeval import first_documents
from expunge.data.example import Example, Role, Split, Splits
from expunge.data.registry import BENCHMARKS, Benchmark, Request
from expunge.data.synthesize import Inventor
from expunge.errors import UserError

#: rows of each split; `forget` and `retain` are for unlearning, `retain_unseen` is taught and never shown to it
SIZES = {"forget": 30, "retain": 60, "retain_unseen": 24, "holdout": 24}
SIZE = sum(SIZES.values())
SEED = 42
#: sha256 of the rows that SEED and SIZE give
DIGEST = "fd4dc491c5c7048b4d0af2ec595a96a3a1a259c7bdc64b4903989d0fafb0f130"
#: columns that rows bring beside prompt and answer, and sha256 of those that SEED and SIZE give
COLUMNS = ("subject", "paraphrased_question", "paraphrased_answer", "perturbed_answer", "related")
DIGEST_COLUMNS = "9fcb86cbb19a7ae18c1763b77d30246a65fa2aa74125f8618147dc2ad087a198"
WRONG = 5  # wrong answers to a row

_ROLES: dict[str, Role] = {"forget": "forget", "retain": "retain", "retain_unseen": "retain", "holdout": "holdout"}
_LEAST = 10  # rows of the smallest split: one document of every task
_KINDS = ("place", "organism", "organisation")

#: in the order in which wrong values are drawn: what few words are left for comes first
_VALUES = ("place", "name", "address", "person", "date", "identity", "phone", "email")

Sentences = tuple[str, str]  # prompt and answer, whose {slots} are still open


@dataclass(frozen=True)
class _Document:
    """What the inventor filled into a text (the first of the rows) and the questions about it."""

    id: str
    split: str
    task: str
    slots: Mapping[str, str]
    rows: Sequence[Sentences]

    @property
    def subject(self) -> str:
        """The slot of the person or thing that it is about."""
        return "name" if self.task == "encyclopedia" else "person"


def fictitious(seed: int = SEED, size: int | None = None) -> Splits:
    """Four splits of `size` rows together (138 when None). Raises UserError on a size that makes no whole documents."""
    inventor = Inventor(seed, avoid=_all_text())
    drawn = {
        name: list(_documents(inventor, name, rows))
        for name, rows in _rows_of_splits(SIZE if size is None else size).items()
    }
    # Only now, so that a further column changes no row.
    wrong = _wrong_values(inventor, [document for documents in drawn.values() for document in documents])
    return Splits(
        {
            name: Split(
                name,
                _ROLES[name],
                tuple(row for document in documents for row in _examples(document, wrong[document.id])),
            )
            for name, documents in drawn.items()
        }
    )


def _load(request: Request) -> Splits:
    if request.part and not request.part.isdecimal():
        raise UserError(f"data.benchmark: 'fictitious:{request.part}' does not say how many rows", "e.g. fictitious:60")
    whole = fictitious(request.seed, int(request.part) if request.part else None)
    if request.documents is None:
        return whole
    fewer = {
        split.name: replace(split, examples=tuple(first_documents(split.examples, request.documents)))
        for split in whole
    }
    return Splits(fewer)


BENCHMARKS.register("fictitious")(
    Benchmark(
        name="fictitious",
        description="invented stories, people and articles; generated, no download (fictitious:N for N rows)",
        load=_load,
        has_documents=True,
    )
)


def fictitious_digest(splits: Splits) -> str:
    """sha256 of every row of the splits, in order."""
    rows = [[split.name, row.id, row.task, row.prompt, row.answer] for split in splits for row in split.examples]
    return _sha256(rows)


def columns_digest(splits: Splits) -> str:
    """sha256 of the COLUMNS of every row of the splits, in order."""
    return _sha256([[row.id, *(row.extra.get(name) for name in COLUMNS)] for split in splits for row in split.examples])


def _sha256(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def _rows_of_splits(size: int) -> dict[str, int]:
    """Rows per split in the proportion of SIZES; each an even number, for documents have 2 or 6 rows."""
    least = _LEAST * len(SIZES)
    if size < least or size % 2:
        raise UserError(
            f"fictitious: {size} rows cannot be made of whole documents", f"give an even number from {least} on"
        )
    rows = {name: max(_LEAST, 2 * (size * share // (2 * SIZE))) for name, share in SIZES.items()}
    while (spare := size - sum(rows.values())) != 0:
        # What rounding left goes to retain; what the smallest splits took too much comes from the largest.
        name = "retain" if spare > 0 else max(rows, key=lambda split: rows[split])
        rows[name] += spare if spare > 0 else -2
    return rows


def _documents(inventor: Inventor, split: str, rows: int) -> Iterator[_Document]:
    """Documents of the three tasks in turn, so that the first rows of a split are of every task."""
    people = max(1, rows // 10)
    others = (rows - 6 * people) // 2
    waiting = {"creative": others - others // 2, "biography": people, "encyclopedia": others // 2}
    make = {"creative": _story, "biography": _life, "encyclopedia": _article}
    while any(waiting.values()):
        for task in waiting:
            if waiting[task]:
                waiting[task] -= 1
                yield _Document(inventor.document(), split, task, *make[task](inventor))


def _story(inventor: Inventor) -> tuple[dict[str, str], list[Sentences]]:
    beginning, question, asked = inventor.deal(texts.STORIES)
    slots = {"person": inventor.person(), "place": inventor.place(), "other": inventor.place()}
    return slots, [(beginning, inventor.deal(texts.TURNS)), (question, f"{{{asked}}}")]


def _life(inventor: Inventor) -> tuple[dict[str, str], list[Sentences]]:
    slots = {
        "person": inventor.person(),
        "date": inventor.date(),
        "identity": inventor.identity(),
        "phone": inventor.phone(),
        "email": inventor.email(),
        "address": inventor.address(),
    }
    questions = [(inventor.deal(wordings), f"{{{fact}}}") for fact, wordings in texts.ASKED.items()]
    return slots, [inventor.deal(texts.LIVES), *questions]


def _article(inventor: Inventor) -> tuple[dict[str, str], list[Sentences]]:
    kind = inventor.deal(_KINDS)
    beginning, question, asked = inventor.deal(texts.ARTICLES[kind])
    slots = {"name": inventor.name(), "other": inventor.name()}
    slots[asked] = inventor.person() if asked == "person" else inventor.place()
    return slots, [(beginning, inventor.deal(texts.FACTS[kind])), (question, f"{{{asked}}}")]


def _examples(document: _Document, wrong: Mapping[str, Sequence[str]]) -> Iterator[Example]:
    """The rows of a document; `wrong` has WRONG values for every slot that stands in an answer."""
    for number, (prompt, answer) in enumerate(document.rows):
        name = document.id + (f"qa{number - 1}" if number else "sc1")
        said, columns = (_of_question if number else _of_text)(document, prompt, answer)
        yield Example(
            id=name,
            prompt=prompt.format(**document.slots),
            answer=answer.format(**document.slots),
            task=document.task,
            source=f"fictitious:{document.split}:{name}",
            extra={
                "kind": "question" if number else "text",
                "entities": [document.slots[slot] for slot in _open(answer)],
                "subject": document.slots[document.subject],
                "paraphrased_answer": said.format(**document.slots),
                "perturbed_answer": [
                    said.format(**{slot: wrong[slot][place] for slot in _open(answer)}) for place in range(WRONG)
                ],
                **columns,
            },
        )


def _of_text(document: _Document, prompt: str, answer: str) -> tuple[str, dict[str, Any]]:
    """Other words for the answer, with open slots, and the columns that only some rows have."""
    if document.task == "biography":
        return texts.LIVES_REWORDED[answer], {}  # what it tells is what the questions ask
    said, question = probes.ENDS[answer]
    forth, back, _ = texts.BY_TASK[document.task]
    related = [
        _probe("paraphrase", forth + question, "{other}", document),
        _probe("reverse", back, f"{{{document.subject}}}", document),
    ]
    return said, {"related": related}


def _of_question(document: _Document, prompt: str, answer: str) -> tuple[str, dict[str, Any]]:
    """Other words for the answer, with open slots, and the columns that only some rows have."""
    (fact,), (given,) = _open(answer), _open(prompt)
    hops = []
    if document.task == "biography":
        wordings = texts.ASKED[fact]
        place = wordings.index(prompt)
        reworded = [wordings[(place + step) % len(wordings)] for step in (1, 2)]
        back = texts.WHOSE[fact]
        facts = list(texts.ASKED)
        question, at, part = texts.PARTS[fact]
        known = facts[(facts.index(fact) + 1) % len(facts)]
        chain = f"What is the {texts.WHAT[fact][0]} of the person {texts.WHAT[known][1]}?"
        hops = [_probe("one_hop", question, document.slots[fact].split(at)[part], document)]
    else:
        *reworded, back, question = probes.QUESTIONS[prompt]
        chain = texts.BY_TASK[document.task][2] + question
    related = [
        _probe("paraphrase", reworded[0], answer, document),
        _probe("reverse", back, f"{{{given}}}", document),
        *hops,
        _probe("multi_hop", chain, answer, document),
    ]
    asked = [wording.format(**document.slots) for wording in reworded]
    return texts.SAID[fact], {"paraphrased_question": asked, "related": related}


def _probe(relation: str, prompt: str, answer: str, document: _Document) -> dict[str, str]:
    slots = document.slots
    return {"prompt": prompt.format(**slots), "answer": answer.format(**slots), "relation": relation}


def _wrong_values(inventor: Inventor, documents: Sequence[_Document]) -> dict[str, dict[str, list[str]]]:
    """By document and slot: WRONG values of the same kind for everything that an answer of the document says."""
    wrong: dict[str, dict[str, list[str]]] = {document.id: {} for document in documents}
    said = [
        (document, slot)
        for document in documents
        for slot in {s: 0 for _, answer in document.rows for s in _open(answer)}
    ]
    for kind in _VALUES:
        mine = [(document.id, slot) for document, slot in said if _kind(document, slot) == kind]
        values = inventor.many(kind, WRONG * len(mine))
        for number, (name, slot) in enumerate(mine):
            wrong[name][slot] = values[number :: len(mine)]
    return wrong


def _kind(document: _Document, slot: str) -> str:
    """Which values of the inventor a slot takes."""
    return slot if slot != "other" else "name" if document.task == "encyclopedia" else "place"


@cache
def _open(sentence: str) -> Sequence[str]:
    """The slots of a sentence, in order."""
    return [slot for _, slot, _, _ in Formatter().parse(sentence) if slot is not None]


def _all_text() -> str:
    """Every sentence of a row: an invented value must not happen to stand in one.

    Sentences of the columns are not among them, or a new one could change the rows; tests look for values in them.
    """
    return json.dumps(
        [texts.STORIES, texts.TURNS, texts.LIVES, texts.ASKED, texts.ARTICLES, texts.FACTS], ensure_ascii=False
    )
