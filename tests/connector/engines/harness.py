"""What the tests of this folder share besides fixtures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from preloaded import Script

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def connector(
    disk: Path | None = None,
    *,
    name: str = "LMCacheConnector",
    policy: str = "recompute",
    role: str = "kv_both",
    **options: Any,
) -> dict[str, Any]:
    """A KVTransferConfig as a mapping.

    With more patience than is the default: tiny models on a busy machine compute faster than a disk is read.
    """
    extra: dict[str, Any] = {"memory": {"capacity": "256MiB"}, "patience": 1000.0, **options}
    if disk is not None:
        extra["tiers"] = [{"type": "disk", "path": str(disk), "capacity": "1GiB"}]
    path = {"kv_connector_module_path": "lmcache.connector"} if name == "LMCacheConnector" else {}
    return {
        "kv_connector": name,
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra,
        **path,
    }


DRIVE = HERE / "drive.py"  # takes a scenario on standard input
DRIVE_MANY = HERE / "drive_many.py"  # takes a list of engines


def environment(*, processes: bool = False) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if processes else "0",
        "OMP_NUM_THREADS": "1",
    }


def has_amx() -> bool:
    """Whether vLLM uses this processor's tile instructions."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


class Failed(Exception):
    """vLLM did not start or died; the text is what it printed."""


def drive(script: Path, told: Any, env: dict[str, str], log: Path, *, fresh: bool = False) -> Any:
    """What a script that is told this on standard input has as "results" on its last line; Failed when it ends badly.

    In a fork of a process that has imported vLLM, or in a fresh interpreter (see preloaded.py).
    """
    if fresh:
        with log.open("w") as err:
            done = subprocess.run(
                [sys.executable, str(script)],
                input=json.dumps(told),
                env=env,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                timeout=300,
                check=False,
            )
        status, printed = done.returncode, done.stdout
    else:
        running = Script(script, json.dumps(told), env, log)
        try:
            printed = running.stdout.read()
            status = running.wait()
        finally:  # pytest's own limit of time may end the wait
            running.kill()
    last = [line for line in printed.splitlines() if line.startswith('@@{"results"')]
    if status or not last:
        raise Failed(f"exit {status}\n{printed[-2000:]}\n{log.read_text()[-6000:]}")
    return json.loads(last[-1][2:])["results"]
