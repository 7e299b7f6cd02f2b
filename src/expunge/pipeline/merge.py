"""`expunge merge`: as it is said, or as a search finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.merging.registry import MERGES
from expunge.merging.run import MergeResult, merge_models
from expunge.pipeline.merge_search_run import Question, search_merge
from expunge.pipeline.progress import Reporter
from expunge.recipe import Recipe, load_recipe

#: Part of each difference that is kept when nothing is said, as in the published unlearning merge.
DENSITY = 0.8


@dataclass(frozen=True)
class Said:
    """What a user says of a merge; None and absent: the default, or what a search chooses."""

    base: str | None = None
    method: str | None = None
    weights: Sequence[Any] | None = None
    density: Any = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # further keywords of merge_models


def merge(
    models: Sequence[str],
    output: Path,
    said: Said,
    search: Mapping[str, Any] | None,
    reference: str | None,
    rows: Mapping[str, Any],
    overrides: Sequence[str],
    reporter: Reporter,
) -> MergeResult:
    """Merge into `output`. Raises UserError for what does not fit; then nothing is written."""
    if search is not None:
        recipe = _recipe(models, said, search, reference, rows, overrides)
        assert recipe.merge is not None
        flags = {"trust_remote_code": recipe.model.trust_remote_code, "allow_pickle": recipe.model.allow_pickle}
        beside = None if recipe.reference is None else recipe.reference.model_copy(update=flags)
        question = Question(
            models, said.base, beside, recipe.merge, recipe.model, recipe.data, recipe.evaluate, recipe.seed,
            said.options,
        )  # fmt: skip
        return search_merge(question, output, reporter)[1]
    if rows or reference is not None or overrides:
        raise UserError("rows, a reference and settings of a recipe are for a search", "add --search")
    method = said.method or "ties"
    return merge_models(
        list(models),
        output,
        base=said.base,
        method=method,
        weights=said.weights,
        density=density_of(method, said.density),
        parameters=said.parameters,
        **said.options,
    )


def density_of(method: str, given: Any) -> Any:
    """The density of a merge: as given, else the default; None for methods that don't trim. Raises UserError."""
    if MERGES.get(method).trims:
        return DENSITY if given is None else given
    if given is not None:
        trimming = ", ".join(name for name, entry in MERGES.items() if entry.trims)
        raise UserError(
            f"{method} has no use for a density: it keeps all of every difference",
            f"leave it out, or choose a method that trims: {trimming}",
        )
    return None


def _recipe(
    models: Sequence[str],
    said: Said,
    search: Mapping[str, Any],
    reference: str | None,
    rows: Mapping[str, Any],
    overrides: Sequence[str],
) -> Recipe:
    """A recipe whose `merge.search` chooses what is not given. Raises UserError that lists all problems."""
    scale = said.parameters.get("scale", said.parameters.get("lambda"))
    given = {"weights": said.weights, "density": said.density, "scale": scale}
    over = [name for name, value in given.items() if value is None]
    methods = {} if said.method is None else {"methods": [said.method]}
    merging: dict[str, Any] = {"parameters": dict(said.parameters), "search": {"over": over, **methods, **search}}
    known = {"method": said.method, "weights": said.weights, "density": said.density}
    merging |= {name: value for name, value in known.items() if value is not None}
    inputs = [{"name": f"model-{number}"} for number in range(1, len(models) + 1)]
    first = said.base or next(iter(models), "")
    tree = {"name": "merge", "model": first, "data": dict(rows), "unlearn": inputs, "reference": reference}
    return load_recipe({**tree, "merge": merging}, overrides=overrides)
