# Everything a newcomer needs: `make demo` and `make test` set up a virtual environment the first time and reuse it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test fast lint types format

demo: $(VENV)/.installed  ## every verb once on generated CT, below demo/
	$(BIN)/blosam demo --output_dir demo --overwrite true

test: $(VENV)/.test-installed  ## all tests
	$(BIN)/python -m pytest

fast: $(VENV)/.test-installed  ## the tests of under ten seconds
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.test-installed
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c "import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else 'Python %d.%d found, 3.10 to 3.13 needed, as in: make demo PYTHON=python3.12' % sys.version_info[:2])"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (torch, MONAI, MLflow: a few minutes the first time) ..."
	$(PIP) -e '.[dicom]'
	@touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@touch $@
