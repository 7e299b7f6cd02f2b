"""One generic registry: a room's leaves are found on disk when first asked for, and plugins by entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, Protocol, TypeVar

from expunge.errors import UserError, did_you_mean

T = TypeVar("T")

PLUGINS = "expunge.plugins"
_plugins_loaded = False


class Described(Protocol):
    """A leaf that says what it is, for `expunge list` and the generated tables."""

    def describe(self) -> dict[str, str]:
        """Label → text; the first label is "summary"."""
        ...


class Registry(Generic[T]):
    """Leaves of one room by name, discovered lazily; a second leaf of the same name is an error."""

    def __init__(self, kind: str, room: str) -> None:
        self.kind = kind
        self.room = room
        self._entries: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated object under `name`. Raises ValueError on a duplicate."""

        def file(entry: T) -> T:
            if name in self._entries and self._entries[name] is not entry:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._entries[name] = entry
            return entry

        return file

    def get(self, name: str) -> T:
        """The leaf called `name`. Raises UserError with the near name if there is none."""
        self._discover()
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} '{name}'", did_you_mean(name, self._entries))
        return self._entries[name]

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._discover()
        return sorted(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """Pairs of name and leaf, sorted by name."""
        return iter([(name, self._entries[name]) for name in self.names()])

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        room = importlib.import_module(self.room)
        for module in pkgutil.iter_modules(room.__path__):
            importlib.import_module(f"{self.room}.{module.name}")
        _load_plugins()


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for plugin in entry_points(group=PLUGINS):
        plugin.load()
