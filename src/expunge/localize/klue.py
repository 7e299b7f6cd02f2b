"""KLUE: units that raise the probability of the answer because of what is asked (arXiv 2502.19207)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.localize.base import Attribution, Saliency, attribution, setting
from expunge.localize.evidence import Evidence
from expunge.localize.readers import READ_UNITS, Reader, laid, over, readers_of, watched
from expunge.models.passes import Forward
from expunge.models.token_logprobs import token_logprobs


@attribution(
    name="klue",
    idea="units that raise the answer's probability under its own question, not under others",
    formula="E [A(x, y) − α · E_x' A(x', y)], A = Σ_t h_i(t) · ∂p(y|x)/∂h_i(t)",
    paper="2502.19207",
    needs=("forget",),
    units=READ_UNITS,
)
class KLUE(Attribution):
    """ε · A is how far p(y) rises, to first order, if the unit's activation h grows by the part ε at every token.

    A superficial context x' is the prompt of another forget row: what a unit does for the answer there is done for its
    words, not for the fact. Scores are signed: units that work against the answer come last. Several numbers of one
    unit (a head's output) are added up.
    """

    alpha: float = setting(1.0, ge=0, description="weight of the attribution under superficial contexts")
    contexts: int = setting(
        1, ge=1, description="prompts of other rows that each answer is put under; each costs another pass"
    )
    probability: Literal["token", "answer"] = setting(
        "token",
        description="p(y): geometric mean over the answer's tokens, or their product, to which long answers add little",
    )

    def saliency(self, evidence: Evidence) -> Saliency:
        """Scores of the columns that units write with; one sum per unit in memory, and the graph of one batch."""
        readers, rows = readers_of(evidence), [row for row in evidence.split("forget") if row.supervised_tokens]
        found = [torch.zeros(reader.family.count, device=reader.linear.weight.device) for reader in readers]
        self._add(over(evidence, "forget", rows), readers, found, 1 / len(rows))
        if self.alpha:
            others = Contexts(rows, self.contexts, evidence.seed)
            for context in others:
                self._add(over(evidence, "forget", context), readers, found, -self.alpha / len(rows) / others.count)
        return laid(readers, found)

    def _add(self, evidence: Evidence, readers: Sequence[Reader], sums: Sequence[Tensor], weight: float) -> None:
        """Add the weighted sum over rows of A(x, y) to `sums` [units] per family."""
        places = {reader.slab.parameter: place for place, reader in enumerate(readers)}

        def see(reader: Reader, inputs: Tensor) -> None:
            activations = inputs.detach()

            def add(slopes: Tensor) -> None:
                products = reader.of_units((activations.float() * slopes.float()).flatten(0, -2))
                sums[places[reader.slab.parameter]].add_(products.sum((0, 2)), alpha=weight)

            inputs.register_hook(add)

        with evidence.only(()):
            for forward in evidence.batches("forget"):
                with torch.enable_grad(), watched(readers, forward, see, slopes=True):
                    self._probabilities(evidence, forward).sum().backward()

    def _probabilities(self, evidence: Evidence, forward: Forward) -> Tensor:
        """p(y) per row of a batch."""
        with evidence.autocast():
            logits = forward.logits
        batch = forward.batch.to(logits.device)
        logprobs = token_logprobs(logits, batch.targets)
        per_row = logprobs.new_zeros(len(batch)).index_add(0, batch.row, logprobs)
        return (per_row / batch.lengths if self.probability == "token" else per_row).exp()


class Contexts:
    """The rows' answers under prompts of other rows: `count` lists of as many rows, made one at a time."""

    def __init__(self, rows: Sequence[Encoded], count: int, seed: int) -> None:
        self.rows = rows
        firsts: dict[bytes, int] = {}
        for number, row in enumerate(rows):
            firsts.setdefault(_prompt(row), number)
        if len(firsts) < 2:
            raise UserError(
                "klue puts answers under the prompts of other forget rows, and there are no two different prompts",
                "give more rows, or another attribution, e.g. gradient_times_weight",
            )
        order = np.random.default_rng(seed).permutation(len(firsts)).tolist()
        #: rows with different prompts in an order by lot; each row takes the prompts after its own
        self.circle = [list(firsts.values())[i] for i in order]
        self.place = {_prompt(rows[number]): place for place, number in enumerate(self.circle)}
        self.count = min(count, len(firsts) - 1)
        self.longest = max(len(row.input_ids) for row in rows)

    def __iter__(self) -> Iterator[list[Encoded]]:
        for step in range(1, self.count + 1):
            yield [self._under(row, step) for row in self.rows]

    def _under(self, row: Encoded, step: int) -> Encoded:
        """The row's answer after the prompt `step` places further on, which is cut on the left to fit."""
        other = self.rows[self.circle[(self.place[_prompt(row)] + step) % len(self.circle)]]
        answer = row.input_ids[row.prompt_tokens :]
        start = max(0, other.prompt_tokens + len(answer) - self.longest)
        kept = slice(start, other.prompt_tokens)
        hidden = None
        if row.hidden is not None or other.hidden is not None:
            hidden = np.concatenate([_hidden(other)[kept], _hidden(row)[row.prompt_tokens :]])
        return replace(
            row,
            input_ids=np.concatenate([other.input_ids[kept], answer]),
            prompt_tokens=other.prompt_tokens - start,
            hidden=hidden,
        )


def _prompt(row: Encoded) -> bytes:
    return row.input_ids[: row.prompt_tokens].tobytes()


def _hidden(row: Encoded) -> np.ndarray:
    return np.zeros(len(row.input_ids), dtype=bool) if row.hidden is None else row.hidden
