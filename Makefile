# make demo     everything, end to end, on this machine     make test     what CI runs
# make gpu      benchmarks and tests on a CUDA device within BUDGET=540 seconds, with $(PYTHON) as it is; installs nothing
# make slow     the tests that make test leaves out: more of the same, or tests of what seldom changes
# make faults   the fault tests alone, without the slow ones (all: FAULTS=fault); docs/checkpoint-format.md has their table
# make mutants  bugs planted one at a time: does a test notice? A table; an hour or more (MUTANTS="clip bf16": these only)
# make fuzz     a thousand broken rows of every data format: read clean, or refused by path, line and reason; minutes
# make coverage how much of the package make test runs, forks and spawned processes counted; some three times as long
# make same     nine commands under BASE=commit and under this tree: is every file that they write the same?
# make compat   what older transformers make of our exports: a table; installs them into .venv-compat (0.5 GB)
# make peers    files that mining and prepare.py write, by the loaders of the trainers that they are for; installs them into .venv-peers
# make consumers  what programs that serve exports make of them, and of faults in them: a table; installs them into .venv-consumers
#
# make experiments  the grids of configs/experiments/ (docs/experiments.md says what they read), and their page
# make docs     the pages and notebooks that commands make     make constraints   constraints.txt, from .venv
# make site     docs/ as a site that opens without a network, links and anchors checked: site/index.html; installs into .venv-site
#
# make demo TORCH="torch==2.14.0"      another torch       make test PYTHON=python3.12      another Python
# make demo CONSTRAINTS=               the newest versions of everything else, not the tested ones

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
BENCHMARKS ?= step kernels ceilings mining optimizer

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test slow lint coverage same faults mutants fuzz gpu bench compat consumers peers docs site experiments constraints clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	$(BIN)/python launch/demo.py

# pytest-xdist would begin with the files of most tests, which are not the longest: tests/conftest.py has its own order.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow"

slow: $(INSTALLED)
	$(PYTEST) -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A process that is killed leaves no figures, so the failpoints' own lines are not all counted.
coverage: $(INSTALLED)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

BASE ?= HEAD

same: $(INSTALLED)
	$(BIN)/python tests/same_behaviour.py $(BASE)

FAULTS ?= fault and not slow

# Stealing, because a file of many tests would be the last one on one core.
faults: $(INSTALLED)
	$(BIN)/python -m pytest tests/checkpoint tests/data tests/mine tests/train -m "$(FAULTS)" -n $(JOBS) --dist worksteal -q

# Two at a time, whatever JOBS says: what they ask starts ranks of its own.
mutants: $(INSTALLED)
	$(BIN)/python tests/mutants.py --jobs 2 $(MUTANTS)

FUZZ ?= --rows 1000

fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz.py $(FUZZ)

# Most of the GPU tests' time is compilation: in parallel where pytest-xdist is installed.
in_parallel = $(shell $(PYTHON) -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')

# What matters most first. Seconds of each on an H200 (ceilings, kernels, mining, tests: of recorded runs; step, optimizer: reckoned):
# what no longer fits into BUDGET is left out, and said. Each part runs even if another failed (a rented GPU's results are not
# thrown away), and any failure fails the target.
BUDGET ?= 540
PARTS = step:275 tests:90 kernels:110 ceilings:25 mining:15 optimizer:20
ARGUMENTS_step := --minutes 4.4
ARGUMENTS_kernels := --minutes 1.4

gpu: RUN = PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
gpu:
	@failed=""; left_out=""; began=$$(date +%s); \
	for part in $(PARTS); do \
	  name=$${part%%:*}; about=$${part##*:}; left=$$(( $(BUDGET) + began - $$(date +%s) )); \
	  if [ $$left -lt $$about ]; then \
	    echo "== $$name left out: about $$about s, $$left s are left of BUDGET=$(BUDGET)"; left_out="$$left_out $$name"; continue; \
	  fi; \
	  echo "== $$name: about $$about s of $$left s that are left"; \
	  case $$name in \
	    tests) $(RUN) -m pytest tests/gpu -q $(in_parallel) ;; \
	    step) $(RUN) -m benchmarks.step $(ARGUMENTS_step) ;; \
	    kernels) $(RUN) -m benchmarks.kernels $(ARGUMENTS_kernels) ;; \
	    *) $(RUN) -m benchmarks.$$name ;; \
	  esac || failed="$$failed $$name"; \
	done; \
	echo "== make gpu: $$(( $$(date +%s) - began )) s$${left_out:+; left out:$$left_out}"; \
	if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed" >&2; exit 1; fi

# checkpoint and data need what a GPU machine may lack (safetensors, datasets), so they are not among the GPU's.
bench: $(INSTALLED)
	@failed=""; \
	for name in $(BENCHMARKS) checkpoint data; do \
	  echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name || failed="$$failed benchmarks.$$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "make bench: failed:$$failed" >&2; exit 1; fi

# transformers-sentence_transformers of each environment: the published model's own, the last 4, the first 5 that is enough.
COMPAT := 4.51.3-4.1.0 4.57.6-5.1.2 5.2.0-5.2.3

compat: $(COMPAT:%=.venv-compat/%/.installed)
	$(BIN)/python -m pytest tests/export/test_other_versions.py -q

# Torch and the rest are those of .venv: a .pth file puts its packages behind the older ones.
.venv-compat/%/.installed: | $(INSTALLED)
	@echo "$(@D): pip will complain that nemo_embed_core wants a newer transformers; that is the point"
	$(BIN)/python -m venv --clear --without-pip $(@D)
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "$$main" >"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(BIN)/python -m pip --python $(@D)/bin/python install -qq "transformers==$(word 1,$(subst -, ,$*))" \
	  "sentence-transformers==$(word 2,$(subst -, ,$*))" "datasets<5"
	@touch $@

# With all that .venv has behind them, as in .venv-compat.
CONSUMERS := onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 xllamacpp==2026.10.11549

consumers: .venv-consumers/.installed
	.venv-consumers/bin/python -m pytest tests/export/test_serving.py tests/export/test_gguf.py -q

.venv-consumers/.installed: Makefile | $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "$$main" >"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(BIN)/python -m pip --python $(@D)/bin/python install -qq $(CONSUMERS)
	@touch $@

# Loaders are all that is asked of them: of what they require they have what .venv has.
PEERS := FlagEmbedding==1.4.2 tevatron==0.1.0 nemo-automodel==0.7.0 accelerate==1.15.0

peers: .venv-peers/.installed
	.venv-peers/bin/python -m pytest tests/mine/test_peers.py -q

.venv-peers/.installed: Makefile | $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "$$main" >"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(BIN)/python -m pip --python $(@D)/bin/python install -qq --no-deps $(PEERS)
	@touch $@

EXPERIMENTS ?= thresholds losses merging instructions attention matryoshka lora distillation synthetic

experiments: $(INSTALLED)
	for name in $(EXPERIMENTS); do \
	  $(BIN)/python launch/experiment.py --grid configs/experiments/$$name.yaml --output runs/$$name --delete_models true && \
	  cp runs/$$name/results.json docs/experiments/$$name.json || exit 1; \
	done
	page=$$($(BIN)/python -m docs.experiments) && echo "$$page" >docs/experiments.md

# A failure leaves the page as it was.
docs: $(INSTALLED)
	page=$$($(BIN)/python -m benchmarks.report) && echo "$$page" >docs/benchmarks.md
	page=$$($(BIN)/python -m docs.architecture) && echo "$$page" >docs/architecture.md
	page=$$($(BIN)/python -m docs.options) && echo "$$page" >docs/options.md
	page=$$($(BIN)/python -m docs.experiments) && echo "$$page" >docs/experiments.md
	page=$$($(BIN)/python -m docs.llms) && echo "$$page" >docs/llms.txt
	$(BIN)/python tests/test_examples.py

# Beside .venv, which has other things to do with 13 packages of a site. pymdown-extensions 13 leaves out 3.11.0 to 3.11.4.
SITE := mkdocs==1.6.1 mkdocs-material==9.8.2 pymdown-extensions==12.3 babel==2.19.0 backrefs==8.3.1 colorama==0.4.6 \
  ghp-import==2.1.0 jinja2==3.1.6 mergedeep==1.3.4 mkdocs-get-deps==0.2.2 mkdocs-material-extensions==1.3.1 \
  paginate==0.5.7 platformdirs==4.14.8 pyyaml-env-tag==1.1 watchdog==7.1.0

site: .venv-site/.installed
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

.venv-site/.installed: Makefile constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -qq -c constraints.txt $(SITE)
	@touch $@

# To go to newer versions: make test CONSTRAINTS= in a new .venv, then this.
constraints: $(INSTALLED)
	pins=$$($(BIN)/python .ci/constraints.py) && echo "$$pins" >constraints.txt

# torch first and named again, so that no extra brings another one.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11: give another one, for example make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "$(PYTHON) has no venv or no pip: install them (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq $(TORCH) $(CONSTRAINTS:%=-c %)
	$(BIN)/python -m pip install -qq $(TORCH) $(CONSTRAINTS:%=-c %) --editable '.[eval,demo,log,inspect,synthesize,dev]'
	@touch $@

# Keeps .venv, .venv-compat, .venv-consumers, .venv-peers, .venv-site, runs/ and data-cache/: they cost time, not space for mistakes.
clean:
	rm -rf build dist site *.egg-info .coverage* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
