"""python -m experiments.storage_bench: how fast storage is (bench/storage/measure.py)."""

import sys

from experiments.bench.storage.measure import main

if __name__ == "__main__":
    sys.exit(main())
