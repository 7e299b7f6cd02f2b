"""The examples of a source, and the splits of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from expunge.data.example import Example, Role, Split, Splits
from expunge.data.registry import BENCHMARKS, Benchmark, Format, Request
from expunge.data.rows import Issue, Rows, issue_hint, issues_sentence
from expunge.errors import UserError, did_you_mean
from expunge.recipe import DataConfig, SourceConfig

_SHOWN = 5
_ROLES: dict[str, Role] = {"forget": "forget", "retain": "retain", "retain_unseen": "retain", "holdout": "holdout"}


def load_examples(source: SourceConfig, name: str = "row", layout: Format | None = None) -> list[Example]:
    """The rows of a file or dataset; rows without an id are called `name-0`, `name-1`, …. Raises UserError.

    `layout` is a format that is not in the registry: that of one benchmark.
    """
    rows = Rows(source.path, source.format)
    rows.format = layout or rows.format
    examples: list[Example] = []
    issues: list[Issue] = []
    count = 0
    for entry in islice(rows, source.limit):
        if isinstance(entry, Example):
            if not issues:
                examples.append(entry)
            continue
        count += 1
        if count <= _SHOWN:
            issues.append(entry)
    if issues:
        raise UserError(issues_sentence(issues, count), issue_hint(issues[0]))
    if not examples:
        raise UserError(f"{source.path} has no rows", "see the row of each format in: expunge list formats")
    return _with_ids(examples, name)


def load_splits(config: DataConfig, seed: int, *, unlearns: bool = True) -> Splits:
    """Every split of a run, checked for rows on both sides. Raises UserError.

    `seed` draws a benchmark that is generated. Without `unlearns` the split `forget` may be absent: some benchmarks
    measure on other rows than those that unlearning trains on.
    """
    splits: dict[str, Split] = {}
    notes: tuple[str, ...] = ()
    if config.benchmark is not None:
        benchmark, part = benchmark_of(config.benchmark)
        if config.documents is not None and not benchmark.has_documents:
            raise UserError(
                f"data.documents: the rows of {benchmark.name} are not counted by documents",
                "leave it out, or choose a benchmark that has them, such as lume",
            )
        folder = None if config.folder is None else Path(config.folder)
        loaded = benchmark.load(Request(part, folder, seed, config.documents))
        splits, notes = dict(loaded.by_name), loaded.notes
    elif config.forget is None:
        raise UserError(
            "data.forget: no rows to forget are given", "give a file (--forget FILE) or a benchmark, such as fictitious"
        )
    for name, role in _ROLES.items():
        source: SourceConfig | None = getattr(config, name)
        if source is not None:
            splits[name] = Split(name, role, tuple(load_examples(source, name)))
    for name, extra in config.splits.items():
        if name in splits or name in _ROLES:
            raise UserError(f"data.splits.{name}: there is a split of that name already", "choose another name")
        splits[name] = Split(name, extra.role, tuple(load_examples(extra, name)))
    if unlearns and ("forget" not in splits or not splits["forget"].examples):
        raise UserError(f"data.benchmark: {config.benchmark} has no rows to forget", " ".join(notes) or "choose a part")
    _refuse_shared_rows(splits)
    order = [*(name for name in _ROLES if name in splits), *(name for name in splits if name not in _ROLES)]
    return Splits({name: splits[name] for name in order}, notes)


def benchmark_of(name: str) -> tuple[Benchmark, str]:
    """The benchmark and its part: `tofu:forget10`. Raises UserError with what is valid."""
    base, _, part = name.partition(":")
    benchmark = BENCHMARKS.get(base)
    if part and benchmark.parts and part not in benchmark.parts:
        raise UserError(f"benchmark {base} has no part '{part}'", did_you_mean(part, benchmark.parts))
    return benchmark, part


def _with_ids(examples: Sequence[Example], name: str) -> list[Example]:
    """Every row an id of its own: absent ones are numbered, a second one of the same name gets a suffix."""
    wanted = [example.id or f"{name}-{place}" for place, example in enumerate(examples)]
    taken = set(wanted)
    seen: Counter[str] = Counter()
    named = []
    for example, identity in zip(examples, wanted, strict=True):
        seen[identity] += 1
        final = identity
        if seen[identity] > 1:
            number = seen[identity]
            while (final := f"{identity}-{number}") in taken:
                number += 1
            taken.add(final)
        named.append(example if example.id == final else replace(example, id=final))
    return named


def _refuse_shared_rows(splits: dict[str, Split]) -> None:
    """A row that is to be forgotten can be neither kept nor be a row that nobody learnt."""
    rows = splits["forget"].examples if "forget" in splits else ()
    forget = {content(example): example for example in reversed(rows)}
    for name in ("retain", "retain_unseen", "holdout"):
        if name not in splits:
            continue
        shared = [(forget[key], row) for row in splits[name].examples if (key := content(row)) in forget]
        if shared:
            first, second = shared[0]
            more = f", and {len(shared) - 1} more" if len(shared) > 1 else ""
            raise UserError(
                f"{first.place} (forget) and {second.place} ({name}) are the same row{more}",
                f"remove {'them' if len(shared) > 1 else 'it'} from one of the two",
            )


def content(example: Example) -> tuple[str, ...]:
    """What makes two rows the same: turns, prompt and answer, blanks around them aside."""
    turns: Iterable[str] = (part.strip() for turn in example.turns for part in turn)
    return (*turns, example.prompt.strip(), example.answer.strip())
