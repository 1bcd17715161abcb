"""The bytes of the disk tier's folders: who gets them, and what goes for it."""

from __future__ import annotations

import contextlib
import threading
import time

from lmcache import metrics
from lmcache.keys import ChunkKey
from lmcache.storage.backends.disk_folder import Folder
from lmcache.storage.backends.disk_index import DiskIndex, Entry

ROUNDS, SPARING_ROUNDS = 16, 3
# A folder is scanned again when other processes have written this share of it that we don't know, but not so often that
# scans would take more than a twentieth of the time.
UNKNOWN_SHARE, SCAN_PAUSE = 1 / 8, 20


class DiskSpace:
    """Reserves and evicts, folder by folder. Thread-safe.

    share: bytes that the files of one folder may have, over all processes.
    """

    def __init__(self, index: DiskIndex, folders: int, share: int, tier: str) -> None:
        self._index, self._share, self._tier = index, share, tier
        self._lock = threading.Lock()
        self._pending = [0] * folders
        self._next_scan = [0.0] * folders

    def reserve(self, folder: Folder, key: ChunkKey, size: int, spares: list[str]) -> bool:
        """Count ``size`` bytes more, evicting as need be; False when they cannot be had.

        ``settle`` ends the reservation, when the chunk is in the index or will not be.
        spares: is given the file of a victim, which the chunk of ``key`` can be written over: that is quicker than to
        remove one file and make another, by a third on ext4.
        """
        if size > self._share:
            return False
        for attempt in range(ROUNDS):
            limit = self._limit(folder, size)
            if self._count(folder, size, limit):
                return True
            missing = folder.account.read() + size - limit
            if missing <= 0 or self._scan_if_due(folder, missing):
                continue  # somebody has just given bytes back, or we know more now
            victims = self._index.candidates(folder.number, missing)
            if not victims:
                break  # other writers have reserved what is not indexed yet
            evicted = 0
            for victim, entry in victims:
                if attempt < SPARING_ROUNDS and folder.used_since(victim, entry.used_ns):
                    # Another process has used it since we last heard of it.
                    self._index.keep(victim, time.time_ns())
                elif not spares and size // 2 <= entry.size <= size * 2:
                    evicted += self._take(folder, victim, entry, key, spares)
                else:
                    evicted += self._evict(folder, victim, entry)
            metrics.EVICTED_CHUNKS.labels(self._tier).inc(evicted)
        for spare in spares:
            folder.drop(spare)
        return False

    def settle(self, folder: int, size: int) -> None:
        """A reservation has ended."""
        with self._lock:
            self._pending[folder] -= size

    def trim(self, folder: Folder) -> None:
        """Evict what is beyond the folder's share."""
        excess = folder.account.read() - self._share
        victims = self._index.candidates(folder.number, excess)
        evicted = sum(self._evict(folder, key, entry) for key, entry in victims)
        metrics.EVICTED_CHUNKS.labels(self._tier).inc(evicted)

    def unlink(self, folder: Folder, key: ChunkKey, entry: Entry | None) -> bool:
        """Remove a file and count its bytes no more; whether it was this call that removed it. OSError."""
        found = folder.find(key) if entry is None else None
        size = entry.size if entry is not None else found[2] if found is not None else 0
        gone = folder.unlink(key)
        if gone:
            folder.account.change(-size)
        return gone

    def scan(self, folder: Folder) -> None:
        """Bring index and account in line with the files. OSError."""
        started = time.monotonic()
        folder.remade = False
        folder.account.open()
        changes = folder.account.changes()
        known = set(self._index.keys_of(folder.number))
        found, writing = folder.scan()
        folder.account.correct(changes, sum(size for _, _, size in found) + writing)
        for used_ns, key, size in found:
            if key in known:
                known.discard(key)
            elif self._index.find(key) is None:
                self._index.add(key, Entry(folder.number, size, used_ns))
        for key in known:
            self._index.forget(key)
        now = time.monotonic()
        self._next_scan[folder.number] = now + SCAN_PAUSE * (now - started)

    def _count(self, folder: Folder, size: int, limit: int) -> bool:
        if not folder.account.reserve(size, limit):
            return False
        with self._lock:
            self._pending[folder.number] += size
        return True

    def _limit(self, folder: Folder, size: int) -> int:
        """Bytes that the folder may have: its share of the capacity, less when its file system is fuller than that."""
        try:
            free = folder.free_bytes() - self._pending[folder.number]
        except OSError:
            return self._share
        if size > free + self._index.known_bytes(folder.number):
            return self._share  # evicting everything would not do, so nothing is evicted: the write says what is wrong
        return min(self._share, folder.account.read() + free)

    def _evict(self, folder: Folder, key: ChunkKey, entry: Entry) -> bool:
        self._index.forget(key)
        with contextlib.suppress(OSError):
            return self.unlink(folder, key, entry)
        return False

    def _take(self, folder: Folder, victim: ChunkKey, entry: Entry, key: ChunkKey, spares: list[str]) -> bool:
        self._index.forget(victim)
        with contextlib.suppress(OSError):
            if (spare := folder.take(victim, key)) is not None:
                folder.account.change(-entry.size)
                spares.append(spare)
                return True
        return False

    def _scan_if_due(self, folder: Folder, missing: int) -> bool:
        known = self._index.known_bytes(folder.number)
        unknown = folder.account.read() - known - self._pending[folder.number]
        wanted = unknown > self._share * UNKNOWN_SHARE or (unknown > 0 and missing > known)
        if not wanted or time.monotonic() < self._next_scan[folder.number]:
            return False
        with contextlib.suppress(OSError):
            self.scan(folder)
            return True
        return False
