"""One pass of a batch through a model: logits and hidden states at the supervised positions, and no more than asked."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.data.collate import Batch
from expunge.models.forward import (
    capture_head_input,
    capture_layer,
    pick_positions,
    resumed,
    supervised_head,
    truncated,
    unwrap,
)
from expunge.models.packing import pack_rows
from expunge.models.prefix import Prefix


class Forward:
    """One pass of a micro-batch, made when its first result is asked for. N supervised positions, row by row."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        hidden_layer: int | None = None,
        logits: bool = True,
        packs: bool = False,
        prefix: Prefix | None = None,
        head_inputs: bool = False,
    ) -> None:
        self.model, self.batch = model, batch
        self.hidden_layer = hidden_layer  # decoder layer whose output is wanted
        self.with_logits = logits  # without, the layers above `hidden_layer` do not run
        self.packs = packs  # the model keeps packed rows apart
        self.prefix = prefix  # what the frozen layers below the first trained one give
        self.with_head_inputs = head_inputs

    @cached_property
    def _outputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits [N, V] (N = 0 if none are wanted), hidden states [N, d], and what enters the head [N, d]."""
        hidden: list[Tensor] = []
        vectors: list[Tensor] = []
        inputs, supervised, place = self._inputs
        wanted = supervised if self.with_logits else supervised[:0]
        states = self._states(inputs["input_ids"], place)
        with ExitStack() as stack:
            stack.enter_context(supervised_head(self.model, wanted))
            if self.with_head_inputs:
                stack.enter_context(capture_head_input(self.model, vectors))
            if self.prefix is not None:
                stack.enter_context(resumed(self.model, self.prefix.depth, states))
            if self.hidden_layer is not None:
                stack.enter_context(capture_layer(self.model, self.hidden_layer, hidden))
                if not self.with_logits:
                    stack.enter_context(truncated(self.model, self.hidden_layer))
            logits = self.model(**inputs, use_cache=False).logits[0]
        picked = pick_positions(hidden[0], supervised) if hidden else None
        return logits, picked, vectors[0][0] if vectors else None

    def _states(self, input_ids: Int[Tensor, "K W"], place: Int[Tensor, " T"]) -> Any:
        """The kept prefix where each token stands, as the last frozen layer hands it on; None without a prefix."""
        if self.prefix is None:
            return None
        states = self.prefix.states(self.model, self.batch, self.packs)
        lines = states.new_zeros(input_ids.numel(), states.shape[-1])
        lines[place] = states
        return self.prefix.output(lines.view(*input_ids.shape, -1))

    @cached_property
    def _inputs(self) -> tuple[dict[str, Tensor], Int[Tensor, " N"], Int[Tensor, " T"]]:
        """What the model is given, and flat positions in it: of the supervised logits, and of every token."""
        batch = self.batch
        present = batch.attention_mask.bool()
        config = unwrap(self.model).config
        width = config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        lines = pack_rows(batch.input_ids, present, width) if self.packs else None
        if lines is not None:
            given = {"input_ids": lines.input_ids, "position_ids": lines.position_ids}
            return given, lines.place[batch.supervised[present]], lines.place
        # rows are padded on the right and attention is causal, so no real position ever sees padding
        supervised, place = (mask.flatten().nonzero()[:, 0] for mask in (batch.supervised, present))
        return {"input_ids": batch.input_ids}, supervised, place

    @property
    def shape(self) -> tuple[int, int]:
        """Lines and tokens per line that the model is given: the rows, padded, or what they are packed into."""
        lines, width = self._inputs[0]["input_ids"].shape
        return lines, width

    @property
    def place(self) -> Int[Tensor, " T"]:
        """Where every token of the batch, row by row, stands in the flattened lines; a row's tokens are neighbours."""
        return self._inputs[2]

    @property
    def logits(self) -> Float[Tensor, "N V"]:
        """Logits at the supervised positions."""
        return self._outputs[0]

    @property
    def hidden(self) -> Float[Tensor, "N d"]:
        """Output of the wanted layer at the supervised positions."""
        hidden = self._outputs[1]
        assert hidden is not None, "no hidden layer was asked for"
        return hidden

    @property
    def head_inputs(self) -> Float[Tensor, "N d"]:
        """The vectors that enter the output embedding at the supervised positions."""
        vectors = self._outputs[2]
        assert vectors is not None, "head inputs were not asked for"
        return vectors
