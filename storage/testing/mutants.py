"""``FolderBackend`` with one defect each: what the conformance suite is for.

``MUTANTS`` names for each a test of ``BackendTests`` that fails with it. ``UNSEEN`` are those that the suite cannot
tell from a right one, because it looks from outside only: they want tests of your own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

from lmcache import metrics
from lmcache.errors import ClosedError, CorruptChunkError, StorageError
from lmcache.keys import FINGERPRINT_BYTES, KEY_BYTES, NAMESPACE_BYTES, ChunkKey
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header
from lmcache.storage.memory.pool import PAGE
from lmcache.storage.testing.reference import FolderBackend, FolderConfig


class _Memory:
    """Bytes that a backend takes for a buffer."""

    address = 0

    def __init__(self, view: memoryview) -> None:
        self.view, self.nbytes = view, view.nbytes

    def share(self) -> Buffer:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError


# -- what is there -----------------------------------------------------------------------------------------------------


class ContainsLooksBehindAGap(FolderBackend):
    """``contains`` counts what is there instead of the leading run."""

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        return sum(len(self.sizes([key])) for key in keys)


class SizesLookBehindAGap(FolderBackend):
    """``sizes`` leaves out what is not there instead of stopping."""

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        sizes = super().sizes
        return [size for key in keys for size in sizes([key])]


class SizesWithHeaders(FolderBackend):
    """``sizes`` gives the bytes of files."""

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        return [HEADER_BYTES + size for size in super().sizes(keys)]


class KeysIncomplete(FolderBackend):
    """``keys`` forgets one."""

    def keys(self) -> list[ChunkKey] | None:
        return (super().keys() or [])[1:]


# -- reading -----------------------------------------------------------------------------------------------------------


class GetCountsBehindAGap(FolderBackend):
    """``get`` goes on behind a miss and counts all that it filled."""

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        get = super().get
        return sum(get([key], [buffer]) for key, buffer in zip(keys, into, strict=True))


class GetTakesAnyLength(FolderBackend):
    """``get`` fills a shorter buffer with the beginning of the payload."""

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            whole = memoryview(bytearray(self._sizes.get(key, 0)))
            if len(whole) < buffer.nbytes or not super().get([key], [_Memory(whole)]):
                return count
            buffer.view[:] = whole[: buffer.nbytes]
        return len(keys)


class WritesWholePages(FolderBackend):
    """``get`` writes zeros behind the payload, up to the end of the page."""

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        ctypes.memset(buffer.address, 0, -(-buffer.nbytes // PAGE) * PAGE)
        return super()._load(key, buffer)


class WritesThePageAfter(FolderBackend):
    """``get`` writes a byte too many, where another buffer begins."""

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        ctypes.memset(buffer.address + -(-buffer.nbytes // PAGE) * PAGE, 0, 1)
        return super()._load(key, buffer)


class ReadsThroughOneScratch(FolderBackend):
    """Threads that read use one memory on the way."""

    _scratch = memoryview(bytearray(2 << 20))

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        if not super()._load(key, _Memory(self._scratch[: buffer.nbytes])):
            return False
        buffer.view[:] = self._scratch[: buffer.nbytes]
        return True


class RemembersWhatItRead(FolderBackend):
    """A cache in front, that a removal does not reach."""

    def __init__(self, config: FolderConfig) -> None:
        super().__init__(config)
        self._cache: dict[ChunkKey, bytes] = {}

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            if len(self._cache.get(key, b"")) != buffer.nbytes:
                if not super().get([key], [buffer]):
                    return count
                self._cache[key] = bytes(buffer.view)
            buffer.view[:] = self._cache[key]
        return len(keys)


class RemembersSizes(FolderBackend):
    """Sizes are remembered beyond a removal."""

    def __init__(self, config: FolderConfig) -> None:
        super().__init__(config)
        self._seen: dict[ChunkKey, int] = {}

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._seen.update(zip(keys, super().sizes(keys), strict=False))
        found = [self._seen.get(key, 0) for key in keys]
        return found[: found.index(0)] if 0 in found else found


# -- keys --------------------------------------------------------------------------------------------------------------


class _Renamed(FolderBackend):
    """Knows chunks by another key that it makes of theirs."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        raise NotImplementedError

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        return super().sizes([self._name(key) for key in keys])

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        return super().get([self._name(key) for key in keys], into)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        return super().put([self._name(key) for key in keys], buffers)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return super().remove([self._name(key) for key in keys])

    def keys(self) -> list[ChunkKey] | None:
        super().keys()
        return None


def _padded(key: ChunkKey, namespace: bytes, digest: bytes) -> ChunkKey:
    return ChunkKey(namespace.ljust(NAMESPACE_BYTES, b"\0"), digest.ljust(len(key.digest), b"\0"))


class HalfDigest(_Renamed):
    """The first half of the digest is all that is kept of it."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        return _padded(key, key.namespace, key.digest[:16])


class OtherHalfOfTheDigest(_Renamed):
    """The second half is."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        return _padded(key, key.namespace, key.digest[16:])


class NoTags(_Renamed):
    """Chunks of other tenants and adapters have the same name."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        return _padded(key, key.fingerprint, key.digest)


class NoFormat(_Renamed):
    """Chunks of other formats have the same name."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        return _padded(key, bytes(FINGERPRINT_BYTES) + key.namespace[FINGERPRINT_BYTES:], key.digest)

    def clear(self, fingerprint: bytes | None = None) -> int:
        return super().clear()


class NamesWithoutCase(_Renamed):
    """Names fold the case of letters."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        return ChunkKey(key.namespace, key.digest.lower())


class NamesAsText(_Renamed):
    """Bytes that are no ASCII have one name."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        return ChunkKey(key.namespace, key.digest.decode("ascii", "replace").replace("\ufffd", "?").encode())


class FieldsInAnyOrder(_Renamed):
    """The two halves of a key can stand for each other."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        raw, half = key.to_bytes(), KEY_BYTES // 2
        return ChunkKey.from_bytes(b"".join(sorted([raw[:half], raw[half:]])))


# -- writing -----------------------------------------------------------------------------------------------------------


class CountsAKeyOnce(FolderBackend):
    """``put([k, k])`` is 1."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        return min(super().put(keys, buffers), len(set(keys)))


class LastOfABatch(FolderBackend):
    """Of a key that stands in a batch twice, the last bytes are held."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        return super().put(list(reversed(keys)), list(reversed(buffers)))


class PutsInAnotherOrder(FolderBackend):
    """The keys are sorted, and the buffers stay as they were."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        return super().put(sorted(keys, key=ChunkKey.to_bytes), buffers)


class SeenBeforeItIsWritten(FolderBackend):
    """The index knows a chunk before its file is there."""

    def _store(self, key: ChunkKey, buffer: Buffer) -> None:
        with self._lock:
            self._add(key, buffer.nbytes)
        self.file_of(key).parent.mkdir(parents=True, exist_ok=True)
        self._write(self.file_of(key), key, buffer)


class SeenWhileItIsWritten(FolderBackend):
    """The index knows a chunk once its header is written."""

    def _store(self, key: ChunkKey, buffer: Buffer) -> None:
        self.file_of(key).parent.mkdir(parents=True, exist_ok=True)
        with self.file_of(key).open("wb") as file:
            file.write(encode_header(key, buffer.view))
            with self._lock:
                self._add(key, buffer.nbytes)
            file.write(buffer.view)


class OverwritesInPlace(FolderBackend):
    """A key that is put again is written over the old bytes."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        with self._working():
            for key, buffer in zip(keys, buffers, strict=True):
                if self._sizes.get(key) == buffer.nbytes:
                    self._write(self.file_of(key), key, buffer)
        return super().put(keys, buffers)


class WritesThroughOneScratch(FolderBackend):
    """Threads that write use one memory on the way."""

    _scratch = memoryview(bytearray(2 << 20))

    def _write(self, path: Path, key: ChunkKey, buffer: Buffer) -> None:
        payload = self._scratch[: buffer.nbytes]
        payload[:] = buffer.view
        super()._write(path, key, _Memory(payload))


class WritesLater(FolderBackend):
    """The bytes are written with the next call: until then the backend looks at its caller's memory."""

    def __init__(self, config: FolderConfig) -> None:
        super().__init__(config)
        self._later: list[tuple[ChunkKey, memoryview]] = []

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._flush()
        self._later = [(key, buffer.view) for key, buffer in zip(keys, buffers, strict=True)]
        return len(keys)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._flush()
        return super().sizes(keys)

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        self._flush()
        return super().get(keys, into)

    def _flush(self) -> None:
        later, self._later = self._later, []
        for key, view in later:
            super().put([key], [_Memory(view)])


class ScramblesTheBuffer(FolderBackend):
    """What is stored is encoded where it lies, in the caller's buffer."""

    def _write(self, path: Path, key: ChunkKey, buffer: Buffer) -> None:
        super()._write(path, key, buffer)
        buffer.view[:] = bytes(buffer.nbytes)


class KeepsAHandle(FolderBackend):
    """``put`` takes a handle of its own and never gives it back."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._handles = [buffer.share() for buffer in buffers]
        return super().put(keys, buffers)


class ReleasesTheBuffer(FolderBackend):
    """``put`` gives back what is its caller's."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        held = super().put(keys, buffers)
        for buffer in buffers:
            buffer.release()
        return held


# -- capacity ----------------------------------------------------------------------------------------------------------


class NoCapacity(FolderBackend):
    """It takes whatever comes."""

    def __init__(self, config: FolderConfig) -> None:
        super().__init__(config)
        self._capacity = 1 << 62


class CapacityForABatchOnly(FolderBackend):
    """What earlier calls put is not counted."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._used = 0
        return super().put(keys, buffers)


class CapacityAnewWithEachStart(FolderBackend):
    """What lies there at the start is not counted."""

    def _scan(self) -> None:
        super()._scan()
        self._used = 0


class RoomIsNeverGivenBack(FolderBackend):
    """A removal does not make room."""

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        used = self._used
        removed = super().remove(keys)
        self._used = used
        return removed


class CountsWhatItWrote(FolderBackend):
    """``put`` counts what it wrote, also where that had to go again for the rest of the batch."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        put = super().put
        return sum(put([key], [buffer]) for key, buffer in zip(keys, buffers, strict=True))


class EvictsForWhatNeverFits(FolderBackend):
    """A chunk that is larger than the place costs all others."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        for key, buffer in zip(keys, buffers, strict=True):
            if HEADER_BYTES + buffer.nbytes > self._capacity:
                self.clear()
            super().put([key], [buffer])
        return super().put(keys, buffers)


class TooLargeIsAnError(FolderBackend):
    """A chunk that is larger than the place ends the batch with an error; what was put before it is not told."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        for key, buffer in zip(keys, buffers, strict=True):
            if HEADER_BYTES + buffer.nbytes > self._capacity:
                raise StorageError("too large")
            super().put([key], [buffer])
        return super().put(keys, buffers)


# -- removing ----------------------------------------------------------------------------------------------------------


class RemoveStopsAtAGap(FolderBackend):
    """``remove`` ends at the first key that is not there."""

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return super().remove(keys[: self.contains(keys)])


class RemoveLeavesTheLast(FolderBackend):
    """``remove`` of several leaves the last."""

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        if len(keys) < 2:
            return super().remove(keys)
        return super().remove(keys[:-1]) + self.contains(keys[-1:])


class RemoveCountsKeys(FolderBackend):
    """``remove`` counts what it was asked for."""

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        super().remove(keys)
        return len(keys)


class RemoveCountsAKeyTwice(FolderBackend):
    """``remove([k, k])`` is 2."""

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        there = sum(self.contains([key]) for key in keys)
        super().remove(keys)
        return there


class RemoveWithoutALock(FolderBackend):
    """Two threads that remove one key both find it there."""

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        with self._working():
            there = [key for key in keys if key in self._sizes]
            for key in dict.fromkeys(there):
                self.file_of(key).unlink()
                self._used -= HEADER_BYTES + self._sizes[key]
                del self._sizes[key]
            return len(set(there))


class ClearTakesAll(FolderBackend):
    """``clear`` of a format clears the others too."""

    def clear(self, fingerprint: bytes | None = None) -> int:
        return super().clear()


class ClearLeavesTenants(FolderBackend):
    """``clear`` of a format leaves the chunks of requests with tags."""

    def clear(self, fingerprint: bytes | None = None) -> int:
        if fingerprint is None:
            return super().clear()
        without_tags = fingerprint + bytes(NAMESPACE_BYTES - FINGERPRINT_BYTES)
        return self.remove([key for key in self.keys() or () if key.namespace == without_tags])


# -- errors ------------------------------------------------------------------------------------------------------------


class AMissIsAnError(FolderBackend):
    """``get`` of a key that is not there raises KeyError."""

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        for key in keys:
            self._sizes[key]
        return super().get(keys, into)


class AnotherLengthIsAnError(FolderBackend):
    """``get`` into a buffer of another length raises ValueError."""

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        for key, buffer in zip(keys, into, strict=True):
            if self._sizes.get(key, buffer.nbytes) != buffer.nbytes:
                raise ValueError("wrong length")
        return super().get(keys, into)


class AnEmptyBatchIsAnError(FolderBackend):
    """``remove([])`` raises IndexError."""

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        self.file_of(keys[0])
        return super().remove(keys)


class ForeignErrors(FolderBackend):
    """What the system raises comes out as it is."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        for key, buffer in zip(keys, buffers, strict=True):
            if key not in self._sizes and HEADER_BYTES + buffer.nbytes <= self._capacity:
                self._store(key, buffer)
        return super().put(keys, buffers)


class FailedWritesCount(FolderBackend):
    """``put`` says nothing of an error, and that all is held."""

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        try:
            return super().put(keys, buffers)
        except OSError:
            return len(keys)


class NeverRecovers(FolderBackend):
    """After a failure it holds nothing any more."""

    def _store(self, key: ChunkKey, buffer: Buffer) -> None:
        try:
            super()._store(key, buffer)
        except OSError:
            self._capacity = 0
            raise


class DamageIsServed(FolderBackend):
    """Checksums are not looked at."""

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        with self.file_of(key).open("rb") as file:
            file.seek(HEADER_BYTES)
            file.readinto(buffer.view)
        return True


class DamageStays(FolderBackend):
    """What is damaged is a miss, and stays where it is."""

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        try:
            with self.file_of(key).open("rb") as file:
                header = file.read(HEADER_BYTES)
                file.readinto(buffer.view)
            check_chunk(header, key, buffer.view)
        except CorruptChunkError:
            metrics.CORRUPT_CHUNKS.labels(self.name).inc()
            return False
        except FileNotFoundError:
            return False
        return True


class DamageIsNotCounted(FolderBackend):
    """What is damaged is removed without a word."""

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        try:
            with self.file_of(key).open("rb") as file:
                header = file.read(HEADER_BYTES)
                file.readinto(buffer.view)
            check_chunk(header, key, buffer.view)
        except (CorruptChunkError, FileNotFoundError):
            with self._lock:
                self._drop(key)
            return False
        return True


# -- closing -----------------------------------------------------------------------------------------------------------


class ClosesOnce(FolderBackend):
    """A second ``close`` raises."""

    def close(self) -> None:
        if self._closed:
            raise ClosedError("closed already")
        super().close()


class CloseForgets(FolderBackend):
    """``close`` removes what was to stay."""

    def close(self) -> None:
        if not self._closed:
            self.clear()
        super().close()


class StartsEmpty(FolderBackend):
    """What lies there is not looked for at the start."""

    def _scan(self) -> None:
        pass


class AnswersAfterClose(FolderBackend):
    """``close`` does not keep it from working."""

    def close(self) -> None:
        pass


class MissesAfterClose(FolderBackend):
    """After ``close`` nothing is there, and nothing is removed, without a word."""

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        return [] if self._closed else super().sizes(keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        return 0 if self._closed else super().clear(fingerprint)


class ForeignErrorsAfterClose(FolderBackend):
    """After ``close`` what it lacks raises, whatever that is."""

    def close(self) -> None:
        self._sizes = None  # type: ignore[assignment]


class ForeignErrorsWhileItCloses(FolderBackend):
    """``close`` takes away what a call uses that runs."""

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        with self._working():
            for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
                if self._sizes.get(key) != buffer.nbytes or not self._load(key, buffer):
                    return count
                if self._closed:
                    raise RuntimeError("cannot schedule new futures after shutdown")
            return len(keys)


# -- what cannot be seen from outside ----------------------------------------------------------------------------------


class ShortHashes(_Renamed):
    """Names of 64 bits: two of 4,000,000,000 keys share one. No test can find such a pair."""

    @staticmethod
    def _name(key: ChunkKey) -> ChunkKey:
        hashed = xxhash.xxh3_64_digest(key.to_bytes()[FINGERPRINT_BYTES:])
        return _padded(key, key.fingerprint, hashed)


class AnyHeader(FolderBackend):
    """The key in the header is not compared: the chunk of another key under this name is served."""

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        try:
            with self.file_of(key).open("rb") as file:
                header = file.read(HEADER_BYTES)
                file.readinto(buffer.view)
            check_chunk(header, ChunkKey.from_bytes(header[16 : 16 + KEY_BYTES]), buffer.view)
        except FileNotFoundError:
            return False
        except CorruptChunkError:
            metrics.CORRUPT_CHUNKS.labels(self.name).inc()
            with self._lock:
                self._drop(key)
            return False
        return True


class LeaksDescriptors(FolderBackend):
    """Every ``get`` leaves a file open."""

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        os.open(self._root, os.O_RDONLY)
        return super()._load(key, buffer)


class SizesReadPayloads(FolderBackend):
    """``sizes`` reads whole files."""

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        sizes = super().sizes(keys)
        with self._lock:
            for key in keys[: len(sizes)]:
                if key in self._sizes:
                    self.file_of(key).read_bytes()
        return sizes


MUTANTS: dict[type[FolderBackend], str] = {
    ContainsLooksBehindAGap: "test_contains_and_get_stop_at_the_first_miss",
    SizesLookBehindAGap: "test_contains_and_get_stop_at_the_first_miss",
    SizesWithHeaders: "test_what_was_put_comes_back_bit_for_bit",
    KeysIncomplete: "test_keys_names_all_that_is_held",
    GetCountsBehindAGap: "test_contains_and_get_stop_at_the_first_miss",
    GetTakesAnyLength: "test_another_length_is_a_miss",
    WritesWholePages: "test_nothing_is_written_beside_the_buffer",
    WritesThePageAfter: "test_nothing_is_written_beside_the_buffer",
    ReadsThroughOneScratch: "test_calls_on_other_keys_meanwhile_change_nothing",
    RemembersWhatItRead: "test_what_is_put_after_a_removal_is_what_comes_back",
    RemembersSizes: "test_what_is_put_after_a_removal_is_what_comes_back",
    HalfDigest: "test_keys_that_are_alike_are_different",
    OtherHalfOfTheDigest: "test_keys_that_are_alike_are_different",
    NoTags: "test_keys_that_are_alike_are_different",
    NoFormat: "test_keys_that_are_alike_are_different",
    NamesWithoutCase: "test_keys_that_are_alike_are_different",
    NamesAsText: "test_keys_that_are_alike_are_different",
    FieldsInAnyOrder: "test_keys_that_are_alike_are_different",
    CountsAKeyOnce: "test_a_key_may_stand_in_a_batch_twice",
    LastOfABatch: "test_a_key_may_stand_in_a_batch_twice",
    PutsInAnotherOrder: "test_a_batch_is_answered_in_its_order",
    SeenBeforeItIsWritten: "test_a_chunk_is_seen_whole_or_not_at_all",
    SeenWhileItIsWritten: "test_a_chunk_is_seen_whole_or_not_at_all",
    OverwritesInPlace: "test_a_chunk_is_seen_whole_or_not_at_all",
    WritesThroughOneScratch: "test_threads_keep_their_keys_apart",
    WritesLater: "test_what_was_put_comes_back_bit_for_bit",
    ScramblesTheBuffer: "test_what_was_put_comes_back_bit_for_bit",
    KeepsAHandle: "test_buffers_stay_their_callers",
    ReleasesTheBuffer: "test_buffers_stay_their_callers",
    NoCapacity: "test_a_small_place_takes_new_chunks_and_never_too_many",
    CapacityForABatchOnly: "test_a_small_place_takes_new_chunks_and_never_too_many",
    CapacityAnewWithEachStart: "test_a_small_place_takes_new_chunks_and_never_too_many",
    RoomIsNeverGivenBack: "test_room_that_was_given_back_is_used_again",
    CountsWhatItWrote: "test_what_put_counts_is_what_is_held",
    EvictsForWhatNeverFits: "test_a_chunk_that_is_too_large_does_no_harm",
    TooLargeIsAnError: "test_a_chunk_that_is_too_large_does_no_harm",
    RemoveStopsAtAGap: "test_remove_counts_what_was_there",
    RemoveLeavesTheLast: "test_remove_counts_what_was_there",
    RemoveCountsKeys: "test_remove_counts_what_was_there",
    RemoveCountsAKeyTwice: "test_a_key_may_stand_in_a_batch_twice",
    RemoveWithoutALock: "test_threads_may_put_and_remove_the_same_keys",
    ClearTakesAll: "test_clear_by_format_leaves_the_others",
    ClearLeavesTenants: "test_clear_by_format_leaves_the_others",
    AMissIsAnError: "test_an_unknown_key_is_a_miss",
    AnotherLengthIsAnError: "test_another_length_is_a_miss",
    AnEmptyBatchIsAnError: "test_empty_batches_are_nothing",
    ForeignErrors: "test_a_place_that_fails_is_a_storage_error_or_a_miss",
    FailedWritesCount: "test_a_place_that_fails_is_a_storage_error_or_a_miss",
    NeverRecovers: "test_a_place_that_fails_is_a_storage_error_or_a_miss",
    DamageIsServed: "test_damaged_bytes_are_a_miss_counted_and_removed",
    DamageStays: "test_damaged_bytes_are_a_miss_counted_and_removed",
    DamageIsNotCounted: "test_damaged_bytes_are_a_miss_counted_and_removed",
    ClosesOnce: "test_close_is_idempotent",
    CloseForgets: "test_what_is_durable_survives_closing",
    StartsEmpty: "test_what_is_durable_survives_closing",
    AnswersAfterClose: "test_after_close_every_call_raises_closed_error",
    MissesAfterClose: "test_after_close_every_call_raises_closed_error",
    ForeignErrorsAfterClose: "test_after_close_every_call_raises_closed_error",
    ForeignErrorsWhileItCloses: "test_a_call_during_which_it_is_closed_ends",
}

UNSEEN: tuple[type[FolderBackend], ...] = (ShortHashes, AnyHeader, LeaksDescriptors, SizesReadPayloads)
