"""A profile is fitted for a Hugging Face model in a folder, and the codec that is given it packs that model's KV."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lmcache.cli import app
from lmcache.errors import KernelArgumentError
from lmcache.kernels import PagedLayers
from lmcache.kernels.codecs.base import build_codec
from lmcache.kernels.codecs.fit import fit_texts
from lmcache.kernels.codecs.kv_model import KVModel
from lmcache.kernels.codecs.profile import Profile
from lmcache.kernels.sides import Side

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]
WORDS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def text(words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(words))


@pytest.mark.parametrize("kind", ["klt", "cachegen"])
def test_more_bits_are_finer_steps(kind: str, folder: Path, tmp_path: Path) -> None:
    texts = {"a": text(100, 1), "b": text(100, 2)}
    profiles = fit_texts(kind, folder, texts, [2.0, 4.0], prefix=84, scored=16)
    (sample,) = KVModel(folder).samples({"a": texts["a"]}, 84, 16)
    cache = torch.stack([torch.cat(sides, -1) for sides in sample.kv])[:, None]  # [L, 1, H, T, 2 D]
    pages, slots = PagedLayers(list(cache)), torch.arange(84)
    sides = [Side("key", 0, 16, 2), Side("value", 16, 16, 2)]
    errors = []
    for number, profile in enumerate(profiles):
        assert profile.kind == kind
        profile.save(file := tmp_path / f"{number}.npz")
        codec = build_codec({"type": kind, "profile": str(file)})
        assert codec is not None
        plane = codec.bind(sides, range(2), 0, pages.device)
        packed = plane.pack([side.of(pages) for side in sides], slots)
        assert bool(packed.sound)
        back = PagedLayers([torch.zeros_like(layer) for layer in pages.layers])
        parts = [part[: int(used)] for part, used in zip(packed.parts, packed.used, strict=True)]
        plane.unpack([side.of(back) for side in sides], slots, parts)
        errors.append(float((torch.stack(list(back.layers)) - cache).norm() / cache.norm()))
    assert errors[1] < 0.8 * errors[0] < 0.8


def test_a_short_text_is_refused(folder: Path) -> None:
    with pytest.raises(KernelArgumentError, match="short has 50 tokens; more than 84 are needed"):
        fit_texts("klt", folder, {"short": text(50, 1)}, [2.0], prefix=84)


def test_the_command_writes_a_profile(folder: Path, tmp_path: Path) -> None:
    (file := tmp_path / "text.txt").write_text(text(1100, 3))
    out = tmp_path / "new" / "profile.npz"
    given = ["--model", str(folder), "--out", str(out), str(file)]
    done = CliRunner().invoke(app, ["profile", "klt", *given])
    assert done.exit_code == 0, done.output
    assert Profile.load(out).kind == "klt"
    wrong = CliRunner().invoke(app, ["profile", "dct", *given])
    assert wrong.exit_code == 1
    assert "unknown kind of profile 'dct'; known: klt, cachegen" in wrong.output
