"""The health of a lower tier, as ``StorageManager.health`` reports it."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache.storage.run.breaker import SideHealth


@dataclass(frozen=True)
class TierHealth:
    """How a lower tier fares."""

    name: str
    reads: SideHealth
    writes: SideHealth
    """Also removals."""
    latency_s: float | None
    """Exponentially weighted mean of the calls that moved bytes."""
    read_bytes_per_s: float | None
    write_bytes_per_s: float | None
    """Means of one call, which say how large the next batches are; None before the first."""
    queue_bytes: int
    """Bytes that wait to be written, or are being written."""
    hung_threads: int
    """Calls that ran out of time and have not come back."""
    owes_clear: bool
    """Whether a clear is owed: until it is done, its chunks count as not there."""
    owed_removals: int
    """Chunks (or selections of them) that count as not there, and are not known to be gone for good."""

    @property
    def breaker(self) -> str:
        """The worse of both: ``open``, ``half_open`` or ``closed``."""
        return max(self.reads.breaker, self.writes.breaker, key=["closed", "half_open", "open"].index)

    @property
    def failures(self) -> int:
        """Failures in a row, of the side that has more of them."""
        return max(self.reads.failures, self.writes.failures)

    @property
    def last_error(self) -> str | None:
        return self._latest.last_error

    @property
    def last_error_age_s(self) -> float | None:
        return self._latest.last_error_age_s

    @property
    def _latest(self) -> SideHealth:
        sides = [side for side in (self.reads, self.writes) if side.last_error_age_s is not None]
        return min(sides, key=lambda side: side.last_error_age_s or 0.0, default=self.reads)
