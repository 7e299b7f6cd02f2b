"""What the frozen layers below the first trained one give, computed once per row: from then on a step skips them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.data.collate import Batch
from expunge.models.forward import decoder_layers, first_tensor, supervised_head, truncated, unwrap
from expunge.models.packing import pack_rows
from expunge.models.storage import allocate, has_room


def frozen_depth(model: nn.Module) -> int:
    """Number of decoder layers below the first trained parameter; 0 if something before the layers is trained."""
    layers = decoder_layers(model)
    owner = {id(parameter): number for number, layer in enumerate(layers) for parameter in layer.parameters()}
    inside = False
    for parameter in unwrap(model).parameters():
        number = owner.get(id(parameter))
        inside = inside or number is not None
        if parameter.requires_grad:
            return number if number is not None else (len(layers) if inside else 0)
    return len(layers)


def has_dropout(model: nn.Module) -> bool:
    """Whether a pass in training differs from one in evaluation, so that states can't be kept."""
    config: Any = unwrap(model).config.get_text_config()  # type: ignore[union-attr, operator]
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in unwrap(model).modules())
    return drops or bool(getattr(config, "attention_dropout", 0))


class Prefix:
    """States after the first `depth` decoder layers at every token of a row, kept from the row's first use on."""

    def __init__(self, depth: int, tokens: Sequence[int], width: int, file: Path | None = None) -> None:
        self.depth, self.width, self.file = depth, width, file
        self._starts = [0]
        for count in tokens:
            self._starts.append(self._starts[-1] + count)
        self._known = [False] * len(tokens)
        self._states: Tensor | None = None
        self._beside: tuple[Any, ...] | None = None

    def states(self, model: nn.Module, batch: Batch, packs: bool) -> Float[Tensor, "T d"]:
        """The states of the batch's rows, one after another; rows that are new run through the frozen layers."""
        rows = batch.index.tolist()
        new = [place for place, row in enumerate(rows) if not self._known[row]]
        if new:
            self._keep([rows[place] for place in new], *self._run(model, batch, new, packs))
        assert self._states is not None
        parts = [self._states[self._starts[row] : self._starts[row + 1]] for row in rows]
        return torch.cat(parts).to(batch.input_ids.device)

    @torch.no_grad()
    def _run(self, model: nn.Module, batch: Batch, new: list[int], packs: bool) -> tuple[Tensor, list[int]]:
        """States of the rows at these places of the batch, flat, and their lengths."""
        ids, present = batch.input_ids[new], batch.attention_mask[new].bool()
        lines = pack_rows(ids, present, self.width) if packs else None
        given = {"input_ids": ids} if lines is None else {"input_ids": lines.input_ids}
        if lines is not None:
            given["position_ids"] = lines.position_ids
        last = decoder_layers(model)[self.depth - 1]
        hook = last.register_forward_hook(lambda _, __, output: outputs.append(output))
        outputs: list[Any] = []
        nowhere = torch.zeros(0, dtype=torch.int64)
        with truncated(model, self.depth - 1), supervised_head(model, nowhere):
            model(**given, use_cache=False)
        hook.remove()
        self._beside = outputs[0][1:] if isinstance(outputs[0], tuple) else None
        place = present.flatten().nonzero()[:, 0] if lines is None else lines.place
        return first_tensor(outputs[0]).flatten(0, 1)[place], present.sum(1).tolist()

    def output(self, states: Float[Tensor, "B L d"]) -> Any:
        """The states as the last frozen layer hands them on: some architectures return a tuple."""
        return states if self._beside is None else (states, *(None for _ in self._beside))

    def _keep(self, rows: list[int], states: Tensor, lengths: list[int]) -> None:
        if self._states is None:
            self._states = allocate((self._starts[-1], self.width), states.dtype, self.file)
        for row, part in zip(rows, states.split(lengths), strict=True):
            self._states[self._starts[row] : self._starts[row + 1]] = part.to(self._states.device)
            self._known[row] = True


def open_prefix(model: nn.Module, tokens: Sequence[int], file: Path) -> Prefix | None:
    """A prefix for rows of these lengths in tokens; None where nothing is frozen or no place is left for states."""
    depth = frozen_depth(model)
    width = unwrap(model).config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    if not depth or has_dropout(model) or not has_room(4 * width * sum(tokens), file):
        return None
    return Prefix(depth, tokens, width, file)
