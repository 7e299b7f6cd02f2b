"""The façade that a loss sees: forget and retain rows of one micro-batch, everything lazy and computed once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from expunge.data.collate import Batch
from expunge.models.forward import (
    capture_layer,
    log_softmax_at,
    pick_positions,
    supervised_head,
    truncated,
    unwrap,
)
from expunge.models.packing import pack_rows
from expunge.models.reference import ReferenceCache

#: Positions whose [n, V] logits are turned into a KL term at once; bounds the memory that the term adds.
KL_CHUNK = 512


@dataclass(frozen=True)
class Totals:
    """Rows and selected tokens of a whole optimizer step, over all micro-batches and processes."""

    forget_rows: int
    forget_tokens: int
    retain_rows: int
    retain_tokens: int


class Forward:
    """One pass of a micro-batch through the model, made when its first result is asked for."""

    def __init__(self, model: nn.Module, batch: Batch, hidden_layer: int | None, logits: bool, packs: bool) -> None:
        self.model = model
        self.batch = batch
        self.hidden_layer = hidden_layer
        self.with_logits = logits
        self.packs = packs  # the model keeps packed rows apart

    @cached_property
    def _outputs(self) -> tuple[Tensor, Tensor | None]:
        """Logits [N, V] (N = 0 if none are needed) and the hidden states [N, d] at the supervised positions."""
        sink: list[Tensor] = []
        inputs, supervised = self._inputs()
        wanted = supervised if self.with_logits else supervised[:0]
        with ExitStack() as stack:
            stack.enter_context(supervised_head(self.model, wanted))
            if self.hidden_layer is not None:
                stack.enter_context(capture_layer(self.model, self.hidden_layer, sink))
                if not self.with_logits:
                    stack.enter_context(truncated(self.model, self.hidden_layer))
            logits = self.model(**inputs, use_cache=False).logits[0]
        hidden = pick_positions(sink[0], supervised) if sink else None
        return logits, hidden

    def _inputs(self) -> tuple[dict[str, Tensor], Int[Tensor, " N"]]:
        """What the model is given, and the flat positions in it whose logits predict the supervised tokens."""
        batch = self.batch
        present = batch.attention_mask.bool()
        config = unwrap(self.model).config
        width = config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        lines = pack_rows(batch.input_ids, present, width) if self.packs else None
        if lines is not None:
            given = {"input_ids": lines.input_ids, "position_ids": lines.position_ids}
            return given, lines.place[batch.supervised[present]]
        # rows are padded on the right and attention is causal, so no real position ever sees padding
        return {"input_ids": batch.input_ids}, batch.supervised.flatten().nonzero()[:, 0]

    @property
    def logits(self) -> Float[Tensor, "N V"]:
        """Logits at the supervised positions, row by row."""
        return self._outputs[0]

    @property
    def hidden(self) -> Float[Tensor, "N d"]:
        """Output of the objective's layer at the supervised positions."""
        hidden = self._outputs[1]
        assert hidden is not None, "the objective declares no hidden_layer()"
        return hidden


class Rows:
    """The forget rows or the retain rows of a micro-batch. B rows, N supervised tokens."""

    def __init__(
        self,
        forward: Forward,
        rows: slice,
        cache: ReferenceCache,
        selected: Bool[Tensor, " N"] | None,
        total_rows: int,
        total_tokens: int,
        scale: float,
    ) -> None:
        batch = forward.batch
        self._forward, self._cache, self._scale = forward, cache, scale
        self._total_rows, self._total_tokens = total_rows, total_tokens
        before = int(batch.lengths[: rows.start].sum())
        self._at = slice(before, before + int(batch.lengths[rows].sum()))
        self.index: Int[Tensor, " B"] = batch.index[rows]
        self.targets: Int[Tensor, " N"] = batch.targets[self._at]
        #: row of this side that each token belongs to
        self.row: Int[Tensor, " N"] = batch.row[self._at] - rows.start
        #: 1 where the loss sees the token, 0 where token selection leaves it out
        self.weight: Float[Tensor, " N"] = (
            torch.ones_like(self.targets, dtype=torch.float32) if selected is None else selected.float()
        )

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def logits(self) -> Float[Tensor, "N V"]:
        """Logits at the supervised positions."""
        return self._forward.logits[self._at]

    @cached_property
    def token_logprobs(self) -> Float[Tensor, " N"]:
        """log p(token | before), float32."""
        return log_softmax_at(self.logits, self.targets)

    @cached_property
    def sequence_logprobs(self) -> Float[Tensor, " B"]:
        """log p(answer | prompt): the sum over the selected tokens of a row."""
        return self.sum_per_row(self.token_logprobs)

    @cached_property
    def lengths(self) -> Float[Tensor, " B"]:
        """Selected tokens per row, at least 1."""
        return self.sum_per_row(torch.ones_like(self.weight)).clamp(min=1)

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
        return self._forward.hidden[self._at].float()

    @cached_property
    def frozen_hidden(self) -> Float[Tensor, "N d"]:
        """The same under the start model; cached before training."""
        return self._cache.hidden(self.index, self.targets.device).float()

    def nll(self) -> Float[Tensor, ""]:
        """Mean negative log-likelihood per token."""
        return self.mean_tokens(-self.token_logprobs)

    def kl(self) -> Float[Tensor, ""]:
        """Mean KL(start model ‖ model) per token, on these tokens alone: neither prompt nor padding dilutes it."""
        head_inputs = self._cache.head_inputs(self.index, self.targets.device)
        parts = []
        for start in range(0, len(self.targets), KL_CHUNK):
            piece = slice(start, start + KL_CHUNK)
            with torch.no_grad():
                reference = torch.log_softmax(self._cache.head_logits(head_inputs[piece]).float(), -1)
            current = torch.log_softmax(self.logits[piece].float(), -1)
            # log_target keeps exp() out of the graph; the sum over V is the divergence of one token
            parts.append(torch.nn.functional.kl_div(current, reference, log_target=True, reduction="none").sum(-1))
        return self.mean_tokens(torch.cat(parts) if parts else self.token_logprobs)

    def sum_per_row(self, values: Float[Tensor, " N"]) -> Float[Tensor, " B"]:
        """Sum of the selected tokens' values in each row."""
        return values.new_zeros(len(self)).index_add(0, self.row, values * self.weight)

    def mean_rows(self, values: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """Mean over the rows of the whole optimizer step: this micro-batch's part of it."""
        return values.sum() * (self._scale / max(self._total_rows, 1))

    def mean_tokens(self, values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
        """Mean over the selected tokens of the whole optimizer step: this micro-batch's part of it."""
        return (values * self.weight).sum() * (self._scale / max(self._total_tokens, 1))


class Step:
    """One micro-batch: forget rows, then retain rows, that share one forward pass."""

    def __init__(
        self,
        forward: Forward,
        forget_rows: int,
        forget_cache: ReferenceCache,
        retain_cache: ReferenceCache,
        selected: Bool[Tensor, " N"] | None,
        totals: Totals,
        scale: float,
    ) -> None:
        first, rest = slice(0, forget_rows), slice(forget_rows, len(forward.batch.lengths))
        self.model = forward.model
        self.forget = Rows(forward, first, forget_cache, selected, totals.forget_rows, totals.forget_tokens, scale)
        self.retain = Rows(forward, rest, retain_cache, None, totals.retain_rows, totals.retain_tokens, scale)
