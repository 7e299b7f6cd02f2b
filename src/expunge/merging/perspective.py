"""Models seen in the space of their weights: angles between changes, and where two task vectors meet or clash.

Everything streams over opened inputs, one parameter at a time. Sums are kept in float64. LoRA adapters are compared by
their factors where that is exact, so that ΔW is formed only to look at its elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.adapter_variants import Factors
from expunge.merging.adapters import Adapter
from expunge.merging.inputs import Input, Inputs, open_inputs, resolve
from expunge.merging.merger import Merger, is_finite
from expunge.merging.selection import CHUNK, count, cut, kept_count, trimmed
from expunge.models.files import is_adapter
from expunge.models.names import layer_of

#: The layer of what belongs to no decoder layer: embeddings, the last norm, the head.
OUTSIDE = -1
#: Elements that an inner product takes into float64 at once.
_PIECE = CHUNK * 8

_BROKEN = "that model is broken; leave it out"

#: Called with a number of elements just worked on.
Advance = Callable[[int], None]


def _nobody(elements: int) -> None:
    """Nobody watches."""


def angles(
    first: str | Path, last: str | Path, start: str | Path | None = None, base: str | Path | None = None
) -> dict[str, float]:
    """Angles in degrees between the changes of weights start → first, first → last and start → last (arXiv:2503.21088).

    Keys: first_later, first_whole, later_whole; NaN where a change is zero. Adapters start from their base when `start`
    is None, whole checkpoints need a start or a base. Raises UserError.
    """
    if start is None and base is None and not any(is_adapter(resolve(folder)) for folder in (first, last)):
        raise UserError("changes of whole checkpoints need a model that they start from", "give start or base")
    if start is not None and base is None and not is_adapter(resolve(start)):
        start, base = None, start  # differences from the start itself: nothing is lost to rounding
    opened = open_inputs([folder for folder in (start, first, last) if folder is not None], base)
    try:
        return angles_of(inner_products(opened), started=start is not None)
    finally:
        opened.close()


def factor_angles(first: str | Path, last: str | Path, start: str | Path, base: str | Path | None = None) -> dict:
    """The angles of `angles`, over the flattened A and B of all modules instead of ΔW; raises UserError.

    A starts from random numbers, so an adapter of the start is needed; the result depends on how A and B are scaled
    against each other, as that of ΔW does not.
    """
    opened = open_inputs([start, first, last], base)
    try:
        return angles_of(factor_products(opened), started=True)
    finally:
        opened.close()


def angles_of(products: Float[Tensor, "models models"], started: bool) -> dict[str, float]:
    """Angles in degrees from the inner products of (start,) first and last; without a start it is the origin."""
    moves = torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    moves = moves if started else moves[:, 1:]
    gram = moves @ products.to(torch.float64) @ moves.T
    pairs = {"first_later": (0, 1), "first_whole": (0, 2), "later_whole": (1, 2)}
    return {name: _degrees(float(gram[i, j]), float(gram[i, i]), float(gram[j, j])) for name, (i, j) in pairs.items()}


def _degrees(product: float, one: float, two: float) -> float:
    if one <= 0 or two <= 0:
        return math.nan
    return math.degrees(math.acos(max(-1.0, min(1.0, product / math.sqrt(one * two)))))


@dataclass(frozen=True, slots=True)
class _Pair:
    """ΔW = scaling · B A, in float64."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    scaling: float


def inner_products(opened: Inputs, advance: Advance = _nobody) -> Float[Tensor, "models models"]:
    """⟨Δ_i, Δ_j⟩ over all parameters in float64; two adapters' by ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ), without ΔW."""
    total = torch.zeros(len(opened.models), len(opened.models), dtype=torch.float64)
    for name, info in opened.tensors().items():
        if info.merges:
            total += _products(opened, name)
            advance(info.numel)
    return total


def factor_products(opened: Inputs) -> Float[Tensor, "models models"]:
    """The same over A and B as they are stored. Raises UserError unless all are adapters of equal ranks."""
    total = torch.zeros(len(opened.models), len(opened.models), dtype=torch.float64)
    for name in opened.tensors():
        pairs = [_factors(model, name) for model in opened.models]
        if all(pair is None for pair in pairs):
            continue
        shapes = {None if pair is None else (pair.a.shape, pair.b.shape) for pair in pairs}
        if len(shapes) > 1:
            raise UserError(
                f"the factors of {name} can't be compared: {' and '.join(sorted({m.label for m in opened.models}))} "
                "have no LoRA of one rank there",
                "compare the changes of the weights instead",
            )
        known = [pair for pair in pairs if pair is not None]
        total += _dots([pair.a.reshape(-1) for pair in known]) + _dots([pair.b.reshape(-1) for pair in known])
    return total


def _products(opened: Inputs, name: str) -> Float[Tensor, "models models"]:
    """Inner products of one parameter's differences."""
    pairs = [_factors(model, name) for model in opened.models]
    number = len(pairs)
    if all(pair is not None or _untouched(model, name) for model, pair in zip(opened.models, pairs, strict=True)):
        found = torch.zeros(number, number, dtype=torch.float64)
        for i in range(number):
            for j in range(i, number):
                one, two = pairs[i], pairs[j]
                if one is not None and two is not None:
                    core = ((one.b.T @ two.b) * (one.a @ two.a.T)).sum()
                    found[i, j] = found[j, i] = core * one.scaling * two.scaling
        if not is_finite(found):
            broken = opened.models[int((~found.diagonal().isfinite()).nonzero()[0])]
            raise UserError(f"{name} in {broken.label} holds NaN or infinite numbers", _BROKEN)
        return found
    deltas = _deltas(opened, name)
    return torch.zeros(number, number, dtype=torch.float64) if deltas is None else _dots(deltas)


def _deltas(opened: Inputs, name: str) -> list[Float[Tensor, " n"]] | None:
    """Each input's difference of a parameter, flat; None where none has any. Raises UserError for what is no number."""
    base = None if opened.base is None else opened.base.read(name)
    found = [model.delta(name, base) for model in opened.models]
    shape = next((delta.shape for delta in found if delta is not None), None)
    if shape is None:
        return None
    for model, delta in zip(opened.models, found, strict=True):
        if delta is not None and not is_finite(delta):
            raise UserError(f"{name} in {model.label} holds NaN or infinite numbers", _BROKEN)
    return [torch.zeros(shape).reshape(-1) if delta is None else delta.reshape(-1) for delta in found]


def _untouched(model: Input, name: str) -> bool:
    """Whether an adapter leaves a parameter alone."""
    return isinstance(model, Adapter) and name not in model.changes


def _dots(flats: Sequence[Float[Tensor, " n"]]) -> Float[Tensor, "models models"]:
    """Inner products of flat tensors in float64, piece by piece."""
    total = torch.zeros(len(flats), len(flats), dtype=torch.float64)
    for pieces in zip(*(flat.split(_PIECE) for flat in flats), strict=True):
        rows = torch.stack([piece.to(torch.float64) for piece in pieces])
        total += (rows @ rows.T).cpu()
    return total


def cosine(one: Merger, two: Merger) -> float:
    """Cosine between the differences of two prepared merges of the same inputs; NaN where one is zero."""
    total = torch.zeros(2, 2, dtype=torch.float64)
    for name in one.names:
        found = [merger.delta(name) for merger in (one, two)]
        shape = next((delta.shape for delta in found if delta is not None), None)
        if shape is not None:
            total += _dots([torch.zeros(shape).reshape(-1) if x is None else x.reshape(-1) for x in found])
    return _share(float(total[0, 1]), math.sqrt(float(total[0, 0] * total[1, 1])))


# ------------------------------------------------------------ two task vectors, module by module


@dataclass(frozen=True)
class Compared:
    """Two task vectors in the modules of one kind in one layer; NaN where a measure has no meaning."""

    layer: int  # OUTSIDE for embeddings, the last norm and the head
    module: str
    norms: tuple[float, float]
    cosine: float
    overlap: float  # Jaccard index of the largest elements of each
    conflict: float  # part of the elements that both change whose signs differ
    conflict_kept: float  # the same among the elements that are in both selections
    rank: tuple[float, float]  # effective rank; the mean where a module has several matrices


@dataclass
class _Sums:
    """What adds up over the tensors of a group."""

    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    product: float = 0.0
    both: int = 0
    clash: int = 0
    either_kept: int = 0
    both_kept: int = 0
    clash_kept: int = 0
    ranks: list[tuple[float, float]] = field(default_factory=list)


def compare(opened: Inputs, kept: float = 0.2, ranks: bool = True, advance: Advance = _nobody) -> list[Compared]:
    """Two inputs' task vectors per layer and module; `kept`: part of each tensor that counts as large.

    The largest are selected exactly, tensor by tensor; ranks of whole checkpoints cost an eigendecomposition per
    matrix, of adapters next to nothing. Groups that neither changes are left out. Raises UserError.
    """
    if len(opened.models) != 2:
        raise UserError(f"two models are compared, not {len(opened.models)}", "give the two specialists")
    groups: dict[tuple[int, str], _Sums] = {}
    for name, info in opened.tensors().items():
        if not info.merges:
            continue
        deltas = _deltas(opened, name)
        if deltas is not None:
            sums = groups.setdefault(group_of(name), _Sums())
            _add(sums, deltas[0], deltas[1], kept)
            if ranks and len(info.shape) > 1:
                pairs = zip(opened.models, deltas, strict=True)
                one, two = (_rank(model, name, delta.view(info.shape)) for model, delta in pairs)
                sums.ranks.append((one, two))
        advance(info.numel)
    return [_compared(layer, module, sums) for (layer, module), sums in groups.items() if any(sums.squares)]


def group_of(name: str) -> tuple[int, str]:
    """(Decoder layer or OUTSIDE, module) of a parameter: (7, "q_proj"), (-1, "embed_tokens")."""
    layer = layer_of(name)
    parts = name.split(".")
    module = parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]
    return OUTSIDE if layer is None else layer, module


def effective_rank(matrix: Float[Tensor, "... rows columns"]) -> float:
    """exp(entropy of the singular values divided by their sum) (Roy and Vetterli, 2007); 0 for a zero matrix.

    Of a stack of matrices the mean. From the eigenvalues of the smaller Gram matrix, summed in float64.
    """
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    return sum(map(_effective_rank, stack)) / max(1, len(stack))


def spectral_rank(singular: Float[Tensor, " n"]) -> float:
    """The effective rank that singular values ≥ 0 have."""
    values = singular[singular > 0]
    if not values.numel():
        return 0.0
    shares = values / values.sum()
    return float((-(shares * shares.log()).sum()).exp())


def _effective_rank(matrix: Float[Tensor, "rows columns"]) -> float:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    rows = max(1, _PIECE // max(1, tall.shape[1]))
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=matrix.device)
    for piece in tall.split(rows):
        wide = piece.to(torch.float64)
        gram.addmm_(wide.T, wide)
    squares = torch.linalg.eigvalsh(gram)
    # below the rounding of the largest, an eigenvalue is noise: its root would count as a direction
    floor = float(squares[-1]) * len(squares) * torch.finfo(torch.float64).eps if squares.numel() else 0.0
    return spectral_rank(squares[squares > floor].sqrt())


def _rank(model: Input, name: str, delta: Tensor) -> float:
    """Of an adapter from the r × r core R_B R_Aᵀ, where B = Q_B R_B and Aᵀ = Q_A R_A."""
    pair = _factors(model, name)
    if pair is None:
        return effective_rank(delta)
    core = torch.linalg.qr(pair.b, mode="r").R @ torch.linalg.qr(pair.a.T, mode="r").R.T
    return spectral_rank(torch.linalg.svdvals(core))


def _add(sums: _Sums, one: Float[Tensor, " n"], two: Float[Tensor, " n"], kept: float) -> None:
    """Take in one parameter's two differences."""
    keep = kept_count(one.numel(), kept)
    cuts = [cut(flat, keep) for flat in (one, two)]
    start = 0
    for left, right in _pieces(one, two):
        large = [trimmed(piece, start, at) for piece, at in zip((left, right), cuts, strict=True)]
        signs, large_signs = left.sign() * right.sign(), large[0].sign() * large[1].sign()
        sums.both += count(signs != 0)
        sums.clash += count(signs < 0)
        sums.either_kept += count((large[0] != 0) | (large[1] != 0))
        sums.both_kept += count(large_signs != 0)
        sums.clash_kept += count(large_signs < 0)
        start += left.numel()
    products = _dots([one, two])
    sums.squares[0] += float(products[0, 0])
    sums.squares[1] += float(products[1, 1])
    sums.product += float(products[0, 1])


def _pieces(one: Tensor, two: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(one.split(CHUNK), two.split(CHUNK), strict=True)


def _compared(layer: int, module: str, sums: _Sums) -> Compared:
    one, two = (math.sqrt(square) for square in sums.squares)
    ranks = [sum(column) / len(column) for column in zip(*sums.ranks, strict=True)] or [math.nan, math.nan]
    return Compared(
        layer,
        module,
        (one, two),
        _share(sums.product, one * two),
        _share(sums.both_kept, sums.either_kept),
        _share(sums.clash, sums.both),
        _share(sums.clash_kept, sums.both_kept),
        (ranks[0], ranks[1]),
    )


def _factors(model: Input, name: str) -> _Pair | None:
    """An adapter's factors of a parameter; None where ΔW is not exactly their product."""
    change = model.changes.get(name) if isinstance(model, Adapter) else None
    if not isinstance(model, Adapter) or not isinstance(change, Factors) or change.magnitude is not None:
        return None
    return _Pair(model.read(change.a).to(torch.float64), model.read(change.b).to(torch.float64), change.scaling)


def _share(part: int | float, whole: int | float) -> float:
    return part / whole if whole else math.nan
