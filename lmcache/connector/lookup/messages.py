"""What the scheduler asks the workers, and what they answer: msgpack over a local ZMQ socket.

scheduler    Acquire ─────────────────────────────> Settle ─────> Release (or a Load takes what is held)
worker                Reply(reading) ... Reply ──>   Reply, now
"""

from __future__ import annotations

import msgspec

from lmcache.connector.identity.adapters import Adapter
from lmcache.connector.passages import Passages
from lmcache.keys import PlaceholderSpan


class Acquire(msgspec.Struct, tag=True, frozen=True):
    """passages: how they are found, where the request is to be blended. ranks: the weights' token of every worker.

    adapter: the request's, if it has one.
    """

    lookup_id: int
    tokens: bytes
    tags: dict[str, str]
    placeholders: list[PlaceholderSpan]
    passages: Passages | None = None
    ranks: tuple[str, ...] = ()
    adapter: Adapter | None = None


class Release(msgspec.Struct, tag=True, frozen=True):
    lookup_id: int


class Settle(msgspec.Struct, tag=True, frozen=True):
    """Answer now, with what is held."""

    lookup_id: int


class Clear(msgspec.Struct, tag=True, frozen=True):
    lookup_id: int


class Reply(msgspec.Struct, frozen=True):
    """tokens: held for the lookup (Acquire), or chunks removed (Clear); -1: the request failed.

    reach: where what can be blended ends, if that is further. weights: the worker's token.
    reading: no answer yet; so much is held already.
    """

    lookup_id: int
    tokens: int
    reach: int = 0
    weights: str = ""
    reading: bool = False


Request = Acquire | Release | Settle | Clear
