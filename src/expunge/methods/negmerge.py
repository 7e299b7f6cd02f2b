"""NegMerge: subtract what several fine-tunings agree on (arXiv 2410.05583)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.base import WeightObjective, hyper, objective
from expunge.methods.task_negation import difference, negated
from expunge.models.consensus import unanimous_mean
from expunge.recipe import TrainConfig

Factors = tuple[Annotated[float, Field(gt=0)], ...]


@objective(
    name="negmerge",
    idea="fine-tune several ways, subtract only changes of one shared sign",
    formula="θ − α · mean_k(θ_k − θ) where all signs agree, else θ; θ_k = argmin NLL(forget)",
    paper="2410.05583",
    kind="suppresses",
)
class NegMerge(WeightObjective):
    """Instead of choosing one fine-tuning, keep what does not depend on its hyper-parameters.

    One fine-tuning per pair of factors. Published for image classifiers only. Retain terms would be subtracted too.
    """

    alpha: float = hyper(5.0, gt=0, description="how much of the shared change is subtracted")
    rates: Factors = hyper(
        (0.5, 1.0, 2.0), description="learning rates, as factors of train.lr", published="10 to 30 fine-tunings"
    )
    epochs: Factors = hyper((1.0,), description="lengths, as factors of train.epochs")

    def check(self, model: nn.Module) -> None:
        """Raise UserError unless there are two fine-tunings to compare."""
        if len({*self.rates}) * len({*self.epochs}) < 2:
            raise UserError(
                "negmerge compares the signs of several fine-tunings, and these factors ask for one",
                "--set unlearn.0.parameters.rates=[0.5,1,2], or choose method task_negation",
            )

    def variations(self, train: TrainConfig) -> list[TrainConfig]:
        """One training per pair of factors; a limit on steps is scaled like the epochs."""
        made = []
        for epochs in dict.fromkeys(self.epochs):
            limit = None if train.max_steps is None else max(1, round(train.max_steps * epochs))
            for rate in dict.fromkeys(self.rates):
                update = {"lr": train.lr * rate, "epochs": train.epochs * epochs, "max_steps": limit}
                made.append(train.model_copy(update=update))
        return made

    def combine(self, start: Tensor, trained: Sequence[Tensor]) -> Tensor:
        """θ − α · mean of the changes at elements where all have one sign; the others stay."""
        agreed = unanimous_mean(difference(start, tensor) for tensor in trained)
        return negated(start, agreed, self.alpha)
