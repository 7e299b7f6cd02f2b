"""Merges in the parameters of one model in memory, one after the other: what a search measures."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.merging.inputs import Inputs
from expunge.merging.merger import Merger
from expunge.merging.plan import Plan
from expunge.merging.statistics import Statistics

#: Differences of one parameter, one per input.
Differences = list[Float[Tensor, "*shape"]] | None


class InMemory:
    """A merge in the parameters of `model`; every `set` starts from the files, so that none leaves a trace.

    Memory: the model and few tensors at a time of what is read, or all differences in float32, on the model's device,
    if they fit `budget` bytes. Tensors are rounded to the dtype in which a merge writes them, so that what is measured
    is what is written.
    """

    def __init__(self, model: nn.Module, opened: Inputs, budget: int = 0) -> None:
        """Raises UserError if the files do not hold every parameter of the model."""
        self.model, self.opened = model, opened
        self._tensors = {name: info for name, info in opened.tensors().items() if info.merges}
        from expunge.models.mixture import places  # it imports transformers, which a merge of files does without

        self._places = places(model, tuple(self._tensors))
        needed = 4 * len(opened.models) * sum(info.numel for info in self._tensors.values())
        self._kept: dict[str, Differences] | None = {} if needed <= budget else None

    @property
    def keeps_differences(self) -> bool:
        """Whether the inputs' differences are held in memory once they were read."""
        return self._kept is not None

    @torch.no_grad()
    def set(self, plan: Plan, statistics: Statistics | None = None) -> None:
        """Make the model the merge of that plan, and tell `statistics`. Raises UserError for numbers not finite."""
        merger = _Remembering(self.opened, plan, self._kept, statistics)
        merger.prepare()
        for name, place in self._places.items():
            self._put(name, place, merger.tensor(name))

    @torch.no_grad()
    def reset(self) -> None:
        """Make the model the base itself. Raises ValueError where there is none."""
        base = self.opened.base
        if base is None:
            raise ValueError("there is no base")
        for name, place in self._places.items():
            self._put(name, place, base.read(name))

    def _put(self, name: str, place: Tensor, value: Tensor) -> None:
        from expunge.models.drift import check_shape

        check_shape(name, value, place)
        place.copy_(value)


class _Remembering(Merger):
    """A merger that asks each input for a difference only once, if there is a place to keep it."""

    def __init__(
        self, opened: Inputs, plan: Plan, kept: dict[str, Differences] | None, statistics: Statistics | None
    ) -> None:
        super().__init__(opened, plan, statistics)
        self._kept = kept

    def deltas(self, name: str, base: Tensor | None) -> Differences:
        """As the merger's, from memory where they are known; methods don't change them."""
        if self._kept is None:
            return super().deltas(name, base)
        if name not in self._kept:
            self._kept[name] = super().deltas(name, base)
        found = self._kept[name]
        return None if found is None else list(found)
