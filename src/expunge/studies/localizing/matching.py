"""The objective-free check of arXiv 2505.16252: MLP outputs of a reference, matched by chosen value vectors alone.

Published: gradient descent on Σ over layers of ‖MLP(h; θ) − MLP(h; θ_ref)‖². Only columns of the last matrix may move,
so for given inputs h this is one least-squares problem per layer, which is solved here in closed form with a small
ridge. Inputs are those of both models, the injected one, where the fit begins, and the reference, where it is to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.data.encode import Encoded
from expunge.localize.masks import Mask
from expunge.models import moments as inputs
from expunge.models.quantization import linear_weights

#: Parameter name → columns of its matrix.
Columns = Mapping[str, Int[Tensor, " k"]]


@dataclass(frozen=True)
class Fit:
    """The closed form of one layer: the change of the free columns, and the loss before and after it."""

    change: Float[Tensor, "out free"]
    before: float
    after: float


@dataclass(frozen=True)
class Moved:
    """A region's fit over all layers: `residual` = loss after / loss before; `norm` = ‖change‖ / ‖free columns‖."""

    residual: float
    norm: float


def columns(mask: Mask) -> dict[str, Int[Tensor, " k"]]:
    """The value vectors inside a mask of them, by parameter."""
    found = {name: bits.flatten().nonzero()[:, 0] for name, bits in mask.inside.items()}
    return {name: chosen for name, chosen in found.items() if len(chosen)}


def union(*regions: Columns) -> dict[str, Int[Tensor, " k"]]:
    """Columns of any of the regions, in order."""
    names = dict.fromkeys(name for region in regions for name in region)
    return {name: torch.cat([region[name] for region in regions if name in region]).unique() for name in names}


def second_moments(
    model: nn.Module, rows: Sequence[Encoded], chosen: Columns, batch_size: int, tick: Callable[[int], None]
) -> dict[str, Float[Tensor, "k k"]]:
    """Per parameter the second moments of the coefficients of its chosen columns, over every token of the rows."""
    linear = linear_weights(model)
    inlets = {name: inputs.Inlet(linear[name].module, own) for name, own in chosen.items()}
    return inputs.second_moments(model, rows, inlets, batch_size, tick)


def solve(
    difference: Float[Tensor, "out held"],
    moments: Float[Tensor, "k k"],
    held: Int[Tensor, " held"],
    free: Int[Tensor, " free"],
    ridge: float,
) -> Fit:
    """min over C of Σ_t ‖C·m_free − D·m_held‖² + λ‖C‖², λ = ridge · mean square of m_free; loss is the sum alone.

    `difference` D is what the held columns lack; `held` and `free` are places among the k columns of `moments`.
    """
    d, whole = difference.double(), moments[held][:, held]
    before = float((d @ whole * d).sum())
    own, cross = moments[free][:, free], moments[held][:, free]
    if not len(free):
        return Fit(torch.zeros(len(d), 0), before, before)
    scale = float(own.diagonal().mean())
    if not scale > 0:  # columns that no token ever used
        return Fit(torch.zeros(len(d), len(free)), before, before)
    inverse = torch.linalg.cholesky(own + ridge * scale * torch.eye(len(free), dtype=torch.float64))
    change = torch.cholesky_solve((d @ cross).T, inverse).T
    after = before - 2 * float((change * (d @ cross)).sum()) + float((change @ own * change).sum())
    return Fit(change.float(), before, max(after, 0.0))


@contextmanager
def matched(
    model: nn.Module,
    reference: Mapping[str, Float[Tensor, "out held"]],
    moments: Mapping[str, Float[Tensor, "k k"]],
    known: Columns,
    held: Columns,
    free: Columns,
    ridge: float,
) -> Iterator[Moved]:
    """Within it the free columns of the injected `model` are fitted to the `reference`, whose held columns are given.

    `moments` are over the `known` columns. Afterwards the model is as it was.
    """
    linear = linear_weights(model)
    before = after = moved = size = 0.0
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, wanted in reference.items():
            matrix = linear[name].oriented(linear[name].weight)
            places = {column: place for place, column in enumerate(known[name].tolist())}
            own = free.get(name, torch.zeros(0, dtype=torch.int64))
            lacking = wanted.float() - matrix[:, held[name]].float().cpu()
            fit = solve(lacking, moments[name], _places(places, held[name]), _places(places, own), ridge)
            before, after = before + fit.before, after + fit.after
            kept[name] = matrix[:, own].clone()
            moved, size = moved + _square(fit.change), size + _square(kept[name])
            matrix[:, own] = (kept[name].float() + fit.change.to(matrix.device)).to(matrix.dtype)
    try:
        yield Moved(after / before if before > 0 else 0.0, (moved / size) ** 0.5 if size > 0 else 0.0)
    finally:
        with torch.no_grad():
            for name, values in kept.items():
                linear[name].oriented(linear[name].weight)[:, free.get(name, torch.zeros(0, dtype=torch.int64))] = (
                    values
                )


def take(model: nn.Module, chosen: Columns) -> dict[str, Float[Tensor, "out k"]]:
    """These columns of a model's matrices, on the CPU."""
    linear = linear_weights(model)
    return {
        name: linear[name].oriented(linear[name].weight.detach())[:, own].clone().cpu() for name, own in chosen.items()
    }


def _places(places: Mapping[int, int], own: Tensor) -> Int[Tensor, " k"]:
    return torch.tensor([places[column] for column in own.tolist()], dtype=torch.int64)


def _square(values: Any) -> float:
    return float(values.float().square().sum(dtype=torch.float64))
