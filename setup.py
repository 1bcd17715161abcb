"""Maps the three top-level folders into the package; everything else is in pyproject.toml (docs/architecture.md)."""

from setuptools import find_packages, setup

FOLDERS = {"lmcache.kernels": "triton_kernels", "lmcache.storage": "storage", "lmcache.blend": "blend"}


def packages() -> list[str]:
    # The links lmcache/kernels, lmcache/storage and lmcache/blend are for editors; the build reads the real folders.
    own = [p for p in find_packages(include=["lmcache*"]) if not any(p == n or p.startswith(n + ".") for n in FOLDERS)]
    mapped = []
    for name, folder in FOLDERS.items():
        mapped += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    return own + mapped


setup(packages=packages(), package_dir={"lmcache": "lmcache", **FOLDERS})
