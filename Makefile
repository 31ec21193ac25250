PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-run

.PHONY: demo test test-slow check bench clean

demo: $(VENV)/.run  ## set up, then run the main job on synthetic scenes fetched over loopback HTTP
	$(BIN)/pipeline run precompute -c demo --out $(DEMO)
	$(BIN)/pipeline verify $(DEMO)/store
	$(BIN)/pipeline report $(DEMO)

test: $(VENV)/.dev  ## set up, then pass the tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev  ## the tests that take minutes: kills, real images, thousands of shards
	$(BIN)/python -m pytest -m slow --timeout 1200

check: $(VENV)/.dev  ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## measure, and rewrite the table in benchmarks/README.md
	$(BIN)/python -m benchmarks.resize --out benchmarks/results/resize.json
	$(BIN)/python -m benchmarks.store --out benchmarks/results/store.json
	$(BIN)/python -m benchmarks.engine --out benchmarks/results/engine.json
	$(BIN)/python -m benchmarks.table

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(DEMO) .pytest_cache .ruff_cache

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
