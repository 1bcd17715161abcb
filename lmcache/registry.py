"""Named choices: built-ins in a table of lazy "module:attribute" (or "module") strings, others by entry points."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from lmcache.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Registry(Generic[T]):
    """One kind of component, chosen by name.

    kind: what it is, for messages ("storage backend"). group: entry-point group of third parties.
    Nothing is imported until ``get``; a built-in name cannot be taken over by a third party, which is warned of once.
    """

    def __init__(self, kind: str, builtins: Mapping[str, str], group: str) -> None:
        self.kind = kind
        self._builtins = dict(builtins)
        self._group = group
        self._warned = False

    def names(self) -> list[str]:
        """Every name that ``get`` takes."""
        return sorted({*self._builtins, *(e.name for e in entry_points(group=self._group))})

    def get(self, name: object) -> T:
        """The component of that name. ConfigError names the known ones, or the package whose entry is broken."""
        self._warn_of_shadowed()
        if isinstance(name, str):
            if target := self._builtins.get(name):
                module, _, attribute = target.partition(":")
                found = importlib.import_module(module)
                return cast(T, getattr(found, attribute) if attribute else found)
            for entry in entry_points(group=self._group):
                if entry.name == name:
                    return self._load(entry)
        raise ConfigError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")

    def _load(self, entry: EntryPoint) -> T:
        try:
            return cast(T, entry.load())
        except (AttributeError, ImportError) as error:
            raise ConfigError(
                f"{self.kind} {entry.name!r}: {_package(entry)} names {entry.value!r}, which cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _warn_of_shadowed(self) -> None:
        if self._warned:
            return
        self._warned = True
        for entry in entry_points(group=self._group):
            if entry.name in self._builtins:
                logger.warning(
                    "%s %r of %s is not used: a built-in has that name", self.kind, entry.name, _package(entry)
                )


def _package(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name}" if entry.dist else "an unknown package"


def split_type(options: Mapping[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """``{type: disk, path: ...}`` -> ``("disk", {path: ...})``."""
    rest = dict(options)
    name = rest.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind}: needs a type, got {dict(options)!r}")
    return name, rest
