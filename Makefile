# Every task of the project. `make` alone lists them.

PYTHON := .venv/bin/python
UV_COMPILE := .venv/bin/uv pip compile pyproject.toml --universal --python-version 3.11 \
	--generate-hashes --no-header --no-annotate --quiet

TIMES ?= 5
BUSY ?= 8

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-busy check format bench wheel lock clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## install everything the project needs, as locked
	@bash scripts/setup

demo: setup  ## run a model in real browsers and kill one of them
	@$(PYTHON) -m pool.demo

test: setup  ## run the whole test suite, or what ARGS names
ifdef ARGS
	$(PYTHON) -m pytest $(ARGS)
else
	$(PYTHON) -m pytest -q -n 2 tests/unit
	$(PYTHON) -m pytest tests/browser
endif

test-busy: setup  ## run the real-browser tests (or ARGS) TIMES times beside BUSY busy processes
	$(PYTHON) scripts/test-busy --times $(TIMES) --busy $(BUSY) $(ARGS)

check: setup  ## lint, formatting and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: setup  ## format the code and sort its imports
	$(PYTHON) -m ruff check --select I --fix --quiet .
	$(PYTHON) -m ruff format .

bench: setup  ## run the benchmarks
	$(PYTHON) -m benchmarks $(ARGS)

wheel: setup  ## build dist/*.whl, onnxruntime-web included
	$(PYTHON) -m build --wheel --no-isolation

lock:  ## resolve requirements/*.txt and package-lock.json again (UPGRADE=1: to the newest)
	$(UV_COMPILE) $(if $(UPGRADE),--upgrade) --output-file requirements/runtime.txt
	$(UV_COMPILE) $(if $(UPGRADE),--upgrade) --extra demo --extra dev --extra bench \
		--constraints requirements/runtime.txt --output-file requirements/dev.txt
	npm install --package-lock-only
	@bash scripts/check-locks

clean:  ## delete everything that setup, tests and builds have made
	rm -rf .venv node_modules actors/page/ort actors/page/ort.new dist build *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
