"""How fast bytes move between here and a tier, and how many of them make one batch."""

from __future__ import annotations

FIRST_BYTES = 512 << 10  # of a batch while nothing is known
LEAST_BYTES = 256 << 10
WEIGHT = 0.5  # of the newest batch in the average
SHARE = 1 / 8
"""Of a deadline that one batch should take. What is under way when it ends is lost, or comes too late."""


class Pace:
    """The pace of a tier's reads, or of its writes: that of one call, which may share the link with others."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        """Exponentially weighted mean; None before the first batch."""

    def batch_bytes(self, seconds: float, most: int) -> int:
        """Bytes that should take so many seconds, at most ``most``. A batch has one chunk at least, however large."""
        if self.bytes_per_s is None:
            return min(most, FIRST_BYTES)
        return min(most, max(LEAST_BYTES, int(self.bytes_per_s * seconds)))

    def moved(self, nbytes: int, seconds: float) -> None:
        """A batch took so long."""
        now = nbytes / max(seconds, 1e-6)
        known = now if self.bytes_per_s is None else self.bytes_per_s
        self.bytes_per_s = known + WEIGHT * (now - known)

    def failed(self, nbytes: int, seconds: float) -> None:
        """A batch did not end within so long: the next ones are half of it at most."""
        most = nbytes / 2 / max(seconds, 1e-6)
        known = float(FIRST_BYTES) if self.bytes_per_s is None else self.bytes_per_s
        self.bytes_per_s = min(most, known)
