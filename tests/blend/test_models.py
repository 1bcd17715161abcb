"""Adapters: the model's own rope at any position, and the models that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_families as tiny
import torch

from lmcache.blend.forward import Rotation
from lmcache.blend.models import BLEND_MODELS, adapt
from lmcache.errors import BlendError, ConfigError
from lmcache.kernels.rotary.ops import shift_rotary

# Short prompts, and such as are longer than the model was trained on: dynamic and longrope then turn by other angles.
LENGTHS = (tiny.ORIGINAL - 8, tiny.ORIGINAL + 150)


def rotated_by_hugging_face(model: Any, x: torch.Tensor, positions: torch.Tensor, length: int, kind: str | None) -> Any:
    """`x` [N, H, D] turned by the model's own code, in a forward pass over `length` positions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    names = () if kind is None else (kind,)
    cos, sin = model.model.rotary_emb(x, torch.arange(length)[None], *names)
    return apply_rotary_pos_emb(x, x, cos[0, positions], sin[0, positions], unsqueeze_dim=1)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rope", tiny.ROPES)
def test_the_rope_is_that_of_hugging_face(rope: str, length: int, dtype: torch.dtype) -> None:
    model = tiny.model("llama", rope)
    x = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.tensor([0, 1, 7, 20, 21, 33, 34, 38, 39])
    ours = Rotation(adapt(model), length)(0, x, positions)
    theirs = rotated_by_hugging_face(model, x, positions, length, None)
    assert ours.dtype == dtype
    # bf16: a cosine that differs in its last fp32 bit may round the other way.
    assert tiny.distance(ours.float(), theirs.float()) < (2e-5 if dtype == torch.float32 else 0.02)


def test_dynamic_and_longrope_turn_by_the_length_of_the_prompt() -> None:
    for rope in tiny.ROPES:
        adapter = adapt(tiny.model("llama", rope))
        short, long = (adapter.table(0, length).cos_sin[:40] for length in LENGTHS)
        assert torch.equal(short, long) == (rope not in ("dynamic", "longrope"))
        again = adapter.table(0, LENGTHS[0]).cos_sin[:40]  # nothing is left over from the long prompt
        assert torch.equal(short, again)


def test_local_and_full_layers_have_their_own_ropes() -> None:
    model = tiny.model("gemma3")
    adapter = adapt(model)
    x = torch.randn(3, 2, 32)
    positions = torch.tensor([5, 60, 61])
    for layer, kind in enumerate(tiny.LAYER_TYPES):
        theirs = rotated_by_hugging_face(model, x, positions, 70, kind)
        assert tiny.distance(Rotation(adapter, 70)(layer, x, positions), theirs) < 2e-5
        assert adapter.attention[layer].window == (17 if kind == "sliding_attention" else None)
        assert adapter.attention[layer].scale == 24**-0.5


@pytest.mark.parametrize("rope", tiny.ROPES)
def test_keys_are_moved_by_the_same_table_that_turned_them(rope: str) -> None:
    """Even with an attention factor, which cancels."""
    adapter = adapt(tiny.model("llama", rope))
    keys = torch.randn(30, 2, 16)
    rotation, old = Rotation(adapter, 200), torch.arange(30)
    moved = rotation(0, keys, old)
    shift_rotary(moved, old, old + 150, adapter.table(0, 200))
    assert tiny.distance(moved, rotation(0, keys, old + 150)) < 5e-5


def test_other_architectures_are_refused_with_what_is_known() -> None:
    import transformers

    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    others = {
        "GPT2LMHeadModel": transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2),  # learned positions
        "GptOssForCausalLM": transformers.GptOssConfig(  # attention sinks
            **small, num_key_value_heads=1, head_dim=16, intermediate_size=32, num_local_experts=2
        ),
        "Gemma2ForCausalLM": transformers.Gemma2Config(  # capped attention
            **small, num_key_value_heads=1, head_dim=16, intermediate_size=32
        ),
    }
    for name, config in others.items():
        with pytest.raises(ConfigError, match=rf"'transformers.{name}'; known: .*transformers.LlamaForCausalLM"):
            adapt(tiny.build(config))
    with pytest.raises(ConfigError, match=r"'torch.Linear'"):
        adapt(torch.nn.Linear(2, 2))
    assert len(BLEND_MODELS.names()) >= 5


def llama(**options: Any) -> Any:
    return tiny.build(tiny.config("llama", **options))


def test_other_modules_than_the_architectures_own_are_refused() -> None:
    class Adapter(torch.nn.Linear):
        pass

    model = llama()
    model.model.layers[1].self_attn.q_proj = Adapter(64, 64)
    with pytest.raises(BlendError, match=r"model.layers.1.self_attn.q_proj is a .*Adapter; .* neither quantised"):
        adapt(model)
    with pytest.raises(BlendError, match=r"plain tensors of one dtype"):
        adapt(llama().double())
    mixed = llama()
    mixed.model.layers[0].mlp.to(torch.bfloat16)
    with pytest.raises(BlendError, match=r"plain tensors of one dtype"):
        adapt(mixed)


def test_ropes_that_turn_part_of_a_head_or_are_not_understood_are_refused() -> None:
    partial = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": 0.5}
    with pytest.raises(BlendError, match=r"turns 8 of 16 components"):
        adapt(llama(rope_parameters=partial))
    model = llama()
    model.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    with pytest.raises(BlendError, match=r"rope_type is 'spiral'"):
        adapt(model)


@pytest.mark.parametrize("option", [{"attn_logit_softcapping": 30.0}, {"use_bidirectional_attention": True}])
def test_attention_that_is_not_plain_causal_softmax_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(BlendError, match=next(iter(option))):
        adapt(tiny.build(tiny.config("gemma3", **option)))
