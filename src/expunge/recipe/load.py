"""Preset ← user's YAML ← `--set a.b=c` → one frozen Recipe, its YAML and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from expunge.errors import UserError, did_you_mean
from expunge.recipe.model import Recipe


def load_recipe(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Recipe:
    """A Recipe: preset ← YAML file or mapping ← overrides. Raises one UserError that lists every problem."""
    merged: dict[str, Any] = {}
    if preset is not None:
        merged = _read_preset(preset)
    where = "recipe"
    if isinstance(source, Mapping):
        merged = _merge(merged, dict(source))
    elif source is not None:
        where = str(source)
        user = _read_yaml(Path(source))
        parent = user.pop("preset", None)
        if parent is not None:
            merged = _merge(merged, _read_preset(str(parent)))
        merged = _resolve_paths(_merge(merged, user), Path(source).parent)
    changes = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    for key, value in changes.items():
        merged = _set(merged, key, value)
    return _validate(merged, where)


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """`["train.lr=1e-5"]` as a mapping; values are YAML, and 1e-5 is a number."""
    parsed: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise UserError(
                f"--set '{item}' is not of the form a.b=value", "for instance: --set unlearn.0.train.lr=1e-5"
            )
        parsed[key.strip()] = _parse_value(value)
    return parsed


def preset_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("expunge.recipe") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def dump_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a recipe, a part of one, or plain data."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise UserError(f"unknown preset '{name}'", did_you_mean(name, preset_names()))
    text = (resources.files("expunge.recipe") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.load(text, Loader=_Loader)
    return loaded


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no recipe at {path}", "write one with: expunge init -o recipe.yaml")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text", "a recipe is a YAML file; see: expunge init") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not valid YAML"
        raise UserError(f"{path}{line}: {problem}", "check keys, indentation and quotes around that line") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no recipe", "a recipe is a YAML mapping; see: expunge init")
    return loaded


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as text, here it is a number; and a key that stands twice is an error, not the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node whose keys differ."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if key.value in seen:
                again = f"the key '{key.value}' stands here a second time"
                raise yaml.constructor.ConstructorError(None, None, again, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse_value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _merge(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _set(tree: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of `tree` with `a.0.b` set; list entries by index or by their `name`."""
    keys = dotted.split(".")
    root: Any = json.loads(json.dumps(tree, default=str))
    node = root
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            index = _index(node, key, ".".join(keys[: depth + 1]))
            if last:
                node[index] = value
            else:
                node = node[index]
        elif last:
            node[key] = value
        else:
            if isinstance(node.get(key), str) and key in ("model", "reference", "forget", "retain", "holdout"):
                node[key] = {"id" if key in ("model", "reference") else "path": node[key]}
            if not isinstance(node.get(key), dict | list):
                node[key] = {}
            node = node[key]
    result: dict[str, Any] = root
    return result


def _index(items: list[Any], key: str, where: str) -> int:
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    valid = [*map(str, range(len(items))), *(name for name in names if name)]
    raise UserError(f"--set {where}: there is no entry '{key}'", f"valid: {', '.join(valid)}")


def _resolve_paths(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths in a recipe file are relative to the file, where such a file exists."""

    def resolve(value: Any) -> Any:
        if isinstance(value, str) and not Path(value).is_absolute() and (folder / value).exists():
            return str(folder / value)
        return value

    def at(node: Any, key: str) -> None:
        if not isinstance(node, dict) or key not in node:
            return
        inner = node[key]
        if isinstance(inner, dict):
            for name in ("id", "path"):
                if name in inner:
                    inner[name] = resolve(inner[name])
        else:
            node[key] = resolve(inner)

    at(tree, "model")
    at(tree, "reference")
    for entry in tree["unlearn"] if isinstance(tree.get("unlearn"), list) else []:
        at(entry, "reset")
    for key in ("mask", "against"):
        at(tree.get("localize"), key)
    data = tree.get("data")
    if isinstance(data, dict):
        for key in ("forget", "retain", "retain_unseen", "holdout"):
            at(data, key)
        for name in data.get("splits") or {}:
            at(data["splits"], name)
    return tree


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems, hints = [], []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"{place}: unknown key")
                hints.append(f"{place}: {did_you_mean(str(item['loc'][-1]), _siblings(item['loc']))}")
            else:
                message = item["msg"].removeprefix("Value error, ")
                problems.append(f"{place}: {message}" if place else message)
        listed = "; ".join(problems)
        hint = "; ".join(hints) or "see the commented recipe of: expunge init"
        raise UserError(f"{where}: {listed}", hint) from None


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that are valid where an unknown key stands."""
    node: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, int) or not (isinstance(node, type) and issubclass(node, BaseModel)):
            continue
        field = node.model_fields.get(part)
        node = _model_in(field.annotation) if field is not None else None
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
