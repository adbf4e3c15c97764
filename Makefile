# Every target makes and fills .venv when it is missing or older than what it needs.
# On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# before the command saves the download of the CUDA libraries.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo docs links quick release test check bench ship-bench evaluate fuzz test-install test-horovod test-launch test-cuda \
	test-adapters test-oldest test-torchft churn speeds gpu-check gpu-bench soak faults clean

EXPERIMENT := evaluate
RESULTS := experiments/results/local

# An environment that has what .venv has, and what is installed there beside it.
define beside
$(PYTHON) -m venv $(1)
$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(ls -d $(1)/lib/python*/site-packages)/beside.pth
endef

demo: $(READY)
	$(BIN)/python -m experiments.harness.demo

# How many test files run at a time. Most tests start two to four ranks, so more than half
# of the cores do not help.
JOBS := 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The path of a gradient, in less than two minutes.
quick: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/test_format.py tests/test_plan.py tests/test_structure.py tests/test_workers.py \
		tests/test_entropy.py tests/test_rans.py tests/test_engine.py tests/test_coder.py tests/test_calls.py

# TESTS says which, as pytest does.
TESTS :=
test: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(TESTS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m experiments.bench.codec --out experiments/results --docs docs/explanation/codec.md

# Of rate-limited links, as root: sudo make evaluate. Otherwise times are computed.
# Goes on where it was stopped. EXPERIMENT names a file of experiments/configs.
# EXPERIMENT=scripts trains the scripts of experiments/scripts on a TEXT, in the adapters'
# environment.
TEXT := tinyshakespeare.txt
ifeq ($(EXPERIMENT),scripts)
evaluate: .venv-adapters/ready
	.venv-adapters/bin/python -m experiments.scripts --text $(TEXT) --out $(RESULTS)/scripts.csv
else
evaluate: $(READY)
	$(BIN)/python -m experiments.harness.run experiments/configs/$(EXPERIMENT).toml --out $(RESULTS)
	$(BIN)/python -m experiments.report.build $(RESULTS)/$(EXPERIMENT)/results.csv --page $(RESULTS)/$(EXPERIMENT)/report
endif

# Shipped models beside their rivals: exact, coarse, pruned; an hour on one core. WEIGHTS
# are files to ship, too. nncodec needs a compiler and zipnn a wheel: without them
# their rows say so.
DATA := /usr/share/datasets/fashion-mnist
WEIGHTS :=
ship-bench: .venv-ship/ready
	.venv-ship/bin/python -m experiments.ship.bench --data-dir $(DATA) --models $(RESULTS)/models \
		$(if $(WEIGHTS),--weights $(WEIGHTS)) --out experiments/results/ship.csv --docs docs/explanation/ship.md

.venv-ship/ready: $(READY)
	$(call beside,.venv-ship)
	-.venv-ship/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt zipnn
	-.venv-ship/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nncodec==2.1.3
	@touch $@

fuzz: $(READY)
	$(BIN)/python -m pytest --hypothesis-profile thorough --timeout 0 tests/test_codec.py tests/test_plan.py tests/test_engine.py
	$(BIN)/python -m tests.fuzz --mutations 10000000
	$(BIN)/python -m tests.state_fuzz --count 100000
	$(BIN)/python -m tests.ship_fuzz --mutations 100000

# 21 numeric faults under 37 forms of training, with optimizers that are not told of them.
faults: $(READY)
	$(BIN)/python -m tests.faults

# 20 000 steps with faults beside the oracle, 200 overflows under a GradScaler, 100 failing
# stages, 100 signals to ranks, 30 workers killed, 4 → 3 → 4 ranks: more than an hour.
soak: $(READY)
	$(BIN)/python -m tests.soak

test-install: $(READY)
	$(BIN)/python -m tests.install

# dist/: wheel, sdist and notes, checked and installed into empty environments. Then:
# twine upload dist/*.whl dist/*.tar.gz
release: .venv-release/ready
	.venv-release/bin/python -m tests.install --out dist

.venv-release/ready: $(READY)
	$(call beside,.venv-release)
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[release]"
	@touch $@

# Real Horovod ranks, in an environment of its own; the first build takes minutes.
test-horovod: .venv-horovod/ready
	.venv-horovod/bin/python -m pytest tests/test_horovod.py tests/test_launchers.py -k horovod

# The launchers by their own tools: Ray, Kubeflow's and SkyPilot's schemas, linters.
test-launch: .venv-launch/ready
	.venv-launch/bin/python -m pytest tests/test_launchers.py

# Lightning, Accelerate and the Hugging Face Trainer, in an environment of their own.
test-adapters: .venv-adapters/ready
	.venv-adapters/bin/python -m pytest tests/test_adapters.py

.venv-adapters/ready: $(READY)
	$(call beside,.venv-adapters)
	.venv-adapters/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[experiments,test,lightning,accelerate,transformers]"
	@touch $@

# Machines that come and go, on torchft's membership, in an environment of its own.
test-torchft: .venv-torchft/ready
	.venv-torchft/bin/python -m pytest tests/test_torchft.py tests/test_launchers.py -k torchft

# Half an hour of kills, stops, cut links and joins, as root between hosts of the lab, and
# then the same number of tokens undisturbed. METHODS: lc3, local_sgd and diloco, the last
# two torchft's own.
METHODS := lc3
SEEDS := 0
MINUTES := 30
churn: .venv-torchft/ready
	.venv-torchft/bin/python -m tests.churn --minutes $(MINUTES) --rate 100mbit --methods $(METHODS) --seeds $(SEEDS) \
		--out $(RESULTS)/churn.csv

# What a rank ten times slower costs three others: about ten minutes.
speeds: .venv-torchft/ready
	.venv-torchft/bin/python -m tests.speeds --out $(RESULTS)/speeds.csv

.venv-torchft/ready: $(READY)
	$(call beside,.venv-torchft)
	.venv-torchft/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[experiments,test,torchft]"
	@touch $@

# The CUDA kernels without a GPU: numba's simulator, and NVIDIA's compiler and assembler.
test-cuda: .venv/cuda-ready
	$(BIN)/python -m pytest tests/test_cuda.py

.venv/cuda-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cuda-test]"
	@touch $@

# The site, with warnings as errors (tests run its examples): docs/_build/html/index.html.
docs: .venv-docs/ready
	.venv-docs/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# The links of the site that lead out of it; needs the network.
links: .venv-docs/ready
	.venv-docs/bin/python -m sphinx -q -b linkcheck docs docs/_build/links

.venv-docs/ready: $(READY)
	$(call beside,.venv-docs)
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

# The oldest numpy, numba and zstandard that pyproject.toml promises.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest tests/test_codec.py tests/test_compiled.py tests/test_rans.py tests/test_entropy.py

.venv-oldest/ready: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	grep -vE "^(numpy|numba|llvmlite|zstandard)==" constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt -c constraints-oldest.txt -e ".[test]"
	@touch $@

# On a machine with a GPU: the kernels' cases, DDP, push-pull and local steps on the device,
# NCCL if there are two, and NVIDIA's memory checker if it is installed.
gpu-check: .venv/cuda-ready
	$(BIN)/python -W ignore -m tests.cuda_cases
	$(BIN)/python -m pytest tests/test_cuda.py tests/test_gpu.py
	if command -v compute-sanitizer; then compute-sanitizer --report-api-errors no --error-exitcode 1 \
		$(BIN)/python -W ignore -m tests.cuda_cases special_values whole_exchange; fi

gpu-bench: .venv/cuda-ready
	$(BIN)/python -m experiments.bench.gpu --out experiments/results --docs docs/explanation/codec.md

.venv-horovod/ready: $(READY) launch/install_horovod.sh
	$(call beside,.venv-horovod)
	.venv-horovod/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[experiments,test]"
	launch/install_horovod.sh .venv-horovod/bin/python
	@touch $@

.venv-launch/ready: $(READY)
	$(call beside,.venv-launch)
	.venv-launch/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[experiments,test,launch]"
	@touch $@

clean:
	rm -rf .venv .venv-ship .venv-docs .venv-release docs/_build .venv-horovod .venv-launch .venv-adapters .venv-oldest .venv-torchft build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "lc3 needs Python 3.11 or newer, this is %d.%d; say make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[experiments,test]"
	@touch $@
