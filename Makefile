# make demo    pretrains a small network on photographs and exports torchvision weights
# make test    runs all tests
# Both set the project up first, once: a virtual environment in .venv, torch, MinkowskiEngine, sparkme. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
RUN := $(VENV)/bin/python
# The first Python on PATH that the project is tested with; `make demo PYTHON=/path/to/python3.12` takes another.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	"$$name" -c "$(SUPPORTED)" 2>/dev/null && { echo "$$name"; exit; }; done)

DEMO_DIR := runs/demo
# A quarter of a step less where the processor has such instructions; without them it would take many times as long.
BF16 := $(if $(shell grep -m 1 -o -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null),--precision bf16)
DEMO_FLAGS ?= --model resnet18 --input-size 128 --decoder-width 128 --batch-size 8 --samples-per-epoch 256 --epochs 12 \
  --base-lr 0.4 --crop-scale 1 --workers 1 --log-steps 32 --panel-epochs 4 $(BF16)
TEST_FLAGS ?=
# Each process needs a core and about 5 GB; tests that share a run stay together.
TEST_PROCESSES ?= 2
# Tests allocate and free large tensors all the time: a heap that keeps its memory saves the kernel's time for new pages, 7 % of all.
TEST_HEAP = MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000
PYTEST = $(TEST_HEAP) $(RUN) -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

NEEDED_GIB := 12
# In a variable, since a comma in the call of `step` would end an argument.
PROJECT := .[demo,dev]
BUILDER := $(shell find cuda_ext/minkowski -name "*.py" -o -path "*/compat/*" -type f)
OPERATORS := $(wildcard cuda_ext/csrc/*.* cuda_ext/csrc/cpu/*.* cuda_ext/csrc/cuda/*.*)
# The folder that `make wheels` writes, and that any other target then sets up from, without a compiler.
WHEELS_TO := $(abspath $(or $(WHEELS),dist/wheels))
WHEELS_FROM := $(if $(filter wheels,$(MAKECMDGOALS)),,$(if $(WHEELS),$(abspath $(WHEELS))))

# step NUMBER, NAME, COMMAND, ADVICE: runs a quiet command and prints its name and time; when it fails, also the end of its output and the advice.
define step
@printf '[%s/4] %s ...' '$(1)' '$(2)'; \
log=$$(mktemp); start=$$SECONDS; \
if { $(3); } >"$$log" 2>&1; then printf ' %d s\n' $$((SECONDS - start)); rm -f "$$log"; else \
  printf ' failed after %d s\n\n' $$((SECONDS - start)); tail -n 15 "$$log"; rm -f "$$log"; printf '\nWhat to do: %s\n' '$(4)'; exit 1; fi
endef

PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INDEX_ADVICE := see the lines above. If the package index could not be reached, check the network and `pip config list`; if the disk is full, \
make room (about $(NEEDED_GIB) GB are needed; TMPDIR and PIP_CACHE_DIR may point to another disk). Then run make again, it goes on from here.

.PHONY: help setup demo check test test-all wheels docs lint format cuda-compile clean distclean

help:
	@echo 'make demo     set up, pretrain on photographs, export: the result is in $(DEMO_DIR)'
	@echo 'make check    set up; linters, types and the fastest tests, within a minute'
	@echo 'make test     set up; the tests of everything that runs in one process (tests/units, tests/contracts)'
	@echo 'make test-all all tests: with processes that are killed, compilers and many networks (tests/whole), 20 minutes on two cores'
	@echo 'make setup    only set up: $(VENV) with torch, MinkowskiEngine and sparkme'
	@echo 'make wheels   write wheels of what was compiled to dist/wheels (or WHEELS=DIR), for machines of the same kind;'
	@echo '              there `make setup WHEELS=DIR` installs from them, without a compiler'
	@echo 'make docs     build the pages of docs/ and the reference into build/site'
	@echo 'make lint     ruff, mypy, clang-format      make format   rewrite the sources with ruff and clang-format'
	@echo 'make cuda-compile   compile the CUDA sources, with nvcc and without a GPU'
	@echo 'make clean    remove what builds and tests left; make distclean also removes $(VENV)'
	@echo
	@echo 'PYTHON=... chooses the interpreter for $(VENV) (now: $(or $(PYTHON),none found)).'

setup: $(VENV)/.sparkme-done

demo: setup
	$(RUN) -m sparkme.pretrain --output $(DEMO_DIR) $(DEMO_FLAGS)
	$(RUN) -m sparkme.export $(DEMO_DIR)/checkpoints/last.pt --to torchvision --output $(DEMO_DIR)/resnet18.safetensors --overwrite
	$(RUN) -m sparkme.report $(DEMO_DIR)

wheels: setup
	$(RUN) cuda_ext/wheels.py write '$(WHEELS_TO)'

docs: setup
	$(PIP) 'mkdocs>=1.6' 'mkdocstrings[python]>=1'
	$(RUN) -m mkdocs build --strict
	@echo 'wrote build/site/index.html'

# Three doors: what a change is checked with all day, what it is judged by, and everything.
check: lint
	$(PYTEST) tests/units $(TEST_FLAGS)

test: setup
	$(PYTEST) tests/units tests/contracts $(TEST_FLAGS)

test-all: setup
	$(PYTEST) tests -m 'exhaustive or not exhaustive' $(TEST_FLAGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(OPERATORS)

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(OPERATORS)

# The CUDA sources, compiled for one architecture into build/: it needs nvcc and no GPU. Nothing is installed.
cuda-compile: setup
	@mkdir -p build; printf 'compiling the CUDA sources for %s ...' "$${TORCH_CUDA_ARCH_LIST:=9.0}"; start=$$SECONDS; \
	if FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$$TORCH_CUDA_ARCH_LIST" $(RUN) setup.py --quiet build_ext \
	  --build-lib build/cuda --build-temp build/cuda-objects >build/cuda.log 2>&1; then printf ' %d s\n' $$((SECONDS - start)); \
	else printf ' failed, build/cuda.log ends with\n'; tail -n 30 build/cuda.log; exit 1; fi

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# What is missing is found before the first gigabyte is loaded.
$(VENV)/.venv-done:
	@$(if $(PYTHON),true,echo 'Python 3.11 to 3.14 was not found. Install it or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12'; exit 1)
	@'$(PYTHON)' -c '$(SUPPORTED)' || \
	  { echo '$(PYTHON) does not run or is not Python 3.11 to 3.14: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12'; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '$(PYTHON) cannot make virtual environments: install its venv module (apt-get install python3-venv)'; exit 1; }
	@$(if $(WHEELS_FROM),'$(PYTHON)' cuda_ext/wheels.py check '$(WHEELS_FROM)',true)
	@$(if $(WHEELS_FROM),true,command -v $${CXX:-g++} >/dev/null) || \
	  { echo 'A C++ compiler is missing: install g++ (apt-get install g++, dnf install gcc-c++) or set CXX'; exit 1; }
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); [ "$$free" -ge $(NEEDED_GIB) ] || [ -d $(VENV)/lib ] || \
	  { echo "This disk has $$free GB free, and torch with its CUDA libraries needs $(NEEDED_GIB): make room, or clone to another disk"; exit 1; }
	$(call step,1,virtual environment in $(VENV) ($(PYTHON)),'$(PYTHON)' -m venv $(VENV),see the lines above)
	@touch $@

$(VENV)/.torch-done: $(VENV)/.venv-done constraints.txt
	$(call step,2,$(shell sed -n 's/^torch==/torch /p' constraints.txt) and torchvision from the package index,\
	  $(PIP) torch torchvision setuptools wheel ninja,$(INDEX_ADVICE))
	@touch $@

# Tools are downloaded while the compilers run. setup.py finds MinkowskiEngine installed, so the requirement is met.
$(VENV)/.minkowski-done: $(VENV)/.torch-done $(BUILDER)
	@echo '[3/4] MinkowskiEngine; meanwhile the tools for demo and tests from the package index'
	@start=$$SECONDS; log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	$(PIP) --requirement constraints.txt >"$$log" 2>&1 & tools=$$!; status=0; \
	$(if $(WHEELS_FROM),$(RUN) cuda_ext/wheels.py install '$(WHEELS_FROM)',$(RUN) cuda_ext/minkowski/build.py --install --install-nvcc) || status=1; \
	wait $$tools || { tail -n 15 "$$log"; printf '\nWhat to do: %s\n' '$(INDEX_ADVICE)'; exit 1; }; \
	[ $$status = 0 ] || { printf '\nWhat to do: see the line above, then run make again; it goes on from here.\n'; exit 1; }; \
	printf '[3/4] MinkowskiEngine and the tools ... %d s\n' $$((SECONDS - start))
	@touch $@

$(VENV)/.sparkme-done: $(VENV)/.minkowski-done pyproject.toml setup.py constraints.txt $(OPERATORS)
	$(call step,4,sparkme with its operators,$(if $(WHEELS_FROM),SPARKME_OPERATORS=compiled) \
	  $(PIP) --no-build-isolation --editable '$(PROJECT)',$(INDEX_ADVICE))
	@touch $@
