"""Steps over given logits and hidden states, for tests of objectives: no model, no tokenizer, no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.methods.step import SIDES, ForgetView, Memory, Step, Totals
from expunge.models.passes import Forward
from expunge.models.reference import Kept, ReferenceCache
from training_rows import supervised


@dataclass(frozen=True)
class Start:
    """A start model as far as a loss can see it: at the N supervised tokens of all rows, in the order of SIDES."""

    vectors: Tensor  # [N, d], what enters the head
    head: Tensor  # [V, d]
    hidden: Tensor  # [N, d], outputs of the objective's layer

    @property
    def logits(self) -> Tensor:
        """[N, V]"""
        return self.vectors @ self.head.T


def random_start(count: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> Start:
    """A start model with random states at `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2 * count + vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    return Start(drawn[:count], drawn[2 * count :], drawn[count : 2 * count])


def random_outputs(
    count: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 3
) -> tuple[Tensor, Tensor]:
    """Logits [count, V] and hidden states [count, d] of a model in training."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, vocabulary + width, generator=generator, dtype=torch.float64).to(dtype)
    return drawn[:, :vocabulary].contiguous(), drawn[:, vocabulary:].contiguous()


def make_step(
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    logits: Tensor,
    hidden: Tensor,
    *,
    selected: Tensor | None = None,
    view: ForgetView = ForgetView(),
    memory: Memory | None = None,
    forget_alternatives: Sequence[Encoded] = (),
    retain_alternatives: Sequence[Encoded] = (),
    start: Start | None = None,
    part: Mapping[str, Sequence[int]] | None = None,
    number: int = 0,
    epoch: int = 0,
    scale: float = 1.0,
    lacking: Tensor | None = None,
) -> Step:
    """A micro-batch of an optimizer step over all given rows; alternatives are one per row, in the order of the rows.

    `logits` [N, V] and `hidden` [N, d] are of the supervised tokens of all rows: forget, forget_alternatives, retain,
    retain_alternatives. `selected` and `lacking` [n] are over the forget tokens. `part` names the rows by side that
    this micro-batch holds (alternatives go with their rows); all when absent.
    """
    sides = dict(zip(SIDES, (forget, forget_alternatives, retain, retain_alternatives), strict=True))
    everything = [row for side in SIDES for row in sides[side]]
    tokens = supervised(everything)
    start = start or random_start(sum(tokens), logits.shape[-1], hidden.shape[-1], logits.dtype)
    spans = torch.arange(sum(tokens)).split(tokens)

    chosen: dict[str, list[int]] = {}
    begin = 0
    for side in SIDES:
        owner = side.removesuffix("_alternatives")
        wanted = range(len(sides[owner])) if part is None else part[owner]
        chosen[side] = [begin + row for row in wanted] if sides[side] else []
        begin += len(sides[side])
    numbers = [row for side in SIDES for row in chosen[side]]
    places = torch.cat([spans[row] for row in numbers])

    forward = Forward(torch.nn.Identity(), pad_right([everything[row] for row in numbers], numbers, 0), 0)
    forward.__dict__["_outputs"] = (logits[places], hidden[places], None)
    seen = {side: sum(supervised(rows)) for side, rows in sides.items()}
    if selected is not None:
        seen["forget"] = int(selected.sum())
        selected = selected[torch.cat([spans[row] for row in chosen["forget"]])] if chosen["forget"] else selected[:0]
    totals = Totals({side: len(rows) for side, rows in sides.items()}, seen, number, epoch)
    counts = {side: len(rows) for side, rows in chosen.items()}
    return Step(forward, counts, _cache(everything, start, view), selected, totals, scale, view, memory, lacking)


def _cache(rows: Sequence[Encoded], start: Start, view: ForgetView) -> ReferenceCache:
    """What the start model says of all rows, kept as `build_reference` keeps it."""
    batch = pad_right(rows, range(len(rows)), 0)
    logprobs = (start.logits / view.temperature).log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    cache, numbers = ReferenceCache(), list(range(len(rows)))
    for name, values in (("_logprobs", logprobs), ("_vectors", start.vectors), ("_hidden", start.hidden)):
        kept = Kept(rows, numbers)
        kept.put(numbers, values)
        setattr(cache, name, kept)
    cache._head = lambda vectors: vectors @ start.head.T
    return cache
