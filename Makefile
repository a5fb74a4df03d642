# make test     all checks and tests      make demo [DATA=dir]   pretrain the tiny recipe, write demo-report/
# make lint     the checks alone          make wheel             dist/*.whl
# make venv     .venv with everything     make docs              the documentation site, site/index.html
# make clean    removes what these made
#
# Each sets up .venv by itself, from requirements.lock; docs its own, from requirements-docs.lock. PYTHON=python3.12 chooses the interpreter of a new .venv.

PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
LOCKED := $(VENV)/locked.stamp
INSTALLED := $(VENV)/installed.stamp
TORCH := $(shell grep -m 1 '^torch==' requirements.lock)
NATIVE := $(wildcard kernels/pera_kernels/*/cpu.cpp kernels/pera_kernels/*.h kernels/pera_kernels/*/*.h)

# Python compiles what it imports, when it does; to compile all that is installed takes longer than to unpack it.
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile

# pip leaves byte-compiling to the first import; where nothing may be written then, each import compiles again.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: test demo lint venv wheel docs clean

# A failed check does not hide what the tests say; either fails the target.
test: $(INSTALLED)
	@checks=0; $(MAKE) --no-print-directory lint || checks=1; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -p no:benchmark $(PYTEST_ARGS) || exit 1; \
	[ $$checks = 0 ] || { echo "the tests pass, the checks above do not" >&2; exit 1; }

# One worker a core, each with one OpenMP thread; more than 8 only fight for memory. A file's tests stay on one worker:
# they share what their module set up.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)

demo: $(INSTALLED)
	$(BIN)/pera-fast demo --out demo-report $(if $(DATA),--data "$(DATA)")

lint: $(INSTALLED)
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

venv: $(INSTALLED)

wheel: $(INSTALLED)
	rm -rf build/lib*
	$(BIN)/python -m build --wheel --no-isolation

# Reads the sources without importing them, so its environment holds no torch. A broken link fails it.
docs: $(DOCS_VENV)/locked.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --clean # --quiet would hide broken links from --strict
	@echo "site/index.html"

$(DOCS_VENV)/locked.stamp: requirements-docs.lock
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-docs.lock
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) site build dist demo-report *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis .import_linter_cache
	find pera_fast kernels tests bench docs -name __pycache__ -type d -exec rm -rf {} +
	rm -f kernels/pera_kernels/_native.so

$(LOCKED): requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$$($(PYTHON) -V) is too old, 3.10 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "the venv module of $(PYTHON) is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) -c requirements.lock '$(TORCH)'
	$(PIP) --no-deps -r requirements.lock
	@touch $@

$(INSTALLED): $(LOCKED) pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	@mkdir -p build && rm -f build/install.log
	$(PIP) --no-deps --no-build-isolation --log build/install.log -e .
	@sed -n 's/.*WARNING: pera-fast/WARNING: pera-fast/p' build/install.log >&2
	@[ ! -f kernels/pera_kernels/_native.so ] || touch $@ # without the library: try again next time
