"""MemFlex: where the forget rows pull hard, and elsewhere than the retain rows do (arXiv 2407.01920)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.encode import Encoded
from expunge.localize.base import Attribution, Saliency, attribution, setting
from expunge.localize.choose import unit_scores
from expunge.localize.evidence import Evidence
from expunge.localize.random_ import lay
from expunge.localize.readers import over
from expunge.localize.units import FLAT, Family
from expunge.models.forward import unwrap


@attribution(
    name="memflex",
    idea="units with large forget gradients that point elsewhere than the retain gradients",
    formula="mean|g_f| · (1 − cos(g_f, g_r)) per unit, on answers of which half is noise",
    paper="2407.01920",
    needs=("forget", "retain"),
)
class MemFlex(Attribution):
    """As the authors do, g is the mean gradient over copies of the rows in which random tokens stand in the answers.

    They keep each LoRA module with cos < 0.92 and mean|g_f| > 6e-4, however many there are. Here a density says how
    many units are chosen, so both numbers make a score; units that the rule would drop come after all that it keeps.
    Gradients are those of the weights, far smaller than those of LoRA factors, hence no least size by default. A
    single weight has no direction: it has the cosine of its matrix. The mean is over tokens, theirs over rows.
    """

    copies: int = setting(3, ge=1, description="copies of each row, with noise of their own", published="3")
    noise: float = setting(
        0.5, ge=0, le=1, description="draws of a token that is exchanged, per answer token", published="0.5"
    )
    cosine: float = setting(
        0.92, ge=-1, description="units come last from this cosine on", published="0.92 per LoRA module"
    )
    magnitude: float = setting(
        0.0, ge=0, description="units come last up to this mean |g_f|", published="6e-4 per LoRA module"
    )

    @torch.no_grad()
    def saliency(self, evidence: Evidence) -> Saliency:
        """The unit's score for all of its weights; the retain gradient waits outside the working memory."""
        retain = self._gradient(evidence, "retain", aside=True)
        forget = self._gradient(evidence, "forget")
        families = [_as_whole(family) for family in evidence.families]
        sizes = _means(families, forget, lambda f, _: f.abs(), forget)
        products = _means(families, forget, lambda f, r: f * r, retain)
        squares = [_means(families, own, lambda f, _: f.square(), own) for own in (forget, retain)]
        scores, dropped = [], []
        for place, family in enumerate(evidence.families):
            norms = (squares[0][place] * squares[1][place]).sqrt()
            cosine = torch.where(norms > 0, products[place] / norms, 0.0).clamp(-1, 1)
            dropped.append((cosine >= self.cosine) | (sizes[place] <= self.magnitude))
            own = sizes[place]
            if family.slabs[0].axis == FLAT:
                own = forget[family.slabs[0].parameter].abs_().flatten()
            scores.append(own.mul_((1 - cosine).to(own.device)))
        largest = max(float(own.max()) for own in scores)
        found: dict[str, Tensor] = {}
        for family, own, last in zip(evidence.families, scores, dropped, strict=True):
            own -= largest * last.to(own.device)
            for slab in family.slabs:
                lay(found, slab, own)
        return found

    def _gradient(self, evidence: Evidence, split: str, *, aside: bool = False) -> dict[str, Tensor]:
        rows = list(self._noisy(evidence, split))
        return over(evidence, split, rows).gradient(split, mean=True, aside=aside)

    def _noisy(self, evidence: Evidence, split: str) -> Iterator[Encoded]:
        """Copies of the rows in which some answer tokens, input and label alike, are others of the vocabulary."""
        generator = np.random.default_rng(evidence.seed)
        ordinary = _ordinary_tokens(evidence.model)
        for row in evidence.split(split):
            for _ in range(self.copies):
                # drawn with replacement: a token may be hit twice
                draws = int(row.answer_tokens * self.noise)
                places = row.prompt_tokens + generator.integers(0, max(1, row.answer_tokens), draws)
                ids = row.input_ids.copy()
                ids[places] = ordinary[generator.integers(0, len(ordinary), draws)]
                yield replace(row, input_ids=ids)


def _ordinary_tokens(model: nn.Module) -> np.ndarray:
    """The ids of the vocabulary but for those that begin, end or pad texts."""
    config: Any = unwrap(model).config.get_text_config()  # type: ignore[union-attr, operator]
    special: list[int] = []
    for own in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        special += own if isinstance(own, list) else [own] if own is not None else []
    return np.setdiff1d(np.arange(config.vocab_size), special)


def _as_whole(family: Family) -> Family:
    """A family of single weights as one unit, any other as it is."""
    (slab, *_) = family.slabs
    if slab.axis != FLAT:
        return family
    return replace(family, count=1, slabs=(replace(slab, axis=None, size=family.count),))


class _Lazy(Mapping[str, Tensor]):
    """Products of two gradients, made one parameter at a time when they are asked for."""

    def __init__(
        self, left: Mapping[str, Tensor], of: Callable[[Tensor, Tensor], Tensor], right: Mapping[str, Tensor]
    ) -> None:
        self.left, self.of, self.right = left, of, right

    def __getitem__(self, name: str) -> Tensor:
        return self.of(self.left[name], self.right[name].to(self.left[name].device))

    def __iter__(self) -> Iterator[str]:
        return iter(self.left)

    def __len__(self) -> int:
        return len(self.left)


def _means(
    families: Sequence[Family],
    left: Mapping[str, Tensor],
    of: Callable[[Tensor, Tensor], Tensor],
    right: Mapping[str, Tensor],
) -> list[Tensor]:
    """Per family the mean of of(left, right) over each unit's weights, float32 [units]."""
    found = unit_scores(families, _Lazy(left, of, right), "mean")
    return [own for own in found if own is not None]
