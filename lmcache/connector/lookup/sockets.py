"""Where a scheduler half and its worker halves meet: names that both derive, in a folder of the user's own.

    <TMPDIR | XDG_RUNTIME_DIR | /tmp> / lmcache-<uid> / <hash of engine, start and connector>.<rank>

A socket's path may have 107 bytes, so the name is a hash and a folder that is too long is passed over.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import socket
import stat
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from lmcache.config import socket_folders
from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

SCHEME = "ipc://"
# A socket that nobody listens at is left alone while it is young: its owner may be between bind and listen.
STALE_S = 60.0

_count: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def meeting_name(vllm_config: VllmConfig, side: str) -> str:
    """A name that the halves of one connector share, and no other connector has. Call it once a half.

    side: which half, any two words. The engine id alone will not do: a MultiConnector gives it to all its children,
    users set it to what they like, and an engine that is started again may have it before the old one is gone. vLLM
    makes ``instance_id`` anew at every start and hands it to every process; children are told apart by their order,
    which is the same in every process.
    """
    start = f"{vllm_config.kv_transfer_config.engine_id}/{vllm_config.instance_id}"
    return f"{start}/{next(_count[f'{side}/{start}'])}"


def socket_path(name: str, rank: int) -> str:
    """``ipc://`` address of the worker of ``rank``. ConfigError when no folder will do.

    Raises PermissionError when the folder exists and others can write to it.
    """
    file = f"{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}.{rank}"
    own = f"lmcache-{os.getuid()}"
    most = zmq.IPC_PATH_MAX_LEN - len(f"/{own}/{file}")
    refused = []
    for parent in socket_folders():
        if len(os.fsencode(parent)) > most:
            refused.append(f"{parent} is longer than {most} bytes")
            continue
        try:
            return f"{SCHEME}{_private(Path(parent) / own) / file}"
        except PermissionError:
            raise
        except OSError as error:
            refused.append(f"{parent}: {error.strerror}")
    raise ConfigError(
        f"the socket between vLLM's scheduler and its workers finds no folder ({'; '.join(refused)}): set TMPDIR to a "
        f"folder that can be written, with a path of at most {most} bytes"
    )


def bind(listener: zmq.Socket[bytes], address: str) -> None:
    """Listen at ``address``, and remove what killed workers left beside it. ConfigError when that cannot be."""
    path = Path(address.removeprefix(SCHEME))
    if _is_served(path):  # ZMQ would take the address away from whoever listens, without a word
        raise ConfigError(
            f"another worker listens at {path}: two engines have one engine_id and were started from one configuration "
            "object; give each its own engine_id in --kv-transfer-config, or leave it out"
        )
    try:
        _remove_stale(path.parent)
        listener.bind(address)
    except (OSError, zmq.ZMQError) as error:
        raise ConfigError(f"no socket can be opened at {path} ({error}): set TMPDIR to another folder") from error


def _remove_stale(folder: Path) -> None:
    for path in folder.iterdir():
        try:
            info = path.lstat()
            if stat.S_ISSOCK(info.st_mode) and time.time() - info.st_mtime > STALE_S and not _is_served(path):
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s was left where it is: %s", path, error)


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of this user's with mode 0700: remove it and start again")
    return folder


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # such as a full backlog: somebody is there
            return True
        return True
