"""Named choices: built-ins in a static table of lazy "module:attribute" strings, third parties by entry points."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from lmcache.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """One kind of component, chosen by name.

    kind: what it is, for messages ("storage backend"). group: entry-point group of third parties.
    Nothing is imported until ``get``; a built-in name cannot be taken over by a third party.
    """

    def __init__(self, kind: str, builtins: Mapping[str, str], group: str) -> None:
        self.kind = kind
        self._builtins = dict(builtins)
        self._group = group

    def names(self) -> list[str]:
        """Every name that ``get`` takes."""
        return sorted({*self._builtins, *(e.name for e in entry_points(group=self._group))})

    def get(self, name: object) -> T:
        """The component of that name. ConfigError names the known ones."""
        if isinstance(name, str):
            if target := self._builtins.get(name):
                module, attribute = target.split(":")
                return cast(T, getattr(importlib.import_module(module), attribute))
            for entry in entry_points(group=self._group):
                if entry.name == name:
                    return cast(T, entry.load())
        raise ConfigError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")


def split_type(options: Mapping[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """``{type: disk, path: ...}`` -> ``("disk", {path: ...})``."""
    rest = dict(options)
    name = rest.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind}: needs a type, got {dict(options)!r}")
    return name, rest
