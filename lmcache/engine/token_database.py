"""Tokens -> chained chunk keys.

    tokens   0        64       128      192   210
             ├──full──┼──full──┼──full──┼tail─┤·
                                        └ whole blocks that do not fill a chunk; the last two tokens fill no block

A tail is keyed like a chunk with fewer tokens behind the same parent, so a prompt that is asked again is
found down to the engine's block, whatever the chunk size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lmcache.keys import ROOT_DIGEST, ChunkKey, KVFormat, PlaceholderSpan, chunk_digest, namespace


@dataclass(frozen=True, slots=True)
class Span:
    """The chunk of token positions ``[start, stop)``."""

    key: ChunkKey
    start: int
    stop: int


class TokenDatabase:
    """Keys of one KVFormat. unit: the engine's block in tokens, which divides ``chunk_tokens``."""

    def __init__(self, format: KVFormat, unit: int) -> None:
        if format.chunk_tokens % unit:
            raise ValueError(f"chunk_tokens must be a multiple of the block, got {format.chunk_tokens} and {unit}")
        self.fingerprint = format.fingerprint()
        self.chunk_tokens = format.chunk_tokens
        self.unit = unit

    def prompt(
        self,
        tokens: bytes,
        tags: Mapping[str, str] | None = None,
        placeholders: Sequence[PlaceholderSpan] = (),
    ) -> PromptKeys:
        """The keys of a prompt. tokens: its ids as little-endian uint32."""
        return PromptKeys(self, tokens, namespace(self.fingerprint, tags), tuple(placeholders))


class PromptKeys:
    """The chunks of one prompt."""

    def __init__(
        self, database: TokenDatabase, tokens: bytes, namespace: bytes, placeholders: tuple[PlaceholderSpan, ...]
    ) -> None:
        self.num_tokens = len(tokens) // 4
        self._database = database
        self._tokens = memoryview(tokens)
        self._namespace = namespace
        self._placeholders = placeholders

    @cached_property
    def chunks(self) -> list[Span]:
        """Every full chunk, in order."""
        size = self._database.chunk_tokens
        parent = ROOT_DIGEST
        spans = []
        for start in range(0, self.num_tokens - size + 1, size):
            span = self._span(parent, start, start + size)
            parent = span.key.digest
            spans.append(span)
        return spans

    def tails(self, index: int) -> list[Span]:
        """What could stand where chunk ``index`` would: runs of whole blocks shorter than a chunk, longest first."""
        size, unit = self._database.chunk_tokens, self._database.unit
        start = index * size
        longest = min(self.num_tokens - start, size - unit) // unit * unit
        parent = self.chunks[index - 1].key.digest if index else ROOT_DIGEST
        return [self._span(parent, start, start + n) for n in range(longest, 0, -unit)]

    def _span(self, parent: bytes, start: int, stop: int) -> Span:
        digest = chunk_digest(self._namespace, parent, self._tokens[4 * start : 4 * stop], start, self._placeholders)
        return Span(ChunkKey(self._namespace, digest), start, stop)
