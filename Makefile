# Every target sets up what it needs; see README.md.
PYTHON ?= python3.11
# For example: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
BUNDLE ?= out/demo/bundle
BIN := .venv/bin

.PHONY: install kernel demo test check format protos interop serve image-test torture fuzz peers sbom audit clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps torchattacks==3.5.1
	touch $@

# What `make install` also does; after a change of detector/engines/*.c.
kernel: install
	$(BIN)/python -c "from setuptools import setup; setup()" -q build_ext --inplace

demo: install
	$(BIN)/python -m benchmarks.demo --out out/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

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

# tritonclient wants protobuf below 7 and names its messages like ours: an environment and processes of its own.
interop: install build/interop/.installed
	TRITON_CLIENT_PYTHON=$(CURDIR)/build/interop/bin/python $(BIN)/python -m pytest tests/interop

build/interop/.installed:
	$(PYTHON) -m venv build/interop
	build/interop/bin/pip install -q --disable-pip-version-check "tritonclient[grpc]==2.73.0" "protobuf<7"
	touch $@

serve: install
	$(BIN)/pathguard serve --bundle $(BUNDLE)

# The image is really built and run; needs root, buildah, podman, runc and mmdebstrap, but no Docker. See deploy/image.py.
image-test: install build/tools/.installed
	PATH=$(CURDIR)/build/tools/bin:$$PATH $(BIN)/python -m deploy.image --bundle $(BUNDLE) --json out/image-test.json
	build/tools/bin/kubernetes-validate --strict $(filter-out %/kustomization.yaml,$(wildcard deploy/kubernetes/base/*.yaml))

# At most 15 minutes; traffic goes to 127.0.0.1 only.
torture: install
	$(BIN)/python -m torture --bundle $(BUNDLE) --json out/torture.json

fuzz: install
	$(BIN)/pip install -q --disable-pip-version-check atheris==3.0.0
	$(BIN)/python -m torture.fuzz --json out/fuzz.json

# Environments for the servers that benchmarks/service.py is compared with; it takes their python as options.
peers: build/peers/mlserver/.installed build/peers/litserve/.installed

build/peers/%/.installed: benchmarks/peers/%.txt constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -r $<
	touch $@

# What the image installs, each with its version and licence.
sbom: build/tools/.installed build/serving/.installed
	mkdir -p out
	build/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o out/sbom.cdx.json build/serving

# Without --strict, an advisory service that cannot be reached would pass for a clean bill. `+cpu` is no version it knows.
audit: build/tools/.installed build/serving/.installed
	$(BIN)/pip --python build/serving/bin/python freeze | sed 's/+cpu$$//' > build/serving.txt
	build/tools/bin/pip-audit --strict --disable-pip --no-deps -r build/serving.txt

build/tools/.installed: deploy/requirements.txt
	$(PYTHON) -m venv build/tools
	build/tools/bin/pip install -q --disable-pip-version-check -r deploy/requirements.txt
	touch $@

# As in the Dockerfile.
build/serving/.installed: .venv/.installed pyproject.toml constraints.txt
	$(PYTHON) -m venv --without-pip build/serving
	$(BIN)/pip --python build/serving/bin/python install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt ".[onnx]"
	$(BIN)/pip --python build/serving/bin/python uninstall -q --yes pathguard
	touch $@

clean:
	rm -rf .venv out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
