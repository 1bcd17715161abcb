"""Runs one vLLM engine in this process through a scenario and prints what came out, as JSON on the last line.

    echo '{"model": ..., "connector": null | {...}, "steps": [...], ...}' | python tests/connector/engines/drive.py

Steps: {"generate": [[token ids], ...]} (with "max_tokens", "logprobs", "salts", and "kv": the
kv_transfer_params of each), {"reset": "vllm" | "all"},
{"abort": [token ids], "after": scheduler steps}, {"break_loads": n} (the next n loads raise),
{"garble_loads": true} (every load
writes other bytes than were stored),
{"say": text} (a line on stdout, for whoever wants to send a signal then), {"used": true}, {"preemptions": true},
{"reload": folder} (other weights in place), {"apply": expression} (of ``model``, through apply_model), {"touch":
expression} (of ``model``, behind vLLM's back), {"sleep": level} and {"wake": true}, {"call": method} (of the worker),
{"check_pages": true} (from now on every load is read back from the pages and compared), {"checked": true}
(how many were), {"share_blended": true} (blended blocks keep the hashes of their tokens), {"lose_passages": n} (the
passages of the next n loads are gone, and so is what storage has of them), {"chunks": true} (how many each child of a
MultiConnector has), {"forget": [i, ...]} (these children lose theirs).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="0",
    VLLM_LOGGING_STREAM="ext://sys.stderr",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(scenario: dict[str, Any]) -> list[Any]:
    import torch

    torch.set_num_threads(1)
    from vllm import LLM
    from vllm.config import KVTransferConfig

    options: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        "max_model_len": 4096,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "seed": 0,
        **scenario.get("options", {}),
    }
    if scenario.get("connector"):
        options["kv_transfer_config"] = KVTransferConfig(**scenario["connector"])
    llm = LLM(model=scenario["model"], **options)
    say("started")
    results = [step(llm, each) for each in scenario["steps"]]
    core = llm.llm_engine.engine_core
    core.shutdown()
    return results


def step(llm: Any, each: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    if "say" in each:
        return say(each["say"])
    if "reset" in each:
        return llm.reset_prefix_cache(reset_connector=each["reset"] == "all")
    if "reload" in each:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": each["reload"]})
        return None
    if "apply" in each:
        return llm.apply_model(lambda model: (eval(each["apply"], {"model": model}), None)[1])
    if "touch" in each:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        eval(each["touch"], {"model": model})
        return None
    if "sleep" in each:
        return llm.sleep(each["sleep"])
    if "wake" in each:
        return llm.wake_up()
    if "call" in each:
        llm.collective_rpc(each["call"])
        return None
    if "break_loads" in each:
        return break_loads(each["break_loads"])
    if "garble_loads" in each:
        return garble_loads()
    if "preemptions" in each:
        return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    if "check_pages" in each:
        return check_pages()
    if "checked" in each:
        return len(CHECKED)
    if "share_blended" in each:
        return share_blended()
    if "lose_passages" in each:
        return lose_passages(each["lose_passages"])
    if "used" in each:
        return used_memory()
    if "chunks" in each:
        return [child.storage.stats()["chunks"] for child in children()]
    if "forget" in each:
        return [children()[index].clear() for index in each["forget"]]

    def sampling(kv: Any = None) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=each.get("max_tokens", 8),
            logprobs=each.get("logprobs"),
            detokenize=False,
            ignore_eos=True,
            extra_args={"kv_transfer_params": kv} if kv is not None else None,
        )

    if "abort" in each:
        engine = llm.llm_engine
        engine.add_request("victim", TokensPrompt(prompt_token_ids=each["abort"]), sampling())
        for _ in range(each.get("after", 1)):
            engine.step()
        engine.abort_request(["victim"])
        while engine.has_unfinished_requests():
            engine.step()
        return None
    salts = each.get("salts") or [None] * len(each["generate"])
    prompts = [
        TokensPrompt(prompt_token_ids=ids, **({"cache_salt": salt} if salt else {}))
        for ids, salt in zip(each["generate"], salts, strict=True)
    ]
    params = [sampling(kv) for kv in each.get("kv") or [None] * len(prompts)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        {
            "tokens": list(out.outputs[0].token_ids),
            "cached": out.num_cached_tokens,
            "reason": out.outputs[0].finish_reason,
            "ttft": out.metrics.first_token_latency if out.metrics else None,
            "logprobs": [
                {str(token): entry.logprob for token, entry in position.items()}
                for position in out.outputs[0].logprobs or []
            ],
        }
        for out in outputs
    ]


def break_loads(count: int) -> None:
    """The next loads of this process raise in the worker, as a failing device copy would."""
    from lmcache.engine.engine import CacheEngine

    retrieve = CacheEngine.retrieve
    left = [count]

    def broken(self: CacheEngine, *args: Any, **kwargs: Any) -> int:
        if left[0] > 0:
            left[0] -= 1
            raise OSError("injected")
        return retrieve(self, *args, **kwargs)

    CacheEngine.retrieve = broken  # type: ignore[method-assign]


def garble_loads() -> None:
    """The error that the tests of this folder exist to see: KV that is not that text's."""
    from lmcache.engine.mover import PageMover

    scatter = PageMover.scatter

    def garbled(self: PageMover, tables: Any, start: int, stop: int, chunk: Any, **kwargs: Any) -> None:
        half = len(chunk.view) // 2
        chunk.view[:half] = bytes(chunk.view[half : 2 * half])  # the later layers' KV in the earlier ones
        scatter(self, tables, start, stop, chunk, **kwargs)

    PageMover.scatter = garbled  # type: ignore[method-assign]


CHECKED: list[int] = []


def check_pages() -> None:
    """After every load the pages must hold the leased chunks, bit for bit."""
    from lmcache.engine.engine import CacheEngine

    retrieve = CacheEngine.retrieve

    def checked(self: CacheEngine, lookup: Any, block_ids: Any, *, start: int = 0, stop: int | None = None) -> int:
        count = retrieve(self, lookup, block_ids, start=start, stop=stop)
        tables = self._mover.tables(block_ids)
        for span, held in zip(lookup.spans, lookup.lease.buffers, strict=False):
            if span.start >= start and (stop is None or span.stop <= stop):
                buffer = self.storage.allocate(held.nbytes)
                self._mover.gather(tables, span.start, span.stop, buffer)
                assert buffer.view == held.view
                buffer.release()
                CHECKED.append(span.stop - span.start)
        return count

    CacheEngine.retrieve = checked  # type: ignore[method-assign]


def share_blended() -> None:
    """The error that "blended blocks are nobody else's" is about."""
    from lmcache.connector.scheduler.loads import Loads

    Loads._unshare = lambda *args: None  # type: ignore[method-assign]


def lose_passages(count: int) -> None:
    """As when a lease ran out and memory was needed for something else."""
    from lmcache.connector.blending import Blending

    fill, left = Blending.fill, [count]

    def losing(self: Blending, found: Any, *args: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            found.close()
            self.rename(self.store.format.model)  # forgets what it knows
            self._engine.storage.clear(self.store.format.kv_format().fingerprint(), wait=False)
        return fill(self, found, *args)

    Blending.fill = losing  # type: ignore[method-assign]


def used_memory() -> dict[str, int]:
    """The worker's storage statistics (single-process engines only)."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    manager = get_kv_transfer_group()._worker.engine.storage
    manager.flush(10)
    return manager.stats()


def children() -> list[Any]:
    """The cache engines of a MultiConnector's workers, in order (single-process engines only)."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return [child._worker.engine for child in get_kv_transfer_group()._connectors]


def say(text: str) -> None:
    print(f"@@{text}", flush=True)


if __name__ == "__main__":
    results = main(json.load(sys.stdin))
    print("@@" + json.dumps({"results": results}), flush=True)
