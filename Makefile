# Every target sets up .venv first; `python3 -m venv` and pip are all it takes. `make` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# One thread per process: the tests' processes share the machine, and results do not depend on its cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest --durations=15
BENCH = $(BIN)/moe-runtime bench $(if $(QUICK),--quick) $(if $(JSON),--json $(JSON))
SUITES := exchange layer peers routers service scale skew transformers wire
RESULTS ?= benchmarks/results
BENCH_STAMP := $(VENV)/.installed-bench
HIVEMIND_VENV := .venv-hivemind
HIVEMIND_STAMP := $(HIVEMIND_VENV)/.installed
RAY_LOG := $(VENV)/test-ray.log
COVERED := routing wire service
MIN_COVERAGE := 95

.DEFAULT_GOAL := help
.PHONY: help demo chat test test-others test-ray test-cluster check format venv docs coverage soak chaos chaos-docs bench bench-peers bench-results bench-docs clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Train, serve and classify real digits with five kinds of experts on Ray; DEMO=routers: by every policy.
	$(BIN)/moe-runtime demo $(or $(DEMO),digits)

chat: $(STAMP)  ## Chat with a real language model, its experts in Ray actors; also ARGS='--prompt "..." --json PATH'.
	$(BIN)/moe-runtime demo chat $(ARGS)

test: $(STAMP)  ## Run every test but the soak tests and the lab's, tests/ray beside the others; gate the coverage of the core.
	@$(MAKE) --no-print-directory --jobs=2 test-others test-ray
	$(coverage_gates)

test-others: $(STAMP)
	$(PYTEST) -m "not soak and not cluster" --ignore-glob='tests/ray/*' --cov --cov-report=

# Actors take seconds to start, and most of that is waiting. Its output comes when it is done.
test-ray: $(STAMP)
	@$(PYTEST) tests/ray -m "not soak" >$(RAY_LOG) 2>&1; status=$$?; cat $(RAY_LOG); exit $$status

test-cluster: $(STAMP)  ## Run `ray up` and what follows for real, on hosts made of namespaces; needs root.
	@PYTHONPATH=tests $(BIN)/python -m cluster.lab
	$(PYTEST) tests/cluster

check: $(STAMP)  ## Formatting, lint, types, layering, spelling and security: what CI runs before the tests.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml moe_runtime
	@$(audit)

format: $(STAMP)  ## Format the code and repair what ruff can.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: $(STAMP)  ## Set up .venv and nothing else.

docs: $(STAMP)  ## Write docs/configuration.md, the metrics of docs/observability.md and the systems of docs/routers.md.
	$(BIN)/python -m moe_runtime.cli.configuration_page docs/configuration.md
	$(BIN)/python -m moe_runtime.metrics.page docs/observability.md
	$(BIN)/python -m moe_runtime.cli.presets_page docs/routers.md

coverage: $(STAMP)  ## Coverage of the core by the tests that need no Ray, line by line.
	$(PYTEST) tests/unit $(wildcard tests/rpc) -m "not soak" -q --cov --cov-report=term-missing
	$(coverage_gates)

soak: $(STAMP)  ## Run the long tests, and half an hour of chaos.
	$(PYTEST) -m soak
	$(MAKE) chaos MINUTES=30

chaos: $(STAMP)  ## Break a cluster under load and check every answer; also MINUTES=2, SEED=0, WITHOUT="fault ..." and JSON=PATH.
	$(BIN)/moe-runtime chaos --minutes $(or $(MINUTES),2) --seed $(or $(SEED),0) \
	  $(foreach fault,$(WITHOUT),--without $(fault)) $(if $(JSON),--json $(JSON))

chaos-docs: $(STAMP)  ## Write the figures of docs/reliability.md anew from JSON (benchmarks/chaos.json); breaks nothing.
	$(BIN)/python -m moe_runtime.chaos.page $(or $(JSON),benchmarks/chaos.json) docs/reliability.md

bench: $(BENCH_STAMP)  ## Run every benchmark, or SUITE=name; also QUICK=1 and JSON=PATH.
	$(BENCH) $(SUITE)

bench-peers: $(BENCH_STAMP) $(HIVEMIND_STAMP)  ## Benchmark against hivemind, in an environment of its own; also QUICK=1 and JSON=PATH.
	$(BENCH) peers

bench-results: $(BENCH_STAMP) $(HIVEMIND_STAMP)  ## Measure every suite, or SUITE="a b", into RESULTS (benchmarks/results).
	@mkdir -p $(RESULTS)
	for suite in $(or $(SUITE),$(SUITES)); do \
	  $(BIN)/moe-runtime bench $(if $(QUICK),--quick) --json $(RESULTS)/$$suite.json $$suite || exit 1; \
	done

bench-docs: $(BENCH_STAMP)  ## Write the figures and plots of docs/ anew from RESULTS (benchmarks/results); measures nothing.
	$(BIN)/python -m moe_runtime.bench.page $(RESULTS) docs

clean:  ## Remove .venv and every cache.
	rm -rf $(VENV) $(HIVEMIND_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage* build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -maxdepth 3 -name '*.egg-info' -type d -prune -exec rm -rf {} +

# Known vulnerabilities of what constraints.txt pins. Without an index to ask there is no report, and no failure.
define audit
report=$$(timeout 120 $(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --timeout 5 \
  --progress-spinner off --format json 2>/dev/null); \
if [ -z "$$report" ]; then echo "pip-audit: skipped, no index could be reached"; \
else echo "$$report" | $(BIN)/python -c "$$AUDIT_SUMMARY"; fi
endef

define AUDIT_SUMMARY
import json, sys
packages = json.load(sys.stdin)["dependencies"]
skipped = [package for package in packages if "skip_reason" in package]
found = [(package["name"], package["version"], v["id"]) for package in packages for v in package.get("vulns", ())]
print(f"pip-audit: {len(packages) - len(skipped)} packages audited, {len(skipped)} unknown to the index")
sys.exit("\n".join(f"{name} {version}: {known_as}" for name, version, known_as in found) or 0)
endef
export AUDIT_SUMMARY

define coverage_gates
$(foreach package,$(COVERED),$(BIN)/coverage report --include='moe_runtime/$(package)/*' --fail-under=$(MIN_COVERAGE)
	)
endef

$(STAMP): pyproject.toml constraints.txt examples/custom_expert/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moe_runtime needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another interpreter: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV): a few minutes the first time."
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	# Torch first and by itself: where a local wheel is offered, nothing else may decide on another.
	$(PIP_INSTALL) setuptools torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	# The build tool is the pinned one above: nothing is fetched beside the constraints.
	$(PIP_INSTALL) --no-build-isolation --editable '.[runtime,demo,dev]'
	$(PIP_INSTALL) --no-build-isolation --no-deps ./examples/custom_expert
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(PIP_INSTALL) --no-build-isolation --editable '.[bench]'
	@touch $@

# hivemind has no wheel; its build fetches the daemon that carries its messages.
$(HIVEMIND_STAMP): benchmarks/requirements-hivemind.txt
	@echo "Setting up $(HIVEMIND_VENV): a few minutes."
	$(PYTHON) -m venv $(HIVEMIND_VENV)
	$(HIVEMIND_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-hivemind.txt
	@touch $@
