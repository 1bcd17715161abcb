"""Experiments: a YAML file in, a folder of results out (`python -m experiments.run <yaml> key.path=value ...`)."""
