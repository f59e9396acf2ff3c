# `make demo` and `make test` are all a new user needs; both install what they need into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# one thread in each of two workers: two threads in each would fight for two cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

.PHONY: demo test check lint types test-long install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

demo: install
	$(BIN)/fusepress compress examples/street/recipe.yaml
	$(BIN)/fusepress compress examples/street/recipe.yaml --target rtx-4090 -o gates.latency=null

test: install
	$(MAKE) check

check: install lint types
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

test-long: install
	$(PYTEST) -m long
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults --kills 20 --results build/faults

clean:
	rm -rf $(VENV) build dist *.egg-info runs .mypy_cache .ruff_cache .pytest_cache
