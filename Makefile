# Everything a person or CI runs. Each target sets .venv up first (instant when it is ready).
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo model lint test test-quick test-kernels test-rest clean
PY := .venv/bin/python
KERNEL_MODES := cpu interpret aot
# Two tests at a time, as most wait or compute with one thread; a file's tests share what it has started.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
export HF_HUB_OFFLINE := 1

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

setup: ## create .venv with everything pinned (PYTHON=python3.12, DEVICE=cuda to choose)
	@scripts/setup.sh

model: setup ## fetch and convert the small language model of the demo and the tests
	@$(PY) -m experiments.model

demo: model ## real documents through real vLLM: TTFT without cache, from memory, from disk
	@$(PY) -m experiments.run quickstart

lint: setup ## ruff, mypy --strict, import-linter
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict -p lmcache -p experiments
	.venv/bin/lint-imports

test: setup lint test-kernels test-rest ## everything that CI runs

test-quick: lint ## what to run while working, in three minutes: lint, no kernels, no real vLLM, no real servers
	$(PY) -m pytest -q tests --ignore=tests/kernels $(TWO) -m "not (vllm or slow or serial)"

test-kernels: setup ## the kernel tests: plain torch, Triton's interpreter, compiled ahead of time
	set -e; for mode in $(KERNEL_MODES); do echo "== kernels: $$mode"; \
		LMCACHE_KERNEL_MODE=$$mode $(PY) -m pytest -q tests/kernels -n 2; done

test-rest: model ## every other test, real vLLM included
	$(PY) -m pytest -q tests --ignore=tests/kernels $(TWO) -m "not serial"
	$(PY) -m pytest -q tests --ignore=tests/kernels -m serial

clean: ## remove .venv, caches and build outputs (results/ stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
