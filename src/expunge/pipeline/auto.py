"""`method: auto`: the settings of an unlearn entry that its user left open, chosen from what the recipe has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from expunge.models.aliases import UNTRAINED
from expunge.numbers import rate_for_size
from expunge.recipe import STRANGERS, Recipe, UnlearnConfig

NAME = "auto"
#: Optimizer steps; passes over a large forget set, even if that is more; passes that are enough for a small one, if
#: they make so many steps.
STEPS, PASSES, ENOUGH_PASSES, LEAST_STEPS = 150, 3, 20, 72
BATCH, RETAIN_BATCH = 8, 14
#: Neighbours of a forget row, at least this many of all rows together.
EACH, NEIGHBOURS = 4, 120
#: What must stay of the strength on held-out retain rows, and the retain rows from which some are held out.
KEEP, ENOUGH = 0.95, 40


#: Rates, and the size of the model that they were found on; larger models get smaller ones, smaller larger.
RATE, ADAPTER_RATE, SIZE = 2e-4, 3e-4, 135e6
#: How far updates keep out of what retain rows use.
NULL_SPACE = 3.0


@dataclass(frozen=True)
class Given:
    """What there is to choose by."""

    forget_rows: int
    retain_rows: int = 0
    parameters: int = 0  # of the model; 0: not known


def decided(recipe: Recipe, given: Given) -> tuple[Recipe, list[str]]:
    """The recipe with every `auto` entry written out, and a sentence on each; what an entry says itself stays."""
    entries, reasons = [], []
    for entry in recipe.unlearn:
        if entry.method == NAME:
            found, why = _entry(entry, recipe, given)
            entry = found
            reasons.append(f"{entry.name}: auto is {why}")
        entries.append(entry)
    return (recipe.model_copy(update={"unlearn": entries}) if reasons else recipe), reasons


def _entry(entry: UnlearnConfig, recipe: Recipe, given: Given) -> tuple[UnlearnConfig, str]:
    lacking, forget_rows = _lacking(recipe), given.forget_rows
    rate = RATE if entry.lora is None else ADAPTER_RATE
    batch = min(BATCH, max(forget_rows, 1))
    per_step = batch / max(forget_rows, 1)
    most = max(ENOUGH_PASSES, ceil(LEAST_STEPS * per_step))
    epochs = max(PASSES, min(most, ceil(STEPS * per_step)))
    each = max(1, min(EACH, ceil(NEIGHBOURS / max(forget_rows, 1))))
    chosen: dict[str, Any] = {
        "retain": {"nll": 0.0, "kl": 2.0},
        "retain_batch": RETAIN_BATCH,
        "neighbours": each,
        "train": {
            "epochs": epochs,
            "batch_size": batch,
            "lr": rate_for_size(rate, SIZE, given.parameters or SIZE),
            "schedule": "linear",
            "warmup": 0.07,
        },
    }
    if entry.lora is None and recipe.localize is None:
        chosen["null_space"] = NULL_SPACE
    if given.retain_rows >= ENOUGH:
        chosen["keep"] = KEEP
    # asked about strangers, the target gives their answers no more than a first surprise: that chooses too few tokens
    chosen["tokens"] = {"by": "knowledge", "model": lacking} if lacking else {"by": "all"}
    said = entry.model_dump(exclude_unset=True)
    tokens = _over(chosen["tokens"], said.get("tokens", {}))
    if tokens["by"] == "knowledge" and tokens.get("model") != STRANGERS and tokens.get("fall") is None:
        chosen["tokens"]["prompts"] = True
    made = UnlearnConfig.model_validate(_over(chosen, said) | {"method": "erase"})
    return made, _sentence(made)


def _lacking(recipe: Recipe) -> str | None:
    """What lacks the knowledge, as token selection names it; None where nothing does."""
    if recipe.prepare is not None and recipe.model.id not in UNTRAINED:
        return "original"
    return "reference" if recipe.reference is not None else None


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    made = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = _over(made[key], value) if both else value
    return made


def _sentence(entry: UnlearnConfig) -> str:
    if entry.tokens.by == "knowledge":
        without = "the target when it is asked about strangers"
        without = without if entry.tokens.model == STRANGERS else f"the model '{entry.tokens.model}'"
        too = " (of prompts too, where they were learnt, and then without strangers)" if entry.tokens.prompts else ""
        tokens = f"on the tokens that surprise {without}{too}"
    else:
        tokens = f"on {entry.tokens.by} tokens"
    guarded = "" if entry.null_space is None else "; updates keep out of the directions that these rows use"
    held = f"; scaled down until held-out retain rows keep {entry.keep:.0%} of their strength" if entry.keep else ""
    beside = f"{entry.neighbours} strangers beside each forget row" if entry.neighbours else "no strangers"
    return (
        f"erase {tokens}; retain rows and {beside} answered as before (KL × {entry.retain.kl:g}){guarded}; "
        f"learning rate {entry.train.lr:g}, {entry.train.epochs:g} epochs of {entry.train.batch_size} + "
        f"{entry.retain_batch} rows{held}"
    )
