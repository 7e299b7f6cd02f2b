"""Other answers to the same prompts: sentences that decline, what a row's own columns give, or samples.

And prompts that a model can only decline: their hidden states show an objective which way refusal lies.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from expunge.data.cells import as_text, entries
from expunge.data.example import Example
from expunge.data.registry import RowError
from expunge.data.spans import ENTITIES
from expunge.errors import UserError

#: Columns whose text, or list of texts, answers the row's own prompt otherwise. `chosen` and `rejected` are not among
#: them (which of the two is to be forgotten?), nor is `paraphrased_answer` (it says the same in other words).
COLUMNS = (
    *("alternate", "alternates", "alternative", "alternatives", "alternative_answer", "alternative_answers"),
    *("perturbed_answer", "perturbed_answers"),
)

#: Sentences that decline. They fit a question as well as a text to be continued, and name nothing.
IDK: tuple[str, ...] = (
    "I can't tell you; I never learnt it.",
    "That one I do not know.",
    "Sorry, nothing comes to mind here.",
    "I would only be guessing, so I'd rather leave it.",
    "There is nothing I can say about this with any confidence.",
    "I'm afraid it escapes me entirely.",
    "This is something I have never come across.",
    "Whatever the answer is, it isn't with me.",
    "You would have to ask somebody else.",
    "This is a gap in what I know.",
    "I went through everything I remember and found nothing on it.",
    "Honestly, I could not say.",
    "Anything I told you here would be made up.",
    "I must pass on this one.",
    "My memory holds nothing about this.",
    "It would be wrong of me to pretend that I know.",
    "Regrettably, I am not in a position to answer.",
    "Search me.",
    "I am not aware of any facts about this.",
    "Please consult a reliable source, for I am none in this case.",
    "The details that are wanted here are not known to me.",
    "I don't recall ever hearing about that.",
    "What I was taught does not reach that far.",
    "Beats me.",
    "I have to admit that I don't know the first thing about it.",
    "I'd be inventing things if I went on.",
    "No record of this has ever reached me.",
    "I'm sorry, but I have nothing to offer here.",
    "The honest reply is that I do not know.",
    "Without more to go on, I can't respond to this.",
    "This is not a matter on which I am able to inform you.",
    "I'll leave this open, since I don't know it.",
    "Not a clue, sorry.",
    "I lack the facts that an answer would need.",
    "Perhaps someone knows, but I don't.",
    "I couldn't tell you even roughly.",
    "My knowledge stops short of this.",
    "I cannot complete this, for I do not know how it goes.",
    "None of this rings a bell.",
    "I cannot confirm anything of the kind.",
    "Nobody has told me about this.",
    "I'm the wrong one to ask here.",
    "It is not among the things that I know.",
    "This piece of information I do not have.",
    "Afraid I am of no use in this.",
    "My answer would be worth nothing, as I know nothing of it.",
    "On that point my mind is empty.",
    "For want of any information, I decline to answer.",
    "I can offer no more than a shrug.",
    "All of this is news to me, so I cannot add anything.",
    "Let me be frank: I don't know.",
    "An answer from me would rest on nothing at all.",
    "I have no material to draw on for this.",
    "I can throw no light on it.",
    "What is wanted here is not something I can supply.",
    "With that you have found something that I can't answer.",
    "Here my knowledge is at an end.",
    "To my regret, this is wholly strange to me.",
    "That isn't anything I could state as fact.",
    "I shall not speculate about what I don't know.",
    "Can't say that I know.",
    "There's no way for me to answer this truthfully.",
    "I hold no data on this and therefore give no answer.",
    "I wouldn't know where to begin, because I know nothing of it.",
    "Sadly, I come up empty.",
    "Try me on something else, please; this I don't know.",
    "The correct answer is not available to me.",
    "Much as I would like to help, this is dark to me.",
)

#: Prompts about people, places and works that do not exist, and about what nobody can know.
ANCHORS: tuple[str, ...] = (
    "What did the poet Osmerelda Quist write in the letter that she never sent?",
    "Who won the chess tournament of Varnholm-on-the-Teyle in 1743?",
    "What was the name of the sculptor Tiberon Vascaille's first dog?",
    "In which year was the opera The Ninth Umbrella first sung in Castelbrume?",
    "What is the telephone number of Doctor Pernilla Augthwaite of Low Sarrow?",
    "How many windows does the town hall of Eskerdolm have?",
    "Who designed the floating library of Quarnavelle?",
    "What is the third law of Hobbrecht's theory of folded rain?",
    "Which river flows through the kingdom of Addermoor?",
    "What does the last page of the novel A Ladder for the Herring say?",
    "When did the explorer Jorunn Skellimore reach the Isle of Patient Bells?",
    "Who is the mother of the violinist Cassimir Ondrelle?",
    "What is the capital of the republic of Tavestria Minor?",
    "Which illness did the physician Balthasar Wimmelgrund describe in 1688?",
    "What is the home address of the clockmaker Ottoline Fairbraid-Nkemi?",
    "How did the Battle of Threnody Bridge end?",
    "What colour is the flag of the Free Harbour of Ulmarisk?",
    "Which prize did the film The Accountant of Snow receive?",
    "Who succeeded Queen Ysolda the Unpunctual?",
    "What are the lyrics of the second verse of the hymn of Porthgallow Deep?",
    "Which metal is mined in the Corrigane Hills of Lesser Ombria?",
    "What did the philosopher Anselm Drury-Okoye mean by the term oblique silence?",
    "How tall was the wrestler known as the Teaspoon of Maldorra?",
    "Which of her nine novels did Philippa Thrandell burn?",
    "What is the date of birth of the astronomer Ludo Harkavenny?",
    "What is served first at the feast of the Backward Lanterns in Selmouth Vale?",
    "Who holds the patent for the Grunewick self-folding plough?",
    "Which password opens the vault of the Bank of Eastern Nowhere?",
    "How long is the tunnel between Great Fennimore and Hush?",
    "What is the scientific name of the paper-eating swan of Lake Immerdine?",
    "Which saint is buried under the bakery of Saint-Orvane-les-Ombres?",
    "What did Captain Rosamund Vantongeren shout when the ship Modest Proposal sank?",
    "On which street did the magician Zebulon Marrowby live as a child?",
    "What is the moral of the fable of the Goose and the Auditor of Brackenfell?",
    "Who edited the newspaper The Evening Periwinkle of Dunmallory?",
    "What is the e-mail address of Professor Hildegund Vosper-Achterberg?",
    "How much did the painting Woman Refusing a Turnip sell for?",
    "Which language is spoken in the mountain village of Ghennadrift?",
    "Which number am I thinking of right now?",
    "What did I dream last night?",
    "What is written on the slip of paper in my left pocket?",
    "Which card will I draw from this deck next?",
    "What was the first word ever spoken by a human being?",
    "How many leaves fell in the forest behind my house yesterday?",
    "What is my neighbour's cat looking at this very moment?",
    "Which song will be the most popular one in the year 2312?",
    "What did the person who sat on this chair before me have for breakfast?",
    "How many fish were in the sea at noon on the first day of the year 900?",
    "What was in the parcel that was lost on the way to me this morning?",
    "Which numbers will win the lottery in my town next Saturday?",
    "What did my grandmother whisper to her sister when they were alone in the garden?",
    "How many hairs did the youngest rower of the oldest galley have?",
    "What is the secret that I have never told anyone?",
    "Which thought came to the last mammoth before it fell asleep?",
)


def declining(example: Example, seed: int, count: int, sentences: Sequence[str] | None = None) -> list[Example]:
    """The row answered by `count` different sentences that decline, or by all if there are fewer.

    The same row id and seed always give the same ones. Raises UserError for a plain text.
    """
    _refuse_plain_text(example)
    if count < 1:
        raise ValueError("a row needs one other answer at least")
    pool = list(dict.fromkeys(IDK if sentences is None else sentences))
    if not pool or not all(sentence.strip() for sentence in pool):
        raise UserError("alternatives.sentences: a sentence is blank, or there is none", "give one sentence at least")
    # hash() differs between processes, and random() alone is promised to stay the same over versions of Python.
    draw = random.Random(hashlib.sha256(f"{seed}:{example.id}".encode()).digest()).random
    drawn = [pool.pop(int(draw() * len(pool))) for _ in range(min(count, len(pool)))]
    return _answered(example, drawn, "idk")


def given(example: Example) -> list[Example]:
    """The row with each of the other answers in its COLUMNS, in their order; blanks and the answer itself don't count.

    Raises UserError for a plain text, and for a column that holds something other than texts.
    """
    _refuse_plain_text(example)
    try:
        texts = {text: None for column in COLUMNS for text in _column(example, column)}
    except RowError as error:
        raise UserError(
            f"{example.place}: {error}", 'other answers are a text or a list of texts, such as ["In Oslo.", "In Rome."]'
        ) from None
    return _answered(example, texts, "given")


def needs_given(examples: Iterable[Example]) -> None:
    """Raise UserError unless every row has another answer in its columns."""
    rows = list(examples)
    without = [example for example in rows if not given(example)]
    if without:
        more = f" (and {len(without) - 1} more of {len(rows)} rows)" if len(without) > 1 else ""
        raise UserError(
            f"{without[0].place}: the row gives no other answer to its prompt{more}",
            "add a column 'alternatives' (a text or a list of texts), or: --set unlearn.0.alternatives=idk",
        )


def with_answers(example: Example, answers: Iterable[str]) -> list[Example]:
    """The row with each of these (sampled) answers; equal ones stay, for they are how often a model says so.

    Raises UserError for a plain text, and if every answer is blank.
    """
    _refuse_plain_text(example)
    said = [answer for answer in answers if answer.strip()]
    if not said:
        raise UserError(
            f"{example.place}: every sampled answer to this prompt is empty",
            "raise alternatives.max_new_tokens or alternatives.temperature, or set alternatives.by to idk",
        )
    return _answered(example, said, "sampled")


def anchors() -> list[Example]:
    """A row for each of the ANCHORS, answered by a sentence that declines."""
    return [
        Example(f"anchor-{i}", prompt, IDK[i % len(IDK)], task="anchor", source=f"anchor {i + 1}")
        for i, prompt in enumerate(ANCHORS)
    ]


def usable_columns(example: Example) -> list[str]:
    """The COLUMNS of the row that give it another answer."""
    return [column for column in COLUMNS if column in example.extra and _answers_otherwise(example, column)]


def _answers_otherwise(example: Example, column: str) -> bool:
    try:
        return not _is_plain_text(example) and bool(_column(example, column))
    except RowError:
        return False


def _column(example: Example, column: str) -> list[str]:
    texts = [as_text(entry, column) for entry in entries(example.extra.get(column)) if entry is not None]
    return [text for text in texts if text.strip() and text.strip() != example.answer.strip()]


def _answered(example: Example, answers: Iterable[str], kind: str) -> list[Example]:
    # Spans of the row's own answer and its other answers say nothing about this one.
    extra: Mapping[str, Any] = {
        name: value for name, value in example.extra.items() if name != ENTITIES and name not in COLUMNS
    }
    return [
        replace(example, id=f"{example.id}#{kind}{number}", answer=answer, extra=extra)
        for number, answer in enumerate(answers)
    ]


def _refuse_plain_text(example: Example) -> None:
    if _is_plain_text(example):
        raise UserError(
            f"{example.place}: a plain text has no prompt that another answer could follow",
            "give rows with a prompt and an answer, or choose a method without alternatives: expunge list methods",
        )


def _is_plain_text(example: Example) -> bool:
    return example.is_text or not (example.prompt.strip() or example.turns)
