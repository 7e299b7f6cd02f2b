"""Merge methods by name: what each is, which parameters it takes, and how they are checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, create_model

from expunge.errors import UserError, did_you_mean
from expunge.registry import Registry

Method = TypeVar("Method", bound=Callable[..., Any])

# Every method has these: they act on the result, or on how the density is understood, so that the
# method itself stays a function on the tensors of one parameter.
_SCALE = Field(
    1.0,
    allow_inf_nan=False,
    validation_alias=AliasChoices("scale", "lambda"),
    description="factor on the merged difference before it is added to the base (λ)",
)
_SCOPES = {
    "tensor": "each tensor by itself",
    "model": "one threshold trims all tensors together",
    "factor": "the A and B of LoRA adapters are merged apart, as PEFT does: not the merge of the weights",
}
_MATCH = Field(
    "none",
    description="rescale the merged difference to the weighted mean norm of the inputs' differences, of each tensor or "
    "of the whole model, so that methods differ in direction only",
)
_SEED = Field(42, ge=0, description="of what is drawn at random")

#: Parameters that every method has, and that act around it.
COMMON = ("scale", "scale_match", "scope")


@dataclass(frozen=True)
class Merge:
    """A merge method: `function(deltas, weights, density, **parameters)` gives the merged delta of one parameter.

    Deltas are float32 and not to be changed; the result is a fresh tensor of the same shape. A function that is random
    declares a keyword `draw: Draw`, which is filled in per parameter, and thereby has the parameter `seed`.
    """

    name: str
    function: Callable[..., Any]
    summary: str
    paper: str
    needs_base: bool
    weighs: bool
    trims: bool
    random: bool
    models: tuple[int, int | None]  # least and largest number of models
    parameters: type[BaseModel]

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` with defaults filled in. Raises UserError listing every unknown name and value out of range."""
        try:
            checked = self.parameters.model_validate(dict(given))
        except ValidationError as error:
            problems, hints = [], []
            for item in error.errors():
                place = str(item["loc"][0])
                place = "scale" if place == "lambda" else place
                if item["type"] == "extra_forbidden":
                    problems.append(f"unknown parameter '{place}'")
                    hints.append(did_you_mean(place, self.parameters.model_fields))
                else:
                    valid = _kind(self.parameters.model_fields[place]).removesuffix(" | none")
                    valid = f"finite {valid}" if item["type"] == "finite_number" else valid
                    problems.append(f"{place} is {_plain(item['input'])}, which is not: {valid}")
            hint = "; ".join(hints) or f"see: expunge list merges {self.name}"
            raise UserError(f"merge method {self.name}: {'; '.join(dict.fromkeys(problems))}", hint) from None
        return checked.model_dump()

    def describe(self) -> dict[str, str]:
        """Label → text for `expunge list merges` and the docs; the first is the summary."""
        rows = {"summary": self.summary, "paper": self.paper or "none"}
        rows["base"] = "required" if self.needs_base else "optional for full checkpoints"
        rows["weights"] = "used" if self.weighs else "not used"
        rows["density"] = "used" if self.trims else "not used"
        rows["models"] = _count(self.models)
        own = {name: field for name, field in self.parameters.model_fields.items() if name not in (*COMMON, "seed")}
        rows["parameters"] = ", ".join(f"{name}={_plain(field.default)}" for name, field in own.items()) or "none"
        for name, field in self.parameters.model_fields.items():
            rows[f"parameter {name}"] = f"{_kind(field)}, default {_plain(field.default)}: {field.description or ''}"
        return rows


MERGES: Registry[Merge] = Registry("merge method", "expunge.merging")


def merge(
    name: str,
    *,
    summary: str,
    paper: str,
    needs_base: bool = True,
    weighs: bool = True,
    trims: bool = False,
    models: tuple[int, int | None] = (1, None),
    scopes: tuple[str, ...] | None = None,
) -> Callable[[Method], Method]:
    """Decorator that files a function under `name`; its keyword-only arguments become the method's parameters.

    `weighs`: it uses the weights; `trims`: it uses the density, and a density may be a part of the whole model.
    `scopes` are those that make sense, when they are not all of them.
    """

    valid = scopes or (("tensor", "model", "factor") if trims else ("tensor", "factor"))

    def file(function: Method) -> Method:
        hints = get_type_hints(function, include_extras=True)
        given = inspect.signature(function).parameters
        fields: dict[str, Any] = {
            parameter.name: (hints.get(parameter.name, Any), parameter.default)
            for parameter in given.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "draw"
        }
        random = "draw" in given
        if random:
            fields["seed"] = (int, _SEED)
        fields["scope"] = (Literal[valid], _scope(valid))
        fields["scale"] = (float, _SCALE)
        fields["scale_match"] = (Literal["none", "tensor", "model"], _MATCH)
        # "lax" conversions (YAML's "1" for a float) are welcome, unknown names are not
        settings = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)
        model = create_model(f"{name}_parameters", __config__=settings, **fields)
        MERGES.register(name)(Merge(name, function, summary, paper, needs_base, weighs, trims, random, models, model))
        return function

    return file


def _scope(valid: tuple[str, ...]) -> Any:
    return Field("tensor", description="; ".join(f"{name}: {_SCOPES[name]}" for name in valid))


def _count(models: tuple[int, int | None]) -> str:
    least, most = models
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _kind(field: Any) -> str:
    """The type of a field in words: `total | frequency`, `true | false`, `number > 0`."""
    kind = _type_words(field.annotation)
    bare = kind.removesuffix(" | none")  # the limits are those of the number
    words = [bare]
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    for limit in field.metadata:
        words += [f"{sign} {getattr(limit, key):g}" for key, sign in signs.items() if hasattr(limit, key)]
    return " ".join(words) + kind[len(bare) :]


def _type_words(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _type_words(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " | ".join(_plain(value) for value in get_args(kind))
    if get_args(kind):
        return " | ".join(_type_words(part) for part in get_args(kind))
    words = {bool: "true | false", float: "number", int: "whole number", str: "text", type(None): "none"}
    return words.get(kind, str(kind))


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
