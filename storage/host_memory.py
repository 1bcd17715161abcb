"""Host memory for a pool: one mapping with huge pages, near the right processor, touched, and pinned on CUDA.

What the system refuses is done without, and said in one warning.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import re
from pathlib import Path
from typing import Literal

from lmcache.errors import ConfigError

logger = logging.getLogger(__name__)

HugePages = bool | Literal["transparent", "hugetlb"]
MAP_HUGETLB = 0x40000
MPOL_PREFERRED = 1
MBIND = {"x86_64": 237, "aarch64": 235}  # number of the system call
MEMINFO = Path("/proc/meminfo")
NODES = Path("/sys/devices/system/node")
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ANYWHERE = -1


def map_memory(capacity: int, huge_pages: HugePages) -> mmap.mmap:
    """``capacity`` bytes of private memory, not touched yet."""
    if huge_pages == "hugetlb":
        size = _huge_page_bytes()
        try:
            return mmap.mmap(-1, -(-capacity // size) * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
        except OSError as error:
            logger.warning(
                "%d reserved huge pages of %d KiB were refused (%s): raise vm.nr_hugepages; "
                "transparent huge pages are asked for instead",
                -(-capacity // size),
                size >> 10,
                error,
            )
    available = available_bytes()
    if available is not None and capacity > available:
        # The system would grant it, and kill somebody when it is touched.
        raise ConfigError(f"memory.capacity is {capacity} bytes, of which only {available} are available: lower it")
    try:
        memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"memory.capacity is {capacity} bytes, which the system refuses ({error}): lower it"
        ) from error
    if huge_pages:
        _ask_for_transparent_pages(memory)
    return memory


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(MEMINFO), re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _ask_for_transparent_pages(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        # The kernel accepts the advice also where an administrator has switched the feature off.
        refusal = "switched off in this kernel" if "[never]" in _text(TRANSPARENT) else ""
    except OSError as error:
        refusal = str(error)
    if refusal:
        logger.warning("transparent huge pages were refused (%s): small pages are used", refusal)


def touch(address: int, nbytes: int) -> None:
    """Write every page: the first touch costs several times a copy, so it happens at start, not in a request."""
    ctypes.memset(address, 0, nbytes)


def bind_to_node(address: int, nbytes: int, node: int | None, *, cuda: bool) -> int | None:
    """Ask for the pages of a mapping, before its first touch, on one NUMA node; returns the node, None: as it comes.

    node: a node's number; ANYWHERE; None: the GPU's node (``cuda``), else that of the processors that this process may
    run on, and nothing where the machine has one node or the processors belong to several.
    A node without room gives the rest to others: this is a preference, for a strict one would end in an OOM kill.
    """
    if node == ANYWHERE:
        return None
    if node is None and (len(online_nodes()) < 2 or (node := _near_node(cuda)) is None):
        return None
    number = MBIND.get(platform.machine())
    if number is None:
        logger.warning("NUMA placement is not known for %s: memory comes from any node", platform.machine())
        return None
    mask = (ctypes.c_ulong * (node // 64 + 1))()
    mask[node // 64] = 1 << node % 64
    library = ctypes.CDLL(None, use_errno=True)
    arguments = (address, nbytes, MPOL_PREFERRED, ctypes.addressof(mask), len(mask) * 64 + 1, 0)
    if library.syscall(ctypes.c_long(number), *(ctypes.c_ulong(value) for value in arguments)):
        why = os.strerror(ctypes.get_errno())
        logger.warning("memory on NUMA node %d was refused (%s): it comes from any node", node, why)
        return None
    return node


def online_nodes(nodes: Path = NODES) -> list[int]:
    """Numbers of the NUMA nodes that are there; empty where the kernel names none."""
    return parse_list(_text(nodes / "online"))


def node_of_processors(processors: set[int], nodes: Path = NODES) -> int | None:
    """The node that all of ``processors`` belong to."""
    for node in online_nodes(nodes):
        if processors <= set(parse_list(_text(nodes / f"node{node}" / "cpulist"))):
            return node
    return None


def parse_list(text: str) -> list[int]:
    """The kernel's list format: ``0-2,5`` -> [0, 1, 2, 5]."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def pin(address: int, nbytes: int) -> bool:
    """Register memory with CUDA, so that copies to and from it need no detour."""
    import torch

    code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
    if code:
        logger.warning("cudaHostRegister failed with code %d: copies will go through pageable memory", code)
    return code == 0


def unpin(address: int) -> None:
    import torch

    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _near_node(cuda: bool) -> int | None:
    return _node_of_gpu() if cuda else node_of_processors(os.sched_getaffinity(0))


def _node_of_gpu() -> int | None:
    import torch

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    # torch's type stubs do not know these three.
    domain, bus, device = gpu.pci_domain_id, gpu.pci_bus_id, gpu.pci_device_id  # type: ignore[attr-defined]
    name = f"{domain:04x}:{bus:02x}:{device:02x}.0"
    text = _text(Path("/sys/bus/pci/devices") / name / "numa_node").strip()
    node = int(text or ANYWHERE)
    if node == ANYWHERE:
        logger.warning("the NUMA node of GPU %s is not known: memory comes from any node", name)
        return None
    return node


def _huge_page_bytes() -> int:
    found = re.search(r"Hugepagesize:\s+(\d+) kB", _text(Path("/proc/meminfo")))
    return int(found[1]) << 10 if found else 2 << 20


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
