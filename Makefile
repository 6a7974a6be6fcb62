# Every target sets up what it needs; see README.md.
PYTHON ?= python3.11
# For example: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
BUNDLE ?= out/demo/bundle
BIN := .venv/bin

.PHONY: install demo test check format protos serve clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps torchattacks==3.5.1
	touch $@

demo: install
	$(BIN)/python -m benchmarks.demo --out out/demo

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protos.generate --check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: install
	$(BIN)/python -m protos.generate

serve: install
	$(BIN)/pathguard serve --bundle $(BUNDLE)

clean:
	rm -rf .venv out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
