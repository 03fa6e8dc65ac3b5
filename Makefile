# Everything goes through one virtual environment, .venv, made from pyproject.toml and constraints.txt.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: install demo test test-all test-services check format bench pictures

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "temper needs Python 3.11 or 3.12: install one, or name it with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch first: what comes after it then needs no other build of it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## train the digits job, from the command to the result
	$(BIN)/temper train jobs/digits.yaml

test: install  ## the tests; under 12 minutes on 2 cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not services and not browser"

test-services: install  ## a sweep against PostgreSQL and MLflow's server, and the pages in a browser; needs both from Debian
	$(BIN)/python -m pytest -q -m "services or browser"

test-all: install  ## the tests and the long proofs
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: install  ## lint, types, and who may import whom
	$(BIN)/ruff check platform tests benchmarks docs
	$(BIN)/ruff format --check platform tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix platform tests benchmarks docs
	$(BIN)/ruff format platform tests benchmarks docs

bench: install  ## temper beside hand-written loops, sparse and taught steps beside dense ones, as ratios
	$(BIN)/python benchmarks/step_loop.py
	$(BIN)/python benchmarks/dsd_step.py --repeats 9
	$(BIN)/python benchmarks/distill_step.py --repeats 9

pictures: install  ## the README's pictures, made anew; needs Chromium
	$(BIN)/python docs/make_pictures.py /tmp/pictures
	TEMPER_PICTURES=$(CURDIR)/docs $(BIN)/python -m pytest -q -m browser
