"""The process of one vLLM: a job and then steps on stdin, events on stdout, logs on stderr (see engine.py)."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.framework.workloads import WARM_UP


def main(messages: Iterator[dict[str, Any]], tell: Callable[[dict[str, Any]], None]) -> None:
    job = next(messages)
    started = time.perf_counter()
    llm = start(job)
    ask(llm, job, {"user": WARM_UP}, max_tokens=4)
    tell({"started": time.perf_counter() - started, **describe()})
    for step in messages:
        for request in step["requests"]:
            if step["reset"] != "none":
                llm.reset_prefix_cache(reset_connector=step["reset"] == "all")
            answer = ask(llm, job, request, job["max_tokens"])
            about = {"phase": step["phase"], "document": request["document"], "question": request["question"]}
            tell({**about, "run": job["run"], **answer})
    llm.llm_engine.engine_core.shutdown()  # a connector writes what it still holds


def start(job: dict[str, Any]) -> Any:
    import torch

    engine = job["engine"]
    torch.set_num_threads(engine["threads"])
    from vllm import LLM
    from vllm.config import KVTransferConfig

    options: dict[str, Any] = {
        key: engine[key] for key in ("dtype", "max_model_len", "gpu_memory_utilization", "enforce_eager")
    }
    if engine["block_size"]:
        options["block_size"] = engine["block_size"]
    if job["kv_transfer"]:
        options["kv_transfer_config"] = KVTransferConfig(**job["kv_transfer"])
    return LLM(model=job["model"], seed=job["seed"], disable_log_stats=False, max_num_seqs=8, **options)


def ask(llm: Any, job: dict[str, Any], request: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """One request, greedily, alone in the engine."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    tokenizer = llm.get_tokenizer()
    ids = request.get("tokens")
    if ids is None:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": request["user"]}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = TokensPrompt(prompt_token_ids=ids)
    kv = request.get("kv_transfer_params")
    extra = {"kv_transfer_params": kv} if kv is not None else None
    began = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=max_tokens, seed=job["seed"], extra_args=extra)
    (out,) = llm.generate([prompt], params, use_tqdm=False)
    return {
        "prompt_tokens": len(out.prompt_token_ids),
        "cached_tokens": out.num_cached_tokens or 0,
        "ttft_s": out.metrics.first_token_latency,
        "total_s": time.perf_counter() - began,
        "tokens": list(out.outputs[0].token_ids),
        "text": out.outputs[0].text.strip(),
    }


def describe() -> dict[str, Any]:
    """Hardware and versions, for captions."""
    import torch
    import vllm

    versions = {"python": platform.python_version(), "torch": torch.__version__, "vllm": vllm.__version__}
    return {"hardware": hardware(), "cores": os.cpu_count(), "versions": versions}


def hardware() -> str:
    """The GPU's name, or the processor's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    # stdout is for events only: what vLLM prints there goes to the log.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    main(map(json.loads, sys.stdin), lambda event: print(json.dumps(event), file=channel, flush=True))
