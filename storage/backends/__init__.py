"""The built-in backends, loaded by name through ``storage/registry.py``."""
