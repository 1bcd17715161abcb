"""What the scheduler half tells the worker half at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from lmcache.connector.identity.adapters import Adapter
from lmcache.connector.passages import Passages
from lmcache.keys import PlaceholderSpan

BlockIds = tuple[list[int], ...]


@dataclass(frozen=True)
class Load:
    """Write the chunks of lookup ``lookup_id`` into token positions ``[start, stop)`` of a request.

    whole_request: report the request as received (or failed) instead of its blocks (vLLM's asynchronous loads).
    blended: what lies behind ``exact`` tokens, which the chunks hold or the pages have, is blended.
    adapter: the request's, if it has one.
    """

    request_id: str
    lookup_id: int
    block_ids: BlockIds
    start: int
    stop: int
    whole_request: bool
    blended: bool = False
    exact: int = 0
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Store:
    """Store the KV of ``tokens`` (uint32, from the first one) that ends after ``start``.

    oldest: the step in which the first of their blocks was begun. ranks: the weights' token of every worker, as the
    scheduler knows them; () for one worker. adapter: the request's, if it has one.
    """

    request_id: str
    tokens: bytes
    block_ids: BlockIds
    start: int
    tail: bool
    tags: dict[str, str]
    placeholders: Sequence[PlaceholderSpan]
    oldest: float = float("inf")
    ranks: tuple[str, ...] = ()
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Learn:
    """Keep the passages of ``tokens`` (uint32, from the first one) that end behind ``start``. oldest: as of Store."""

    request_id: str
    tokens: bytes
    block_ids: BlockIds
    start: int
    passages: Passages
    tags: dict[str, str]
    oldest: float = float("inf")


@dataclass
class StepMetadata(KVConnectorMetadata):
    """All loads and stores of one step, and what is learned from it. step: counts up, from 1.

    adapters: name and vLLM's number of those that the step computes with.
    """

    step: int = 0
    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    learns: list[Learn] = field(default_factory=list)
    adapters: list[tuple[str, int]] = field(default_factory=list)
