"""What the blend experiments share: the model, the corpus as tokens, storage, and the machine in words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from experiments.blending.prompts import PREFIX, TASK, Encode, Prompt
from experiments.framework.config import ROOT, ExperimentConfig
from experiments.framework.engine_process import hardware
from experiments.framework.model import PACKAGES, folder_of
from lmcache.blend.models import adapt
from lmcache.blend.models.base import BlendModel
from lmcache.blend.standalone import BlendEngine
from lmcache.config import load_config
from lmcache.errors import BlendError, ConfigError
from lmcache.storage.manager import StorageManager


@dataclass(frozen=True)
class BlendSession:
    """model: of Hugging Face; adapted: the same for the blender. texts: the corpus by name. prefix: of its prompts."""

    name: str
    model: Any
    adapted: BlendModel
    encode: Encode
    texts: dict[str, str]
    manager: StorageManager
    caption: str
    prefix: str = PREFIX

    def engine(self, prompt: Prompt, options: Mapping[str, Any]) -> BlendEngine:
        """An engine that blends with these selector options, for prompts with this one's prefix."""
        return BlendEngine(self.adapted, self.manager, model_id=self.name, prefix=prompt.prefix, selector=dict(options))

    def learn(self, engine: BlendEngine, prompt: Prompt) -> None:
        """Prefill the prompt's passages, each on its own behind the prefix, into storage. Raises BlendError."""
        held = engine.learn(prompt.passages)
        if held != len(prompt.passages):
            raise BlendError(f"{prompt.key}: storage took {held} of {len(prompt.passages)} passages; is it too small?")


@contextmanager
def open_session(config: ExperimentConfig) -> Iterator[BlendSession]:
    """Load the model of ``config.engine`` and the corpus of ``config.workload``. Raises ConfigError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(config.engine.threads)
    package = PACKAGES.get(config.engine.model)
    folder = folder_of(package) if package else config.engine.model
    dtype = getattr(torch, config.engine.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"engine.dtype is {config.engine.dtype!r}; it must be a torch dtype, such as float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = sorted((ROOT / config.workload.corpus / "documents").glob("*.txt"))
    manager = StorageManager(load_config(overrides={"memory.capacity": 768 << 20, "memory.huge_pages": False}))
    name = os.path.basename(folder)
    caption = (
        f"{name}, {config.engine.dtype}, Hugging Face, torch {torch.__version__} on {hardware()}, "
        f"{config.engine.threads} of {os.cpu_count()} cores"
    )

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    texts = {file.stem: file.read_text().strip() for file in files}
    chats = "<|im_start|>" in tokenizer.get_vocab()
    prefix = PREFIX if chats else f"{tokenizer.bos_token or ''}{TASK}\n\n"
    try:
        yield BlendSession(name, model, adapt(model), encode, texts, manager, caption, prefix)
    finally:
        manager.clear()
        manager.close()
