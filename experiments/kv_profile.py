"""Profiles of the demo's model for the entropy-coded codecs, fitted on the first documents of the corpus and kept.

python -m experiments.kv_profile klt --bits 2.3       fits the profile when it is not there, and prints the file

It belongs to the model's weights: another model needs another one, which `lmcache profile` fits.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.framework.config import ROOT
from experiments.framework.model import cache_dir, smollm2

# Documents of data/ to fit on, in the order of their names; the others are left to score.
DOCUMENTS = 4
# Bits an element that are fitted together, as what takes time is the same for all.
RATES = {"klt": (2.0, 2.3, 3.0), "cachegen": (2.6, 3.1)}
_SOURCES = ("experiments/kv_profile.py", "triton_kernels/codecs/fit.py", "triton_kernels/codecs/kv_model.py")


def profile_path(kind: str, bits: float, threads: int = 1) -> Path:
    """The profile's file; fitted now, a minute or two, unless this very code has done so before on this machine."""
    from filelock import FileLock

    folder = cache_dir().parent / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = hashlib.blake2b(digest_size=4)
    for name in _SOURCES:
        stamp.update((ROOT / name).read_bytes())
    rates = RATES[kind] if bits in RATES[kind] else (bits,)
    paths = {rate: folder / f"smollm2-{kind}-{rate:g}-{stamp.hexdigest()}.npz" for rate in rates}
    with FileLock(folder / f"smollm2-{kind}.lock"):
        if not paths[bits].exists():
            fit_smollm2(kind, paths, threads)
    return paths[bits]


def with_profile(options: dict[str, Any], threads: int = 1) -> dict[str, Any]:
    """Codec options, ``profile: fit:2.3`` replaced by the file of the profile for 2.3 bits."""
    given = str(options.get("profile", ""))
    if not given.startswith("fit:"):
        return options
    return {**options, "profile": str(profile_path(options["type"], float(given.removeprefix("fit:")), threads))}


def fit_smollm2(kind: str, paths: Mapping[float, Path], threads: int) -> None:
    """Fit a profile for each rate and write it."""
    from lmcache.kernels.codecs.fit import fit_texts

    print(f"fitting {kind} profiles of the demo's model, once", file=sys.stderr, flush=True)
    files = sorted((ROOT / "data" / "documents").glob("*.txt"))[:DOCUMENTS]
    texts = {file.stem: file.read_text() for file in files}
    profiles = fit_texts(kind, smollm2(), texts, list(paths), threads=threads)
    for path, profile in zip(paths.values(), profiles, strict=True):
        profile.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.kv_profile", description=__doc__)
    parser.add_argument("kind", choices=tuple(RATES))
    parser.add_argument("--bits", type=float, default=2.3, help="bits an element, before what streams cost")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print(profile_path(given.kind, given.bits, given.threads))


if __name__ == "__main__":
    main()
