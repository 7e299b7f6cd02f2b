"""From an attribution to a mask: checked beforehand, scored, chosen; and the scores of units on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expunge.errors import UserError
from expunge.localize.base import Attribution, AttributionDeclaration
from expunge.localize.choose import choose, mask_of, unit_scores
from expunge.localize.evidence import Evidence
from expunge.localize.masks import Mask
from expunge.localize.quality import touched
from expunge.localize.units import Family
from expunge.recipe import Strata
from expunge.runs.atomic import replacing

SCHEMA = "expunge.unit_scores/1"

_MISSING = {
    "forget": ("the forget rows", "give them: --forget ROWS"),
    "retain": ("the retain rows", "give them: --retain ROWS"),
    "region": ("a region that is known", "give a mask of it: --against mask.safetensors"),
}


@dataclass(frozen=True)
class Located:
    """A mask, and what it was chosen from: the units, and the score of each, family by family."""

    mask: Mask
    families: Sequence[Family]
    scores: Sequence[Tensor | None]  # float32 [units]; None: nothing in the family was scored


def check_fit(about: AttributionDeclaration, unit: str, given: Collection[str]) -> None:
    """Raises UserError if an attribution can't tell these units apart, or lacks one of the things that it reads.

    `given` holds what there is: forget, retain, region. No model is needed: call it before one is loaded.
    """
    if about.units and unit not in about.units:
        raise UserError(
            f"{about.name} can't tell units of the kind {unit} apart",
            f"units of {about.name}: {', '.join(about.units)}",
        )
    for need in about.needs:
        if need not in given:
            what, hint = _MISSING.get(need, (f"the {need} rows", f"give them: --{need} ROWS"))
            raise UserError(f"{about.name} reads {what}, and there are none", hint)


def locate(
    attribution: Attribution, evidence: Evidence, density: float, strata: Strata, about: Mapping[str, Any] | None = None
) -> Located:
    """The mask of the units with the largest scores. `about` is added to what the mask says of itself.

    Raises UserError as `check_fit` and `choose` do.
    """
    declared = attribution.about
    splits = [name for name, rows in evidence.rows.items() if rows]
    check_fit(declared, evidence.unit, [*splits, *(["region"] if evidence.region is not None else [])])
    # the scores of weights are given up as soon as those of units are there
    scores = unit_scores(evidence.families, attribution.saliency(evidence), declared.pool)
    chosen = choose(evidence.families, scores, density, strata)
    if declared.side and evidence.region is not None:
        _check_side(declared, evidence.families, chosen, touched(evidence.region, evidence.families))
    settings: Any = attribution
    origin = {
        "by": declared.name,
        "parameters": dataclasses.asdict(settings),
        "unit": evidence.unit,
        "density": density,
        "strata": strata,
        "seed": evidence.seed,
        "units": sum(family.count for family in evidence.families),
        "chosen": sum(int(units.sum()) for units in chosen),
        "rows": {name: len(evidence.rows[name]) for name in sorted(evidence.used)},
    }
    return Located(mask_of(evidence.families, chosen, {**origin, **(about or {})}), evidence.families, scores)


def _check_side(
    about: AttributionDeclaration, families: Sequence[Family], chosen: Sequence[Tensor], region: Sequence[Tensor]
) -> None:
    """Raises UserError if so many units are asked for that a choice left its side of the known region."""
    inside = about.side == "inside"
    strays = sum(int((own.cpu() & (hit != inside)).sum()) for own, hit in zip(chosen, region, strict=True))
    if strays:
        room = sum(int((hit == inside).sum()) for hit in region)
        units = sum(family.count for family in families)
        raise UserError(
            f"{about.name} chooses {about.side} the known region, and of {sum(int(own.sum()) for own in chosen)} units "
            f"{strays} had no place there: {room} of {units} are {about.side}",
            f"ask for fewer: --density {floor(1000 * room / units) / 1000:g}, with --strata model",
        )


def scores_file(mask: Path) -> Path:
    """Where the scores of a mask's units lie: beside it, mask.safetensors → mask.scores.safetensors."""
    return mask.with_name(f"{mask.name.removesuffix('.safetensors')}.scores.safetensors")


def write_scores(file: Path, families: Sequence[Family], scores: Sequence[Tensor | None]) -> None:
    """Family name → scores of its units, float32, in one safetensors file, whole or not at all.

    With single weights as units it is as large as the model in float32.
    """
    named = zip(families, scores, strict=True)
    kept = {family.name: values.detach().float().contiguous() for family, values in named if values is not None}
    with replacing(file) as work:
        save_file(kept, work, {"schema": SCHEMA})


def read_scores(file: str | Path) -> dict[str, Tensor]:
    """Family name → scores of its units, as `write_scores` wrote them. Raises UserError for any other file."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"no scores at {file}", "make them with a mask: expunge localize MODEL --forget ROWS")
    try:
        with safe_open(path, "pt") as opened:
            if (opened.metadata() or {}).get("schema") != SCHEMA:
                raise UserError(f"{file} holds no scores of units", "they lie beside a mask: mask.scores.safetensors")
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}", "make the mask again: expunge localize") from None
