"""Runs several vLLM engines, one after the other, in this process: importing vLLM takes longer than an engine's start.

    echo '[{"model": ..., "connector": null | {...}, "options": {...}, "steps": [...]}, ...]' | python drive_many.py

Prints one result for each engine on the last line: the results of its steps, or what it died of. Steps are those of
drive.py and: {"embed": [[token ids], ...]} (with "task"), {"home": folder} (what ~ means), {"copy": [from, to]} (files;
"times": "old" keeps those of the files that are written over), "lora": [name, number, path, in place?] beside
"generate" (and "max_tokens").
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import drive


def run(engine: dict[str, Any]) -> list[Any]:
    from vllm import LLM
    from vllm.config import KVTransferConfig, PoolerConfig

    options: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        "max_model_len": 2048,
        "skip_tokenizer_init": "pooler" not in engine,
        "disable_log_stats": False,
        "seed": 0,
        **engine.get("options", {}),
    }
    if engine.get("connector"):
        options["kv_transfer_config"] = KVTransferConfig(**engine["connector"])
    if "pooler" in engine:
        options |= {"runner": "pooling", "pooler_config": PoolerConfig(**engine["pooler"])}
    llm = LLM(model=engine["model"], **options)
    try:
        return [step(llm, each) for each in engine["steps"]]
    finally:
        llm.llm_engine.engine_core.shutdown()


def step(llm: Any, each: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    if "copy" in each:
        source, target = map(Path, each["copy"])
        for file in source.iterdir():
            old = (target / file.name).stat()
            shutil.copyfile(file, target / file.name)
            if each.get("times") == "old":
                os.utime(target / file.name, ns=(old.st_atime_ns, old.st_mtime_ns))
        return None
    if "home" in each:
        os.environ["HOME"] = each["home"]
        return None
    if "lora" in each:
        name, number, path, *in_place = each["lora"]
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in each["generate"]],
            SamplingParams(temperature=0, max_tokens=each.get("max_tokens", 8), detokenize=False, ignore_eos=True),
            lora_request=LoRARequest(name, number, path, load_inplace=bool(in_place)),
            use_tqdm=False,
        )
        return [{"tokens": list(out.outputs[0].token_ids), "cached": out.num_cached_tokens} for out in outputs]
    if "embed" in each:
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in each["embed"]]
        outputs = llm.encode(prompts, pooling_task=each.get("task", "embed"), use_tqdm=False)
        return [
            {"vector": out.outputs.data.flatten()[-64:].tolist(), "cached": out.num_cached_tokens} for out in outputs
        ]
    return drive.step(llm, each)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    results: list[Any] = []
    for engine in json.load(sys.stdin):
        try:
            results.append(run(engine))
        # What an engine dies of is what the tests look at.
        except BaseException as error:
            results.append(f"{type(error).__name__}: {error}")
            traceback.print_exc()
    print("@@" + json.dumps({"results": results}), flush=True)


if __name__ == "__main__":
    main()
