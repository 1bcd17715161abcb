"""The steps of a blend, whichever engine the prompt is for.

    keep   a passage's tokens and KV ──> SegmentStore, and the index of what is known
    find   a prompt ── which parts of it are known ──> segments ──> their KV, held in memory
    fuse   held KV ──> Blender (rotate, select, recompute); again with what is left when a passage is lost meanwhile

``BlendEngine`` (standalone.py) drives them for a model of Hugging Face, ``Blending`` (lmcache.connector) for vLLM.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lmcache.blend.blender import Blended
from lmcache.blend.forward import KV
from lmcache.blend.reuse import Segment
from lmcache.blend.segments import ContentIndex, Match, Tokens
from lmcache.blend.store import SegmentStore
from lmcache.blend.stored import PrefixKV, StoredKV
from lmcache.errors import BlendError, CorruptChunkError, LeaseExpiredError

logger = logging.getLogger(__name__)

_INDEXES = 64  # tenants, adapters, ... whose passages are known by content


@dataclass(frozen=True)
class FoundPassages:
    """Passages of a prompt, and what of their KV is held in memory until ``close``. segments: what was looked for."""

    tokens: Tokens
    segments: Sequence[Segment]
    kv: StoredKV
    tags: Mapping[str, str]

    @property
    def reach(self) -> int:
        """Where the last held passage ends, with a token of the prompt behind it."""
        return min(max((each.stop for each in self.kv.segments), default=0), len(self.tokens) - 1)

    @property
    def missing(self) -> list[Match]:
        """Known passages whose KV is not held."""
        held = {segment.start for segment in self.kv.segments}
        return [each for each in self.segments if isinstance(each, Match) and each.start not in held]

    def close(self) -> None:
        self.kv.close()


class BlendPipeline:
    """What is known by content, and the steps over it. Thread-safe.

    min_tokens: the shortest run of a known passage that is worth reusing. Stores are given with each call, for ropes
    may depend on the prompt's length.
    """

    def __init__(self, min_tokens: int) -> None:
        self.min_tokens = min_tokens
        self._indexes: OrderedDict[tuple[tuple[str, str], ...], ContentIndex] = OrderedDict()
        self._lock = threading.Lock()

    def index(self, tags: Mapping[str, str] | None = None) -> ContentIndex:
        """The index of passages kept under these tags; passages of other tags (tenants) are never found."""
        key = tuple(sorted((tags or {}).items()))
        with self._lock:
            index = self._indexes.setdefault(key, ContentIndex(self.min_tokens))
            self._indexes.move_to_end(key)
            if len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        return index

    def forget(self) -> None:
        """Know no passage any more; their KV stays in storage."""
        with self._lock:
            self._indexes.clear()

    def keep(
        self,
        store: SegmentStore,
        passage: Tokens,
        stored_at: int,
        layers: Callable[[], Sequence[KV] | None],
        *,
        below: bool,
        tags: Mapping[str, str] | None = None,
    ) -> bool:
        """Store a passage unless it is stored, and know it by content; whether it is held in the end.

        stored_at: the position of its first token. layers: called for its KV where it is needed; None: it is gone.
        below: ask tiers below memory, too, whether they have it.
        """
        held = store.holds(passage, below=below, tags=tags)
        if not held and (made := layers()):
            held = store.put(passage, stored_at, made, tags=tags)
        if held:
            self.index(tags).add(passage)
        return held

    def find(
        self,
        store: SegmentStore,
        prompt: Tokens,
        segments: Sequence[Segment] | None,
        *,
        timeout_s: float,
        prefix: PrefixKV | None = None,
        pipelined: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> FoundPassages:
        """Hold the KV of a prompt's passages; the caller closes it.

        segments: where they are; None: by content. The rest is as of ``SegmentStore.retrieve``.
        """
        wanted = self.index(tags).find(prompt) if segments is None else segments
        kv = store.retrieve(prompt, wanted, prefix=prefix, timeout_s=timeout_s, pipelined=pipelined, tags=tags)
        return FoundPassages(prompt, wanted, kv, tags or {})

    def fuse(
        self,
        found: FoundPassages,
        blend: Callable[[StoredKV], Blended],
        retrieve: Callable[[Sequence[Segment]], StoredKV],
    ) -> Blended:
        """Blend what was found, which is closed then.

        retrieve: what can be had of segments now. When a passage is lost while layers are computed, the blend begins
        again with that, and at last without any passage: nothing is ever made of half a passage.
        """
        held = None if found.kv.closed else found.kv
        for segments in (found.segments, found.segments, ()):
            kv, held = held or retrieve(segments), None
            with kv:
                try:
                    return blend(kv)
                except (LeaseExpiredError, CorruptChunkError) as error:
                    logger.warning("a passage was lost while a prompt was blended, which begins again: %s", error)
        raise BlendError("the prompt cannot be blended even without passages")
