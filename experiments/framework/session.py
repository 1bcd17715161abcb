"""A run's engines: starts them, shows progress, gathers rows."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.framework.config import ExperimentConfig
from experiments.framework.engine import Engine, Job, Step, model_path
from experiments.framework.report import Results


class Session:
    """Starts the vLLMs of an experiment and sends them requests."""

    def __init__(self, config: ExperimentConfig, results: Results, requests: int) -> None:
        self.config, self.results = config, results
        self.model = model_path(config.engine)
        self.work = results.folder / "work"
        self.work.mkdir()
        self.told: dict[str, Any] = {}
        self.runs = 0
        self.bar = tqdm(total=requests, unit="request", file=sys.stderr, dynamic_ncols=True)
        self.began = time.monotonic()

    def engine(self, name: str, cached: bool, options: dict[str, Any] | None = None) -> Engine:
        """Start a new vLLM, with the cache or without; its log is ``log/<number>-<name>.txt``.

        options: of LMCache, on top of the configuration's.
        """
        config = self.config.model_copy(update={"cache": {**(self.config.cache or {}), **(options or {})}})
        job = Job(
            model=self.model,
            engine=config.engine.model_dump(mode="json"),
            kv_transfer=config.kv_transfer(self.work) if cached else None,
            max_tokens=config.workload.max_tokens,
            seed=config.seed,
            run=self.runs,
        )
        self.bar.set_description(f"{name}: vLLM starts")
        engine = Engine(job, self.results.log / f"{self.runs}-{name}.txt")
        self.told.update({key: engine.told[key] for key in ("hardware", "cores", "versions")})
        self.runs += 1
        return engine

    def ask(self, engine: Engine, *steps: Step) -> None:
        """Send steps to ``engine``; every request becomes a row of the results."""
        for step in steps:
            for row in engine.run(step):
                self.results.add(row)
                self.bar.set_description(f"{row.phase}: {row.document} {row.ttft_s:.2f} s")
                self.bar.update()

    def close(self) -> None:
        self.bar.close()
        shutil.rmtree(self.work, ignore_errors=True)

    @property
    def caption(self) -> str:
        """Hardware, model and versions, for a figure."""
        engine, versions = self.config.engine, self.told["versions"]
        model = Path(self.model).name
        threads = f", {engine.threads} of {self.told['cores']} cores computing" if "+cpu" in versions["torch"] else ""
        return f"{model}, {engine.dtype}, vLLM {versions['vllm']} on {self.told['hardware']}{threads}"

    def facts(self) -> dict[str, Any]:
        return {**self.told, "model": self.model, "seconds": round(time.monotonic() - self.began, 1)}
