# make quickstart: the main job, from nothing to runs/quickstart/report.html. make test: all quick tests.
# Environments are made here, with uv where it is installed, else with venv and pip; Python compiles what it imports.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# --dist loadgroup waits for ever for a worker that died and was started again.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart=0 -q
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test test-slow lint lock clean

quickstart:
	@began=$$(date +%s); $(MAKE) -s $(STAMP) && echo "installed in $$(($$(date +%s) - began)) s"
	$(BIN)/lfjax train --config=configs/quickstart.py --workdir=runs/quickstart

test: $(TEST_STAMP)
	$(PYTEST)

test-slow: $(TEST_STAMP)
	$(PYTEST) -m slow

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Exact versions with hashes; no registry is named in them.
lock:
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --constraint constraints.txt pyproject.toml -o requirements.lock
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --constraint constraints.txt --extra test pyproject.toml -o requirements-test.lock

$(STAMP): pyproject.toml requirements.lock
	$(call install,requirements.lock)
	touch $@

$(TEST_STAMP): pyproject.toml requirements-test.lock
	$(call install,requirements-test.lock)
	touch $@ $(STAMP)

define install
if command -v uv >/dev/null; then \
  uv venv -q --allow-existing --python $(PYTHON) $(VENV) && \
  uv pip install -q --python $(BIN)/python --require-hashes -r $(1) && \
  uv pip install -q --python $(BIN)/python --no-deps -e .; \
else \
  $(PYTHON) -m venv $(VENV) && \
  $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --require-hashes -r $(1) && \
  $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps -e .; \
fi
endef

clean:
	rm -rf $(VENV) runs build *.egg-info
