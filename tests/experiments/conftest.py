from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.blending.session import BlendSession
from lmcache.blend.models import adapt
from lmcache.config import load_config
from lmcache.storage.manager import StorageManager

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def session() -> Iterator[BlendSession]:
    """A tiny model, a text of 900 tokens, storage in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    manager = StorageManager(load_config(overrides={"memory.capacity": 64 << 20, "memory.huge_pages": False}))
    texts = {"a": "".join(map(chr, torch.randint(2, 90, (900,)).tolist()))}
    yield BlendSession("tiny", model, adapt(model), lambda t: [ord(c) % 97 for c in t], texts, manager, "tiny")
    manager.clear()
    manager.close()
