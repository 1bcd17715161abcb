"""How much is computed again while a prompt's KV is loaded, from what loading and computing took so far.

    load      |0000|1111|2222|3333|             bytes of a layer / throughput
    compute        |000 |111 |222 |333|         a + b rows, of a layer

After the first layer, loading and computing run side by side, and the prompt takes as long as the slower one. Where
loading is slower, the controller raises the ratio: more tokens are recomputed, for better quality at no cost in time.
Conversely, for a given ratio, `slowest_hidden` names the slowest tier that the model does not have to wait for.

Yao et al., "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion", section 5
(arXiv:2405.16444). There both times are profiled beforehand; here they are measured as prompts come.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from lmcache.errors import ConfigError

_SPREAD = 0.02  # rows must differ by so much, relative, to tell what a row costs from what a layer costs


class LoadingController:
    """Chooses ratios such that computing is hidden by loading. Thread-safe.

    min_ratio: what quality needs, chosen whenever nothing better is known. max_ratio: what is chosen at most.
    memory: weight of what was measured before, against 1 for the latest. Raises ConfigError for what cannot be.
    """

    def __init__(self, min_ratio: float = 0.15, max_ratio: float = 1.0, *, memory: float = 0.75) -> None:
        if not 0 <= min_ratio <= max_ratio <= 1:
            raise ConfigError(f"min_ratio is {min_ratio}, max_ratio {max_ratio}; they must ascend within 0 .. 1")
        if not 0 <= memory < 1:
            raise ConfigError(f"memory is {memory}; it must be 0 .. 1, less than 1")
        self.min_ratio, self.max_ratio = min_ratio, max_ratio
        self._memory = memory
        self._lock = threading.Lock()
        self._bytes = self._seconds = 0.0
        self._moments: tuple[float, ...] = (0.0,) * 5  # of rows x and seconds y: 1, x, y, xx, xy

    def read(self, nbytes: int, seconds: float) -> None:
        """So many bytes came from tiers below memory, the last of them `seconds` after all were asked for."""
        if nbytes > 0:
            with self._lock:
                self._bytes = self._memory * self._bytes + nbytes
                self._seconds = self._memory * self._seconds + max(seconds, 1e-9)

    def computed(self, rows: Sequence[int], seconds: float) -> None:
        """Layers that computed so many rows each took `seconds` together."""
        if rows and sum(rows):
            x, y = sum(rows) / len(rows), seconds / len(rows)
            with self._lock:
                pairs = zip(self._moments, (1.0, x, y, x * x, x * y), strict=True)
                self._moments = tuple(self._memory * old + new for old, new in pairs)

    @property
    def throughput(self) -> float | None:
        """Bytes a second of reads from below memory; None before the first."""
        with self._lock:
            return self._bytes / self._seconds if self._seconds else None

    def compute_s(self, rows: float) -> float | None:
        """Seconds of a layer that computes so many rows; None before the first blend."""
        line = self._line()
        return line and line[0] + line[1] * rows

    def ratio(self, tokens: int, bytes_per_layer: float, *, always: int = 0, complete: float = 0.0) -> float:
        """The largest share of `tokens` whose computing takes no longer than loading, within min_ratio .. max_ratio.

        tokens: reused, so that they may be computed again or not. bytes_per_layer: that have yet to be read from below
        memory, mean over layers. always: tokens that every layer computes in any case. complete: share of the layers
        that compute all tokens before one chooses.
        """
        throughput, line = self.throughput, self._line()
        if not (throughput and line and tokens and bytes_per_layer and complete < 1):
            return self.min_ratio
        layer_s, row_s = line
        load_s = bytes_per_layer / throughput
        load_s = (load_s - complete * (layer_s + row_s * (always + tokens))) / (1 - complete)
        hidden = ((load_s - layer_s) / row_s - always) / tokens
        return min(max(hidden, self.min_ratio), self.max_ratio)

    def _line(self) -> tuple[float, float] | None:
        """(seconds of a layer, seconds of a row in it) by least squares; (0, ..) where row counts differ too little.

        Then all of a layer's cost is charged to its rows, which overestimates what more rows would cost: the ratio
        rises in steps, and each is measured.
        """
        with self._lock:
            n, x, y, xx, xy = self._moments
        if not n:
            return None
        spread = n * xx - x * x
        if spread > (_SPREAD * x) ** 2:
            row_s = (n * xy - x * y) / spread
            layer_s = (y - row_s * x) / n
            if row_s > 0 and layer_s >= 0:
                return layer_s, row_s
        return 0.0, max(xy / xx, 1e-12)


def slowest_hidden(throughputs: Mapping[str, float], bytes_per_layer: float, compute_s: float) -> str | None:
    """The slowest of the tiers from which a layer is loaded while one computes; None where each is waited for.

    throughputs: bytes a second of each tier. compute_s: of a layer at the ratio that quality needs
    (`LoadingController.compute_s`). The slowest is taken for the cheapest.
    """
    hidden = [name for name, throughput in throughputs.items() if bytes_per_layer <= throughput * compute_s]
    return min(hidden, key=lambda name: throughputs[name], default=None)
