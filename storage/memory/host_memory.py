"""Host memory for a pool: one mapping with huge pages, near the right processor, touched, and pinned on CUDA.

Where the system refuses one of these, the pool does without it, and one warning says so.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import re
import resource
from pathlib import Path
from typing import Literal

from lmcache.errors import ConfigError
from lmcache.storage.memory.limits import huge_page_room, parse_list, require_room, size, text

logger = logging.getLogger(__name__)

HugePages = bool | Literal["transparent", "hugetlb"]
MAP_HUGETLB = 0x40000
MPOL_PREFERRED = 1
MBIND = {"x86_64": 237, "aarch64": 235}  # number of the system call
MEMINFO = Path("/proc/meminfo")
NODES = Path("/sys/devices/system/node")
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ANYWHERE = -1
TOUCH_BYTES = 256 << 20  # between two looks at the limits


def map_memory(capacity: int, huge_pages: HugePages) -> tuple[mmap.mmap, bool]:
    """``capacity`` bytes of private memory, not touched yet, and whether reserved huge pages back it.

    ConfigError when the system, or a cgroup, does not leave that much.
    """
    if huge_pages == "hugetlb":
        memory = _map_reserved(capacity, _huge_page_bytes())
        if memory is not None:
            return memory, True
    require_room(capacity)
    try:
        memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"memory.capacity is {capacity} bytes, which the system refuses ({error}{_ulimits('AS', 'DATA')}): lower it"
        ) from error
    if huge_pages:
        _ask_for_transparent_pages(memory)
    return memory, False


def _map_reserved(capacity: int, page: int) -> mmap.mmap | None:
    pages = -(-capacity // page)
    room = huge_page_room(page)
    if room is not None and pages * page > room.nbytes:
        refusal = room.why  # the mapping would be granted, and end in a SIGBUS
    else:
        try:
            return mmap.mmap(-1, pages * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
        except OSError as error:
            refusal = f"{error}"
    logger.warning(
        "%d reserved huge pages of %d KiB were refused (%s): raise vm.nr_hugepages, or that limit; "
        "transparent huge pages are asked for instead",
        pages,
        page >> 10,
        refusal,
    )
    return None


def _ulimits(*names: str) -> str:
    """What this process's resource limits are, where they are limits."""
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in names}
    return "".join(f"; RLIMIT_{name} is {size(n)}" for name, n in limits.items() if n != resource.RLIM_INFINITY)


def _ask_for_transparent_pages(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        # The kernel accepts the advice also where an administrator has switched the feature off.
        refusal = "switched off in this kernel" if "[never]" in text(TRANSPARENT) else ""
    except OSError as error:
        refusal = str(error)
    if refusal:
        logger.warning("transparent huge pages were refused (%s): small pages are used", refusal)


def touch(address: int, nbytes: int, reserved: bool = False) -> None:
    """Write every page: the first touch costs several times a copy, so it happens at start, not in a request.

    reserved: huge pages back it. Otherwise the limits are read again and again, for other workers touch theirs at the
    same time: ConfigError instead of an OOM kill.
    """
    for start in range(0, nbytes, TOUCH_BYTES):
        if start and not reserved:
            require_room(nbytes, start)
        ctypes.memset(address + start, 0, min(TOUCH_BYTES, nbytes - start))


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
    return parse_list(text(nodes / "online"))


def node_of_processors(processors: set[int], nodes: Path = NODES) -> int | None:
    """The node that all of ``processors`` belong to."""
    for node in online_nodes(nodes):
        if processors <= set(parse_list(text(nodes / f"node{node}" / "cpulist"))):
            return node
    return None


def pin(address: int, nbytes: int) -> bool:
    """Register memory with CUDA, so that copies to and from it need no detour."""
    import torch

    code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
    if code:
        logger.warning(
            "cudaHostRegister failed with code %d%s: copies will go through pageable memory", code, _ulimits("MEMLOCK")
        )
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
    number = text(Path("/sys/bus/pci/devices") / name / "numa_node").strip()
    node = int(number or ANYWHERE)
    if node == ANYWHERE:
        logger.warning("the NUMA node of GPU %s is not known: memory comes from any node", name)
        return None
    return node


def _huge_page_bytes() -> int:
    found = re.search(r"Hugepagesize:\s+(\d+) kB", text(MEMINFO))
    return int(found[1]) << 10 if found else 2 << 20
