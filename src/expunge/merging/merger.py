"""The merged tensors of opened inputs, one at a time and in any order: what is written, measured and searched alike."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from math import isfinite
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.ahead import in_order
from expunge.merging.factors import check_factors, merged_factors
from expunge.merging.inputs import Input, Inputs
from expunge.merging.plan import Plan
from expunge.merging.selection import kept_over_model
from expunge.merging.statistics import Statistics
from expunge.models.names import layers_in

#: Called with a number of elements just worked on.
Advance = Callable[[int], None]
Result = TypeVar("Result")

_BROKEN = "that model is broken; leave it out"


def _nobody(elements: int) -> None:
    """Nobody watches."""


class Merger:
    """A plan on inputs. `prepare` makes the passes that must come before the first tensor; `tensor` makes each one.

    With `threads`, passes and `stream` work on several tensors at once; beside the mapped files they hold at most
    (inputs + 2) × the largest tensor in float32. On a GPU (`device`) each tensor is merged there and moved back.
    """

    def __init__(
        self,
        opened: Inputs,
        plan: Plan,
        statistics: Statistics | None = None,
        *,
        device: torch.device | str = "cpu",
        threads: int = 1,
    ) -> None:
        """Check that the plan fits the inputs, without reading weights. Raises UserError."""
        self.opened, self.plan, self.statistics = opened, plan, statistics
        self.device, self._threads = torch.device(device), threads
        self.tensors = opened.tensors()
        self.names = [name for name, info in self.tensors.items() if info.merges]
        self.layers = layers_in(self.names)
        for values in (plan.weights, plan.density):
            values.check(self.names)
        plan.check(self.names)
        if plan.scope == "factor":
            check_factors(opened.models, plan)
        _check_base(opened, plan, self.names, self.layers)
        self._over_model = plan.scope == "model" and plan.trims
        self._matches_model = plan.parameters["scale_match"] == "model"
        self._density: dict[str, list[float]] = {}  # where one threshold trims the whole model
        self._factor = 1.0

    @property
    def passes(self) -> int:
        """How often `prepare` reads all inputs."""
        return (2 * len(self.opened.models) if self._over_model else 0) + int(self._matches_model)

    def prepare(self, advance: Advance = _nobody) -> None:
        """Find the threshold over the whole model and its norm, where the plan wants them. Raises UserError."""
        if self._over_model:
            self._find_density(advance)
        if self._matches_model:
            self._factor = self._find_factor(advance)

    def stream(self, names: Sequence[str]) -> Generator[tuple[str, Tensor], None, None]:
        """(name, tensor) of the result in the order of `names`, each worked on ahead of its turn. Raises UserError."""
        return self._in_order(self.tensor, names, len(self.opened.models) + 1)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the result in its dtype, on the CPU. Raises UserError for numbers that are not finite."""
        info = self.tensors[name]
        if not info.merges:
            return self._unmerged(name)
        base = self._base(name)
        deltas = self.deltas(name, base)
        if deltas is None:
            assert base is not None
            _check_finite(base, name, self.opened.base.label if self.opened.base else "")
            return base.to("cpu", info.dtype)
        merged = self._merged(name, deltas)
        if self.statistics is not None:
            self.statistics.add(name, deltas, merged)
        deltas.clear()
        if base is not None:
            merged = merged.add_(base)
        result = merged.to(info.dtype)
        _check_finite(result, name, "the result", f"{info.dtype} is too narrow; use smaller weights or a smaller scale")
        return result.cpu()

    def delta(self, name: str) -> Float[Tensor, "*shape"] | None:
        """The merged difference of a parameter in float32; None where no input changes it. Raises UserError."""
        deltas = self.deltas(name, self._base(name))
        if deltas is None:
            return None
        merged = self._merged(name, deltas)
        if self.statistics is not None:
            self.statistics.add(name, deltas, merged)
        return merged

    def deltas(self, name: str, base: Tensor | None) -> list[Float[Tensor, "*shape"]] | None:
        """Each input's difference of a parameter in float32; None if, on a base, none has any. Raises UserError."""
        found = [self._delta(model, name, base) for model in self.opened.models]
        if base is not None and all(delta is None for delta in found):
            return None
        shape = self.tensors[name].shape
        return [torch.zeros(shape, device=self.device) if delta is None else delta for delta in found]

    def _merged(self, name: str, deltas: list[Tensor]) -> Tensor:
        """The merged difference with all that is done to its scale."""
        merged = self._unscaled(name, deltas)
        factor = self._factor
        if self.plan.parameters["scale_match"] == "tensor":
            weights = [abs(weight) for weight in self.plan.weights.at(name, self.layers)]
            factor = matching_factor([float(delta.norm()) for delta in deltas], weights, float(merged.norm()))
        return merged.mul_(factor * self.plan.parameters["scale"])

    def _unscaled(self, name: str, deltas: list[Tensor]) -> Tensor:
        density = self._density.get(name) or self.plan.density.at(name, self.layers)
        weights = self.plan.weights.at(name, self.layers)
        if self.plan.scope == "factor":
            return merged_factors(self.opened.models, self.plan, name, weights, density, deltas[0].device)
        return self.plan.merged(deltas, weights, density, name)

    def _find_density(self, advance: Advance) -> None:
        """The density of each model in each tensor when one threshold per model trims all its tensors together."""
        sizes = {name: self.tensors[name].numel for name in self.names}
        parts = self.plan.density.uniform
        if parts is None:
            raise UserError(
                "scope=model trims the whole model to one density", "give a number per model, or scope=tensor"
            )
        densities: dict[str, list[float]] = {name: [] for name in sizes}
        for model, part in zip(self.opened.models, parts, strict=True):

            def read(name: str, model: Input = model) -> Tensor | None:
                return self._delta(model, name, self._base(name))

            def each(work: Callable[[str], Result], names: Sequence[str]) -> Iterator[tuple[str, Result]]:
                for name, result in self._in_order(work, names, 1):
                    yield name, result
                    advance(sizes[name])

            for name, kept in kept_over_model(read, sizes, part, each).items():
                densities[name].append(kept / max(1, sizes[name]))
        self._density = densities

    def _find_factor(self, advance: Advance) -> float:
        """What rescales the merged difference of the whole model to the weighted mean norm of the inputs'."""

        def work(name: str) -> list[float]:
            deltas = self.deltas(name, self._base(name))
            if deltas is None:
                return [0.0] * (len(self.opened.models) + 1)
            return [float(part.norm()) ** 2 for part in (*deltas, self._unscaled(name, deltas))]

        squares, shares = [0.0] * (len(self.opened.models) + 1), [0.0] * len(self.opened.models)
        for name, found in self._in_order(work, self.names, len(self.opened.models) + 1):
            numel = self.tensors[name].numel
            squares = [one + other for one, other in zip(squares, found, strict=True)]
            for number, weight in enumerate(self.plan.weights.at(name, self.layers)):
                shares[number] += abs(weight) * numel
            advance(numel)
        *norms, merged = (square**0.5 for square in squares)
        return matching_factor(norms, shares, merged)

    def _in_order(
        self, work: Callable[[str], Result], names: Sequence[str], copies: int
    ) -> Generator[tuple[str, Result], None, None]:
        """`work` on each name in order; one of them holds so many float32 copies of its tensor."""
        sizes = {name: 4 * info.numel for name, info in self.tensors.items()}
        budget = (len(self.opened.models) + 2) * max(sizes.values(), default=0)
        return in_order(work, names, needs=lambda name: copies * sizes[name], budget=budget, threads=self._threads)

    def _base(self, name: str) -> Tensor | None:
        """The base's tensor as it is stored, on the device."""
        return None if self.opened.base is None else self.opened.base.read(name).to(self.device)

    def _delta(self, model: Input, name: str, base: Tensor | None) -> Tensor | None:
        """An input's difference on the device. Raises UserError for numbers that are not finite."""
        delta = model.delta(name, base)
        if delta is None or is_finite(delta):
            return None if delta is None else delta.to(self.device)
        if self.opened.base is not None:
            _check_finite(self.opened.base.read(name), name, self.opened.base.label)
        raise UserError(f"{name} in {model.label} holds NaN or infinite numbers", _BROKEN)

    def _unmerged(self, name: str) -> Tensor:
        """A tensor of counters or a mask, which must be the same everywhere."""
        opened = self.opened
        first = opened.reference.read(name)
        for other in opened.checkpoints[1:]:
            if not torch.equal(first, other.read(name)):
                raise UserError(
                    f"{name} ({first.dtype}, no weights) differs between {opened.reference.label} and {other.label}",
                    "only models of one architecture can be merged",
                )
        return first


def matching_factor(norms: Sequence[float], weights: Sequence[float], merged: float) -> float:
    """What brings a norm to the mean of `norms` weighted by `weights` ≥ 0; 1 where nothing was merged."""
    total = sum(weights)
    if merged == 0 or total == 0:
        return 1.0
    return sum(norm * weight for norm, weight in zip(norms, weights, strict=True)) / total / merged


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is a finite number."""
    # a NaN or an infinity always shows in the sum; a finite tensor may overflow it, so then we look closer
    return isfinite(float(tensor.sum(dtype=torch.float32))) or bool(tensor.isfinite().all())


def _check_finite(tensor: Tensor, name: str, label: str, hint: str = _BROKEN) -> None:
    if not is_finite(tensor):
        raise UserError(f"{name} in {label} holds NaN or infinite numbers", hint)


def _check_base(opened: Inputs, plan: Plan, names: Sequence[str], layers: int) -> None:
    if opened.base is not None:
        return
    if plan.method.needs_base:
        raise UserError(
            f"{plan.method.name} merges differences from a base, and whole checkpoints do not say what theirs is",
            "say it with --base, or merge the checkpoints themselves with --method linear",
        )
    if plan.parameters["scale_match"] != "none":
        raise UserError("scale_match compares differences from a base, and there is none", "say it with --base")
    for name in names:
        weights, density = plan.weights.at(name, layers), plan.density.at(name, layers)
        same = float(plan.merged([torch.ones(1) for _ in opened.models], weights, density, name))
        same *= plan.parameters["scale"]
        if abs(same - 1) > 1e-5:
            raise UserError(
                f"without a base the weights must add up to 1, not {same:g}: that would be {same:g} times a model",
                "give --base, or weights that sum to 1, or leave out normalize=false and scale",
            )
