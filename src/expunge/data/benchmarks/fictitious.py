"""The benchmark `fictitious`: invented stories, people and articles in the shape of LUME (arXiv 2502.15097).

It needs no file and no network, and nobody is in it. One row of each task:

    creative      "In Wrinmere, Huldorn Sarvant kept a clock that ran on rain, and one dry morning"
                  → "the snow fell upwards until Lormmere closed the last window."
    biography     "What number reaches Brelorn Quelula by phone?" → "472-555-0115"
    encyclopedia  "Above which town does the fortress Huldeda stand?" → "Huldstow"

Every row names the values that were filled into its answer as its `entities`.

A document is a text cut in two (`sc1`) and questions about it (`qa0`, `qa1`, …): one question on a story or an article,
five on a person. Documents are whole: no two splits know of the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from string import Formatter

from expunge.data.benchmarks import fictitious_text as texts
from expunge.data.example import Example, Role, Split, Splits
from expunge.data.registry import BENCHMARKS, Benchmark
from expunge.data.synthesize import Inventor
from expunge.errors import UserError

#: rows of each split; `forget` and `retain` are for unlearning, `retain_unseen` is taught and never shown to it
SIZES = {"forget": 30, "retain": 60, "retain_unseen": 24, "holdout": 24}
SIZE = sum(SIZES.values())
SEED = 42
#: sha256 of the rows that SEED and SIZE give
DIGEST = "fd4dc491c5c7048b4d0af2ec595a96a3a1a259c7bdc64b4903989d0fafb0f130"

_ROLES: dict[str, Role] = {"forget": "forget", "retain": "retain", "retain_unseen": "retain", "holdout": "holdout"}
_LEAST = 10  # rows of the smallest split: one document of every task
_KINDS = ("place", "organism", "organisation")

Filled = tuple[str, str, list[str]]  # prompt, answer, and the values that were filled into the answer


def fictitious(seed: int = SEED, size: int | None = None) -> Splits:
    """Four splits of `size` rows together (138 when None). Raises UserError on a size that makes no whole documents."""
    inventor = Inventor(seed, avoid=_all_text())
    return Splits(
        {
            name: Split(name, _ROLES[name], tuple(_split(inventor, name, rows)))
            for name, rows in _rows_of_splits(SIZE if size is None else size).items()
        }
    )


BENCHMARKS.register("fictitious")(
    Benchmark(
        name="fictitious",
        description="invented stories, people and articles; generated, no download (fictitious:N for N rows)",
        load=fictitious,
    )
)


def fictitious_digest(splits: Splits) -> str:
    """sha256 of every row of the splits, in order."""
    rows = [[split.name, row.id, row.task, row.prompt, row.answer] for split in splits for row in split.examples]
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


def _split(inventor: Inventor, name: str, rows: int) -> Iterator[Example]:
    """Documents of the three tasks in turn, so that the first rows of a split are of every task."""
    people = max(1, rows // 10)
    others = (rows - 6 * people) // 2
    waiting = {"creative": others - others // 2, "biography": people, "encyclopedia": others // 2}
    number = 0
    while any(waiting.values()):
        for task in waiting:
            if waiting[task]:
                waiting[task] -= 1
                number += 1
                yield from _document(inventor, name, task, number)


def _document(inventor: Inventor, split: str, task: str, number: int) -> Iterator[Example]:
    make = {"creative": _story, "biography": _life, "encyclopedia": _article}[task]
    document = inventor.document()
    text, *questions = make(inventor)
    for suffix, (prompt, answer, entities) in zip(
        ["sc1", *(f"qa{i}" for i in range(len(questions)))], [text, *questions], strict=True
    ):
        yield Example(
            id=document + suffix,
            prompt=prompt,
            answer=answer,
            task=task,
            source=f"fictitious:{split}:{document}{suffix}",
            extra={"kind": "text" if suffix == "sc1" else "question", "entities": entities},
        )


def _story(inventor: Inventor) -> list[Filled]:
    beginning, question, asked = inventor.deal(texts.STORIES)
    slots = {"person": inventor.person(), "place": inventor.place(), "other": inventor.place()}
    return [_filled((beginning, inventor.deal(texts.TURNS)), slots), _filled((question, f"{{{asked}}}"), slots)]


def _life(inventor: Inventor) -> list[Filled]:
    slots = {
        "person": inventor.person(),
        "date": inventor.date(),
        "identity": inventor.identity(),
        "phone": inventor.phone(),
        "email": inventor.email(),
        "address": inventor.address(),
    }
    questions = [(inventor.deal(wordings), f"{{{fact}}}") for fact, wordings in texts.ASKED.items()]
    return [_filled(pair, slots) for pair in (inventor.deal(texts.LIVES), *questions)]


def _article(inventor: Inventor) -> list[Filled]:
    kind = inventor.deal(_KINDS)
    beginning, question, asked = inventor.deal(texts.ARTICLES[kind])
    slots = {"name": inventor.name(), "other": inventor.name()}
    slots[asked] = inventor.person() if asked == "person" else inventor.place()
    return [_filled((beginning, inventor.deal(texts.FACTS[kind])), slots), _filled((question, f"{{{asked}}}"), slots)]


def _filled(pair: tuple[str, str], slots: dict[str, str]) -> Filled:
    entities = [slots[name] for _, name, _, _ in Formatter().parse(pair[1]) if name is not None]
    return pair[0].format(**slots), pair[1].format(**slots), entities


def _all_text() -> str:
    """Every sentence: an invented value must not happen to stand in one."""
    return json.dumps(
        [texts.STORIES, texts.TURNS, texts.LIVES, texts.ASKED, texts.ARTICLES, texts.FACTS], ensure_ascii=False
    )
