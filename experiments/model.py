"""python -m experiments.model: fetch a small language model and print its folder (framework/model.py)."""

from experiments.framework.model import main

if __name__ == "__main__":
    main()
