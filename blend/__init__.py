"""CacheBlend: reuse of any passage's KV, anywhere in the prompt (Yao et al., EuroSys 2025, arXiv:2405.16444)."""

if __name__ != "lmcache.blend":
    raise ModuleNotFoundError(f"import lmcache.blend, not {__name__}", name=__name__)
