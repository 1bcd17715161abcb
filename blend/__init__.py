"""CacheBlend: reuse of any passage's KV, anywhere in the prompt. Arrives with a later release; empty for now."""

if __name__ != "lmcache.blend":
    raise ModuleNotFoundError(f"import lmcache.blend, not {__name__}", name=__name__)
