"""The rotary tables that keys are moved with are those that transformers turns keys with."""

from __future__ import annotations

import pytest
import torch

from lmcache.kernels.rotary.tables import RotaryTable, rope_frequencies

transformers = pytest.importorskip("transformers")

HEAD_DIM = 96
MAX_POSITIONS = 32_768
ORIGINAL = {"original_max_position_embeddings": 4096}
PAIRS = HEAD_DIM // 2
SHORT = [1.0 + 0.01 * i for i in range(PAIRS)]
LONG = [1.0 + 0.5 * i for i in range(PAIRS)]
ROPES: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 8.0, **ORIGINAL},
    "yarn-mscale": {
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "beta_fast": 16,
        "beta_slow": 2,
        **ORIGINAL,
    },
    "yarn-exact-ramp": {"factor": 8.0, "truncate": False, "attention_factor": 1.25, **ORIGINAL},
    "longrope": {"short_factor": SHORT, "long_factor": LONG, **ORIGINAL},
    "longrope-factor": {"short_factor": SHORT, "long_factor": LONG, "factor": 32.0, **ORIGINAL},
    "proportional": {"partial_rotary_factor": 0.25},
    "default-partial": {"partial_rotary_factor": 0.5},
    "yarn-partial": {"factor": 8.0, "partial_rotary_factor": 0.5, **ORIGINAL},
}


def parameters(name: str, theta: float) -> dict[str, object]:
    return {"rope_type": name.partition("-")[0], "rope_theta": theta, **ROPES[name]}


def theirs(name: str, theta: float, length: int | None) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi.modeling_phi import PhiConfig, PhiRotaryEmbedding

    config = PhiConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=parameters(name, theta),
    )
    config.head_dim = HEAD_DIM
    # Phi's class has a default of its own, 0.5, which may not replace the one given.
    config.rope_parameters = {"partial_rotary_factor": 1.0, **parameters(name, theta)}
    kind = name.partition("-")[0]
    if kind == "default":  # the one that each model has for itself
        return PhiRotaryEmbedding.compute_default_rope_parameters(config, device=None, seq_len=length)
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return inverse, factor


@pytest.mark.parametrize("length", [None, 3000, 100_000])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_frequencies_are_those_of_transformers(name: str, theta: float, length: int | None) -> None:
    want, factor = theirs(name, theta, length)
    ours = rope_frequencies(parameters(name, theta), HEAD_DIM, max_positions=MAX_POSITIONS, length=length)
    # Theirs are calculated in fp32.
    torch.testing.assert_close(ours.inverse, want.double(), rtol=3e-6, atol=0)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


def test_gemma3_has_two_ropes() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, Gemma3TextConfig

    config = Gemma3TextConfig(head_dim=64)
    rotary = Gemma3RotaryEmbedding(config)
    x, positions = torch.zeros(1, 1), torch.arange(5000)[None]
    for kind in ("full_attention", "sliding_attention"):
        cos, sin = rotary(x, positions, layer_type=kind)
        frequencies = rope_frequencies(config.rope_parameters[kind], 64)
        table = RotaryTable.from_frequencies(frequencies, 5000, angles=torch.float32)
        torch.testing.assert_close(table.cos_sin[:, 0], cos[0, :, :32], rtol=0, atol=1e-3)
        torch.testing.assert_close(table.cos_sin[:, 1], sin[0, :, :32], rtol=0, atol=1e-3)


def test_angles_in_fp32_are_turned_as_an_engine_does() -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, rope_parameters=rope)
    rotary = LlamaRotaryEmbedding(config)
    positions = torch.arange(131_072)
    cos, sin = (part[0, :, :PAIRS] for part in rotary(torch.zeros(1, 1), positions[None]))
    frequencies = rope_frequencies(rope, HEAD_DIM)
    assert torch.equal(frequencies.inverse[:1].float(), rotary.inv_freq[:1])
    # With their frequencies, which differ from the exact ones in the last place, every angle is the same.
    frequencies = type(frequencies)(rotary.inv_freq.double())
    same = RotaryTable.from_frequencies(frequencies, len(positions), angles=torch.float32)
    torch.testing.assert_close(same.cos_sin[:, 0], cos, rtol=0, atol=3e-7)
    torch.testing.assert_close(same.cos_sin[:, 1], sin, rtol=0, atol=3e-7)
    # Exact angles are others: half a unit of the last place of 131,071 radians is 1 / 256.
    exact = RotaryTable.from_frequencies(frequencies, len(positions))
    assert 1e-3 < (exact.cos_sin[:, 0] - cos).abs().max() < 5e-3
