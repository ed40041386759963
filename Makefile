# `make demo` and `make test` do all set-up themselves: a venv, torch, the build.
#   TORCH="torch==2.11.0" picks another torch; pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, …) pick where it comes from.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -n 2
# What people put on models, each tried on every system by tests/test_tools.py (docs/tools.md): adapters (peft, which needs transformers),
# quantised layers (torchao), offloading (accelerate), attributions (captum), counters (fvcore, thop, ptflops, torchinfo), exported
# programs (onnx, onnxscript, onnxruntime, openvino); and what builds the documentation (mkdocs.yml; PyYAML reads the tops of its pages).
TOOLS = peft transformers torchao accelerate captum fvcore thop ptflops torchinfo onnx onnxscript onnxruntime openvino \
  mkdocs-material "mkdocstrings[python]" mkdocs-awesome-nav pyyaml
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES = build_backend.py setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
SAY = @echo "*** $(VENV):"

.PHONY: demo test test-none lint fuzz longrun sanitize installs versions machines coverage mutants reliability hosts bench budgets readme clean

demo: $(VENV)/demo.ready
	$(BIN)/lifeops demo $(ARGS)

# One thread per test process: the tests use both cores, and thread-count tests set their own number.
test: $(VENV)/test.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# The pure-Python installation: no compiled kernels, everything runs on the reference.
test-none: $(VENV)/test.ready
	rm -rf $(VENV)/none && LIFEOPS_BUILD=none $(PIP) install --no-build-isolation --no-deps --target $(VENV)/none .
	cd tests && LIFEOPS_BUILD=none OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(VENV))/none $(abspath $(BIN))/python -m pytest $(PYTEST_ARGS) \
	  test_without_kernels.py test_errors.py test_autograd.py test_life.py test_convert.py -k "not cpu"

lint: $(VENV)/test.ready
	$(BIN)/ruff check .

# Random cases of everything against formulas in float64: `make fuzz ARGS="--cases 100000 --seed 7 --minutes 120"` (docs/reliability.md).
# A slice of it, always the same cases, is part of `make test`.
fuzz: $(VENV)/test.ready
	$(BIN)/python tests/fuzz/run.py $(ARGS)

# A thousand steps of training, 100,000 calls, tensors past 2^31 elements: `make longrun ARGS="memory"`, `make longrun ARGS="--page"`
# (docs/reliability.md). In short they are part of `make test`.
longrun: $(VENV)/test.ready
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m longrun $(ARGS)

# The compiled CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, or with --tsan under ThreadSanitizer, every instruction
# set of this machine in turn: `make sanitize ARGS="--isa avx2 --cases 100"` (docs/reliability.md). They are built apart, below build/.
sanitize: $(VENV)/test.ready
	$(BIN)/python tests/sanitized.py $(ARGS)

# Which lines of lifeops/, kernels/ (Triton's interpreter) and csrc/cpu the tests run, and whether each other one is explained:
# `make coverage ARGS="--page"` (docs/reliability.md).
coverage: $(VENV)/coverage.ready
	$(BIN)/python tests/covered.py $(PYTEST_ARGS) $(ARGS)

# Mistakes made in lifeops/ops and lifeops/hosts on purpose, one at a time in a copy of the tree, and which ones no test notices:
# `make mutants ARGS="--count 300 --seed 1 --page"`. It picks tests by what `make coverage` recorded.
mutants: $(VENV)/coverage.ready
	$(BIN)/python tests/mutants/run.py $(ARGS)

# On processors that this machine does not have (no AVX, no AVX-512, aarch64), emulated by qemu: `make machines ARGS="--machine haswell"`
# (docs/reliability.md). It needs Debian's qemu-user and g++-aarch64-linux-gnu; what it downloads stays below build/machines.
machines: $(VENV)/test.ready
	$(BIN)/python tests/machines.py $(ARGS)

# Every way to install, each in a fresh environment, and what it says where it cannot: `make installs ARGS="--only uv --page"`
# (docs/installing.md). A thinned set is part of `make test`. Nothing is set up before.
installs:
	$(PYTHON) tests/installs.py $(ARGS)

# One compiled wheel on several releases of torch, builds from source on several Pythons, several releases of Triton:
# `make versions ARGS="--torch 2.10.0 2.14.1 --python 3.10 3.13 --triton 3.6.0=2.3.5 3.9.0"` (docs/reliability.md). Nothing is set up before.
versions:
	$(PYTHON) tests/versions.py $(ARGS)

# All figures of docs/reliability.md, and the table at its top. It takes hours, 14 GB of memory, and what `machines` and `versions` need.
reliability: $(VENV)/coverage.ready
	$(MAKE) fuzz longrun machines coverage mutants ARGS="--page"
	$(MAKE) sanitize ARGS="--page" && $(MAKE) sanitize ARGS="--page --tsan --isa widest"
	$(MAKE) versions ARGS="--torch 2.10.0 2.11.0 2.12.0 2.13.0 2.14.1 --python 3.10 3.12 3.13 --triton 3.6.0=2.3.5 3.7.0 3.9.0 --page"
	$(BIN)/python tests/reliability.py

# docs/hosts.md: what every host of tests/host_configs*.py answers, each answer compared with an oracle.
hosts: $(VENV)/test.ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/hosts_table.py

# `make bench`: the full CPU set, its pictures and docs/performance.md. `make bench ARGS="--quick"`: only these arguments,
# nothing is written.
ROWS ?= bench/results/cpu.csv
bench: $(VENV)/test.ready
ifdef ARGS
	$(BIN)/python -m bench $(ARGS)
else
	$(BIN)/python -m bench --out $(ROWS)
	$(BIN)/python -m bench --system life_qkv,life_attention --mode fwd,fwdbwd --dtype float32 --allocator default --out $(ROWS)
	$(BIN)/python -m bench.rollout --skip-time --level layers --out $(dir $(ROWS))rollout_memory.json
	$(BIN)/python -m bench module_check --out $(dir $(ROWS))module_check.json
	$(BIN)/python -m bench scaling --repeats 2
	-$(BIN)/python -m bench again
	$(BIN)/python -m bench.readme
	$(BIN)/python -m bench page
endif

# What the pages refuse to show (docs/performance.md), measured anew, and the pages: minutes instead of hours. Commit first.
.PHONY: again
again: $(VENV)/test.ready
	-$(BIN)/python -m bench again $(ARGS)
	$(BIN)/python -m bench.readme
	$(BIN)/python -m bench page

# Registers, spills and instructions per element of every GPU kernel variant on sm_80, sm_90 and sm_100, without a GPU.
budgets: $(VENV)/test.ready
	$(BIN)/python -m bench.budgets $(ARGS)
	$(BIN)/python -m bench.attention_budgets
	$(BIN)/python -m bench.rollout_budgets
	$(BIN)/python tests/cuda_budgets.py
	$(BIN)/python tests/cuda_conv_budgets.py
	$(BIN)/python -m bench.light

# Generated parts of README.md and docs/.
readme: $(VENV)/test.ready
	$(BIN)/python -m bench.readme

# The documentation as a site, build/site/index.html, strictly and without a network; `make test` builds it, too.
.PHONY: docs
docs: $(VENV)/test.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/torch.ready:
	$(SAY) "installing $(TORCH), half a minute once it is downloaded"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -U pip "setuptools>=77" wheel pybind11 ninja numpy "$(TORCH)"
	@$(BIN)/python -c "import torch; print('torch==' + torch.__version__.split('+')[0])" > $(VENV)/constraints.txt
	@touch $@

$(VENV)/built.ready: $(VENV)/torch.ready $(SOURCES)
	$(SAY) "building the kernels, two minutes on two cores"
	@$(PIP) install --no-build-isolation -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/demo.ready: $(VENV)/built.ready
	$(SAY) "installing what the demo draws and prints with"
	@$(PIP) install -c $(VENV)/constraints.txt scikit-learn matplotlib numpy rich
	@touch $@

# stardist: for its picture of cell nuclei alone (examples/nuclei.py).
$(VENV)/test.ready: $(VENV)/built.ready
	$(SAY) "installing what the tests need, a minute once it is downloaded"
	@$(PIP) install -c $(VENV)/constraints.txt pytest pytest-xdist pytest-benchmark hypothesis timm safetensors scikit-learn matplotlib rich ruff mypy \
	  triton $(TOOLS)
	@$(PIP) install --no-deps stardist
	@touch $@

$(VENV)/coverage.ready: $(VENV)/test.ready
	$(PIP) install -c $(VENV)/constraints.txt pytest-cov gcovr cosmic-ray
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info lifeops/*.so lifeops/_build.json runs
