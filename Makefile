# make demo | test | lint | clean. TORCH and TORCHVISION name the releases to install, for instance
# `make test TORCH=torch==2.11.0 TORCHVISION=torchvision==0.26.0`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := .venv/.installed
# Where mypy finds the package whole: backends, kernels and custom become a part of it only when it is installed.
TYPED := build/typed
NATIVE = $(shell find kernels custom -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint clean

demo: $(INSTALLED)
	@$(BIN)/python -m ai3_compile demo

test: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/clang-format --dry-run -Werror --ferror-limit=3 $(NATIVE)
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/ai3_compile
	@ln -s $(addprefix $(CURDIR)/,$(wildcard ai3_compile/*) backends kernels custom) $(TYPED)/ai3_compile
	@MYPYPATH=$(TYPED) $(BIN)/mypy --no-error-summary -p ai3_compile

# torchvision's own dependencies would bring a second PyTorch in, hence --no-deps, and the constraints for all that follows.
$(INSTALLED): pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $(TORCH), $(TORCHVISION) and ai3-compile into .venv"
	@$(PIP) install "setuptools>=77" $(TORCH) numpy pillow
	@$(PIP) install --no-deps $(TORCHVISION)
	@$(BIN)/python -c "import importlib.metadata as m; [print(f'{n}=={m.version(n)}') for n in ('torch', 'torchvision')]" \
	  > .venv/constraints.txt
	@$(PIP) install --no-build-isolation --constraint .venv/constraints.txt --editable '.[demo,bench,dev]'
	@touch $@

clean:
	@rm -rf .venv build dist *.egg-info ai3_compile/_core*.so .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
