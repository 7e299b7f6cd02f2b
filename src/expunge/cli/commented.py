"""The commented recipe of `expunge init`, made from the words that stand beside the fields."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from expunge.recipe import Recipe

#: What a first recipe is about; every other field is shown with its default.
_START: dict[str, Any] = {
    "name": "my-run",
    "model": "smollm2-135m",
    "data": {"forget": "forget.jsonl", "retain": "retain.jsonl"},
    "unlearn": [{"name": "unlearned", "lora": 16, "train": {"lr": 1e-4}}],
}
#: Values for fields that are absent by default, so that deleting the "# " before them leaves something that works.
_EXAMPLES: dict[str, Any] = {
    "reference": "path/to/a/model",
    "reset": "path/to/the/base",
    "revision": "main",
    "format": "qa",
    "limit": 1000,
    "benchmark": "fictitious",
    "folder": "path/to/its/files",
    "documents": 12,
    "retain_unseen": "retain-unseen.jsonl",
    "holdout": "holdout.jsonl",
    "alpha": 16,
    "max_steps": 100,
    "nll": 1.0,
    "kl": 1.0,
    "retain_batch": 8,
    "fall": 0.5,
    "span": "sequence",
    "cap": 4.0,
    "quantile": 0.8,
    "by": "idk",
    "sentences": ["I have never heard of that."],
    "neighbours": 4,
    "sam": 0.01,
    "relearning": {"steps": 1, "lr": 1e-4},
    "keep": 0.95,
    "null_space": 3,
    "trainable": [r"\.mlp\.down_proj\."],
    "against": "region.safetensors",
    "seed": 1,
    "weights": [1.0],
    "metrics": ["extraction_strength", "rouge_l_recall"],
    "minutes": 30,
    "lora": 16,
}
_COLUMN = 46  # where the words begin

Line = tuple[str, str]  # YAML, and the words beside it


def commented_recipe() -> str:
    """A recipe that `load_recipe` takes, with every field, its default and what it means."""
    head = [
        "# A recipe: everything that a run is. Paths are relative to this file.",
        "# Check it:  expunge run recipe.yaml --dry-run        Change a field for once:  --set unlearn.0.train.lr=2e-5",
        "",
    ]
    blocks: list[str] = []
    for name, field in Recipe.model_fields.items():
        lines = _field(name, field, _START)
        # parts stand apart; short fields that belong together do not
        if blocks and (len(lines) > 1 or name in ("model", "data")):
            blocks.append("")
        blocks += [f"{text.ljust(_COLUMN)} # {note}" if note else text for text, note in lines]
    return "\n".join([*head, *blocks]) + "\n"


def _field(name: str, field: FieldInfo, given: Mapping[str, Any]) -> list[Line]:
    """Lines of one field; what is absent by default is a comment that becomes YAML without its "# "."""
    value = given.get(name, None if field.is_required() else field.get_default(call_default_factory=True))
    part, note = _model_of(field.annotation), _note(field)
    if part is not None and isinstance(value, list) and value:
        return [(f"{name}:", note), *(line for entry in value for line in _item(part, entry))]
    if part is not None and isinstance(value, BaseModel | Mapping):
        inner = _indented(_fields(part, value.model_dump() if isinstance(value, BaseModel) else value))
        lines = [(f"{name}:", note), *inner]
        # a key over comments alone would mean null
        return _off([lines[0]]) + inner if all(text.lstrip().startswith("#") for text, _ in inner) else lines
    if value is None and part is not None and name not in _EXAMPLES:
        return _off([(f"{name}:", note), *_indented(_fields(part, {}))])
    if value is None:
        return _off([(f"{name}: {_flow(_EXAMPLES.get(name))}", note)])
    return [(f"{name}: {_flow(value)}", note)]


def _fields(model: type[BaseModel], given: Mapping[str, Any]) -> list[Line]:
    return [line for name, field in model.model_fields.items() for line in _field(name, field, given)]


def _item(model: type[BaseModel], entry: Mapping[str, Any]) -> list[Line]:
    """Lines of one entry of a list; its first field stands beside the dash."""
    first, *rest = _fields(model, entry)
    return _indented([(f"- {first[0]}", first[1]), *_indented(rest)])


def _indented(lines: list[Line]) -> list[Line]:
    return [(f"  {text}", note) for text, note in lines]


def _off(lines: list[Line]) -> list[Line]:
    return [(f"# {text}", note) for text, note in lines]


def _note(field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    listed = f"one of: {', '.join(choices)}" if len(choices) > 1 and field.annotation is not NoneType else ""
    described = field.description or ""
    return "; ".join(text for text in (described, "" if all(c in described for c in choices) else listed) if text)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _choices(inner)] if _is_optional(annotation) else []


def _is_optional(annotation: Any) -> bool:
    return NoneType in get_args(annotation)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The part of the recipe that a field holds, through Optional, Annotated and list; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is dict:
        return None
    for inner in get_args(annotation):
        found = _model_of(inner)
        if found is not None:
            return found
    return None


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, float) and value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:g}"
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
    return text.removesuffix("...\n").strip()
