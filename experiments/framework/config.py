"""YAML file -> typed config -> run: the configs that experiments share, and the one way to load one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from lmcache.config import Config, build
from lmcache.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

CONNECTOR: dict[str, Any] = {
    "kv_connector": "LMCacheConnector",
    "kv_connector_module_path": "lmcache.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


class WorkloadConfig(Config):
    """Which questions are asked about which documents."""

    corpus: Path = Field(Path("data"), description="folder with documents/ and questions/, relative to the repository")
    documents: int = Field(5, ge=1, description="how many documents, chosen by the seed")
    questions: int = Field(3, ge=2, le=3, description="how many questions about each")
    max_tokens: int = Field(24, ge=1, description="tokens generated for each answer, greedily")


class EngineConfig(Config):
    """How every vLLM of the run is started; the same with and without the cache."""

    model: str = Field(
        "smollm2",
        description="smollm2 or gemma3-270m (fetched when missing), or a Hugging Face folder or name",
    )
    dtype: str = Field("float32", description="bfloat16 is faster, but its near-ties flip with any change of batching")
    max_model_len: int = Field(4096, ge=1, description="tokens")
    block_size: int | None = Field(None, ge=1, description="tokens per KV block; null: vLLM's choice")
    threads: int = Field(1, ge=1, description="compute threads on a CPU; the others are left to the cache")
    kv_space_gib: int = Field(2, ge=1, description="GiB of KV cache of vLLM itself on a CPU")
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1, description="share of the (GPU's) memory vLLM may count on")
    enforce_eager: bool = Field(True, description="no compilation, no CUDA graphs: starts quickly")
    processes: bool = Field(False, description="vLLM's engine in a process of its own, as in its server")


class ExperimentConfig(Config):
    """What every experiment has. Experiments derive their own Config from it."""

    experiment: str = Field(description="which experiment: a folder of experiments/cases")
    name: str = Field(description="prefix of the results folder")
    results: Path = Field(Path("results"), description="where results folders go, relative to the repository")
    seed: int = Field(0, description="chooses and orders documents; vLLM's seed")
    workload: WorkloadConfig = Field(default_factory=WorkloadConfig, description="documents and questions")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="vLLM")
    connector: dict[str, Any] = Field(
        default_factory=dict, description="on top of our KVTransferConfig; kv_connector and module path: another's"
    )
    cache: dict[str, Any] | None = Field(
        default_factory=dict,
        description="LMCache's options ({work} is the run's scratch folder); null: vLLM alone, to try a run out",
    )

    def kv_transfer(self, work: Path) -> dict[str, Any] | None:
        """The KVTransferConfig with the cache's options in it, as a mapping; None for vLLM alone."""
        if self.cache is None:
            return None
        base = {key: value for key, value in CONNECTOR.items() if self.is_ours or key != "kv_connector_module_path"}
        return {**base, **self.connector, "kv_connector_extra_config": _place(self.cache, work)}

    def labelled(self, labels: dict[str, str]) -> dict[str, str]:
        """Labels that name LMCache, naming instead what this run used in its place."""
        other = "no connector" if self.cache is None else str(self.connector.get("kv_connector"))
        return (
            labels
            if self.cache is not None and self.is_ours
            else {phase: label.replace("LMCache", other) for phase, label in labels.items()}
        )

    @property
    def is_ours(self) -> bool:
        return bool(self.connector.get("kv_connector", CONNECTOR["kv_connector"]) == CONNECTOR["kv_connector"])


ExperimentT = TypeVar("ExperimentT", bound=ExperimentConfig)
ScaleT = TypeVar("ScaleT")


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in the YAML file ``path`` with ``key.path=value`` overrides on top.

    Raises ConfigError for a file that cannot be read and for an override that is none.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for item in overrides:
        if not item.partition("=")[1] or not item.partition("=")[0]:
            raise ConfigError(f"expected key.path=value, got {item!r}")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of option names, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def typed(cls: type[ExperimentT], values: dict[str, Any], where: str) -> ExperimentT:
    """``values`` as ``cls``; unknown keys and wrong values, in LMCache's own options too, are ConfigErrors."""
    from lmcache.config import LMCacheConfig

    config = build(cls, values, where)
    if config.cache is not None and config.is_ours:
        build(LMCacheConfig, _place(config.cache, Path("work")), f"{where}: cache")
    return config


def scale_of(scales: Mapping[str, ScaleT], scale: str) -> ScaleT:
    """How much is measured at the scale of that name. Raises ConfigError."""
    if scale not in scales:
        raise ConfigError(f"scale={scale}: scales has {', '.join(scales)}")
    return scales[scale]


def _place(value: Any, work: Path) -> Any:
    """``value`` with {work} in its strings replaced."""
    if isinstance(value, dict):
        return {key: _place(inner, work) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_place(inner, work) for inner in value]
    return value.replace("{work}", str(work)) if isinstance(value, str) else value
