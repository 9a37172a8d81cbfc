# make demo, make test: each does all its own set-up on a fresh machine (Python >= 3.11; a C++ compiler if there is one).
#
#   PYTHON=python3.12         the interpreter that .venv is made with
#   VENV=                     (empty) use PYTHON as it is, without a virtual environment and without network: what
#                             requirements/ lists for the command must be there already (linters may be missing), and
#                             only this package is added to it, as an editable install
#   FUSED_RESNET_BUILD=auto   what to compile: auto, auto-cpu, cuda, cpu or none (setup.py). Where it is not set, demo
#                             takes auto-cpu on a machine without an NVIDIA device, and every other command auto

PYTHON ?= python3
VENV ?= .venv

ifeq ($(strip $(VENV)),)
  RUN := $(PYTHON)
  STAMPS := build/make/$(subst /,-,$(PYTHON))
  PIP_FLAGS := --no-index
  # Asked for by name with VENV=; Debian's own Python would refuse the editable install.
  export PIP_BREAK_SYSTEM_PACKAGES := 1
else
  RUN := $(VENV)/bin/python
  STAMPS := $(VENV)/make
  PIP_FLAGS :=
endif

# Two stamps: packages-X says that requirements/X.txt is installed, ready-Y that fused_resnet is, built with
# FUSED_RESNET_BUILD=Y; there is one ready-*, as there is one extension. A command alone (`make demo`) takes what it
# needs; what lies there already and holds more (packages-dev, ready-auto) will do for it, and is not undone.
ALONE := $(filter demo docs,$(if $(word 2,$(MAKECMDGOALS)),,$(MAKECMDGOALS)))
REQUIREMENTS := $(if $(wildcard $(STAMPS)/packages-dev),dev,$(or $(ALONE),dev))
PACKAGES := $(if $(strip $(VENV)),$(STAMPS)/packages-$(REQUIREMENTS))
GPU := $(or $(wildcard /dev/nvidia*),$(shell command -v nvidia-smi))
BUILD := $(or $(FUSED_RESNET_BUILD),$(if $(filter demo,$(ALONE)),$(if $(GPU)$(wildcard $(STAMPS)/ready-auto),auto,auto-cpu),auto))
READY := $(STAMPS)/ready-$(BUILD)

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format build docs wheel clean

help:
	@echo "make demo      train and time plain and fused ResNets side by side: a table, a picture, a JSON file"
	@echo "make test      lint, and every test that this machine can run"
	@echo "make bench     a selection of benchmarks/, in about five minutes, as a table and a JSON file"
	@echo "make docs      the documentation as a site: site/index.html"
	@echo "make wheel     sdist and a manylinux wheel for each Python found, tested in empty environments: dist/"
	@echo "make lint, make format, make build, make clean"

demo: $(READY)
	$(RUN) -m fused_resnet demo

# Two processes, since Triton reads TRITON_INTERPRET when it is imported; lint, which uses one core, runs beside the
# first. Every step runs, whichever fails.
test: $(READY)
	@failed=; workers=; mkdir -p build; \
	$(MAKE) --no-print-directory lint > build/lint.log 2>&1 & lint=$$!; \
	if $(RUN) -c 'import xdist' 2>/dev/null; then workers="-n auto --maxprocesses=4"; fi; \
	echo "== tests, 1 of 2: Triton kernels under the interpreter"; \
	if $(RUN) -c 'import triton' 2>/dev/null; then \
	  TRITON_INTERPRET=1 $(RUN) -m pytest tests/kernels $$workers --durations=5 || failed="$$failed Triton kernels,"; \
	else echo "skipped: triton is not installed here"; fi; \
	wait $$lint || failed="$$failed lint,"; cat build/lint.log; \
	echo "== tests, 2 of 2: everything else"; \
	$(RUN) -m pytest tests $$workers --durations=15 || failed="$$failed tests,"; \
	echo "== the phases of benchmarks/run_gpu.sh, dry"; \
	rm -rf build/gpu_dry; \
	PYTHON=$(RUN) sh benchmarks/run_gpu.sh --dry --output build/gpu_dry || failed="$$failed GPU phases,"; \
	if [ -n "$$failed" ]; then echo "make test: failed:$${failed%,}"; exit 1; fi

SUITES := $(addprefix benchmarks/bench_,bn_act.py conv_bn_act.py block.py resnet.py)
BENCH_JSON := .benchmarks/quick.json

bench: $(READY)
	@mkdir -p $(dir $(BENCH_JSON))
	$(RUN) -m pytest -q $(SUITES) --quick --benchmark-json=$(BENCH_JSON) --benchmark-columns=median,iqr,rounds
	@echo "results: $(BENCH_JSON); more: benchmarks/README.md"

CPP_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
ZIZMOR := $(if $(strip $(VENV)),$(VENV)/bin/)zizmor
CLANG_FORMAT = $(RUN) -c 'import clang_format; clang_format.clang_format()'

lint: $(READY)
	@echo "== lint"
	@if ! $(RUN) -c 'import clang_format, mypy, ruff' 2>/dev/null; then \
	  echo "skipped: ruff, mypy or clang-format is not installed here (requirements/dev.txt)"; \
	else \
	  set -x; failed=0; \
	  $(RUN) -m ruff check . || failed=1; \
	  $(RUN) -m ruff format --check . || failed=1; \
	  $(RUN) -m mypy || failed=1; \
	  $(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES) || failed=1; \
	  if command -v $(ZIZMOR) >/dev/null; then $(ZIZMOR) --offline --quiet .github || failed=1; \
	  else echo "skipped: zizmor, which reads .github, is not installed here"; fi; \
	  exit $$failed; \
	fi

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP_FILES)

build: $(READY)

docs: $(PACKAGES)
	$(RUN) -m mkdocs build --strict --quiet
	@echo "wrote site/index.html"

wheel: $(PACKAGES)
	$(RUN) packaging/build_wheels.py

clean:
	rm -rf build dist site *.egg-info fused_resnet/_C*.so $(STAMPS)
	find csrc fused_resnet kernels tests -name __pycache__ -prune -exec rm -rf {} +

$(PACKAGES): requirements/$(REQUIREMENTS).txt $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fused_resnet needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@echo "== installing the packages of $< into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@# --no-compile: Python compiles what it imports, which is a small part of what is installed.
	$(RUN) -m pip install --no-compile -r $<
	@mkdir -p $(@D) && touch $@

# Removing _C first: where FUSED_RESNET_BUILD=none or the compiler has gone, an old one would still be imported.
$(READY): $(PACKAGES) setup.py pyproject.toml fused_resnet/version.py $(shell find csrc)
	@echo "== building and installing fused_resnet (FUSED_RESNET_BUILD=$(BUILD))"
	@rm -f $(STAMPS)/ready-* fused_resnet/_C*.so
	FUSED_RESNET_BUILD=$(BUILD) $(RUN) -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	$(RUN) -m fused_resnet info
	@mkdir -p $(@D) && touch $@
