"""Real vLLM with and without the cache: the same tokens, and the faults that must not change them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Failed, connector, has_amx
from tiny_models import prompt

Run = Callable[..., Any]
Model = Callable[..., Path]

# 700 tokens: five whole blocks of vLLM's 128 and a rest; 640: exactly five; 50: less than a block.
PROMPTS = [prompt(1, 700), prompt(2, 640), prompt(3, 50), prompt(1, 700)[:400] + prompt(4, 300)]
ASK = {"generate": PROMPTS, "max_tokens": 12, "logprobs": 5}


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [out["tokens"] for out in outputs]


def same(outputs: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Equal tokens, and log-probabilities that agree within float32 noise."""
    if tokens(outputs) != tokens(expected):
        return False
    for out, other in zip(outputs, expected, strict=True):
        for a, b in zip(out["logprobs"], other["logprobs"], strict=True):
            if max(abs(a[t] - b[t]) for t in a.keys() & b.keys()) > 1e-3:
                return False
    return True


def cached(outputs: list[dict[str, Any]]) -> list[int]:
    return [out["cached"] for out in outputs]


@pytest.fixture(scope="session")
def reference(vllm_run: Run, tiny_model: Model) -> Callable[[str], list[dict[str, Any]]]:
    """Outputs without any connector, by family."""
    known: dict[str, list[dict[str, Any]]] = {}

    def get(family: str) -> list[dict[str, Any]]:
        if family not in known:
            (outputs,) = vllm_run(tiny_model(family), None, [ASK], enable_prefix_caching=False)
            known[family] = outputs
        return known[family]

    return get


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_memory_and_disk_give_the_tokens_of_plain_vllm(
    family: str, vllm_run: Run, tiny_model: Model, reference: Run, tmp_path: Path
) -> None:
    kv = connector(tmp_path)
    cold, reset, warm = vllm_run(tiny_model(family), kv, [ASK, {"reset": "vllm"}, ASK])
    assert reset is True
    assert same(cold, reference(family))
    assert same(warm, reference(family))
    # A fresh interpreter: hashes and addresses are others than those of the process that wrote.
    (disk,) = vllm_run(tiny_model(family), kv, [ASK], fresh=family == "llama")
    assert same(disk, reference(family))
    for outputs in (warm, disk):
        hit = cached(outputs)
        # At least the whole blocks before the last token; a full hit leaves one token to compute.
        assert hit[0] >= 640
        assert hit[1] >= 512
        assert hit[2] == 0
        assert hit[3] >= 384


def test_smollm2_reads_real_text_as_plain_vllm_does(vllm_run: Run, tmp_path: Path) -> None:
    """Slow: a real model of 135M parameters answers on a CPU, with and without the cache."""
    from transformers import AutoTokenizer

    from experiments.framework.model import smollm2

    model = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [file.read_text() for file in sorted((ROOT / "data" / "documents").glob("*.txt"))[:2]]
    ask = {**ASK, "generate": [tokenizer(text)["input_ids"][:900] for text in texts], "max_tokens": 16}
    (plain,) = vllm_run(model, None, [ask], enable_prefix_caching=False)
    cold, _, warm = vllm_run(model, connector(tmp_path), [ask, {"reset": "vllm"}, ask])
    (disk,) = vllm_run(model, connector(tmp_path), [ask])
    assert same(cold, plain)
    for outputs in (warm, disk):
        assert same(outputs, plain)
        assert cached(outputs) == [896, 896]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_wrong_kv_would_be_noticed(family: str, vllm_run: Run, tiny_model: Model, reference: Run) -> None:
    # The control of every test here: the same path with garbled bytes must fail the comparison.
    steps = [ASK, {"reset": "vllm"}, {"garble_loads": True}, ASK]
    cold, _, _, garbled = vllm_run(tiny_model(family), connector(), steps)
    assert same(cold, reference(family))
    assert not same(garbled[:1], reference(family)[:1])


# vLLM prefers its AMX kernels where the processor has them; those take bfloat16 only.
@pytest.mark.parametrize(("backend", "dtype", "bound"), [("CPU_MLA", "float32", 0.02), ("AMX_MLA", "bfloat16", 0.1)])
def test_mla_gives_the_log_probabilities_of_plain_vllm(
    backend: str, dtype: str, bound: float, vllm_run: Run, tiny_model: Model, tmp_path: Path
) -> None:
    if backend == "AMX_MLA" and not has_amx():
        pytest.skip("this processor has no AMX")
    options = {"attention_backend": backend, "dtype": dtype}
    ask = {"generate": PROMPTS[:2], "max_tokens": 1, "logprobs": 20}
    model = tiny_model("deepseek")
    (plain,) = vllm_run(model, None, [ask], **options)
    check = [{"check_pages": True}, ask, {"checked": True}]
    _, _, _, warm, first = vllm_run(model, connector(tmp_path), [ask, {"reset": "vllm"}, *check], **options)
    _, disk, second = vllm_run(model, connector(tmp_path), check, **options)
    for loaded in (first, second):
        assert loaded >= (20 if backend == "CPU_MLA" else 9), "chunks compared bit for bit"
    for outputs in (warm, disk):
        assert cached(outputs)[0] >= (688 if backend == "CPU_MLA" else 640)
        for got, expected in zip(outputs, plain, strict=True):
            a, b = got["logprobs"][0], expected["logprobs"][0]
            common = a.keys() & b.keys()
            assert len(common) >= 15
            assert max(abs(a[t] - b[t]) for t in common) < bound


def test_kv_of_another_group_layout_is_never_used(
    vllm_run: Run, tiny_model: Model, reference: Run, tmp_path: Path
) -> None:
    # Upstream 0.5.6 serves wrong text here: stored with the hybrid manager off (one group), read with it on (three).
    model, kv = tiny_model("gemma3"), connector(tmp_path)
    off, _, again = vllm_run(model, kv, [ASK, {"reset": "vllm"}, ASK], disable_hybrid_kv_cache_manager=True)
    assert same(off, reference("gemma3"))
    assert same(again, reference("gemma3"))
    assert cached(again)[0] >= 640, "the layout with one group must be cached too, or this test shows nothing"
    (on,) = vllm_run(model, kv, [ASK])
    assert same(on, reference("gemma3"))
    assert cached(on)[0] == 0


def test_other_weights_in_the_same_folder_are_another_model_and_equal_ones_elsewhere_are_not(
    vllm_run: Run, tiny_model: Model, tmp_path: Path
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    kv = connector(tmp_path / "kv")
    vllm_run(tiny_model("llama"), kv, [ASK])
    (equal,) = vllm_run(model, kv, [ASK])
    assert cached(equal)[0] >= 640
    shutil.copy(tiny_model("llama", 1) / "model.safetensors", model / "model.safetensors")
    (other,) = vllm_run(model, kv, [ASK])
    assert cached(other)[0] == 0
    assert tokens(other) != tokens(equal)


@pytest.mark.parametrize("name", ["LMCacheConnectorV1", "short name"])
def test_other_names_work_with_scheduler_and_worker_in_their_own_processes(
    name: str, vllm_run: Run, tiny_model: Model, reference: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("LMCACHE_LOCAL_DISK", "/kv")
    kv = connector(tmp_path, name=name)
    if name == "short name":
        kv["kv_connector"] = "LMCacheConnector"  # without a module path: found through the plugin entry point
    cold, _, warm = vllm_run(tiny_model("llama"), kv, [ASK, {"reset": "vllm"}, ASK], processes=True)
    said = vllm_run.log  # type: ignore[attr-defined]
    assert "memory 256.0MiB holds the KV of 65,536 tokens, below it: disk" in said, "the line at start is seen"
    assert "are set and not read: LMCACHE_LOCAL_DISK (write tiers: " in said
    assert same(cold, reference("llama"))
    assert same(warm, reference("llama"))
    assert cached(warm)[0] >= 640


def test_chunks_larger_than_a_block_and_not_a_multiple_of_it(
    vllm_run: Run, tiny_model: Model, reference: Run, tmp_path: Path
) -> None:
    kv = connector(tmp_path, chunk_tokens=200)
    cold, _, warm = vllm_run(tiny_model("llama"), kv, [ASK, {"reset": "vllm"}, ASK])
    assert "using 256" in vllm_run.log  # type: ignore[attr-defined]
    assert same(cold, reference("llama"))
    assert same(warm, reference("llama"))
    assert cached(warm)[:2] == [640, 639], "the tail is matched down to the block"


def test_hits_on_top_of_vllms_own_prefix_cache(vllm_run: Run, tiny_model: Model, tmp_path: Path) -> None:
    # vLLM holds the first blocks itself, we hold more: only the rest is loaded, into the blocks behind the local hit.
    long, short = prompt(1, 700), prompt(1, 700)[:300]
    model, kv = tiny_model("llama"), connector(tmp_path)
    steps = [{"generate": [long]}, {"reset": "vllm"}, {"generate": [short + prompt(9, 5)]}, {"generate": [long]}]
    first, _, _, last = vllm_run(model, kv, steps)
    assert tokens(first) == tokens(last)
    assert cached(last) == [640]
    assert "a load of" not in vllm_run.log, "a load that fails is computed, and the tokens are the same"  # type: ignore[attr-defined]


def test_chunked_prefill_preemption_abort_and_a_full_reset(
    vllm_run: Run, tiny_model: Model, reference: Run, tmp_path: Path
) -> None:
    steps = [
        {"abort": PROMPTS[0], "after": 2},
        ASK,
        {"reset": "vllm"},
        {"abort": PROMPTS[0], "after": 1},
        ASK,
        {"reset": "all"},
        ASK,
        {"used": True},
        {"preemptions": True},
    ]
    # 16 blocks for four requests of up to six: they are preempted and resumed; 256 tokens a step: prefill in chunks.
    options = {"num_gpu_blocks_override": 16, "max_num_batched_tokens": 256, "max_num_seqs": 4, "max_model_len": 1792}
    _, cold, _, _, warm, cleared, fresh, used, preemptions = vllm_run(
        tiny_model("llama"), connector(tmp_path), steps, **options
    )
    assert same(cold, reference("llama"))
    assert same(warm, reference("llama"))
    assert same(fresh, reference("llama"))
    assert cached(warm)[0] >= 640
    assert cleared is True
    assert used["leases"] == 0
    assert preemptions >= 1, "nothing was preempted, so this test shows less than it says"


def test_cache_salts_do_not_share_and_have_quotas(vllm_run: Run, tiny_model: Model, tmp_path: Path) -> None:
    one, two = {"generate": [PROMPTS[0]], "salts": ["a"]}, {"generate": [PROMPTS[0]], "salts": ["b"]}
    again, memory = {"reset": "vllm"}, {"used": True}
    steps = [one, memory, again, two, memory, again, one, again, two]
    kv = connector(tmp_path, quotas={"b": "4KiB"})
    _, first, _, other, second, _, same, _, below = vllm_run(tiny_model("llama"), kv, steps)
    assert cached(other) == [0]
    assert cached(same) == [640]
    assert first["chunks"] == second["chunks"] > 0, "memory keeps none of b's"
    assert cached(below) == [640], "the disk does"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_failed_load_is_recomputed(
    family: str, vllm_run: Run, tiny_model: Model, reference: Run, tmp_path: Path
) -> None:
    steps = [ASK, {"reset": "vllm"}, {"break_loads": 2}, ASK, {"reset": "vllm"}, ASK]
    cold, _, _, broken, _, after = vllm_run(tiny_model(family), connector(tmp_path), steps)
    assert "injected" in vllm_run.log  # type: ignore[attr-defined]
    assert same(cold, reference(family))
    assert same(broken, reference(family))
    assert same(after, reference(family))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_with_policy_fail_a_failed_load_ends_that_request_and_vllm_goes_on(
    family: str, vllm_run: Run, tiny_model: Model, reference: Run, tmp_path: Path
) -> None:
    first = {**ASK, "generate": PROMPTS[:1]}
    steps = [first, {"reset": "vllm"}, {"break_loads": 1}, first, {"reset": "vllm"}, first]
    _, _, _, broken, _, after = vllm_run(tiny_model(family), connector(tmp_path, policy="fail"), steps)
    assert "set it to 'recompute'" in vllm_run.log  # type: ignore[attr-defined]
    assert [out["reason"] for out in broken] == ["error"]
    assert same(after, reference(family)[:1])


def test_killed_at_any_moment_vllm_leaves_a_disk_tier_that_the_next_start_uses(
    vllm_run: Run, vllm_process: Run, tiny_model: Model, reference: Run, tmp_path: Path
) -> None:
    model, kv = tiny_model("llama"), connector(tmp_path / "kv")
    dice = random.Random(5)
    for round_ in range(3):
        busy = [{"generate": [*PROMPTS, prompt(100 * round_ + i, 900)], "max_tokens": 4} for i in range(40)]
        process = vllm_process(model, kv, busy)
        for line in process.stdout:
            if line.startswith("@@started"):
                break
        # A random moment of its work, on a clock that the engine does not know of.
        assert process.wait(dice.uniform(0.05, 1.5)) is None, "it was done before"
        process.kill()
    (outputs,) = vllm_run(model, kv, [ASK])
    assert same(outputs, reference("llama"))
    assert not list((tmp_path / "kv").rglob("*.tmp*"))


def test_damaged_files_are_misses_and_are_removed(
    vllm_run: Run, tiny_model: Model, reference: Run, tmp_path: Path
) -> None:
    model, kv = tiny_model("llama"), connector(tmp_path)
    vllm_run(model, kv, [ASK])
    files = sorted(tmp_path.rglob("*.kv"))
    assert len(files) >= 12
    damaged = files[::2]
    for i, file in enumerate(damaged):
        raw = bytearray(file.read_bytes())
        if i % 4 == 0:
            raw = raw[: len(raw) // 2]
        elif i % 4 == 1:
            raw[-1] ^= 1
        elif i % 4 == 2:
            raw = bytearray(files[1].read_bytes())
        else:
            raw = bytearray()
        file.write_bytes(raw)
    (outputs,) = vllm_run(model, kv, [ASK])
    assert same(outputs, reference("llama"))


def test_bad_tiers_are_clear_errors_at_start(vllm_run: Run, tiny_model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed, match="file"):
        vllm_run(tiny_model("llama"), connector(tmp_path / "file" / "below"), [ASK])
    with pytest.raises(Failed, match="less than one chunk"):
        vllm_run(tiny_model("llama"), connector(memory={"capacity": "64KiB"}), [ASK])
    with pytest.raises(Failed, match="unknown key capacty; known: "):
        vllm_run(tiny_model("llama"), connector(memory={"capacty": "1GiB"}), [ASK])


def test_a_full_disk_is_a_slower_cache_not_a_dead_vllm(
    vllm_run: Run, tiny_model: Model, reference: Run, small_disk: Path
) -> None:
    cold, _, warm = vllm_run(tiny_model("llama"), connector(small_disk), [ASK, {"reset": "vllm"}, ASK])
    assert same(cold, reference("llama"))
    assert same(warm, reference("llama"))
    (after,) = vllm_run(tiny_model("llama"), connector(small_disk), [ASK])
    assert same(after, reference("llama"))


def test_connectors_side_by_side_keep_apart_and_to_their_roles_in_a_long_temporary_folder(
    vllm_run: Run, tiny_model: Model, reference: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"memory": {"capacity": "32MiB"}}
    roles = ["kv_producer", "kv_consumer", "kv_both", "kv_both"]  # the last two are the same in everything
    children = [connector(role=role, **small) for role in roles]
    kv = {**connector(name="MultiConnector"), "kv_connector_extra_config": {"connectors": children}}
    again = [{"reset": "vllm"}, ASK]
    steps = [ASK, {"chunks": True}, *again, {"forget": [2]}, *again, {"forget": [2, 3]}, *again, {"chunks": True}]
    with tempfile.TemporaryDirectory(prefix="x" * 60) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        results = vllm_run(tiny_model("llama"), kv, steps)
    for trouble in ("failed; vLLM is told", "was not answered"):
        assert trouble not in vllm_run.log  # type: ignore[attr-defined]
    cold, stored, _, first, _, _, second, _, _, neither, stored_later = results
    for outputs in (cold, first, second, neither):
        assert same(outputs, reference("llama"))
    assert cached(first)[0] >= 640
    assert cached(second)[0] >= 640, "the twin of the connector that forgot everything has it"
    assert cached(neither)[0] == 0, "a producer promises nothing"
    for chunks in (stored, stored_later):
        assert [bool(count) for count in chunks] == [True, False, True, True], "a consumer stores nothing"
