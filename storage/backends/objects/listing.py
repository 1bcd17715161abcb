"""Which of many chunks a bucket has, by as few rounds of requests as listings allow.

A listing gives 1,000 names at a time, in order. The first page of a namespace tells how many of the wanted chunks come
to a page; by that the rest of them is cut into slices of about one page, which are listed side by side:

    wanted   a b c d e f g h i j k l m n o p ...
    round 1  [ page  ]
    round 2            [ page  ] [ page  ] ...      each begins after the name before its first wanted one
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import obstore

from lmcache.keys import ChunkKey
from lmcache.storage.naming import SUFFIX, chunk_path, namespace_path
from lmcache.storage.run.threads import Threads

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

PAGE = 1000
# A slice is made for less than a page, as the names are not spread evenly.
_SHARE_OF_A_PAGE = 0.8
# A page costs about as much as so many questions for single objects.
_PAGE_COST = 4


class Search:
    """The listings that could answer for ``keys``; none when they are ``few`` or less."""

    def __init__(self, store: ObjectStore, keys: Sequence[ChunkKey], few: int) -> None:
        self._store = store
        self._keys = keys
        self._sizes: dict[ChunkKey, int] = {}
        self.wanted: dict[bytes, dict[str, ChunkKey]] = {}
        """Names of wanted chunks by namespace; ``first`` is called with each of these."""
        self._unlisted: dict[bytes, list[str]] = {}
        self._per_page: dict[bytes, int] = {}
        for key in keys if len(keys) > few else ():
            self.wanted.setdefault(key.namespace, {})[chunk_path(key)] = key

    def first(self, namespace: bytes) -> None:
        """Read the first page of a namespace."""
        names = sorted(self.wanted[namespace])
        page = next(self._pages(namespace, None), [])
        self._keep(namespace, page)
        last = page[-1]["path"] if len(page) >= PAGE else None
        self._unlisted[namespace] = [] if last is None else [name for name in names if name > last]
        self._per_page[namespace] = len(names) - len(self._unlisted[namespace])

    def rest(self, threads: Threads) -> tuple[list[ChunkKey], dict[ChunkKey, int]]:
        """Read the other pages. Returns the keys to ask for singly, and the objects' bytes of those found."""
        alone: set[ChunkKey] = set() if self.wanted else set(self._keys)
        slices = []
        for namespace, names in self._unlisted.items():
            length = int(self._per_page[namespace] * _SHARE_OF_A_PAGE)
            if length < _PAGE_COST:
                alone.update(self.wanted[namespace][name] for name in names)
            else:
                slices += [(namespace, names[i : i + length]) for i in range(0, len(names), length)]
        threads.map(lambda item: self._slice(*item), slices)
        return [key for key in self._keys if key in alone], self._sizes

    def _slice(self, namespace: bytes, names: list[str]) -> None:
        for page in self._pages(namespace, names[0].removesuffix(SUFFIX)):
            self._keep(namespace, page)
            if page[-1]["path"] >= names[-1]:
                return

    def _pages(self, namespace: bytes, offset: str | None) -> Iterator[Sequence[ObjectMeta]]:
        yield from obstore.list(self._store, namespace_path(namespace), offset=offset, chunk_size=PAGE)

    def _keep(self, namespace: bytes, page: Iterable[ObjectMeta]) -> None:
        wanted = self.wanted[namespace]
        for entry in page:
            if (key := wanted.get(entry["path"])) is not None:
                self._sizes[key] = entry["size"]
