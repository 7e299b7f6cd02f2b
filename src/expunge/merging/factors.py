"""scope=factor: the A and B of LoRA adapters merged apart, in PEFT's convention, which is not the merge of the weights.

With s_i the scaling of adapter i, v_i = √|w_i s_i| weighs its B, and v_i with the sign of w_i s_i its A. The method
merges the A alone and the B alone, and ΔW = B'A'. For a weighted sum that is Σ_i Σ_j ±v_i v_j B_i A_j: cross terms of
one adapter's B with another's A come in, so that the norm depends on how alike the factors' starts were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.errors import UserError
from expunge.merging.adapter_variants import Factors
from expunge.merging.adapters import Adapter
from expunge.merging.inputs import Input
from expunge.merging.plan import Plan

_EXACT = "leave out scope=factor: adapters of all kinds are then merged exactly"


def check_factors(models: Sequence[Input], plan: Plan) -> None:
    """Raises UserError unless all models are plain LoRA adapters whose ranks agree wherever they meet."""
    ranks: dict[str, list[tuple[int, str]]] = {}
    for model in models:
        if not isinstance(model, Adapter):
            raise UserError(f"scope=factor merges the factors of LoRA adapters, and {model.label} has none", _EXACT)
        for name, change in model.changes.items():
            if not isinstance(change, Factors) or change.magnitude is not None:
                raise UserError(
                    f"scope=factor merges nothing but LoRA factors, and {model.label} changes {name} in another way",
                    _EXACT,
                )
            ranks.setdefault(name, []).append((change.rank, model.label))
    for name, found in ranks.items():
        other = next((item for item in found if item[0] != found[0][0]), None)
        if other is not None:
            raise UserError(
                f"scope=factor needs equal ranks: that of {name} is {found[0][0]} in {found[0][1]} "
                f"and {other[0]} in {other[1]}",
                _EXACT,
            )
        if len(found) < plan.method.models[0]:
            raise UserError(
                f"{plan.method.name} merges at least {plan.method.models[0]} models, and only {found[0][1]} "
                f"changes {name}",
                _EXACT,
            )


def merged_factors(
    models: Sequence[Input],
    plan: Plan,
    name: str,
    weights: Sequence[float],
    density: Sequence[float],
    device: torch.device | str = "cpu",
) -> Float[Tensor, "*shape"]:
    """ΔW = B'A' of a parameter in float32 and the base's layout, unscaled; models that leave it alone have no say."""
    found = [
        (model, change, weight, part)
        for model, weight, part in zip(models, weights, density, strict=True)
        if isinstance(model, Adapter) and isinstance(change := model.changes.get(name), Factors)
    ]
    scaled = [weight * change.scaling for _, change, weight, _ in found]
    sizes = [math.sqrt(abs(value)) for value in scaled]
    parts = [part for *_, part in found]
    a = _merged(
        plan,
        [model.read(change.a, device) for model, change, *_ in found],
        [math.copysign(size, value) for size, value in zip(sizes, scaled, strict=True)],
        parts,
        f"{name}/A",
    )
    b = _merged(plan, [model.read(change.b, device) for model, change, *_ in found], sizes, parts, f"{name}/B")
    return a.T @ b.T if found[0][1].transposed else b @ a


def _merged(plan: Plan, factors: list[Tensor], weights: list[float], density: list[float], name: str) -> Tensor:
    if plan.method.trims and not plan.method.random:
        # PEFT keeps ⌊density · elements⌋ of each factor, where we otherwise keep the nearest whole number
        numel = factors[0].numel()
        density = [int(part * numel) / numel for part in density]
    return plan.merged(factors, weights, density, name)
