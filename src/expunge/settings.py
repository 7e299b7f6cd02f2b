"""Leaves with settings: frozen dataclasses whose fields carry bounds, a description and the values of papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from expunge.errors import UserError, did_you_mean

T = TypeVar("T")


def setting(default: Any, *, description: str, published: str = "", **bounds: Any) -> Any:
    """A field: default, bounds that pydantic checks, and the values that papers used."""
    return Field(default, description=description, json_schema_extra={"published": published}, **bounds)


def with_settings(cls: type[Any]) -> type[Any]:
    """`cls` as a frozen dataclass that refuses unknown and ill-typed fields."""
    made: Any = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    return made


def described_settings(cls: type[Any]) -> dict[str, str]:
    """`parameter NAME` → default, description and published values, for `expunge list` and the generated tables."""
    described = {}
    for item in dataclasses.fields(cls):
        default: Any = item.default
        extra = default.json_schema_extra or {}
        published = f"; published: {extra['published']}" if extra.get("published") else ""
        described[f"parameter {item.name}"] = f"{default.default}: {default.description}{published}"
    return described


def build(kind: str, name: str, cls: type[T], parameters: Mapping[str, Any]) -> T:
    """A leaf with its settings, e.g. build("method", "npo", NPO, {…}). Raises UserError for a key or value."""
    fields: Any = cls
    valid = [item.name for item in dataclasses.fields(fields)]
    for key in parameters:
        if key not in valid:
            hint = did_you_mean(key, valid) if valid else f"{name} has none: leave it out"
            raise UserError(f"{kind} {name} has no parameter '{key}'", hint)
    try:
        return TypeAdapter(cls).validate_python(dict(parameters))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"{kind} {name}: {problems}", f"see: expunge list {kind}s {name}") from None
