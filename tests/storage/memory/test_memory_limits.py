"""A pool larger than a container's limit is an error that says so, not a SIGKILL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.storage.memory import host_memory
from lmcache.storage.memory import limits as memory_limits
from lmcache.storage.memory.limits import Room, huge_page_room, require_room, room
from lmcache.storage.memory.pool import PinnedPool

MIB = 1 << 20
NEVER_SET = 9223372036854771712  # how cgroup v1 writes no limit

Tree = Callable[[dict[str, object]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A root with these files in it; the cgroup files by their place below /sys/fs/cgroup."""

    def plant(files: dict[str, object]) -> Path:
        for name, content in files.items():
            file = tmp_path / (name if name.startswith(("proc/", "sys/devices/")) else f"sys/fs/cgroup/{name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
        return tmp_path

    return plant


def v2(path: str, top: str = "/") -> dict[str, object]:
    mount = f"31 23 0:28 {top} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
    return {"proc/self/cgroup": f"0::{path}", "proc/self/mountinfo": f"23 1 0:1 / / rw - ext4 /dev/a rw\n{mount}"}


def v1(path: str, top: str = "/", controllers: str = "memory") -> dict[str, object]:
    mount = f"35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,{controllers}"
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    return {
        "proc/self/cgroup": f"4:{controllers}:{path}\n3:cpuset:/elsewhere\n0::/",
        "proc/self/mountinfo": f"{mount}\n{unified}",
    }


def of(files: dict[str, object], tree: Tree) -> tuple[int, str]:
    """Bytes, and the file that says so."""
    root = tree(files)
    found = room(root)
    assert found is not None
    return found.nbytes, found.why.replace(str(root / "sys/fs/cgroup"), "@")


def test_without_limits_it_is_what_the_system_has(tree: Tree) -> None:
    nbytes, why = of({"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:     500 kB\nSwapFree: 1 kB"}, tree)
    assert nbytes == 500 << 10
    assert "MemAvailable" in why


def test_nothing_known_is_no_limit(tree: Tree, tmp_path: Path) -> None:
    assert room(tmp_path) is None
    require_room(1 << 50, root=tmp_path)
    assert room(tree({**v2("/a"), "a/memory.max": "max", "a/memory.current": 5})) is None
    assert room(tree({**v1("/a"), "memory/a/memory.limit_in_bytes": NEVER_SET})) is None


def test_a_limit_of_version_2_less_what_is_in_use(tree: Tree) -> None:
    files = {**v2("/app"), "app/memory.max": 700 * MIB, "app/memory.current": 100 * MIB, "app/memory.high": "max"}
    assert of({"proc/meminfo": "MemAvailable: 99999999 kB", **files}, tree) == (
        600 * MIB,
        "this process's cgroup may use 700.0MiB, of which 100.0MiB are in use (@/app/memory.max)",
    )


def test_a_limit_of_version_1_less_what_is_in_use(tree: Tree) -> None:
    files = {"memory/app/memory.limit_in_bytes": 700 * MIB, "memory/app/memory.usage_in_bytes": 100 * MIB}
    nbytes, why = of({**v1("/app"), **files}, tree)
    assert nbytes == 600 * MIB
    assert why.endswith("(@/memory/app/memory.limit_in_bytes)")


def test_pages_of_files_can_be_had_back(tree: Tree) -> None:
    stat = f"anon 5\ninactive_file {60 * MIB}\nactive_file {20 * MIB}"
    files = {"memory.max": 700 * MIB, "memory.current": 100 * MIB, "memory.stat": stat}
    assert of({**v2("/"), **files}, tree)[0] == 680 * MIB
    stat = f"cache 9\ninactive_file 1\ntotal_inactive_file {90 * MIB}\ntotal_active_file 0"
    files = {f"memory/{name}": value for name, value in files.items()}
    limits = {"memory/memory.limit_in_bytes": 700 * MIB, "memory/memory.usage_in_bytes": 100 * MIB}
    assert of({**v1("/"), **limits, "memory/memory.stat": stat}, tree)[0] == 690 * MIB


@pytest.mark.parametrize(("high", "left"), [(300, 250), (900, 450)])
def test_the_mark_from_which_a_group_is_throttled_counts_too(tree: Tree, high: int, left: int) -> None:
    files = {"a/memory.max": 500 * MIB, "a/memory.high": high * MIB, "a/memory.current": 50 * MIB}
    assert of({**v2("/a"), **files}, tree)[0] == left * MIB


def nested(unit: str, limits: dict[str, tuple[object, int]]) -> dict[str, object]:
    names = ("memory.max", "memory.current") if unit == "" else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    return {
        str(Path(unit) / path / name): value
        for path, pair in limits.items()
        for name, value in zip(names, pair, strict=True)
    }


@pytest.mark.parametrize(("mount", "unit"), [(v2, ""), (v1, "memory")])
def test_the_tightest_of_nested_groups_counts(mount: Callable[[str], dict[str, object]], unit: str, tree: Tree) -> None:
    none = "max" if unit == "" else NEVER_SET
    limits = {"pod/box/job": (none, 10 * MIB), "pod/box": (900 * MIB, 20 * MIB), "pod": (700 * MIB, 400 * MIB)}
    nbytes, why = of({**mount("/pod/box/job"), **nested(unit, limits)}, tree)
    assert nbytes == 300 * MIB
    assert "/pod/memory." in why
    # A group beside it is nobody's business.
    beside = nested(unit, {"pod/other": (1 * MIB, 0)})
    assert of({**mount("/pod/box/job"), **nested(unit, limits), **beside}, tree)[0] == 300 * MIB


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/../elsewhere"])
def test_a_container_that_sees_only_its_own_group_finds_it(path: str, tree: Tree) -> None:
    # With v1 and no namespace of its own the path counts from the host's root, and the mount begins at /docker/abc.
    files = {"memory/memory.limit_in_bytes": 700 * MIB, "memory/memory.usage_in_bytes": 0}
    assert of({**v1(path, top="/docker/abc"), **files}, tree)[0] == 700 * MIB


def test_limits_above_that_a_container_cannot_see_are_in_its_statistics(tree: Tree) -> None:
    stat = f"hierarchical_memory_limit {300 * MIB}\nhierarchical_memsw_limit {NEVER_SET}"
    files = {"memory.limit_in_bytes": NEVER_SET, "memory.usage_in_bytes": 50 * MIB, "memory.stat": stat}
    nbytes, why = of({**v1("/", "/docker/abc"), **{f"memory/{name}": each for name, each in files.items()}}, tree)
    assert nbytes == 250 * MIB
    assert "hierarchical_memory_limit in @/memory/memory.stat" in why


def test_controllers_that_share_a_mount_are_found(tree: Tree) -> None:
    files = {"memory/memory.limit_in_bytes": 700 * MIB}
    assert of({**v1("/", controllers="cpu,memory"), **files}, tree)[0] == 700 * MIB


def test_a_cpuset_of_one_node_leaves_that_nodes_memory(tree: Tree) -> None:
    node = "Node 1 MemTotal: 9 kB\nNode 1 MemFree: 300 kB\nNode 1 Active(file): 50 kB\nNode 1 Active(anon): 900 kB"
    files: dict[str, object] = {
        "sys/devices/system/node/online": "0-1",
        "sys/devices/system/node/node1/meminfo": node,
        "proc/meminfo": "MemAvailable: 9999 kB",
        "proc/self/status": "Name:\tx\nMems_allowed:\t2\nMems_allowed_list:\t1",
    }
    nbytes, why = of(files, tree)
    assert nbytes == 350 << 10
    assert "NUMA nodes 1 only" in why
    assert of({**files, "proc/self/status": "Mems_allowed_list:\t0-1"}, tree)[0] == 9999 << 10


def test_reserved_huge_pages_have_limits_of_their_own(tree: Tree) -> None:
    files = {"a/hugetlb.2MB.max": 64 * MIB, "a/hugetlb.2MB.current": 4 * MIB, "a/hugetlb.2MB.rsvd.max": "max"}
    found = huge_page_room(2 * MIB, tree({**v2("/a"), **files}))
    assert found is not None
    assert found.nbytes == 60 * MIB
    assert huge_page_room(1 << 30, tree({})) is None
    found = huge_page_room(2 * MIB, tree({"hugetlb.2MB.rsvd.max": 8 * MIB}))
    assert found is not None
    assert found.nbytes == 8 * MIB, "also of the group above"


def test_huge_pages_that_a_group_may_not_have_are_refused_before_they_end_in_a_sigbus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_memory, "huge_page_room", lambda page: Room(2 * MIB, "the group may use 2.0MiB (file)"))
    monkeypatch.setattr(host_memory, "MAP_HUGETLB", 0)  # as if the system had them
    PinnedPool(4 * MIB, huge_pages="hugetlb").close()
    assert "refused (the group may use 2.0MiB (file))" in caplog.text
    caplog.clear()
    pool = PinnedPool(2 * MIB, huge_pages="hugetlb")
    assert "refused" not in caplog.text
    pool.close()


def test_the_error_says_what_was_given_what_there_is_and_what_to_do(tree: Tree) -> None:
    root = tree({**v2("/app"), "app/memory.max": 700 * MIB, "app/memory.current": 100 * MIB})
    require_room(500 * MIB, root=root)
    with pytest.raises(ConfigError) as caught:
        require_room(1024 * MIB, root=root)
    assert str(caught.value) == (
        "memory.capacity is 1073741824 bytes (1.0GiB), of which only 629145600 are available: this process's cgroup "
        f"may use 700.0MiB, of which 100.0MiB are in use ({root}/sys/fs/cgroup/app/memory.max); set memory.capacity to "
        "536.0MiB or less (each worker takes that much), or raise that limit"
    )
    # Not to the last byte: the process needs some itself.
    with pytest.raises(ConfigError):
        require_room(600 * MIB, root=root)


def test_the_pool_asks_before_it_maps_and_while_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "TOUCH_BYTES", MIB)
    asked: list[tuple[int, int]] = []

    def require(nbytes: int, touched: int = 0) -> None:
        asked.append((nbytes, touched))
        if touched == 2 * MIB:
            raise ConfigError("another worker was faster")

    monkeypatch.setattr(host_memory, "require_room", require)
    with pytest.raises(ConfigError, match="another worker"):
        PinnedPool(4 * MIB)
    assert asked == [(4 * MIB, 0), (4 * MIB, MIB), (4 * MIB, 2 * MIB)]


def test_a_refused_mapping_names_the_resource_limit() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        "from lmcache.storage.memory import host_memory; host_memory.map_memory(4 << 30, False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if "available" in done.stderr:
        pytest.skip("this machine has not that much memory")
    assert "ConfigError: memory.capacity is 4294967296 bytes, which the system refuses" in done.stderr
    assert "RLIMIT_AS is 3.0GiB" in done.stderr


@pytest.fixture
def group() -> Iterator[Path]:
    """A real cgroup below this process's own, of 700 MiB."""
    own = next(iter(memory_limits._groups(Path("/"), "memory")), None)
    if own is None:
        pytest.skip("no memory cgroup is to be seen here")
    folder = own / f"lmcache-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        limit = next(
            (file for name in ("memory.max", "memory.limit_in_bytes") if (file := folder / name).exists()), None
        )
        if limit is None:
            pytest.skip("a cgroup that was made here has no memory controller")
        try:
            limit.write_text(str(700 * MIB))
        except OSError as error:
            pytest.skip(f"no limit can be set here: {error}")
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.parametrize("capacity", [1024, 300])
def test_in_a_real_container_too_much_is_an_error_and_the_rest_works(group: Path, capacity: int) -> None:
    code = (
        f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from lmcache.storage.memory.pool import PinnedPool\n"
        f"PinnedPool({capacity} << 20).close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if capacity < 700:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1, f"exit {done.returncode}: {done.stderr}"
    assert "memory.capacity is 1073741824 bytes (1.0GiB), of which only" in done.stderr
    assert f"({group}/memory." in done.stderr
