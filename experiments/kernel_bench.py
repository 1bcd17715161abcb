"""python -m experiments.kernel_bench: how fast the kernels are (bench/kernels/measure.py)."""

import sys

from experiments.bench.kernels.measure import main

if __name__ == "__main__":
    sys.exit(main())
