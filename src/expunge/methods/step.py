"""The façade that a loss sees: the rows of one micro-batch by side, everything lazy and computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expunge.models.passes import Forward
from expunge.models.reference import ReferenceCache
from expunge.models.token_logprobs import token_logprobs

#: The sides of a micro-batch in the order of its rows. Alternatives are other answers to the same prompts, one per row.
SIDES = ("forget", "forget_alternatives", "retain", "retain_alternatives")

#: Positions whose [n, V] logits a loss works on at once; bounds the memory that it adds.
PIECE = 512


@dataclass(frozen=True)
class Totals:
    """An optimizer step as a whole, over all micro-batches and processes: its number, and rows and tokens by side."""

    rows: Mapping[str, int]
    tokens: Mapping[str, int]  # those that the loss sees
    number: int = 0  # of the optimizer step, from 0
    epoch: int = 0  # of the forget rows, from 0


@dataclass(frozen=True)
class ForgetView:
    """How the forget loss looks at its rows, whatever the objective is."""

    temperature: float = 1.0  # logits are divided by it (arXiv 2406.09179)
    cap: float | None = None  # rows whose mean token NLL has passed it no longer count (arXiv 2406.09179)
    quantile: float | None = None  # this part of each answer's tokens counts, those of lowest loss (arXiv 2406.09179)


class Rows:
    """One side of a micro-batch. B rows, N supervised tokens."""

    def __init__(
        self,
        forward: Forward,
        rows: slice,
        cache: ReferenceCache,
        selected: Bool[Tensor, " N"] | None,
        total_rows: int,
        total_tokens: int,
        scale: float,
        view: ForgetView = ForgetView(),
        lacking: Float[Tensor, " N"] | None = None,
    ) -> None:
        batch = forward.batch
        self._forward, self._cache, self._scale, self._view = forward, cache, scale, view
        self.total_rows, self.total_tokens = total_rows, total_tokens
        before = int(batch.lengths[: rows.start].sum())
        self._at = slice(before, before + int(batch.lengths[rows].sum()))
        self._selected = selected
        #: log-probs of the tokens under a model that lacks the knowledge, where one chose the tokens
        self.lacking_token_logprobs: Float[Tensor, " N"] | None = lacking
        self._alternatives: Rows | None = None
        self.index: Int[Tensor, " B"] = batch.index[rows]
        self.targets: Int[Tensor, " N"] = batch.targets[self._at]
        #: row of this side that each token belongs to
        self.row: Int[Tensor, " N"] = batch.row[self._at] - rows.start
        #: where each row's supervised tokens begin: the position that predicts its first one
        self.first: Int[Tensor, " B"] = batch.lengths[rows].cumsum(0) - batch.lengths[rows]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def alternatives(self) -> Rows:
        """Other answers to the same prompts, one per row, in the order of the rows."""
        assert self._alternatives is not None, "the objective declares no alternatives"
        return self._alternatives

    @cached_property
    def weight(self) -> Float[Tensor, " N"]:
        """1 where the loss sees the token, 0 where selection, quantile or cap leave it out."""
        weight = (
            torch.ones_like(self.targets, dtype=torch.float32) if self._selected is None else self._selected.float()
        )
        view = self._view
        if view.quantile is not None:
            weight = weight * self._of_lowest_loss(weight, view.quantile)
        if view.cap is not None:
            losses = self._per_row(-self.token_logprobs.detach() * weight) / self._per_row(weight).clamp(min=1)
            weight = weight * (losses < view.cap).float()[self.row]
        return weight

    def _of_lowest_loss(self, weight: Float[Tensor, " N"], part: float) -> Float[Tensor, " N"]:
        """1 for the tokens that make up the given part of their row's selected tokens and have the highest log-prob."""
        key = self.token_logprobs.detach().masked_fill(weight == 0, -torch.inf)
        order = key.argsort(descending=True, stable=True)
        order = order[self.row[order].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - self.first[self.row[order]]
        return (rank < (self._per_row(weight) * part).ceil()[self.row]).float()

    @cached_property
    def logits(self) -> Float[Tensor, "N V"]:
        """Logits at the supervised positions, divided by the temperature."""
        logits = self._forward.logits[self._at]
        return logits if self._view.temperature == 1 else logits / self._view.temperature

    @cached_property
    def token_logprobs(self) -> Float[Tensor, " N"]:
        """log p(token | before), float32."""
        return token_logprobs(self._forward.logits[self._at], self.targets, self._view.temperature)

    @cached_property
    def sequence_logprobs(self) -> Float[Tensor, " B"]:
        """log p(answer | prompt): the sum over the selected tokens of a row."""
        return self.sum_per_row(self.token_logprobs)

    @cached_property
    def lengths(self) -> Float[Tensor, " B"]:
        """Selected tokens per row, at least 1."""
        return self._per_row(self.weight).clamp(min=1)

    @cached_property
    def reference_token_logprobs(self) -> Float[Tensor, " N"]:
        """What the start model gives each token; cached before training."""
        return self._cache.logprobs(self.index, self.targets.device)

    @cached_property
    def reference_sequence_logprobs(self) -> Float[Tensor, " B"]:
        """log p(answer | prompt) under the start model."""
        return self.sum_per_row(self.reference_token_logprobs)

    @cached_property
    def hidden(self) -> Float[Tensor, "N d"]:
        """Output of the objective's layer at the supervised positions, float32."""
        return _wide(self._forward.hidden[self._at])

    @cached_property
    def frozen_hidden(self) -> Float[Tensor, "N d"]:
        """The same under the start model; cached before training."""
        return _wide(self._cache.hidden(self.index, self.targets.device))

    def nll(self) -> Float[Tensor, ""]:
        """Mean negative log-likelihood per token."""
        return self.mean_tokens(-self.token_logprobs)

    def kl(self) -> Float[Tensor, ""]:
        """Mean KL(start model ‖ model) per token, on these tokens alone: neither prompt nor padding dilutes it."""

        def divergence(logits: Tensor, _: Tensor, reference: Tensor) -> Tensor:
            # log_target keeps exp() out of the graph; the sum over V is the divergence of one token
            pair = logits.log_softmax(-1), reference.log_softmax(-1)
            return torch.nn.functional.kl_div(*pair, log_target=True, reduction="none").sum(-1)

        return self.mean_tokens(self.over_logits(divergence, reference=True))

    def over_logits(self, function: Callable[..., Tensor], *, reference: bool = False) -> Float[Tensor, " N"]:
        """`function(logits [n, V], targets [n]) -> [n]` for all tokens; logits are float32 and come in pieces.

        With `reference`, a third argument is the start model's logits [n, V]. What a piece computes is not kept but
        computed again in the backward pass, so that memory grows with the piece and not with the tokens.
        """
        vectors = self._cache.head_inputs(self.index, self.targets.device) if reference else None

        def piecewise(logits: Tensor, targets: Tensor, vectors: Tensor | None) -> Tensor:
            if vectors is None:
                return function(_wide(logits), targets)
            with torch.no_grad():
                start = _wide(self._cache.head_logits(vectors)) / self._view.temperature
            return function(_wide(logits), targets, start)

        parts = []
        for begin in range(0, len(self.targets), PIECE):
            piece = slice(begin, begin + PIECE)
            given = self.logits[piece], self.targets[piece], None if vectors is None else vectors[piece]
            parts.append(checkpoint(piecewise, *given, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(parts) if parts else self.token_logprobs

    def sum_per_row(self, values: Float[Tensor, " N"]) -> Float[Tensor, " B"]:
        """Sum of the selected tokens' values in each row."""
        return self._per_row(values * self.weight)

    def mean_per_row(self, values: Float[Tensor, " N"]) -> Float[Tensor, " B"]:
        """Mean of the selected tokens' values in each row."""
        return self.sum_per_row(values) / self.lengths

    def mean_rows(self, values: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """Mean over the rows of the whole optimizer step: this micro-batch's part of it."""
        return values.sum() * (self._scale / max(self.total_rows, 1))

    def mean_tokens(self, values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
        """Mean over the selected tokens of the whole optimizer step: this micro-batch's part of it."""
        return (values * self.weight).sum() * (self._scale / max(self.total_tokens, 1))

    def _per_row(self, values: Float[Tensor, " N"]) -> Float[Tensor, " B"]:
        return values.new_zeros(len(self)).index_add(0, self.row, values)


@dataclass
class Memory:
    """What outlives a step: numbers that an objective keeps (saved with checkpoints), and means of frozen states."""

    numbers: dict[str, float] = field(default_factory=dict)
    #: mean frozen state [d] of the objective's layer at the last prompt token: of the forget rows, of the anchors
    means: dict[str, Tensor] = field(default_factory=dict)


class Step:
    """One micro-batch: its sides share one forward pass."""

    def __init__(
        self,
        forward: Forward,
        counts: Mapping[str, int],
        cache: ReferenceCache,
        selected: Bool[Tensor, " N"] | None,
        totals: Totals,
        scale: float,
        view: ForgetView = ForgetView(),
        memory: Memory | None = None,
        lacking: Float[Tensor, " N"] | None = None,
    ) -> None:
        made: dict[str, Rows] = {}
        # the start model's log-probs of alternatives are kept at the temperature of the forget rows
        views = {"forget": view, "forget_alternatives": ForgetView(view.temperature)}
        start = 0
        for side in SIDES:
            rows = slice(start, start + counts.get(side, 0))
            start = rows.stop
            whole = totals.rows.get(side, 0), totals.tokens.get(side, 0)
            chosen, beside = (selected, lacking) if side == "forget" else (None, None)
            view_of_side = views.get(side, ForgetView())
            made[side] = Rows(forward, rows, cache, chosen, *whole, scale, view_of_side, beside)
        self.model, self.number, self.epoch = forward.model, totals.number, totals.epoch
        self.forget, self.retain = made["forget"], made["retain"]
        self.forget._alternatives = made["forget_alternatives"]
        self.retain._alternatives = made["retain_alternatives"]
        self.memory = memory if memory is not None else Memory()


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
