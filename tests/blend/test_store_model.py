"""The keys of a real model's first layer, which depend on the token and its position alone, moved by the store."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend.chunks import SegmentFormat
from lmcache.blend.reuse import Segment
from lmcache.blend.store import SegmentStore
from lmcache.config import load_config
from lmcache.kernels.rotary.tables import RotaryTable, rope_frequencies
from lmcache.storage.manager import StorageManager

transformers = pytest.importorskip("transformers")

ORIGINAL = {"original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, object]] = {
    "default": {},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 8.0, **ORIGINAL},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ROPES)
def test_a_moved_segment_has_the_keys_of_the_model_there(name: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel

    rope = {"rope_type": name, "rope_theta": 1e4, **ROPES[name]}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=rope,
    )
    model = LlamaModel(config).eval()

    def prefill(tokens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values `[T, H, D]` of each layer."""
        with torch.no_grad():
            cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
        return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]

    table = RotaryTable.from_frequencies(rope_frequencies(rope, 16, max_positions=512), 512)
    manager = StorageManager(load_config(overrides={"memory.capacity": 1 << 20, "memory.huge_pages": False}))
    store = SegmentStore(manager, SegmentFormat("tiny", torch.float32, 2, 16, (table, table)))
    passage = list(range(20, 60))
    # Prefilled behind a system prompt of 9 tokens, whose rows are dropped.
    made = [(keys[9:], values[9:]) for keys, values in prefill([*range(1, 10), *passage])]
    assert store.put(passage, 9, made)
    prompt = [*range(100, 128), *range(60, 100), *range(70, 90), *passage, 5]
    want, at = prefill(prompt), 88
    with store.retrieve(prompt, [Segment(at, at + 40)]) as found:
        keys, values = found.layer(0)
        torch.testing.assert_close(keys[at:-1], want[0][0][at:-1], rtol=0, atol=2e-5 * float(want[0][0].abs().max()))
        torch.testing.assert_close(values[at:-1], want[0][1][at:-1])
        assert not torch.allclose(keys[at:-1], made[0][0], atol=1e-2), "they were not moved"
        # Above the first layer they are those of another context: near, not the same. That is what blending is for.
        assert not torch.equal(found.layer(1)[1][at:-1], want[1][1][at:-1])
        assert torch.equal(found.layer(1)[1][at:-1], made[1][1])
    manager.close()
    assert manager.pool.used_bytes == 0
