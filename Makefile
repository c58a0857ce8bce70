# Everything runs in .venv, which `make setup` builds from constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test chaos setup lint bench clean tools

demo: setup
	$(BIN)/eigenwatch demo $(ARGS)

test: setup tools
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# As long as asked: make chaos ARGS="--seeds 20"; the same faults again: ARGS="--seed 7".
chaos: setup
	$(BIN)/python -m tests.chaos $(ARGS)

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "eigenwatch needs Python >= 3.11; run: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # on all cores, as pip does not; what cannot be is no code
	touch $@

# promtool, Prometheus and Chromium are Debian packages; without root the tests that need them say so.
tools:
	@command -v promtool >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y prometheus >/dev/null; } \
	  || echo "promtool is missing: install Debian's package 'prometheus' to run every test"
	@command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium chromium-driver >/dev/null; } \
	  || echo "chromium is missing: install Debian's packages 'chromium' and 'chromium-driver' to run every test"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p eigenwatch

bench: setup
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info eigenwatch-store
