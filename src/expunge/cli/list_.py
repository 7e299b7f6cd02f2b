"""`expunge list`: what this installation knows, read from the registries."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from expunge.cli.common import Json, console, print_json, say, table
from expunge.errors import UserError, did_you_mean

#: kind → module and name of its registry; presets are files and have none
REGISTRIES = {
    "methods": ("expunge.methods.base", "OBJECTIVES"),
    "merges": ("expunge.merging.registry", "MERGES"),
    "attributions": ("expunge.localize.base", "ATTRIBUTIONS"),
    "metrics": ("expunge.metrics.base", "METRICS"),
    "conventions": ("expunge.recipe.conventions", "CONVENTIONS"),
    "attacks": ("expunge.attacks.base", "ATTACKS"),
    "benchmarks": ("expunge.data.registry", "BENCHMARKS"),
    "formats": ("expunge.data.registry", "FORMATS"),
    "studies": ("expunge.studies.base", "STUDIES"),
}
KINDS = (*REGISTRIES, "presets")


def list_(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help=f"{', '.join(KINDS)}", show_default=False)] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="one of them, in full", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """List what there is: methods, merges, metrics, formats …; with a NAME, all about one."""
    if kind is None:
        _print_kinds(json_)
        return
    entries = described(kind)
    if name is None:
        _print_all(kind, entries, json_)
        return
    if name not in entries:
        raise UserError(f"unknown {singular(kind)} '{name}'", did_you_mean(name, entries))
    if json_:
        print_json({"name": name, **entries[name]})
        return
    print(name)
    for label, text in entries[name].items():
        print(f"  {label}: {text}" if "\n" not in text else f"  {label}:\n{_indented(text)}")


def singular(kind: str) -> str:
    """`methods` is method, `studies` is study."""
    return kind.removesuffix("ies") + "y" if kind.endswith("ies") else kind.removesuffix("s")


def described(kind: str) -> dict[str, dict[str, str]]:
    """Name → (label → text) of everything of a kind. Raises UserError for an unknown kind."""
    if kind not in KINDS:
        raise UserError(f"there is no list of '{kind}'", did_you_mean(kind, KINDS))
    if kind == "presets":
        return _presets()
    from importlib import import_module

    module, name = REGISTRIES[kind]
    registry = getattr(import_module(module), name)
    return {
        entry: leaf.describe() if hasattr(leaf, "describe") else _declared(leaf) for entry, leaf in registry.items()
    }


def _declared(leaf: Any) -> dict[str, str]:
    """The same of a leaf that declares itself in plain fields (formats, benchmarks)."""
    about = {"summary": str(leaf.description)}
    for label in ("columns", "example", "paper"):
        value = getattr(leaf, label, None)
        if value:
            about[label] = value if isinstance(value, str) else _plain_text(label, value)
    return about


def _plain_text(label: str, value: Any) -> str:
    if label == "columns":
        return ", ".join(" or ".join(names) for names in value)
    import json

    return json.dumps(dict(value), ensure_ascii=False)


def _presets() -> dict[str, dict[str, str]]:
    """The recipes that come with the package; their first comment line is the summary."""
    from importlib import resources

    from expunge.recipe import preset_names

    folder = resources.files("expunge.recipe") / "presets"
    found = {}
    for name in preset_names():
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        first = text.partition("\n")[0]
        found[name] = {"summary": first.removeprefix("#").strip() if first.startswith("#") else "", "recipe": text}
    return found


def _print_kinds(json_: bool) -> None:
    found = {kind: list(described(kind)) for kind in KINDS}
    if json_:
        print_json(found)
        return
    console().print(
        table(["kind", "names"], [[kind, ", ".join(names) or "none in this version"] for kind, names in found.items()])
    )
    say("more: expunge list KIND [NAME]")


def _print_all(kind: str, entries: dict[str, dict[str, str]], json_: bool) -> None:
    if json_:
        print_json([{"name": name, **about} for name, about in entries.items()])
        return
    if not entries:
        say(f"no {kind} in this version")
        return
    optional = [label for label in ("parameters", "paper") if any(about.get(label) for about in entries.values())]
    headers = ["name", "summary", *optional]
    rows: list[list[Any]] = [
        [name, *(about.get(label, "") for label in headers[1:])] for name, about in entries.items()
    ]
    console().print(table(headers, rows))
    say(f"all about one: expunge list {kind} NAME")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
