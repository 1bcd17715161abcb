"""One NIXL agent with one storage plugin: registered memory, and transfers that are waited for without spinning."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmcache.errors import ConfigError, StorageError
from lmcache.storage.backends.indexed.registrations import Registrations

if TYPE_CHECKING:
    from nixl import nixl_agent, nixl_xfer_handle

LEAST_PAUSE_S, MOST_PAUSE_S = 50e-6, 1e-3
"""Between two looks at a transfer: grows from one to the other."""
Span = tuple[int, int, int]
"""Address in memory or offset in the file or object; bytes; 0 or the number of the file or object."""
_serial = itertools.count()


class NixlError(StorageError):
    """NIXL refused or failed a transfer; it does not say why, so whoever asked must find out."""


class Agent:
    """Thread-safe. plugin: POSIX, OBJ, ...; parameters: as NIXL names them. ConfigError when it does not load."""

    def __init__(self, plugin: str, parameters: dict[str, str]) -> None:
        nixl = _import_nixl()
        # RuntimeError: what they arrive as where another pybind11 module of the process translates exceptions first.
        kinds = [value for name, value in vars(nixl).items() if name.startswith("nixl") and isinstance(value, type)]
        errors = [kind for kind in kinds if issubclass(kind, Exception)]
        self._errors: tuple[type[Exception], ...] = (RuntimeError, *errors)
        self._memory = "OBJ" if plugin == "OBJ" else "FILE"
        self._plugins = [plugin]
        self.name = f"lmcache-{os.getpid()}-{next(_serial)}"
        config = nixl.nixl_agent_config(
            enable_prog_thread=False, backends=[], sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self._agent: nixl_agent = nixl.nixl_agent(self.name, config)
        try:
            self._agent.create_backend(plugin, parameters)
        except self._errors as error:
            known = ", ".join(self._agent.get_plugin_list()) or "none"
            raise ConfigError(
                f"NIXL's plugin {plugin} does not load ({error}): its libraries (for GDS: libcufile and libcudart, "
                f"with a GPU) or its parameters are missing, see NIXL's own log. In this build there are: {known}"
            ) from error
        self.registrations: Registrations[Any] = Registrations(self._register, self._unregister)

    def begin(self, operation: str, memory: Sequence[Span], remote: Sequence[Span], names: Sequence[str]) -> Transfer:
        """Start to move ``memory[i]`` to or from ``remote[i]``. NixlError when it fails at once.

        operation: "READ" fills memory, "WRITE" empties it. names: the object behind each of ``remote``, "" for files.
        """
        agent = self._agent
        ends: dict[tuple[int, str], int] = {}
        for (offset, nbytes, number), name in zip(remote, names, strict=True):
            ends[number, name] = max(ends.get((number, name), 0), offset + nbytes)
        try:
            spans = [(0, end, number, name) for (number, name), end in ends.items()]
            registered = agent.register_memory(spans, self._memory, self._plugins)
        except self._errors as error:
            raise NixlError(f"NIXL cannot register {len(ends)} files or objects: {error}") from error
        try:
            handle = agent.initialize_xfer(
                operation,
                agent.get_xfer_descs(list(memory), "DRAM"),
                agent.get_xfer_descs(list(remote), self._memory),
                self.name,
                b"",
                self._plugins,
            )
            return Transfer(self, handle, registered, agent.transfer(handle))
        except self._errors as error:
            self._unregister(registered)
            raise NixlError(f"NIXL's {operation} failed: {error}") from error

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Whether objects are there. May block for half a minute; NixlError when the service does not say."""
        try:
            spans = [(0, 0, number + 1, name) for number, name in enumerate(names)]
            return [a is not None for a in self._agent.query_memory(spans, self._plugins[0], self._memory)]
        except self._errors as error:
            raise NixlError(f"NIXL cannot query objects: {error}") from error

    def state(self, handle: nixl_xfer_handle) -> str:
        try:
            return str(self._agent.check_xfer_state(handle))
        except self._errors:
            return "ERR"

    def finish(self, handle: nixl_xfer_handle, registered: object) -> None:
        try:
            handle.release()
        finally:
            self._unregister(registered)

    def close(self) -> None:
        self.registrations.close()

    def _register(self, address: int, nbytes: int) -> object:
        try:
            return self._agent.register_memory([(address, nbytes, 0, "")], "DRAM", self._plugins)
        except self._errors as error:
            raise StorageError(f"NIXL cannot register {nbytes} bytes of memory: {error}") from error

    def _unregister(self, registered: Any) -> None:
        try:
            self._agent.deregister_memory(registered, self._plugins)
        except self._errors as error:
            raise StorageError(f"NIXL cannot deregister memory: {error}") from error


class Transfer:
    """What ``Agent.begin`` started. Memory may be used again when ``wait`` has returned True."""

    def __init__(self, agent: Agent, handle: nixl_xfer_handle, registered: object, state: str) -> None:
        self._agent, self._handle, self._registered, self._state = agent, handle, registered, state
        self._finished = False

    def wait(self, timeout_s: float) -> bool:
        """False while it still runs after ``timeout_s``. NixlError when it has failed."""
        deadline = time.monotonic() + timeout_s
        pause = LEAST_PAUSE_S
        while self._state == "PROC":
            self._state = self._agent.state(self._handle)
            if self._state != "PROC":
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(MOST_PAUSE_S, pause * 1.3)
        if not self._finished:
            self._finished = True
            self._agent.finish(self._handle, self._registered)
        if self._state != "DONE":
            raise NixlError("NIXL's transfer failed")
        return True


def _import_nixl() -> Any:
    try:
        import nixl
    except ImportError as error:
        raise ConfigError(f"the nixl tier needs NIXL; in your clone: pip install -e '.[nixl]' ({error})") from error
    return nixl
