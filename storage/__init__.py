"""Where chunks are kept: memory, tiers below it, and the manager in front of them."""

if __name__ != "lmcache.storage":
    raise ModuleNotFoundError(f"import lmcache.storage, not {__name__}", name=__name__)
