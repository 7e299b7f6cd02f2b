"""Setting weights to zero: what hides the knowledge may be easier to lose than the knowledge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from expunge.attacks.base import ModelAttack, Point, World, attack, restored, setting
from expunge.attacks.states import remembered
from expunge.errors import UserError
from expunge.models.forward import evaluating, supervised_head
from expunge.models.quantization import LinearWeight, linear_weights

#: Halvings of the interval in which the threshold over all tensors lies: float32 has no more digits.
_HALVINGS = 40


@attack(
    name="prune",
    idea="set weights to zero that are small, little used, or used for the forget rows alone",
    paper="2306.11695",
    kind="weights",
    budget="part of the linear weights looked at",
    suite="full",
)
class Prune(ModelAttack):
    """Unstructured pruning of all linear layers but the output embedding.

    Scores are those of the intact model: unlike Wanda's own code, a layer does not see what was pruned below it.
    """

    variant: Literal["magnitude", "magnitude-global", "wanda", "set-difference"] = setting(
        "magnitude",
        description="magnitude: smallest |w| of each tensor (-global: of all); wanda: smallest |w|·‖x‖ of each output, "
        "x from retain rows; set-difference: largest |w|·‖x‖ on forget prompts that are not so on retain rows "
        "(arXiv:2402.05162)",
        published="wanda 50 % of each output",
    )
    fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = setting(
        (0.1, 0.3, 0.5),
        description="part of the weights that is removed; with set-difference the size of both sets that are compared",
        min_length=1,
    )
    rows: int = setting(64, description="rows of each split that activations are read from", published="128", gt=0)

    def points(self) -> list[Point]:
        """One point per fraction, smallest first."""
        return [
            Point(f"{100 * part:g}pct", part, {"variant": self.variant, "fraction": part})
            for part in sorted(self.fractions)
        ]

    @contextmanager
    def applied(self, model: nn.Module, point: Point, world: World) -> Iterator[nn.Module]:
        """Within it the chosen weights are zero. Raises UserError if the rows that the variant needs are not there."""
        linear = linear_weights(model)
        norms = remembered(self, model, world, lambda: self._norms(model, linear, world))
        fraction = point.settings["fraction"]
        threshold = _threshold(linear, fraction) if self.variant == "magnitude-global" else 0.0
        with restored({name: found.weight for name, found in linear.items()}, device="cpu"):
            with torch.no_grad():
                for name, found in linear.items():
                    size = found.oriented(found.weight).detach().abs().float()
                    removed = self._removed(size, {split: norms[split][name] for split in norms}, fraction, threshold)
                    found.weight.masked_fill_(found.oriented(removed), 0)
            yield model

    def _norms(
        self, model: nn.Module, linear: Mapping[str, LinearWeight], world: World
    ) -> dict[str, dict[str, Float[Tensor, " in"]]]:
        """Per split that the variant looks at, ‖x_j‖ of every weight's input features."""
        norms = {}
        for split in {"wanda": ("retain",), "set-difference": ("retain", "forget")}.get(self.variant, ()):
            rows = [row for row in world.rows.get(split, ()) if row.supervised_tokens][: self.rows]
            if not rows:
                raise UserError(f"prune with variant {self.variant} needs {split} rows", "choose variant=magnitude")
            # the attacker knows what is asked of the forget set, not what was to be answered
            given = [row.input_ids[: row.prompt_tokens] if split == "forget" else row.input_ids for row in rows]
            norms[split] = _feature_norms(model, linear, given)
        return norms

    def _removed(
        self, size: Float[Tensor, "out in"], norms: Mapping[str, Tensor], fraction: float, threshold: float
    ) -> Bool[Tensor, "out in"]:
        if self.variant == "magnitude-global":
            return size <= threshold
        if self.variant == "magnitude":
            return _extreme(size.reshape(1, -1), fraction, largest=False).view_as(size)
        used = {split: size * norm for split, norm in norms.items()}
        if self.variant == "wanda":
            return _extreme(used["retain"], fraction, largest=False)
        return _extreme(used["forget"], fraction, largest=True) & ~_extreme(used["retain"], fraction, largest=True)


def _extreme(scores: Float[Tensor, "rows n"], fraction: float, largest: bool) -> Bool[Tensor, "rows n"]:
    """The given part of each row: exactly that many, also where scores are equal (weights that come from few bits)."""
    found = scores.topk(round(fraction * scores.shape[1]), dim=1, largest=largest, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, found, True)


def _threshold(linear: Mapping[str, LinearWeight], fraction: float) -> float:
    """|w| below which the given part of all weights lies; found by halving, so that no second copy of them is held."""
    weights = [found.weight.detach().abs() for found in linear.values()]
    wanted = fraction * sum(weight.numel() for weight in weights)
    low, high = 0.0, max(float(weight.max()) for weight in weights)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = sum(int((weight <= middle).sum()) for weight in weights)
        low, high = (middle, high) if below < wanted else (low, middle)
    return high


def _feature_norms(
    model: nn.Module, linear: Mapping[str, LinearWeight], rows: Sequence[np.ndarray]
) -> dict[str, Float[Tensor, " in"]]:
    """‖x_j‖ of every input feature of every linear layer over all tokens. Rows go alone: padding would count."""
    squares = {name: torch.zeros(found.oriented(found.weight).shape[1]) for name, found in linear.items()}
    device = next(model.parameters()).device

    def counted(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[name] += args[0].detach().float().flatten(0, -2).square().sum(0).cpu()

        return hook

    handles = [found.module.register_forward_pre_hook(counted(name)) for name, found in linear.items()]
    try:
        with torch.inference_mode(), evaluating(model), supervised_head(model, torch.zeros(0, dtype=torch.int64)):
            for row in rows:
                ids = torch.from_numpy(row.astype(np.int64))[None].to(device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt().to(device) for name, total in squares.items()}
