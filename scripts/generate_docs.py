"""Fill the generated tables in README.md and docs/ from the registries; --check says which are stale.

A table stands between `<!-- table:methods -->` and `<!-- /table -->`; what is between them is replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- table:([\w-]+) -->\n(.*?)<!-- /table -->", re.DOTALL)
OPENING = re.compile(r"<!-- table:")
#: What benchmarks/objective_cost.py writes.
COSTS = ROOT / "docs" / "measured" / "objective_cost.json"
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")

#: kind → labels of `describe()` that become columns after the name; those that nothing has are left out
COLUMNS = {
    "methods": ("summary", "kind", "paper"),
    "merges": ("summary", "paper"),
    "metrics": ("summary", "range", "needs", "direction", "paper"),
    "attacks": ("summary", "paper"),
    "benchmarks": ("summary", "paper"),
    "formats": ("summary", "columns", "example"),
    "studies": ("summary", "takes", "paper"),
    "presets": ("summary",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables, or with --check compare them. Returns 1 if any is stale or broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    parser.add_argument("files", nargs="*", type=Path, help="default: README.md and docs/**/*.md")
    given = parser.parse_args(arguments)
    files = given.files or [
        path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()
    ]
    stale = []
    for path in files:
        before = path.read_text(encoding="utf-8")
        try:
            after = filled(before)
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        if after != before:
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


def table(kind: str) -> str:
    """The Markdown table of a kind."""
    special: dict[str, Callable[[], str]] = {
        "commands": _commands,
        "objectives": _objectives,
        "parameters": _parameters,
    }
    if kind in special:
        return special[kind]()
    if kind not in COLUMNS:
        raise ValueError(f"there is no table '{kind}' (valid: {', '.join([*COLUMNS, *special])})")
    from expunge.cli.list_ import described, singular

    entries = described(kind)
    if not entries:
        return f"There are no {kind} in this version.\n"
    labels = [label for label in COLUMNS[kind] if any(about.get(label) for about in entries.values())]
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
    if label in ("example", "loss", "default") and text:
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

    rows = []
    for name, cls in OBJECTIVES.items():
        fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
        for item in fields:
            field = item.default
            published = (field.json_schema_extra or {}).get("published") or "–"
            texts = {"default": str(field.default), "published": published, "meaning": field.description}
            rows.append([f"`{name}`", f"`{item.name}`", *(_cell(label, texts) for label in texts)])
    return markdown(["objective", "parameter", "default", "published", "meaning"], rows)


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
