"""Fill the generated tables in README.md and docs/ from the registries, draw its figures; --check says what is stale.

A table stands between `<!-- table:methods -->` and `<!-- /table -->`; what is between them is replaced. A figure's
numbers stand in docs/measured/figures/NAME.json, and docs/images/NAME.svg is drawn from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- table:([\w-]+) -->\n(.*?)<!-- /table -->", re.DOTALL)
OPENING = re.compile(r"<!-- table:")
#: What benchmarks/objective_cost.py writes.
COSTS = ROOT / "docs" / "measured" / "objective_cost.json"
#: Figures of the docs, as a report holds its own.
FIGURES = ROOT / "docs" / "measured" / "figures"
IMAGES = ROOT / "docs" / "images"
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")

#: kind → labels of `describe()` that become columns after the name; those that nothing has are left out
COLUMNS = {
    "methods": ("summary", "kind", "paper"),
    "merges": ("summary", "paper"),
    "attributions": ("summary", "score", "needs", "units", "paper"),
    "metrics": ("summary", "range", "needs", "suite", "direction", "paper"),
    "conventions": ("summary",),
    "attacks": ("summary", "kind", "budget", "needs", "paper"),
    "benchmarks": ("summary", "parts", "files", "convention", "paper"),
    "formats": ("summary", "columns", "example"),
    "studies": ("summary", "takes", "paper"),
    "presets": ("summary",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write tables and figures, or with --check compare them. Returns 1 if any is stale or broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    parser.add_argument("files", nargs="*", type=Path, help="default: README.md and docs/**/*.md")
    given = parser.parse_args(arguments)
    files = given.files or [
        path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()
    ]
    stale = []
    wanted = (
        {} if given.files else {IMAGES / f"{path.stem}.svg": drawn(path) for path in sorted(FIGURES.glob("*.json"))}
    )
    for path in files:
        try:
            wanted[path] = filled(path.read_text(encoding="utf-8"))
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
    for path, after in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != after:
            stale.append(path)
            if not given.check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'stale; make docs renews it' if given.check else 'renewed'}")
    return 1 if given.check and stale else 0


def filled(text: str) -> str:
    """`text` with every table made anew. Raises ValueError for an unknown or unclosed one."""
    if len(OPENING.findall(text)) != len(BLOCK.findall(text)):
        raise ValueError("a table is not closed; write <!-- /table --> on a line of its own")

    def replace(found: re.Match[str]) -> str:
        return f"<!-- table:{found[1]} -->\n{table(found[1])}<!-- /table -->"

    return BLOCK.sub(replace, text)


def drawn(path: Path) -> str:
    """A figure's picture, with colours of its own for light and dark pages."""
    from pydantic import TypeAdapter

    from expunge.report import build
    from expunge.report.drawing import draw
    from expunge.report.figure_data import AnyFigure

    figure: AnyFigure = TypeAdapter(AnyFigure).validate_json(path.read_bytes())
    templates = Path(build.__file__).parent / "templates"
    style = "".join((templates / name).read_text(encoding="utf-8") for name in ("style.css", "document.css"))
    opening, rest = str(draw(figure)).split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}\n'


def table(kind: str) -> str:
    """The Markdown table of a kind."""
    special: dict[str, Callable[[], str]] = {
        "commands": _commands,
        "objectives": _objectives,
        "parameters": _parameters,
        "attack-parameters": _attack_parameters,
        "attribution-parameters": _attribution_parameters,
        "merge-methods": _merge_methods,
        "merge-parameters": _merge_parameters,
        "tables": _tables,
        "choices": _choices,
    }
    if kind in special:
        return special[kind]()
    if kind not in COLUMNS:
        raise ValueError(f"there is no table '{kind}' (valid: {', '.join([*COLUMNS, *special])})")
    return _described(kind, COLUMNS[kind])


def _described(kind: str, columns: Sequence[str]) -> str:
    """Everything of a kind, one row each, with those of the columns that anything has."""
    from expunge.cli.list_ import described, singular

    entries = described(kind)
    if not entries:
        return f"There are no {kind} in this version.\n"
    labels = [label for label in columns if any(about.get(label) for about in entries.values())]
    rows = [[f"`{name}`", *(_cell(label, about) for label in labels)] for name, about in entries.items()]
    return markdown([singular(kind), *labels], rows)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(label: str, about: Mapping[str, str]) -> str:
    text = " ".join(str(about.get(label, "")).split())
    if label == "paper":
        return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text)
    if label in ("example", "loss", "score", "default", "parameters") and text:
        return f"`{text}`".replace("|", "\\|")
    return text.replace("|", "\\|").replace("<", "&lt;")


def _objectives() -> str:
    """Every objective, with the measured cost of its step, and what the cost was measured on."""
    from expunge.cli.list_ import described

    costs: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {"objectives": {}}
    labels = {
        "idea": "summary",
        "formula": "loss",
        "retain terms": "retain terms by default",
        "needs": "needs",
        "kind": "kind",
        "learning rates": "learning rates of its papers",
    }
    rows = [
        [
            f"`{name}`",
            *(_cell(label, about) for label in labels.values()),
            _cost(costs["objectives"].get(name)),
            _cell("paper", about),
        ]
        for name, about in described("methods").items()
    ]
    headers = ["objective", *labels, "cost", "paper"]
    if not costs["objectives"]:
        return markdown(headers, rows)
    measured = (
        f"Cost: {costs['time']} of a training step, as a multiple of {costs['against']}, without the one pass of the "
        f"start model before training ({costs['model']}, {costs['device']}, `{costs['command']}`; –: not measured).\n"
    )
    return f"{markdown(headers, rows)}\n{measured}"


def _cost(found: Mapping[str, Any] | None) -> str:
    """A ratio; objectives that train several times cost it for each of the trainings."""
    if found is None:
        return "–"
    trainings = f" × {found['trainings']} trainings" if found["trainings"] > 1 else ""
    return f"{found['ratio']:.1f}{trainings}"


def _parameters() -> str:
    """Every hyper-parameter of every objective."""
    from expunge.methods.base import OBJECTIVES

    return _settings("objective", OBJECTIVES.items())


def _attack_parameters() -> str:
    """Every setting of every attack."""
    from expunge.attacks.base import ATTACKS

    return _settings("attack", ATTACKS.items())


def _attribution_parameters() -> str:
    """Every setting of every attribution."""
    from expunge.localize.base import ATTRIBUTIONS

    return _settings("attribution", ATTRIBUTIONS.items())


def _merge_methods() -> str:
    """Every merge method with what it takes."""
    return _described("merges", ("summary", "models", "base", "weights", "density", "parameters", "paper"))


def _merge_parameters() -> str:
    """Every parameter of every merge method; methods that mean the same by it stand in one row."""
    from expunge.cli.list_ import described

    methods: dict[tuple[str, str], list[str]] = {}
    everyone = described("merges")
    for name, about in everyone.items():
        for label, text in about.items():
            kind, _, parameter = label.partition(" ")
            if kind == "parameter":
                methods.setdefault((parameter, text), []).append(name)
    rows = []
    for (parameter, text), names in sorted(methods.items()):
        head, _, meaning = text.partition(": ")
        values, _, default = head.rpartition(", default ")
        texts = {"values": values, "default": default, "meaning": meaning}
        whose = "all" if len(names) == len(everyone) else ", ".join(f"`{name}`" for name in names)
        rows.append([f"`{parameter}`", whose, *(_cell(label, texts) for label in texts)])
    return markdown(["parameter", "of", "values", "default", "meaning"], rows)


def _settings(kind: str, leaves: Iterable[tuple[str, Any]]) -> str:
    """The fields of leaves that are dataclasses of settings."""
    rows = []
    for name, cls in leaves:
        fields: Any = dataclasses.fields(cls)
        for item in fields:
            field = item.default
            published = (field.json_schema_extra or {}).get("published") or "–"
            default = "–" if field.default is None else str(field.default)
            texts = {"default": default, "published": published, "meaning": field.description}
            rows.append([f"`{name}`", f"`{item.name}`", *(_cell(label, texts) for label in texts)])
    return markdown([kind, "parameter", "default", "published", "meaning"], rows)


def _tables() -> str:
    """Every table that the passes make, the smallest suite with it, and the metrics that become possible with it."""
    from expunge.metrics.base import METRICS
    from expunge.scoring.tables import SUITES, TABLES

    order = sorted(TABLES, key=lambda name: SUITES.index(TABLES[name]))  # stable: as they are declared within a suite
    last = {name: max((need.table for need in entry.addresses), key=order.index) for name, entry in METRICS.items()}
    rows = []
    for table_name in order:
        possible = [f"`{name}`" for name in last if last[name] == table_name]
        rows.append([f"`{table_name}`", TABLES[table_name], ", ".join(possible)])
    return markdown(["table", "from suite", "metrics that it makes possible"], rows)


def _choices() -> str:
    """Conventions beside each other: every choice that they make, bold where it is not the default's."""
    from expunge.recipe.conventions import CONVENTIONS, EXPUNGE

    fields = [item.name for item in dataclasses.fields(EXPUNGE) if item.name not in ("name", "summary")]
    rows = []
    for name in fields:
        default = getattr(EXPUNGE, name)
        values = [getattr(convention, name) for convention in CONVENTIONS.values()]
        cells = [_choice(value) if value == default else f"**{_choice(value)}**" for value in values]
        rows.append([f"`{name}`", *cells])
    return markdown(["choice", *(f"`{name}`" for name in CONVENTIONS)], rows)


def _choice(value: Any) -> str:
    words = {True: "yes", False: "no", None: "–", (): "–"}
    if isinstance(value, bool) or value in (None, ()):
        return words[value]
    text = ", ".join(map(json.dumps, value)) if isinstance(value, tuple) else str(value)
    return text.replace("|", "\\|")


def _commands() -> str:
    from typer.main import get_command

    from expunge.cli.app import app

    rows = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None) or {"": command}
        for below, leaf in inner.items():
            first = (leaf.help or "").strip().partition("\n")[0]
            rows.append([f"`expunge {f'{name} {below}'.strip()}`", first])
    return markdown(["command", "what it does"], rows)


if __name__ == "__main__":
    sys.exit(main())
