"""Experiments: a YAML file in, a folder of results out (`python -m experiments.run CASE key.path=value ...`)."""
