"""Which weights a worker computes with now, and since which step; their digest is part of the name of its KV."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence

from lmcache import metrics
from lmcache.connector.identity.calls import HARMLESS, Watcher
from lmcache.connector.identity.weights import Weights

logger = logging.getLogger(__name__)

# Calls that also empty vLLM's cache of encoder outputs.
RESETS_IMAGES = frozenset({"reset_encoder_cache", "reload_weights"})
WEIGHTS_TAG = "weights"


class WeightsInUse:
    """Follows the weights of one worker through vLLM's steps and calls.

    weights: None where KV is named by its format alone. rank, ranks: this worker's place among those that compute a
    request together. With several, what one of them computes depends on the weights of all: the scheduler tells each
    the tokens of all, and a tag names them together.
    Threads: ``settle`` and ``computed`` are for the thread that runs the model, the rest for any.
    """

    def __init__(self, weights: Weights | None, rank: int = 0, ranks: int = 1) -> None:
        self._weights = weights
        self._rank, self._ranks = rank, ranks
        self._since = 0
        self._images_reset = self._old_images = False
        self._watcher = Watcher(self._called) if weights is not None else None

    @property
    def name(self) -> str | None:
        """The digest that names the weights; None where they cannot be read."""
        return self._weights.name if self._weights is not None else None

    @property
    def token(self) -> str:
        """Changes whenever the weights were in doubt; two equal tokens mean that they were the same all the time."""
        return self._weights.token if self._weights is not None else ""

    def in_doubt(self) -> bool:
        """Whether the weights must be read again before anything is looked up."""
        if self._weights is None:
            return False
        if self._weights.on_host:
            self._weights.look()  # costs what it costs in a step; on a GPU it would have to wait
        return self._weights.noticed()

    def tags(self, ranks: Sequence[str]) -> dict[str, str] | None:
        """The tags that name the weights of all workers; None where KV has no name now.

        ranks: the token of every worker, as the scheduler knows them.
        """
        if self._weights is None:
            return {}
        if self._weights.name is None:
            return None
        if self._ranks == 1:
            return {}
        if len(ranks) != self._ranks or ranks[self._rank] != self.token:
            return None
        digest = hashlib.blake2b(digest_size=16, person=b"lmcache-ranks")
        for token in ranks:
            digest.update(token.partition("#")[0].encode() + b"\0")
        return {WEIGHTS_TAG: digest.hexdigest()}

    def settle(self, step: int, renamed: Callable[[str | None], None]) -> None:
        """At a step's begin: read the weights, where they are in doubt.

        renamed: called with their name where it is another now, before anything is looked up under it.
        """
        if self._weights is None:
            return
        self._weights.look()
        if not self._weights.noticed():
            return

        def changed(name: str | None) -> None:
            self._since, self._old_images = step, not self._images_reset
            metrics.WEIGHTS_CHANGED.inc()
            logger.warning("lmcache: the weights are others now: KV is named %s", name or "by nothing, and left alone")
            renamed(name)

        self._weights.settle(changed)

    def doubt(self) -> None:
        """Nothing is read or stored until the weights have been read again."""
        if self._weights is not None:
            self._weights.doubt()

    def holds(self) -> bool:
        """Whether the weights still are those that were read. To be asked when copies have ended: it may wait."""
        return self._weights is None or self._weights.hold()

    def computed(self, oldest: float, images: bool) -> bool:
        """Whether blocks, of which the oldest was begun in that step, were computed with the present weights.

        images: whether they depend on outputs of an encoder, which vLLM keeps when the weights change.
        """
        return oldest >= self._since and not (images and self._old_images)

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()

    def _called(self, method: str) -> None:
        if method in RESETS_IMAGES:
            self._images_reset, self._old_images = True, False
        if method not in HARMLESS:
            self._images_reset = method in RESETS_IMAGES
            self.doubt()
