# `make demo`: set up and run the main job. `make test`: set up and pass all tests. `make help`: all targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPU_BUILDS := https://download.pytorch.org/whl/cpu

# Where it is set, each of some hundred processes would compile torch's sources anew: four seconds of processor time each
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast property lint bench costs versions provider vllm refusals reference examples docs style types release setup clean help
# makes .venv, the environment of most targets, as `make` alone does
setup: $(READY)

# not compiled ahead: half of the processor time of the set-up went into modules that nothing here imports
# PyPI's torch is a CUDA build of gigabytes on most machines; where the second index cannot be reached, the first has to do
$(READY): pyproject.toml constraints.txt
	$(PYTHON) .ci/make_venv.py $(VENV)
	$(BIN)/python -m pip install -qq --no-compile --no-deps --timeout 20 --retries 2 -c constraints.txt --extra-index-url $(CPU_BUILDS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[npu,transformers,dev,docs]'
	touch $(READY)

# everything that CI runs but lint, about 25 minutes on two cores
test: $(READY)
	@# the property test draws another seed with MOE_LOWERING_SEED= or `make property`
	MOE_LOWERING_SEED=$${MOE_LOWERING_SEED-1} $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

# the tests that start no process and compile nothing, two to three minutes
test-fast: $(READY)
	MOE_LOWERING_SEED=$${MOE_LOWERING_SEED-1} $(BIN)/python -m pytest -n 2 --dist loadfile -q -m fast

# 20,000 random cases, all checked and all that fail reported; MOE_LOWERING_SEED repeats a run
property: $(READY)
	MOE_LOWERING_CASES=20000 $(BIN)/python -m pytest -n 2 -q tests/passes/test_property.py

# lowers a small Qwen3-MoE four times, on one rank and on two
demo: $(READY)
	$(BIN)/moe-lowering lower qwen3_moe --comm allgather
	$(BIN)/moe-lowering lower qwen3_moe --ep 2 --comm allgather
	$(BIN)/moe-lowering lower qwen3_moe --ep 2 --comm mc2
	$(BIN)/moe-lowering lower qwen3_moe --ep 2 --comm fused_mc2

# the wrappers against the compiled operators of vllm-ascend's wheels, in an environment of its own: docs/provider.md
provider:
	$(PYTHON) .ci/provider.py $(VERSIONS)

# the real vLLM and vllm-ascend on the simulator, in an environment of its own: docs/vllm.md; TESTS="-k eager" selects
vllm:
	$(PYTHON) .ci/vllm.py $(TESTS)

# what the pass itself takes; BENCH="--quick", "--json": see benchmarks/bench_pass.py
bench: $(READY)
	$(BIN)/python benchmarks/bench_pass.py $(BENCH)

# tests with each pair of torch and torch_npu, into docs/versions.md; VERSIONS="2.10 2.14" selects
versions:
	$(PYTHON) .ci/versions.py $(VERSIONS)

# kernels and bytes of a lowered layer, no device needed; COSTS="--write" renews docs/costs.md
costs: $(READY)
	$(BIN)/python benchmarks/costs.py $(COSTS)

# the programs of examples/ with their output: docs/examples.md
examples: $(READY)
	$(BIN)/python .ci/examples.py

# every code of the limit tables with what to do: the list of docs/refusals.md
refusals: $(READY)
	$(BIN)/python .ci/refusals.py

# every public name in one line: docs/reference.md
reference: $(READY)
	$(BIN)/python .ci/public_names.py

# style, types and docs
lint: style types docs

# ruff, and ruff's formatter
style: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# mypy --strict
types: $(READY)
	$(BIN)/mypy

# the site in build/site; a link that leads nowhere is an error
# No -q: it would hide what strict mode counts
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

# wheel and source archive, installed and run away from the checkout; PYTHON=python3.13 for another Python
release:
	$(PYTHON) .ci/release.py

# removes .venv and .venvs
clean:
	rm -rf $(VENV) .venvs

# this list: each target with the first line of the comment above it
help:
	@awk '/^# /{if (!text) text = substr($$0, 3); next} /^[a-z][a-z-]*:/{printf "make %-10s  %s\n", substr($$1, 1, index($$1, ":") - 1), text} {text = ""}' Makefile
