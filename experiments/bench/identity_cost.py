"""What it costs to know which weights compute: python -m experiments.bench.identity_cost

Real vLLM decodes with the small language model on one thread, while everything that identity adds to a step is timed:
the look at the weights (worker) and the ages of blocks (scheduler). Prints medians and their share of a step; exits
with 1 when the share is over 0.2%.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.framework.config import CONNECTOR, EngineConfig
from experiments.framework.engine import Job, environment, model_path
from experiments.framework.engine_process import hardware, start

LIMIT = 0.002
DECODED, RUNNING, PROMPT = 96, 4, 300


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Have every call of ``owner.name`` note how long it took."""
    call: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, measured)


def main() -> None:
    engine = EngineConfig(kv_space_gib=1, max_model_len=1024)
    os.environ.update({**environment(engine), "VLLM_LOGGING_LEVEL": "ERROR"})
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from lmcache.connector.scheduler.blocks import BlockAges
    from lmcache.connector.worker import WorkerHalf

    steps, looks, ages = list[float](), list[float](), list[float]()
    timed(GPUModelRunner, "execute_model", steps)
    timed(WorkerHalf, "begin_step", looks)
    for name in ("begins", "begun", "oldest"):
        timed(BlockAges, name, ages)
    job = Job(model_path(engine), engine.model_dump(mode="json"), CONNECTOR, max_tokens=DECODED, seed=0)
    llm = start(dataclasses.asdict(job))
    prompts = [TokensPrompt(prompt_token_ids=[(7 * i + j) % 40000 + 3 for j in range(PROMPT)]) for i in range(RUNNING)]
    params = SamplingParams(temperature=0, max_tokens=DECODED, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)  # warm-up
    for seconds in (steps, looks, ages):
        seconds.clear()
    llm.generate(prompts, params, use_tqdm=False)
    step, look = statistics.median(steps), statistics.median(looks)
    planned = sum(ages) / len(steps)
    share = (look + planned) / step
    print(
        f"{hardware()}, one thread, SmolLM2-135M float32, {RUNNING} requests, {len(steps)} steps: step "
        f"{step * 1e3:.2f} ms, look {look * 1e6:.1f} us (at most {max(looks) * 1e6:.0f}), ages {planned * 1e6:.1f} us: "
        f"{share:.3%} of a step (limit {LIMIT:.1%})"
    )
    llm.llm_engine.engine_core.shutdown()
    sys.exit(share > LIMIT)


if __name__ == "__main__":
    main()
