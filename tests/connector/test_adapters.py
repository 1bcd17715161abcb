"""LoRA adapters that change: real vLLM, and what the two halves make of a folder's content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import connector
from tiny_models import adapter, prompt

from lmcache.connector.identity import adapters as a

# Each case has an adapter folder and a prompt of its own, so that none is served from another's.
CASES = ["stays", "replaced", "home", "in place", "same times", "number used twice", "number raised", "evicted"]
PROMPTS = {case: prompt(40 + i, 600) for i, case in enumerate(CASES)}
NUMBERS = {case: 1 + i for i, case in enumerate(CASES)}
WHOLE = 512  # tokens of a prompt that are whole blocks


@pytest.fixture(scope="module")
def engines(
    vllm_many: Callable[..., list[Any]], tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What engines said about every case: the two adapters alone, an engine under which files change, the next one."""
    root = tmp_path_factory.mktemp("lora")
    old, new = adapter(root / "old", 1), adapter(root / "new", 2)
    folders = {case: str(shutil.copytree(old, root / case)) for case in CASES}

    def ask(case: str, path: str | None = None, number: int = 0, *in_place: bool, name: str = "") -> dict[str, Any]:
        lora = [name or case, number or NUMBERS[case], path or folders[case], *in_place]
        return {"generate": [PROMPTS[case]], "lora": lora}

    def replace(case: str, **how: Any) -> dict[str, Any]:
        return {"copy": [str(new), folders[case]], **how}

    reset, home = {"reset": "vllm"}, {"home": str(root)}
    changing = {
        "stays": [ask("stays")],
        "replaced": [ask("replaced"), reset, ask("replaced"), replace("replaced"), reset, ask("replaced")],
        "home": [home, ask("home", "~/home"), replace("home")],
        "in place": [ask("in place"), replace("in place"), ask("in place", None, 0, True)],
        "same times": [ask("same times"), replace("same times", times="old")],
        # vLLM goes on with what it has under that number, under another name and from another folder.
        "number used twice": [ask("number used twice"), ask("number used twice", str(new), name="other")],
        # vLLM loads the new files under a new number, and finds the old ones' blocks by name and path.
        "number raised": [ask("number raised"), replace("number raised"), ask("number raised", number=90)],
    }
    evicted = [ask("evicted"), ask("evicted", str(new), 91), replace("evicted"), reset, ask("evicted"), reset]
    evicted += [ask("evicted")]
    readers = [home, *(ask(case) for case in CASES if case not in ("home", "number used twice", "evicted"))]
    readers += [ask("home", "~/home"), ask("number used twice", str(new), name="other")]
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 12}
    llama, kv = str(tiny_model("llama")), connector(root / "kv")
    plain = [ask(case, str(path), 1 + (path == new), name=path.name) for path in (old, new) for case in CASES]
    results = vllm_many(
        [
            {"model": llama, "options": options, "steps": plain},
            {"model": llama, "options": options, "connector": kv, "steps": [x for s in changing.values() for x in s]},
            {"model": llama, "options": options, "connector": kv, "steps": readers},
            {
                "model": llama,
                "options": {**options, "max_loras": 1, "max_cpu_loras": 1},
                "connector": connector(),
                "steps": evicted,
            },
        ]
    )
    assert all(isinstance(result, list) for result in results), results
    alone, changed, read, last = ([each for each in result if isinstance(each, list)] for result in results)
    found: dict[str, Any] = {
        "old": {case: out["tokens"] for case, (out,) in zip(CASES, alone[: len(CASES)], strict=True)},
        "new": {case: out["tokens"] for case, (out,) in zip(CASES, alone[len(CASES) :], strict=True)},
    }
    for case, steps in changing.items():
        count = sum("generate" in each for each in steps)
        found[case], changed = [out for (out,) in changed[:count]], changed[count:]
    order = [step["lora"][0] for step in readers if "lora" in step]
    found["read"] = {
        "number used twice" if name == "other" else name: out for name, (out,) in zip(order, read, strict=True)
    }
    found["evicted"] = [out for (out,) in last]
    return found


def test_the_adapters_of_these_tests_matter(engines: dict[str, Any]) -> None:
    """Slow, as the first that needs the engines of this file: two real ones, a process each."""
    for case in CASES:
        assert engines["old"][case] != engines["new"][case]


def test_an_adapter_that_stays_is_served(engines: dict[str, Any]) -> None:
    first, second, _ = engines["replaced"]
    assert (first["cached"], second["cached"]) == (0, WHOLE)
    assert first["tokens"] == second["tokens"] == engines["old"]["replaced"]


def test_while_the_old_adapter_runs_nothing_is_done_under_the_new_ones_name(engines: dict[str, Any]) -> None:
    after = engines["replaced"][2]
    assert after["tokens"] == engines["old"]["replaced"], "vLLM still has the old one"
    assert after["cached"] == 0


def test_the_next_engine_is_served_what_the_same_adapter_computed(engines: dict[str, Any]) -> None:
    assert engines["read"]["stays"] == {"tokens": engines["old"]["stays"], "cached": WHOLE}


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("stays", "evicted")])
def test_the_next_engine_never_gets_what_another_adapter_computed(case: str, engines: dict[str, Any]) -> None:
    assert engines["read"][case]["tokens"] == engines["new"][case]
    assert engines["read"][case]["cached"] == 0


def test_an_adapter_that_vllm_evicts_and_reads_again_is_what_it_reads_then(engines: dict[str, Any]) -> None:
    old, _, new, again = engines["evicted"]
    assert old["tokens"] == engines["old"]["evicted"]
    assert new["tokens"] == again["tokens"] == engines["new"]["evicted"]
    assert again["cached"] == WHOLE


# ---- stamps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_model.safetensors").write_bytes(bytes(1000))
    return made


def settle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the files be old enough to be known by their times."""
    now = max(file.stat().st_ctime_ns for file in folder.iterdir()) + 10**10
    monkeypatch.setattr(a.time, "time_ns", lambda: now)


def test_a_stamp_is_of_content_and_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(folder, monkeypatch)
    files = a.AdapterFiles()
    assert files.known(str(folder)) is None
    first = files.read(str(folder))
    assert first is not None
    assert files.known(str(folder)) == first
    copy = files.read(str(shutil.copytree(folder, folder.parent / "copy")))
    assert copy is not None
    assert copy.files == first.files
    times = (folder / "adapter_model.safetensors").stat()
    (folder / "adapter_model.safetensors").write_bytes(b"\1" + bytes(999))
    os.utime(folder / "adapter_model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files.known(str(folder)) is None
    second = files.read(str(folder))
    assert second is not None
    assert second.files != first.files


def test_a_file_that_was_just_written_is_read_again(folder: Path) -> None:
    files = a.AdapterFiles()
    first = files.read(str(folder))
    assert files.known(str(folder)) is None
    assert files.read(str(folder)) == first


def test_what_vllm_does_not_read_does_not_count(folder: Path) -> None:
    first = a.AdapterFiles().read(str(folder))
    (folder / "README.md").write_text("trained on a Tuesday")
    (folder / "optimizer.pt").write_bytes(b"large")
    assert a.AdapterFiles().read(str(folder)) == first


def test_a_folder_that_changes_while_it_is_read_has_no_stamp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = a.hashlib.file_digest

    def meanwhile(file: Any, name: str) -> Any:
        (folder / "adapter_config.json").write_text('{"r": 8}')
        return digest(file, name)

    monkeypatch.setattr(a.hashlib, "file_digest", meanwhile)
    assert a.AdapterFiles().read(str(folder)) is None


def test_folders_are_found_where_vllm_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert a.local_folder("~/x") == str(tmp_path / "x")
    assert a.local_folder("/some/x") == "/some/x"
    assert a.local_folder("here") == str(tmp_path / "here")
    assert a.local_folder("org/name") is None
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only: f"/hub/{name}")
    assert a.hub_folder("org/name") == "/hub/org/name"

    def missing(name: str, local_files_only: bool) -> str:
        raise FileNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    assert a.hub_folder("org/name") is None
    assert a.AdapterFiles().read(str(tmp_path / "nowhere")) is None


CONFIG = SimpleNamespace(enable_tower_connector_lora=False, lora_dtype="auto")


def lora(path: str, **fields: Any) -> Any:
    values = {"lora_name": "l", "lora_int_id": 1, "lora_path": path, "load_inplace": False, "is_3d_lora_weight": False}
    return SimpleNamespace(**{**values, **fields})


def test_what_the_network_may_change_is_promised_only_once_it_is_loaded(folder: Path) -> None:
    stamps = a.Stamps(CONFIG)  # type: ignore[arg-type]
    stamp = stamps.ask(str(folder)).result(10)
    assert stamp is not None
    assert not stamps.adapter(lora(str(folder)), stamp, must_be_loaded=False).must_be_loaded
    assert stamps.adapter(lora("org/name"), stamp, must_be_loaded=False).must_be_loaded
    assert stamps.tag(lora(str(folder)), stamp) != stamps.tag(lora(str(folder), is_3d_lora_weight=True), stamp)
    other = a.Stamps(SimpleNamespace(**{**vars(CONFIG), "lora_dtype": "float16"}))  # type: ignore[arg-type]
    assert other.tag(lora(str(folder)), stamp) != stamps.tag(lora(str(folder)), stamp)
    stamps.close()
    other.close()


# ---- what is loaded


class Manager:
    """vLLM's, as far as it is asked."""

    def __init__(self) -> None:
        self.lora_config = object()
        self.held: dict[int, Any] = {}
        self._adapter_manager = SimpleNamespace(list_adapters=lambda: dict(self.held))

    def load(self, number: int, files: str | None, folder: str = "") -> None:
        stamp = a.Stamp(folder, a.signature_of(folder), files) if files else None
        self.held[number] = SimpleNamespace(**{a._ORIGIN: a._Origin(stamp)})


@pytest.fixture
def manager() -> Manager:
    made = Manager()
    a._managers.add(made)
    return made


def loaded(manager: Manager, **options: Any) -> a.LoadedAdapters:
    return a.LoadedAdapters(manager.lora_config, **options)


def test_a_lookup_is_for_what_is_loaded_or_for_what_will_be(manager: Manager) -> None:
    half = loaded(manager)
    assert half.admits(a.Adapter(1, "x", "old"))
    assert not half.admits(a.Adapter(1, "x", "old", must_be_loaded=True))
    manager.load(1, "old")
    assert half.admits(a.Adapter(1, "x", "old", must_be_loaded=True))
    assert not half.admits(a.Adapter(1, "x", "new"))
    assert half.admits(a.Adapter(1, "x", "new", reloaded=True)), "it will be read again with the request"
    manager.load(1, None)
    assert not half.admits(a.Adapter(1, "x", "old"))


def test_only_what_this_adapter_computed_is_loaded_and_stored(manager: Manager) -> None:
    half, old, new = loaded(manager), a.Adapter(1, "x", "old"), a.Adapter(1, "x", "new")
    assert not half.loads(old)
    manager.load(1, "old")
    half.begin_step(5, [("x", 1)])
    assert half.loads(old)
    assert half.stores(old, 5)
    assert half.stores(old, -1), "nothing else has computed under this name"
    assert not half.loads(new)
    assert not half.stores(new, 5)
    manager.load(1, "new")
    half.begin_step(6, [("x", 1)])
    assert half.stores(new, 6)
    assert not half.stores(new, 5), "a block of the old one, found by its name"
    assert not half.stores(old, 4)
    manager.held.clear()
    assert not half.stores(new, 6)


def test_two_that_take_turns_under_one_name_do_not_get_each_others_blocks(manager: Manager) -> None:
    half, first, second = loaded(manager), a.Adapter(1, "x", "1"), a.Adapter(2, "x", "2")
    manager.load(1, "1")
    manager.load(2, "2")
    half.begin_step(1, [("x", 1)])
    half.begin_step(2, [("x", 1), ("x", 2)])
    assert not half.stores(first, 2)
    assert not half.stores(second, 2)
    half.begin_step(3, [("x", 1)])
    assert half.stores(first, 3)
    assert not half.stores(second, 3), "the first computed under this name in step 3"
    manager.load(3, None)
    half.begin_step(4, [("x", 3)])
    half.begin_step(5, [("x", 1)])
    assert not half.stores(first, 4), "what computed in step 4 is not known"
    assert half.stores(first, 5)


def test_several_workers_must_have_read_the_same(manager: Manager, folder: Path) -> None:
    half, adapter_ = loaded(manager, several_workers=True), a.Adapter(1, "x", "f")
    manager.load(1, "f", str(folder))
    half.begin_step(7, [("x", 1)])
    assert not half.stores(adapter_, 7), "the others may not have loaded it yet"
    half.begin_step(10, [("x", 1)])
    assert half.stores(adapter_, 10)


def test_an_adapter_whose_files_were_touched_is_in_doubt(manager: Manager, folder: Path) -> None:
    half, adapter_ = loaded(manager), a.Adapter(1, "x", "f")
    manager.load(1, "f", str(folder))
    assert half.admits(adapter_)
    assert half.loads(adapter_)
    assert half.stores(adapter_, 1)
    os.utime(folder / "adapter_config.json")
    assert not half.admits(adapter_)
    assert not half.loads(adapter_)
    assert not half.stores(adapter_, 1)


def test_where_somebody_else_loads_adapters_one_promise_fails_and_no_more(manager: Manager) -> None:
    half, adapter_ = loaded(manager), a.Adapter(1, "x", "f")
    assert half.admits(adapter_)
    assert not half.loads(adapter_)
    assert not half.admits(adapter_)
    assert not half.admits(a.Adapter(1, "x", "f", reloaded=True))


def test_another_engine_in_this_process_has_its_own(manager: Manager) -> None:
    other = Manager()
    a._managers.add(other)
    other.load(1, "old")
    assert not loaded(manager).loads(a.Adapter(1, "x", "old"))


def test_the_worker_loads_and_stores_only_for_the_adapter_that_is_loaded(manager: Manager, tmp_path: Path) -> None:
    import torch

    import lmcache
    from lmcache.connector.lookup.client import LookupClient
    from lmcache.connector.metadata import Load, StepMetadata, Store
    from lmcache.connector.worker import WorkerHalf
    from lmcache.engine.engine import pack_tokens
    from lmcache.engine.layout import PagedCache
    from lmcache.keys import KVFormat

    config = lmcache.load_config(overrides={"memory.capacity": "4MiB", "chunk_tokens": 16})
    cache = PagedCache.from_layers([torch.zeros(8, 2, 16, 8)])
    format = KVFormat(model="m", chunk_tokens=16, planes=tuple(p.format() for p in cache.planes), layout="token")
    worker = WorkerHalf(config, f"ipc://{tmp_path}/w", format, cache, adapters=loaded(manager))
    client = LookupClient([f"ipc://{tmp_path}/w"])
    tokens, old, new = pack_tokens(list(range(32))), a.Adapter(1, "x", "old"), a.Adapter(1, "x", "new")

    def step(number: int, adapter_: a.Adapter, lookup: int | None = None) -> set[int]:
        store = Store("r", tokens, ([1, 2],), 0, False, {"lora": adapter_.files}, (), number, adapter=adapter_)
        meta = StepMetadata(step=number, adapters=[("x", 1)], stores=[] if lookup else [store])
        if lookup:
            meta.loads = [Load("r", lookup, ([3, 4],), 0, 32, False, adapter=adapter_)]
        worker.begin_step(meta)
        worker.start_load(meta)
        worker.finish_step(meta)
        return worker.take_failed_blocks()

    def held(adapter_: a.Adapter) -> tuple[int, int]:
        lookup = client.acquire(tokens, {"lora": adapter_.files}, (), adapter=adapter_)
        answer = client.answer(lookup, 10)
        return lookup, answer.tokens if answer is not None else -1

    manager.load(1, "old")
    step(1, new)
    step(2, old)
    lookup, count = held(old)
    assert count == 32
    manager.load(1, "new")
    assert step(3, old, lookup) == {3, 4}, "files changed between lookup and load: vLLM is told"
    assert held(old)[1] == 0
    assert held(new)[1] == 0, "nothing was stored for it"
    client.close()
    worker.shutdown()
