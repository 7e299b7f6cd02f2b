"""`expunge merge`: several models that share a base become one, as you say or as a search finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import (
    Benchmark,
    DataFolder,
    Forget,
    Holdout,
    Json,
    Reference,
    Retain,
    TrustRemoteCode,
    console,
    listed,
    number,
    only_stderr,
    print_json,
    say,
    table,
)
from expunge.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.report.search_record import Search

_SEARCH, _ROWS = "Search", "Rows of the search"
#: Merges of a search that are printed.
_SHOWN = 6

Models = Annotated[list[str], typer.Argument(help="checkpoint folders, adapter folders, hub ids or aliases")]
Output = Annotated[Path, typer.Option("--output", "-o", help="folder of the merged checkpoint")]
Base = Annotated[str | None, typer.Option("--base", help="model that the others were trained from")]
Method = Annotated[
    str | None, typer.Option("--method", help="ties when absent; see: expunge list merges", show_default=False)
]
Density = Annotated[
    str | None,
    typer.Option(
        "--density", help="part of each difference that is kept: 0.8 (when absent), 0.8,0.6, or {mlp: 0.5, default: 1}"
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="one per model, e.g. 1,-0.5 or [1, {mlp: 0.5, default: 1}]; 1 each when absent"),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--set", help="a parameter of the method, e.g. scale=0.9; in a search also evaluate.* and data.*"),
]
Rank = Annotated[int | None, typer.Option("--rank", help="write a LoRA adapter of this rank instead", min=1)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or auto: where tensors are merged")]


def _option(name: str, words: str, panel: str = _SEARCH, **more: Any) -> Any:
    return typer.Option(name, help=words, rich_help_panel=panel, show_default=False, **more)


def merge(
    models: Models,
    output: Output,
    base: Base = None,
    method: Method = None,
    density: Density = None,
    weights: Weights = None,
    set_: Parameters = None,
    device: Device = "auto",
    rank: Rank = None,
    search: Annotated[bool, _option("--search", "choose weights, density, scale and method on rows")] = False,
    line: Annotated[bool | None, _option("--line/--no-line", "only the line between two models, by bisection")] = None,
    aim: Annotated[list[str] | None, _option("--aim", "SPLIT:METRIC=VALUE, e.g. forget:mia_loss=0.5")] = None,
    keep: Annotated[list[str] | None, _option("--keep", "SPLIT:METRIC=PART of the base's")] = None,
    methods: Annotated[str | None, _option("--methods", "among which one is chosen: ties,linear")] = None,
    trials: Annotated[int | None, _option("--trials", "merges that are tried (40)", min=1)] = None,
    minutes: Annotated[float | None, _option("--minutes", "no trial begins later")] = None,
    range_: Annotated[list[str] | None, _option("--range", "density=LOW:HIGH or scale=LOW:HIGH")] = None,
    against: Annotated[str | None, _option("--against", "split that stands for the holdout rows in AUCs")] = None,
    limit: Annotated[int | None, _option("--limit", "rows of each split", min=1)] = None,
    memory: Annotated[float | None, _option("--memory", "GB to hold differences in (2)")] = None,
    seed: Annotated[int | None, _option("--seed", "of the search (0)", min=0)] = None,
    forget: Forget = None,
    retain: Retain = None,
    holdout: Holdout = None,
    benchmark: Benchmark = None,
    folder: DataFolder = None,
    template: Annotated[str | None, _option("--template", "auto, chat, raw, or text", _ROWS)] = None,
    reference: Reference = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Merge checkpoints or LoRA adapters into one checkpoint; with --search or --line, find out how on rows."""
    ranges = _ranges(range_ or [])
    asked = {
        "aims": aim, "keep": keep, "methods": listed(methods), "trials": trials, "minutes": minutes,
        "holdout": against, "limit": limit, "memory": memory, "seed": seed, **ranges,
    }  # fmt: skip
    rows = {"forget": forget, "retain": retain, "holdout": holdout, "benchmark": benchmark, "folder": folder}
    given = {**rows, "template": template}
    parts = {
        "base": base,
        "method": method,
        "weights": None if weights is None else _for_each(_numbers(weights, "--weights"), len(models)),
        "density": None if density is None else _one_or_many(_numbers(density, "--density")),
        "options": {"device": device, "rank": rank},
    }
    for name, said in (("density", density), ("scale", _said_scale(set_ or []))):
        if said is not None and name in ranges:
            raise UserError(f"--range {name} has nothing to choose: {name} is given", "leave out one of the two")
    searched = _search(search, line, method, {name: value for name, value in asked.items() if value is not None})
    if searched is None:
        _refuse_rows([*_options(asked), *({**given, "reference": reference}).items()])
        _plain(models, output, parts, set_ or [], json_)
        return
    flags = ["model.trust_remote_code=true"] if trust_remote_code else []
    own = {name: value for name, value in given.items() if value is not None}
    _searched(models, output, {**parts, "reference": reference, **own}, searched, [*flags, *(set_ or [])], json_)


def _plain(models: list[str], output: Path, parts: Mapping[str, Any], sets: list[str], json_: bool) -> None:
    """Merge as it is said, and say what came of it."""
    from expunge import api
    from expunge.recipe import parse_overrides

    with only_stderr(json_), _bar() as progress:
        options = {**parts["options"], "progress": progress}
        given: dict[str, Any] = {**parts, "options": options}
        result = api.merge(models, output=output, parameters=parse_overrides(sets), **given)
    statistics = result.statistics
    if json_:
        print_json(result)
        return
    what = f"{result.tensors} tensors" if result.rank is None else f"an adapter of rank {result.rank}"
    before = ", in place of the merge that was there" if result.replaced else ""
    typer.echo(f"wrote {result.path}: {what} in {result.seconds:.1f} s{before}")
    if result.relative_error is not None:
        typer.echo(f"  part of the difference that this rank loses: {result.relative_error:.2%}")
    for model, norm in zip(models, statistics["delta_norms"], strict=True):
        typer.echo(f"  norm of the difference {norm:10.4g}  {model}")
    typer.echo(f"  norm of the difference {statistics['merged_norm']:10.4g}  merged")
    if statistics["cosine_to_mean"] is not None:
        typer.echo(f"  cosine of the merged difference to the mean of all: {statistics['cosine_to_mean']:.3f}")
    if statistics["sign_conflict"] is not None and len(models) > 1:
        typer.echo(f"  changed weights that the models pull in opposite directions: {statistics['sign_conflict']:.1%}")


def _searched(
    models: list[str],
    output: Path,
    given: Mapping[str, Any],
    search: Mapping[str, Any],
    sets: list[str],
    json_: bool,
) -> None:
    """Search, and say what was found."""
    from expunge import api
    from expunge.recipe import parse_overrides
    from expunge.report.search_record import read_search

    of_recipe = [item for item in sets if "." in item.partition("=")[0]]
    parameters = parse_overrides([item for item in sets if item not in of_recipe])
    with only_stderr(json_):
        made = api.merge(models, output=output, search=search, parameters=parameters, overrides=of_recipe, **given)
    found = read_search(made.path)
    if json_:
        print_json(found.to_json())
        return
    console().print(_best(found))
    print(found.answer)
    if not found.best.met:
        say("warning: what was written keeps less than was asked for")
    say(f"wrote {made.path}; page: {made.path / 'search.html'}; to go on: the same command with more --trials")


def _best(found: Search) -> Table:
    """The best merges with what they measured, and the models themselves beside them."""
    from expunge.report.search_page import best_first, setting_words

    order = best_first(found)
    others = [place for place, one in enumerate(found.tried) if one.kind in ("input", "target", "reference")]
    places = [*order[:_SHOWN], *(place for place in others if place not in order[:_SHOWN])]
    names = list(dict.fromkeys(name for one in found.tried for name in one.values))
    kept = [f"kept: {name}" for name in found.least]
    rows = []
    for place in places:
        one = found.tried[place]
        values = [number(one.values[name].value) if name in one.values else "–" for name in names]
        parts = [f"{one.kept[name]:.1%}" if name in one.kept else "–" for name in found.least]
        head = f"{'→ ' if place == found.chosen else ''}{setting_words(one, found.models)}"
        rows.append([head, number(one.distance), *values, *parts])
    return table(["merge", "distance ↓", *names, *kept], rows, right=["distance ↓", *names, *kept])


def _search(search: bool, line: bool | None, method: str | None, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of `merge.search`; None where nothing is to be searched. Raises UserError for what contradicts."""
    if not search and not line:
        return None
    if search:
        return {**asked, **({} if line is None else {"line": line})}
    for name, _ in _options(asked):
        if name in ("trials", "methods", "range"):
            raise UserError(f"--{name} is for a search, and --line alone makes none", "add --search")
    if method not in (None, "linear"):
        raise UserError(f"the line is linear, not {method}", "leave out --method, or add --search")
    return {**asked, "trials": 0}


def _options(asked: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The fields of `merge.search` under the names of their options."""
    names = {"aims": "aim", "holdout": "against", "density": "range", "scale": "range"}
    return [(names.get(name, name), value) for name, value in asked.items()]


def _refuse_rows(given: list[tuple[str, Any]]) -> None:
    """Raises UserError for an option that a merge without a search would silently ignore."""
    for name, value in given:
        if value is not None:
            option = "data-dir" if name == "folder" else name
            raise UserError(f"--{option} is for a search", "add --search, or --line for two models")


def _said_scale(sets: list[str]) -> str | None:
    return next((item for item in sets if item.partition("=")[0] in ("scale", "lambda")), None)


def _ranges(items: list[str]) -> dict[str, tuple[float, float]]:
    found = {}
    for item in items:
        name, _, ends = item.partition("=")
        low, _, high = ends.partition(":")
        try:
            if name not in ("density", "scale"):
                raise ValueError(name)
            found[name] = (float(low), float(high))
            if name == "density" and not 0 < found[name][0] < found[name][1] <= 1:
                raise UserError(f"--range {item}: densities are above 0, at most 1", "e.g. --range density=0.2:0.9")
        except ValueError:
            raise UserError(f"--range {item} is not of the form NAME=LOW:HIGH", "e.g. --range scale=0.5:2") from None
    return found


class _bar:
    """Context manager: a progress bar on stderr, as the callback that `merge_models` wants."""

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("merging"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = self._progress.add_task("merging", total=None)
        self._progress.start()

        def advance(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        return advance

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()


def _numbers(text: str, option: str) -> list[Any]:
    """Numbers, lists and maps of one model each, as YAML: `1,-0.5` or `[1, {mlp: 0.5, default: 1}]`."""
    from expunge.recipe import parse_overrides

    found = parse_overrides([f"values=[{text}]"])["values"]
    found = found[0] if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list) else found
    try:
        return [_number(value) for value in found]
    except (TypeError, ValueError):
        raise UserError(f"{option} {text} is not a list of numbers", f"for instance: {option} 1,0.5") from None


def _number(value: Any) -> Any:
    """A number, or numbers over layers or by pattern, as floats. Raises ValueError for anything else."""
    if isinstance(value, Mapping) and value:
        return {str(pattern): _number(inner) for pattern, inner in value.items()}
    if isinstance(value, list) and value:
        return [_number(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return float(value)


def _for_each(values: list[Any], models: int) -> list[Any]:
    """One map alone is meant for every model."""
    return values * models if len(values) == 1 and isinstance(values[0], Mapping) else values


def _one_or_many(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
