"""The bytes of the disk tier's folders: who gets them, and what goes for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from lmcache import metrics
from lmcache.errors import OddFileError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.disk.folder import Folder, Spare
from lmcache.storage.index import ChunkIndex, Entry

ROUNDS, SPARING_ROUNDS = 16, 3
# A folder is scanned again when other processes have written this share of it that we don't know, but not so often that
# scans would take more than a twentieth of the time.
UNKNOWN_SHARE, SCAN_PAUSE = 1 / 8, 20
# A write that hangs must not make every other one wait for a scan that waits for it.
SCAN_WAIT_S = 2.0
# While a file system has plenty of room it is asked only now and then how much.
PLENTY_BYTES, ASK_AGAIN_S = 4 << 30, 1.0


class DiskSpace:
    """Reserves and evicts, folder by folder. Thread-safe.

    share: bytes that the files of one folder may have, over all processes.
    """

    def __init__(self, index: ChunkIndex, folders: int, share: int, tier: str) -> None:
        self._index, self._share, self._tier = index, share, tier
        self._lock = threading.Lock()
        self._pending = [0] * folders
        self._next_scan = [0.0] * folders
        self._room = [0] * folders
        """Bytes that the file system had left for us when it was asked, less what has been reserved since then."""
        self._next_ask = [0.0] * folders
        self._gates = [_Gate() for _ in range(folders)]

    def reserve(self, folder: Folder, key: ChunkKey, size: int, spares: list[Spare]) -> bool:
        """Count ``size`` bytes more, evicting as need be; False when they cannot be had.

        ``end_write`` has to follow when they are had, and ``settle`` when the chunk is in the index.
        spares: is given the file of a victim, which the chunk of ``key`` can be written over: that is quicker than to
        remove one file and make another, by a third on ext4.
        """
        if size > self._share:
            return False
        gate, had = self._gates[folder.number], False
        gate.enter()
        try:
            had = self._reserve(folder, key, size, spares, gate)
        finally:
            if not had:
                for spare in spares:
                    folder.drop(spare.spot)
                gate.leave()
        return had

    def _reserve(self, folder: Folder, key: ChunkKey, size: int, spares: list[Spare], gate: _Gate) -> bool:
        scanned, rounds, gone = False, 0, 0
        while rounds < ROUNDS:
            # What was evicted is taken off the account in the same step: each step locks a file.
            missing = folder.account.reserve(size, self._share, self._room_in(folder, size), gone)
            gone = 0
            if not missing:
                with self._lock:
                    self._pending[folder.number] += size
                    self._room[folder.number] -= size
                return True
            if not scanned and self._scan_is_wanted(folder, missing):
                scanned = True
                with gate.outside(), contextlib.suppress(OSError):
                    self.scan(folder, exact=False)
            elif (victims := self._index.candidates(folder.number, missing)) == []:
                break  # other writers have reserved what is not indexed yet
            else:
                # Victims that other processes have evicted already make no round, as each of them is forgotten.
                moved, gone = self._make_room(folder, victims, key, spares, size, sparing=rounds < SPARING_ROUNDS)
                rounds += moved
        if gone:
            folder.account.change(-gone)
        return False

    def end_write(self, folder: Folder, size: int, *, new: bool) -> None:
        """The bytes that were reserved are in a file that is there now, or will not be needed."""
        if not new:
            folder.account.change(-size)
            self.settle(folder.number, size)
        self._gates[folder.number].leave()

    def settle(self, folder: int, size: int) -> None:
        """A reservation has ended: its chunk is in the index."""
        with self._lock:
            self._pending[folder] -= size

    def trim(self, folder: Folder) -> None:
        """Evict what is beyond the folder's share."""
        with self._gates[folder.number].inside():
            excess = folder.account.read() - self._share
            freed = [self._evict(folder, key, entry) for key, entry in self._index.candidates(folder.number, excess)]
            folder.account.change(-sum(freed))
        metrics.EVICTED_CHUNKS.labels(self._tier).inc(sum(map(bool, freed)))

    def unlink(self, folder: Folder, key: ChunkKey, entry: Entry | None) -> bool:
        """Remove a file and count its bytes no more; whether it was this call that removed it. OSError."""
        with self._gates[folder.number].inside():
            found = folder.find(key) if entry is None else None
            size = entry.size if entry is not None else found[2] if found is not None else 0
            gone = folder.unlink(key)
            if gone:
                folder.account.change(-size)
        return gone

    def scan(self, folder: Folder, *, exact: bool = True) -> None:
        """Bring index and account in line with the files. OSError.

        exact: also where the account has a little more than there is, such as bytes that others are about to write.
        """
        started = time.monotonic()
        with self._gates[folder.number].alone():
            folder.remade = False
            folder.account.open()
            changes = folder.account.changes()
            known = set(self._index.keys_of(folder.number))
            found, writing = folder.scan()
            slack = 0 if exact else int(self._share * UNKNOWN_SHARE)
            folder.account.correct(changes, sum(size for _, _, size in found) + writing, slack)
            for used_ns, key, size in found:
                if key in known:
                    known.discard(key)
                elif self._index.find(key) is None:
                    self._index.add(key, Entry(folder.number, size, used_ns))
            for key in known:
                self._index.forget(key)
        now = time.monotonic()
        self._next_scan[folder.number] = now + SCAN_PAUSE * (now - started)

    def _room_in(self, folder: Folder, size: int) -> int:
        """By how many bytes the folder may grow before its file system is full."""
        number, now = folder.number, time.monotonic()
        if self._room[number] < PLENTY_BYTES or now >= self._next_ask[number]:
            try:
                free = folder.free_bytes()
            except OSError:
                return self._share  # the write says what is wrong
            with self._lock:
                self._room[number] = free - self._pending[number]
                self._next_ask[number] = now + ASK_AGAIN_S
        room = self._room[number]
        # When evicting everything would not do nothing is evicted: the write says what is wrong.
        return self._share if size > room + self._index.known_bytes(number) else room

    def _make_room(
        self,
        folder: Folder,
        victims: list[tuple[ChunkKey, Entry]],
        key: ChunkKey,
        spares: list[Spare],
        size: int,
        *,
        sparing: bool,
    ) -> tuple[bool, int]:
        """Evict ``victims``, one of them into ``spares``. Whether any was there, and bytes to take off the account."""
        freed, kept = [], 0
        for victim, entry in victims:
            if sparing and folder.used_since(victim, entry.used_ns):
                # Another process has used it since we last heard of it.
                self._index.keep(victim, time.time_ns())
                kept += 1
            elif not spares and size // 2 <= entry.size <= size * 2:
                freed.append(self._take(folder, victim, entry, key, spares))
            else:
                freed.append(self._evict(folder, victim, entry))
        metrics.EVICTED_CHUNKS.labels(self._tier).inc(sum(map(bool, freed)))
        return any(freed) or kept > 0, sum(freed)

    def _evict(self, folder: Folder, key: ChunkKey, entry: Entry) -> int:
        """Bytes that it freed, which the account does not know yet."""
        try:
            return entry.size if folder.unlink(key) else 0
        except OSError:
            return 0
        finally:
            # Not before: who finds a file that the index does not have adds it.
            self._index.forget(key, entry)

    def _take(self, folder: Folder, victim: ChunkKey, entry: Entry, key: ChunkKey, spares: list[Spare]) -> int:
        """The same; the file goes to ``spares``, unless it has to stay as it is."""
        try:
            spare = folder.take(victim, key)
        except OddFileError:
            return self._evict(folder, victim, entry)
        except OSError:
            return 0
        finally:
            self._index.forget(victim, entry)
        if spare is None:
            return 0
        spares.append(spare)
        return entry.size

    def _scan_is_wanted(self, folder: Folder, missing: int) -> bool:
        known = self._index.known_bytes(folder.number)
        unknown = folder.account.read() - known - self._pending[folder.number]
        due = time.monotonic() >= self._next_scan[folder.number]
        # When nothing we know of is left to evict, others hold nearly everything, and a scan puts an end to that.
        return (unknown > 0 and missing > known) or (unknown > self._share * UNKNOWN_SHARE and due)


class _Gate:
    """Lets in any number of changes (of a file, then of the account), or one scan, which must see both or neither."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._scanning = False

    def enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._scanning)
            self._inside += 1

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        self.leave()
        try:
            yield
        finally:
            self.enter()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._scanning)
            self._scanning = True
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._inside, SCAN_WAIT_S):
                    raise TimeoutError(f"writes have been under way for {SCAN_WAIT_S} s: no scan now")
            yield
        finally:
            with self._changed:
                self._scanning = False
                self._changed.notify_all()
