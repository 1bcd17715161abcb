"""The standalone store that several engines share: ``lmcache server``."""
