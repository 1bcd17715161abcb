"""How long vLLM waits for the cache: real engines over tiers that are slow or hang. Run by hand; a JSON line each.

    python tests/connector/engines/waits.py FOLDER [answers | frozen | prefixes | reset | hang] ...

answers    16 answers of 260 tokens: without a tier, and over one whose calls take 30 ms longer
frozen     six requests at once: without a tier, and over a Valkey that is stopped; and the longest pause of an answer
           that runs while it is stopped
prefixes   200 requests over 20 prefixes, a tier of 0.2 s a call
reset      reset_prefix_cache(reset_connector=True) while the tier hangs
hang       one request whose read hangs, with a short read_timeout_s and with patience that never ends
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)
sys.path.insert(0, str(Path(__file__).parent))
SCENARIOS = ("answers", "frozen", "prefixes", "reset", "hang")


class Engine:
    """One vLLM in this process whose steps are driven, and timed, here."""

    def __init__(self, model: Path, tiers: list[dict[str, Any]] | None, **options: Any) -> None:
        import torch
        from harness import connector
        from vllm import LLM
        from vllm.config import KVTransferConfig

        from lmcache.config import LMCacheConfig

        torch.set_num_threads(1)
        # Of the code before there was patience, too.
        default = {"patience": 1.0} if "patience" in LMCacheConfig.model_fields else {}
        kv = None if tiers is None else KVTransferConfig(**connector(tiers=tiers, **{**default, **options}))
        self.llm = LLM(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            gpu_memory_utilization=0.3,
            max_model_len=4096,
            skip_tokenizer_init=True,
            seed=0,
            kv_transfer_config=kv,
        )

    def run(self, prompts: list[list[int]], max_tokens: int, at_step: Any = None) -> dict[str, Any]:
        """Seconds of all, until each one's first token, and of the longest step."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        engine = self.llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)
        began = time.perf_counter()
        for number, ids in enumerate(prompts):
            engine.add_request(f"{began}-{number}", TokensPrompt(prompt_token_ids=ids), sampling)
        first: dict[str, float] = {}
        cached, longest, step = 0, 0.0, 0
        while engine.has_unfinished_requests():
            if at_step is not None:
                at_step(step)
            at = time.perf_counter()
            for output in engine.step():
                if output.request_id not in first and output.outputs[0].token_ids:
                    first[output.request_id] = time.perf_counter() - began
                    cached += output.num_cached_tokens or 0
            longest = max(longest, time.perf_counter() - at)
            step += 1
        times = sorted(first.values())
        return {
            "seconds": round(time.perf_counter() - began, 3),
            "ttft": [round(value, 3) for value in (times[0], statistics.median(times), times[-1])],
            "longest_step": round(longest, 3),
            "cached": cached,
        }

    def forget(self, *, everything: bool = False) -> float:
        began = time.perf_counter()
        self.llm.reset_prefix_cache(reset_connector=everything)
        return round(time.perf_counter() - began, 3)

    def evict_memory(self) -> None:
        """What was stored is in the lower tiers only."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        manager = get_kv_transfer_group()._worker.engine.storage
        manager.flush(30)
        manager.clear(tier="memory")
        self.forget()


def prompt(length: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, 1000) for _ in range(length)]


def slow(folder: Path, fixed_s: float) -> dict[str, Any]:
    inner = {"type": "disk", "path": str(folder), "capacity": "2GiB"}
    return {"type": "latency", "fixed_s": fixed_s, "inner": inner}


def valkey() -> Any:
    from lmcache.testing.redis import RedisServer, valkey_binary

    binary = valkey_binary()
    assert binary is not None
    return RedisServer(binary)


def answers(model: Path, folder: Path, tier: str) -> Any:
    engine = Engine(model, {"vllm": None, "none": [], "30ms": [slow(folder, 0.03)]}[tier])
    engine.run([prompt(40, 999)], 4)
    runs = [engine.run([prompt(40, 100 * round + n) for n in range(16)], 260) for round in range(5)]
    return [run["seconds"] for run in runs], max(run["longest_step"] for run in runs)


def frozen(model: Path, folder: Path, tier: str) -> Any:
    with valkey() as server:
        tiers = {"none": [], "valkey": [{"type": "remote", "url": f"valkey://127.0.0.1:{server.port}"}]}[tier]
        engine = Engine(model, tiers)
        for n in range(3):
            engine.run([prompt(600, 50 + n)], 4)
        results: dict[str, Any] = {}

        def stop(step: int) -> None:
            if step == 100:
                os.kill(server.pid, signal.SIGSTOP)

        try:
            results["running"] = engine.run([prompt(100, 7)], 600, stop)["longest_step"]
            os.kill(server.pid, signal.SIGCONT)
            time.sleep(12)
            os.kill(server.pid, signal.SIGSTOP)
            results["six"] = engine.run([prompt(600, 500 + n) for n in range(6)], 4)
            results["six_again"] = engine.run([prompt(600, 700 + n) for n in range(6)], 4)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        return results


def prefixes(model: Path, folder: Path, tier: str) -> Any:
    from lmcache.connector.lookup.client import LookupClient

    asked: dict[int, float] = {}
    ages: list[float] = []
    acquire, answer, release = LookupClient.acquire, LookupClient.answer, LookupClient.release

    def timed_acquire(self: Any, *args: Any, **kwargs: Any) -> int:
        lookup = acquire(self, *args, **kwargs)
        asked[lookup] = time.perf_counter()
        return lookup

    def timed_answer(self: Any, lookup: int, wait_s: float = 0.0) -> Any:
        result = answer(self, lookup, wait_s)
        if result is not None and lookup in asked:
            ages.append(time.perf_counter() - asked.pop(lookup))
        return result

    def timed_release(self: Any, lookup: int) -> None:
        if lookup in asked:
            ages.append(time.perf_counter() - asked.pop(lookup))
        release(self, lookup)

    LookupClient.acquire, LookupClient.answer, LookupClient.release = timed_acquire, timed_answer, timed_release  # type: ignore[method-assign]
    shared = [prompt(512, 10_000 + n) for n in range(20)]
    prompts = [shared[n % 20] + prompt(64, 20_000 + n) for n in range(200)]
    engine = Engine(model, {"none": [], "200ms": [slow(folder, 0.2)]}[tier])
    for each in shared:
        engine.run([[*each, 5]], 1)
    if tier != "none":
        engine.evict_memory()
    else:
        engine.forget()
    ages.clear()
    result = engine.run(prompts, 8)
    ages.sort()
    return {**result, "unanswered": [round(ages[len(ages) // 2], 3), round(ages[-1], 3)] if ages else None}


def reset(model: Path, folder: Path, tier: str) -> Any:
    with valkey() as server:
        engine = Engine(model, [{"type": "remote", "url": f"valkey://127.0.0.1:{server.port}"}])
        engine.run([prompt(600, 1)], 4)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            took = [engine.forget(everything=True) for _ in range(2)]
            return {"reset": took, "then": engine.run([prompt(600, 1)], 4)}
        finally:
            os.kill(server.pid, signal.SIGCONT)


def hang(model: Path, folder: Path, tier: str) -> Any:
    from lmcache.config import LMCacheConfig

    inner = {"type": "disk", "path": str(folder), "capacity": "2GiB"}
    options: dict[str, Any] = {"read_timeout_s": 3.0}
    if "patience" in LMCacheConfig.model_fields and tier == "endless":
        options["patience"] = 1000.0
    warm = Engine(model, [inner], **options)
    warm.run([prompt(600, n) for n in range(2)], 4)
    warm.evict_memory()
    warm.llm.llm_engine.engine_core.shutdown()
    engine = Engine(
        model, [{"type": "faults", "operations": ["get"], "hang_rate": 1.0, "hang_s": 60, "inner": inner}], **options
    )
    return engine.run([prompt(600, 0)], 4)


RUNS = {
    "answers": ("none", "30ms"),
    "frozen": ("none", "valkey"),
    "prefixes": ("none", "200ms"),
    "reset": ("valkey",),
    "hang": ("default", "endless"),
}


def main(folder: Path, scenarios: list[str]) -> None:
    if len(scenarios) == 2 and scenarios[1] in ("vllm", *RUNS[scenarios[0]]):
        name, tier = scenarios
        print(
            "@@"
            + json.dumps({"case": f"{name} {tier}", "result": globals()[name](folder / "model", folder / "tier", tier)})
        )
        sys.stdout.flush()
        os._exit(0)  # threads that hang would hold up the interpreter's end
    import tiny_models

    tiny_models.make("llama", folder / "model")
    for name in scenarios or SCENARIOS:
        for tier in RUNS[name]:
            shutil.rmtree(folder / "tier", ignore_errors=True)
            done = subprocess.run(
                [sys.executable, __file__, str(folder), name, tier],
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("@@")]
            print(lines[-1] if lines else f"{name} {tier} failed:\n{done.stderr[-3000:]}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
