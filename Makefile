# `make demo` and `make test` do all the set-up on a fresh machine; the rest is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two torch processes with several threads each slow each other down many times over.
export OMP_NUM_THREADS ?= 1
# Processes that share the tests; each has one thread.
TEST_WORKERS ?= 2

.PHONY: demo retrieval results bench-speed test test-all check clean

demo: $(VENV)/.demo
	$(BIN)/cvlm run configs/quickstart/vqa.yaml --out runs/quickstart

retrieval: $(VENV)/.demo
	$(BIN)/cvlm run configs/quickstart/retrieval.yaml --out runs/retrieval

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_WORKERS) --dist worksteal

test-all: $(VENV)/.test
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

# Keep what the quickstarts measured here: the tables of the README and the docs come from these files.
results: demo retrieval
	for run in quickstart retrieval; do \
	  mkdir -p benchmarks/results/$$run; \
	  cp runs/$$run/metrics.json runs/$$run/cost.json runs/$$run/environment.json runs/$$run/recipe.yaml \
	    benchmarks/results/$$run/; \
	done
	mkdir -p docs/images
	cp runs/quickstart/arms.png docs/images/arms.png

# Our metrics beside the public tools; about half an hour, on a machine that does nothing else.
bench-speed: $(VENV)/.test
	$(BIN)/python -m benchmarks.speed --out benchmarks/results/speed

clean:
	rm -rf $(VENV) runs build *.egg-info
