"""L4: one object a chunk in S3, Google Cloud Storage or Azure Blob Storage, by obstore.

    s3://bucket/prefix/<format fingerprint>/<tenant and tags>/<digest>.kv      header (4096 bytes), payload

An object becomes visible whole or not at all. The first writer of a key wins, where the store knows conditional puts.
Requests run on threads of the backend's own: its synchronous calls give the interpreter lock up, and were as fast as
its asynchronous ones.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import numpy as np
import xxhash
from pydantic import ByteSize, Field, SecretStr, model_validator

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ClosedError, ConfigError, CorruptChunkError, StorageError
from lmcache.forks import Home
from lmcache.keys import ChunkKey
from lmcache.storage.backends.objects.listing import Search
from lmcache.storage.base import Buffer, StorageBackend, distinct
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, check_header, encode_header
from lmcache.storage.index import RecentSizes
from lmcache.storage.naming import chunk_key, chunk_path
from lmcache.storage.run.budget import ByteBudget
from lmcache.storage.run.threads import Threads

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
    from obstore.store import AzureStore, GCSStore, S3Store
except ModuleNotFoundError as error:
    raise ConfigError("object stores need obstore; in your clone: pip install -e '.[object-store]'") from error

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

T = TypeVar("T")
_runtime: list[Home] = []
"""Of the first store that this process opened: the threads of obstore, which all stores share, live in that process."""
PIECE_BYTES = 1 << 20  # of an object that comes: copied and hashed while the next one is underway
DELETE_BATCH = 1000  # keys of one request to delete, by S3's rule
# What obstore and the store behind it raise; the rest would be our own mistake.
_FAILURES = (BaseError, OSError, ValueError)
# Words of answers that do not change by asking again.
_HOPELESS = (" 400 ", " 401 ", " 403 ", " 404 ", "NoSuchBucket", "builder error", "invalid", "InvalidCertificate")
# Of obstore's dump: why a request could not be sent, which the message before it does not say.
_REASON = re.compile(r'(InvalidCertificate)\(\s*(\w+)|message: "([^"]*)"')


class ObjectStoreConfig(Config):
    """Options of ``{type: remote, url: "s3://bucket/prefix"}``, also ``gs://`` and ``az://container/prefix``.

    Without ``access_key`` the cloud's own ways are tried: environment, profile of the machine, workload identity.
    """

    url: str = Field(description="scheme://bucket/prefix")
    endpoint: str | None = Field(None, description="URL of a server other than the cloud's own, as http://host:8333")
    allow_http: bool = Field(False, description="allow an endpoint without TLS")
    ca_file: Path | None = Field(None, description="PEM file of a certificate authority to trust beside the system's")
    region: str | None = Field(None, description="region of the bucket (S3)")
    path_style: bool | None = Field(
        None, description="bucket in the path instead of the host name (S3); null: yes where there is an endpoint"
    )
    access_key: SecretStr | None = Field(None, description="access key id (S3) or account name (Azure)")
    secret_key: SecretStr | None = Field(None, description="secret access key (S3) or account key (Azure)")
    options: dict[str, str] = Field({}, description="any other option of obstore's store, by its name there")
    concurrency: int = Field(16, ge=1, le=1024, description="reads and writes at once")
    in_flight: ByteSize = Field(ByteSize(64 << 20), gt=0, description="bytes of chunks on their way at once")
    lookups: int = Field(64, ge=1, le=1024, description="questions at once; they have threads of their own")
    connect_timeout_s: float = Field(2.0, gt=0, description="seconds to connect")
    timeout_s: float = Field(10.0, gt=0, description="seconds of one request, its transfer included")
    retries: int = Field(2, ge=0, description="times a request that failed is sent again, after a pause with jitter")
    index_ttl_s: float = Field(30.0, ge=0, description="seconds for which a chunk that was seen counts as held")
    index_entries: int = Field(200_000, ge=1, description="chunks that are remembered so")

    @model_validator(mode="after")
    def _check_endpoint(self) -> ObjectStoreConfig:
        if self.endpoint is not None and self.endpoint.lower().startswith("http://") and not self.allow_http:
            raise ValueError("endpoint is http://: set allow_http: true")
        return self


class ObjectStoreBackend(StorageBackend):
    """Chunks as objects."""

    name: ClassVar[str] = "object_store"
    Config = ObjectStoreConfig

    def __init__(self, config: ObjectStoreConfig) -> None:
        self._url = config.url
        self._home = Home("this object store")
        if not _runtime:
            _runtime.append(self._home)
        if _runtime[0].left:
            raise ConfigError(
                f"{config.url}: this process was forked from one that uses object stores, whose threads it lacks: "
                "start it by spawn or forkserver"
            )
        self._store = _open(config)
        self._index = RecentSizes(config.index_entries, config.index_ttl_s)
        self._budget = ByteBudget(config.in_flight)
        self._transfers = Threads("object", config.concurrency, owner=config.url)
        # Questions do not wait behind transfers: the manager asks them where something waits.
        self._questions = Threads("object-ask", config.lookups, owner=config.url)
        # Also as the process ends: a thread that came back from obstore then could end inside of it, and abort.
        self._end = weakref.finalize(self, _close, self._transfers, self._questions)
        self._lookups = config.lookups
        self._mode: PutMode = "create"
        self._closed = False
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._check_open()
        found = self._index.among(keys)
        unknown = [key for key in dict.fromkeys(keys) if key not in found]
        self._guard("look up chunks", lambda: self._ask(unknown, found))
        sizes: list[int] = []
        for key in keys:
            if key not in found:
                break
            sizes.append(found[key])
        return sizes

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        self._check_open()
        calls = [functools.partial(self._fetch, key, buffer.view) for key, buffer in zip(keys, into, strict=True)]
        outcomes = self._transfers.run(calls, ends=lambda outcome: outcome is not True)
        count = next((number for number, outcome in enumerate(outcomes) if outcome is not True), len(keys))
        failure = next((outcome for outcome in outcomes if isinstance(outcome, OSError)), None)
        if failure is not None and not count:
            raise failure
        return count

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._check_open()
        held = self._index.among(keys)
        wanted = [(key, buffer) for key, buffer in distinct(keys, buffers).items() if key not in held]
        self._transfers.map(lambda item: self._send(item[0], item[1].view), wanted)
        return len(keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        self._check_open()
        self._index.drop(keys)
        wanted = list(dict.fromkeys(keys))
        # The store does not tell what was there.
        there = self._guard("look up chunks", lambda: self._questions.map(self._head, wanted))
        paths = [chunk_path(key) for key, size in zip(wanted, there, strict=True) if size is not None]
        self._delete(paths)
        self._index.drop(keys)
        return len(paths)

    def clear(self, fingerprint: bytes | None = None) -> int:
        self._check_open()
        count = 0
        self._index.clear()
        for keys in self._pages(None if fingerprint is None else fingerprint.hex()):
            self._delete([chunk_path(key) for key in keys])
            count += len(keys)
        self._index.clear()
        return count

    def keys(self) -> list[ChunkKey]:
        self._check_open()
        return [key for keys in self._pages(None) for key in keys]

    def close(self) -> None:
        self._closed = True
        self._end()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self._url} is closed")

    def _pages(self, prefix: str | None) -> Iterator[list[ChunkKey]]:
        """Every chunk below a prefix, up to 1,000 at a time."""
        pages = iter(obstore.list(self._store, prefix, chunk_size=DELETE_BATCH))
        while page := self._guard("list chunks", lambda: next(pages, None)):
            yield [key for entry in page if (key := chunk_key(entry["path"])) is not None]

    def _check(self) -> None:
        """ConfigError for what will not mend by itself; a store that cannot be reached now may come back."""
        try:
            # By a list, as the answer to a HEAD does not tell a missing bucket from a missing object.
            next(obstore.list(self._store, "lmcache-start", chunk_size=1), None)
        except _FAILURES as error:
            text = _short(error)
            if any(word in text for word in _HOPELESS):
                raise ConfigError(f"{self._url}: {text}") from None
            logger.warning("%s cannot be reached now: %s", self._url, text)

    def _ask(self, unknown: list[ChunkKey], found: dict[ChunkKey, int]) -> None:
        """Add to ``found`` as much of the leading run of ``unknown`` as there is, in two rounds of requests.

        Round 1 asks for the first keys one by one, and beside that for the first page of each listing that could
        answer the rest; round 2 asks for the rest of the listings in slices, all at once. Keys one by one where
        those are fewer requests.
        """
        first, rest = unknown[: self._lookups], unknown[self._lookups :]
        search = Search(self._store, rest, self._lookups)
        asked: list[ChunkKey | bytes] = [*first, *search.wanted]
        answers = self._questions.map(lambda it: search.first(it) if isinstance(it, bytes) else self._head(it), asked)
        self._note({key: size for key, size in zip(first, answers, strict=False) if size is not None}, found)
        if None in answers[: len(first)]:
            return
        rest, listed = search.rest(self._questions)
        self._note(listed, found)
        while rest:
            wave, rest = rest[: self._lookups], rest[self._lookups :]
            answers = self._questions.map(self._head, wave)
            self._note({key: size for key, size in zip(wave, answers, strict=True) if size is not None}, found)
            if None in answers:
                return

    def _note(self, objects: dict[ChunkKey, int], found: dict[ChunkKey, int]) -> None:
        """Remember sizes of objects; those that cannot be chunks are removed."""
        for key, size in objects.items():
            if size > HEADER_BYTES:
                found[key] = size - HEADER_BYTES
                self._index.add(key, size - HEADER_BYTES)
            else:
                self._damaged(key, f"{size} bytes are no chunk")

    def _head(self, key: ChunkKey) -> int | None:
        """Bytes of an object, None where there is none."""
        try:
            return obstore.head(self._store, chunk_path(key))["size"]
        except FileNotFoundError:
            return None

    def _fetch(self, key: ChunkKey, view: memoryview) -> bool:
        with self._budget.of(HEADER_BYTES + view.nbytes):
            try:
                return self._guard(f"read {chunk_path(key)}", lambda: self._read(key, view))
            except CorruptChunkError as error:
                self._damaged(key, str(error))
                return False

    def _read(self, key: ChunkKey, view: memoryview) -> bool:
        try:
            result = obstore.get(self._store, chunk_path(key))
        except FileNotFoundError:
            self._index.drop([key])
            return False
        size = result.meta["size"]
        if size <= HEADER_BYTES:
            raise CorruptChunkError(f"{size} bytes are no chunk")
        if size != HEADER_BYTES + view.nbytes:
            # Who is wrong, the object or the caller? The header tells.
            data = memoryview(obstore.get_range(self._store, chunk_path(key), start=0, end=HEADER_BYTES))
            if check_header(data, key)[0] != size - HEADER_BYTES:
                raise CorruptChunkError(f"object of {size} bytes, which is not what its header says")
            self._index.add(key, size - HEADER_BYTES)
            return False
        header, digest, came = bytearray(), xxhash.xxh3_64(), 0
        for piece in result.stream(min_chunk_size=PIECE_BYTES):
            data = memoryview(piece)
            came += data.nbytes
            if came > size:
                break
            if missing := HEADER_BYTES - len(header):
                header += data[:missing]
                data = data[missing:]
            if data.nbytes:
                start = came - data.nbytes - HEADER_BYTES
                # By numpy, which lets other threads go on meanwhile.
                np.frombuffer(view, np.uint8)[start : start + data.nbytes] = np.frombuffer(data, np.uint8)
                digest.update(data)
        if came != size:
            raise StorageError(f"{came} bytes came, {size} were announced")
        check_chunk(bytes(header), key, view, digest.intdigest())
        self._index.add(key, view.nbytes)
        return True

    def _send(self, key: ChunkKey, view: memoryview) -> None:
        content: list[bytes | memoryview] = [encode_header(key, view), view]
        with self._budget.of(HEADER_BYTES + view.nbytes):
            self._guard(f"write {chunk_path(key)}", lambda: self._put(chunk_path(key), content))
        self._index.add(key, view.nbytes)

    def _put(self, path: str, content: Sequence[bytes | memoryview]) -> None:
        try:
            obstore.put(self._store, path, content, use_multipart=False, mode=self._mode)
        except AlreadyExistsError:
            return
        except NotSupportedError:
            if self._mode == "overwrite":
                raise
            self._mode = "overwrite"
            self._put(path, content)

    def _damaged(self, key: ChunkKey, why: str) -> None:
        metrics.CORRUPT_CHUNKS.labels(self.name).inc()
        logger.warning("removed %s/%s: %s", self._url, chunk_path(key), why)
        self._index.drop([key])
        with contextlib.suppress(StorageError):  # it is a miss in any case, and is found again
            self._delete([chunk_path(key)])

    def _delete(self, paths: list[str]) -> None:
        for start in range(0, len(paths), DELETE_BATCH):
            batch = paths[start : start + DELETE_BATCH]
            self._guard("remove chunks", lambda: self._delete_batch(batch))  # noqa: B023

    def _delete_batch(self, paths: list[str]) -> None:
        try:
            obstore.delete(self._store, paths)
        except FileNotFoundError:
            # Google's and Azure's say so when another process was faster, and then leave the others.
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, path)

    def _guard(self, what: str, call: Callable[[], T]) -> T:
        """``call()``; what the store or its client raises becomes a StorageError."""
        self._home.check()
        try:
            return call()
        except StorageError:
            raise
        except _FAILURES as error:
            raise StorageError(f"{self._url}: cannot {what}: {_short(error)}") from error


def _close(*threads: Threads) -> None:
    """Begin nothing more, and wait for what runs, which has timeouts."""
    for each in threads:
        each.close(None)


def _open(config: ObjectStoreConfig) -> ObjectStore:
    """The store of a URL; nothing is connected yet."""
    parts = urlsplit(config.url)
    if not parts.netloc:
        raise ConfigError(f"{config.url}: expected {parts.scheme or 's3'}://bucket/prefix")
    try:
        client: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=config.connect_timeout_s),
            "timeout": timedelta(seconds=config.timeout_s),
            "allow_http": config.allow_http,
        }
        if config.ca_file is not None:
            client["root_certificate"] = config.ca_file.read_bytes()
        retry: Any = {
            "max_retries": config.retries,
            "retry_timeout": timedelta(seconds=config.timeout_s),
            "backoff": {
                "init_backoff": timedelta(milliseconds=50),
                "max_backoff": timedelta(seconds=config.timeout_s / 4),
                "base": 2,
            },
        }
        make = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[parts.scheme]
        options: Any = _options(config, parts.scheme)
        prefix = parts.path.strip("/") or None
        return make(parts.netloc, prefix=prefix, config=options, client_options=client, retry_config=retry)  # type: ignore[no-any-return]
    except (*_FAILURES, KeyError) as error:
        raise ConfigError(f"{config.url}: {_short(error)}") from None


def _options(config: ObjectStoreConfig, scheme: str) -> dict[str, Any]:
    """Our options by obstore's names for a cloud; ConfigError for one that this cloud has not."""
    path_style = config.endpoint is not None if config.path_style is None else config.path_style
    ours: dict[str, Any] = {
        "endpoint": config.endpoint,
        "access_key": config.access_key and config.access_key.get_secret_value(),
        "secret_key": config.secret_key and config.secret_key.get_secret_value(),
        "region": config.region,
        "path_style": not path_style if scheme == "s3" else None,  # obstore's option is the opposite
    }
    names = _NAMES[scheme]
    if unknown := sorted(name for name, value in ours.items() if value is not None and name not in names):
        raise ConfigError(f"{config.url}: {scheme}:// takes no {', '.join(unknown)}; it takes {', '.join(names)}")
    return {**{names[name]: value for name, value in ours.items() if value is not None}, **config.options}


_NAMES = {
    "s3": {
        "endpoint": "endpoint",
        "access_key": "access_key_id",
        "secret_key": "secret_access_key",
        "region": "region",
        "path_style": "virtual_hosted_style_request",
    },
    "gs": {"endpoint": "base_url"},
    "az": {"endpoint": "endpoint", "access_key": "account_name", "secret_key": "account_key"},
}


def _short(error: BaseException) -> str:
    """What a store said, without the dump of the request that obstore adds, but for the reason in it."""
    text, _, dump = str(error).partition("\n\nDebug source")
    reason = _REASON.search(dump)
    words = [*text.split(), *(word for word in reason.groups() if word)] if reason else text.split()
    return " ".join(words)
