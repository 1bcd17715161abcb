"""How much memory this process may still touch: the least of what the system, its cgroups and its NUMA nodes leave it.

The kernel grants a mapping of nearly any size, and kills a process of the group when its pages are touched. So the
limits are read before. A root other than / is for tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pydantic import ByteSize

from lmcache.errors import ConfigError

ROOT = Path("/")
UNLIMITED = 1 << 60  # what a limit of cgroup v1 that was never set is above of
# What a process needs besides the pool (page tables alone: 1/512 of it), as a share of the pool, and at most.
RESERVE_SHARE, RESERVE_BYTES = 8, 64 << 20


class Room(NamedTuple):
    """``nbytes`` may still be taken; ``why``: the limit that says so, and where it stands."""

    nbytes: int
    why: str


def require_room(nbytes: int, touched: int = 0, root: Path = ROOT) -> None:
    """ConfigError when the rest of a pool of ``nbytes``, of which ``touched`` are there, may not be had."""
    found = room(root)
    reserve = min(RESERVE_BYTES, nbytes // RESERVE_SHARE)
    if found is None or nbytes - touched + reserve <= found.nbytes:
        return
    have = touched + found.nbytes
    advice = f"set memory.capacity to {size(have - reserve)} or less (each worker takes that much), or "
    raise ConfigError(
        f"memory.capacity is {nbytes} bytes ({size(nbytes)}), of which only {have} are available: {found.why}; "
        f"{advice if have > reserve else ''}raise that limit"
    )


def room(root: Path = ROOT) -> Room | None:
    """The tightest limit on ordinary memory; None where the system tells of none."""
    rooms = [*_of_system(root), *_of_groups(root), *_of_nodes(root)]
    return min(rooms, default=None)


def huge_page_room(page_bytes: int, root: Path = ROOT) -> Room | None:
    """The tightest limit that cgroups set on reserved huge pages of this size; None: none."""
    unit = f"hugetlb.{page_bytes >> 30}GB" if page_bytes >= 1 << 30 else f"hugetlb.{page_bytes >> 20}MB"
    pairs = [("max", "current"), ("rsvd.max", "rsvd.current")]
    pairs += [("limit_in_bytes", "usage_in_bytes"), ("rsvd.limit_in_bytes", "rsvd.usage_in_bytes")]
    rooms: list[Room] = []
    for folder in _groups(root, "hugetlb"):
        for limit, usage in pairs:
            rooms += _of_file(folder, f"{unit}.{limit}", f"{unit}.{usage}")
    return min(rooms, default=None)


def size(nbytes: int) -> str:
    """For people: 700.0MiB."""
    return ByteSize(nbytes).human_readable()


def text(file: Path) -> str:
    """What the kernel says there; empty where it has no such file."""
    try:
        return file.read_text()
    except OSError:
        return ""


def parse_list(text: str) -> list[int]:
    """The kernel's list format: ``0-2,5`` -> [0, 1, 2, 5]."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _of_system(root: Path) -> Iterator[Room]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text(root / "proc/meminfo"), re.MULTILINE)
    if found:
        yield Room(int(found[1]) << 10, "the system has no more (MemAvailable in /proc/meminfo)")


def _of_groups(root: Path) -> Iterator[Room]:
    for folder in _groups(root, "memory"):
        stat = dict(line.split(" ", 1) for line in text(folder / "memory.stat").splitlines() if " " in line)
        # Pages of files count as used, and are given back when memory is short. v1 counts a group's children apart.
        files = sum(int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in ("inactive_file", "active_file"))
        yield from _of_file(folder, "memory.max", "memory.current", files)
        yield from _of_file(folder, "memory.high", "memory.current", files)
        yield from _of_file(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", files)
        # v1's word for the limits of groups above, which a container may not see.
        above = int(stat.get("hierarchical_memory_limit", UNLIMITED))
        if above < UNLIMITED:
            used = _number(folder / "memory.usage_in_bytes") or 0
            yield _left(above, used, files, f"hierarchical_memory_limit in {folder / 'memory.stat'}")


def _of_file(folder: Path, limit: str, usage: str, files: int = 0) -> Iterator[Room]:
    most = _number(folder / limit)
    if most is not None and most < UNLIMITED:
        yield _left(most, _number(folder / usage) or 0, files, str(folder / limit))


def _left(most: int, used: int, files: int, where: str) -> Room:
    kept = max(0, used - files)
    return Room(
        max(0, most - kept), f"this process's cgroup may use {size(most)}, of which {size(kept)} are in use ({where})"
    )


def _of_nodes(root: Path) -> Iterator[Room]:
    """Where a cpuset lets the process have memory of some NUMA nodes only."""
    allowed = re.search(r"^Mems_allowed_list:\s+(\S+)$", text(root / "proc/self/status"), re.MULTILINE)
    nodes = root / "sys/devices/system/node"
    if allowed is None or set(parse_list(text(nodes / "online"))) <= set(parse_list(allowed[1])):
        return
    kinds = r"(?:MemFree|Active\(file\)|Inactive\(file\)|SReclaimable):\s+(\d+) kB"
    nbytes = sum(
        int(each) << 10
        for node in parse_list(allowed[1])
        for each in re.findall(kinds, text(nodes / f"node{node}/meminfo"))
    )
    yield Room(
        nbytes, f"its cpuset has memory on NUMA nodes {allowed[1]} only (Mems_allowed_list in /proc/self/status)"
    )


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and of those above it, as far as they can be seen; v2 and v1."""
    own: dict[str, str] = {}
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)  # v2's has no name
    for line in text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        top, point = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        name = "" if kind == "cgroup2" else controller
        if kind not in ("cgroup", "cgroup2") or (name and name not in options.split(",")) or name not in own:
            continue
        folder = root / point.replace("\\040", " ").lstrip("/")
        # A container's mount may begin at its own group, wherever the path counts from.
        group = PurePosixPath(own[name])
        inside = group.relative_to(top) if group.is_relative_to(top) and ".." not in group.parts else PurePosixPath()
        for part in (inside, *inside.parents) if inside.parts else (inside,):
            yield folder / part


def _number(file: Path) -> int | None:
    found = text(file).strip()
    return int(found) if found.isdigit() else None
