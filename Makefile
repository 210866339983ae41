# Everything runs from .venv, which the first target that needs it makes. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The demo: chat traffic served by two replicas, every reused page checked. At most two minutes.
DEMO_ARGS ?= --workload chat --replicas 2 --forward verify
DEMO_OUT ?= demo-out
# `make bench BENCH_ARGS=--smoke` is a short run of the serving benchmark instead.
BENCH_ARGS ?= core
BASELINE := docs/measurements/core-baseline.json
PYTEST_ARGS ?=
# All tests run in two processes, file by file; each starts one cluster for all its files. Named files run in one, so that
# -s and --pdb work.
JOBS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format types docs bench bench-instructions valgrind profile gpu-report clients clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 picks the interpreter when $(VENV) is made; PYTEST_ARGS, DEMO_ARGS and"
	@echo "  BENCH_ARGS are handed on, as in: make test PYTEST_ARGS='tests/unit -x'"

setup: $(STAMP)  ## make .venv and install rayk into it (the other targets do so when needed)

demo: $(STAMP)  ## serve generated chats from 2 replicas, check every page, write demo-out/
	$(BIN)/rayk bench $(DEMO_ARGS) --out $(DEMO_OUT)

test: $(STAMP)  ## run all tests (those that need a GPU are skipped without one)
	TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python -m pytest $(if $(filter tests%,$(PYTEST_ARGS)),,tests -n $(JOBS) --dist loadfile --no-loadscope-reorder) $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff: rules and formatting; the order of layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/layers.py

format: $(STAMP)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy --strict on the packages
	$(BIN)/mypy

bench: $(STAMP)  ## what the control plane costs, beside its limits and the best peers
	$(BIN)/rayk bench $(BENCH_ARGS)

# Times are noisy and instructions are not: the same commit comes to the same count within a few thousandths of a percent.
bench-instructions: $(STAMP) valgrind  ## count instructions under valgrind; fails when one grew by more than 5 %
	$(BIN)/rayk bench core --only instructions --check --baseline $(BASELINE) --tolerance 0.05

docs: $(STAMP)  ## the docs as a site in site/; no network, and no link that leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

profile: $(STAMP)  ## sample driver, scheduler and replica on Ray with py-spy, write profile-out/
	$(BIN)/python tests/measure/ray_profile.py profile-out

gpu-report: $(STAMP)  ## run the GPU tests and show what they print
	@$(BIN)/python -c 'import torch; n = torch.cuda.device_count(); \
	print("gpu-report:", ", ".join(torch.cuda.get_device_name(i) for i in range(n)) if n else \
	f"torch {torch.__version__} sees no CUDA device, so every GPU test will be skipped")'
	@if [ ! -d tests/gpu ]; then echo "gpu-report: there is no tests/gpu in this tree" >&2; exit 1; fi
	$(BIN)/python -m pytest tests/gpu -m gpu -s $(PYTEST_ARGS)

clients: $(STAMP)  ## foreign clients and routers, Ray Serve and Ray Data (by hand; installed into .venv-clients)
	@test -x .venv-clients/bin/guidellm || { $(PYTHON) -m venv .venv-clients && \
		for site in .venv-clients/lib/python3*/site-packages; do echo "$$PWD"/$(VENV)/lib/python3*/site-packages > $$site/rayk.pth; done && \
		.venv-clients/bin/pip install -qq --disable-pip-version-check \
			schemathesis lm-eval tenacity guidellm smg vllm-router 'ray[serve,data]' && \
		.venv-clients/bin/pip install -qq --disable-pip-version-check --no-deps accelerate; }
	$(BIN)/python tests/clients/run.py .venv-clients
	PYTHONPATH="$$PWD" .venv-clients/bin/python tests/clients/ray_data.py
	PYTHONPATH="$$PWD" .venv-clients/bin/python tests/clients/ray_serve.py
	PYTHONPATH="$$PWD" .venv-clients/bin/python examples/serve/foreign.py

clean:  ## remove caches, builds and output (.venv stays; rm -rf .venv starts afresh)
	rm -rf build dist rayk.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out bench-out profile-out site
	find actors rayk scheduler tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

valgrind:
	@command -v valgrind >/dev/null || { command -v apt-get >/dev/null && \
		if [ "$$(id -u)" = 0 ]; then apt-get install -y -qq valgrind || { apt-get update -qq && apt-get install -y -qq valgrind; }; \
		else sudo -n apt-get install -y -qq valgrind; fi; } || { \
		echo "valgrind is needed and could not be installed: install it with the system's package manager" \
			"(Debian and Ubuntu: apt-get install valgrind)" >&2; exit 1; }

# -c keeps everything, but pip itself, at the versions in constraints.txt.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	@if [ ! -L rayk/actors ] || [ ! -L rayk/scheduler ]; then \
		echo "rayk/actors and rayk/scheduler are not links: this copy was made without symbolic links (a git"; \
		echo "zip, or core.symlinks=false). Clone again where symbolic links work, see CONTRIBUTING.md."; \
		exit 1; fi >&2
	@echo "Installing rayk and what it needs into $(VENV) (once; a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,docs]' || { \
		echo "pip failed, see above. Nothing is half done: run the same command again." >&2; exit 1; }
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14))' || { \
		echo "rayk needs Python 3.11, 3.12 or 3.13 and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
			"make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian and Ubuntu:" \
			"apt install python3-venv), or use another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
