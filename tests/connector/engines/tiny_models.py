"""Random-weight models of every attention family that vLLM's CPU backend runs, small enough to start in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 1024
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _config(family: str) -> Any:
    from transformers import DeepseekV2Config, Gemma3TextConfig, LlamaConfig, Qwen3Config

    if family == "llama":
        return LlamaConfig(**_COMMON, num_hidden_layers=4, num_key_value_heads=2)
    if family == "qwen3":
        return Qwen3Config(**_COMMON, num_hidden_layers=4, num_key_value_heads=2, head_dim=64)
    if family == "gemma3":
        layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        return Gemma3TextConfig(
            **_COMMON, num_hidden_layers=6, num_key_value_heads=2, head_dim=64, sliding_window=256, layer_types=layers
        )
    if family == "deepseek":
        return DeepseekV2Config(
            **_COMMON,
            num_hidden_layers=3,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=64,
            v_head_dim=64,
            first_k_dense_replace=3,
        )
    raise ValueError(f"family must be llama, qwen3, gemma3 or deepseek, got {family!r}")


def make(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the model once; returns its folder."""
    if (folder / "done").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    # vLLM's CPU backend computes MLA over a loaded prefix another way than a fresh prefill, with or without us, and
    # wide random weights blow the difference up (0.5 in log-probabilities at 0.06, plain vLLM, decode against prefill).
    width = 0.01 if family == "deepseek" else 0.15
    model = AutoModelForCausalLM.from_config(_config(family), dtype=torch.float32)
    with torch.no_grad():
        # Wide enough that attention is peaked and every output depends on the KV of the whole context: with the usual
        # 0.02 a random model hardly looks back, and wrong KV would go unnoticed.
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, width if ".self_attn." in name else 0.06)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("architectures", [type(model).__name__])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "done").touch()
    return folder


def encoder(folder: Path) -> Path:
    """A BERT, which keeps no KV, with a tokenizer: vLLM's pooling models want one."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 128, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    """Words w0, w1, ... for the token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "cls_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special, sep_token="w2").save_pretrained(folder)
    return folder


def adapter(folder: Path, seed: int, layers: int = 4) -> Path:
    """A LoRA of the llama, as peft writes it: wide enough to change what is generated. Written anew, in place."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, width in (("q_proj", 256), ("v_proj", 128)):
            where = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{where}.lora_A.weight"] = torch.randn(8, 256, generator=generator) * 0.2
            tensors[f"{where}.lora_B.weight"] = torch.randn(width, 8, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def prompt(seed: int, length: int) -> list[int]:
    """Token ids, the same on every machine."""
    import numpy as np

    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCABULARY, length)]
