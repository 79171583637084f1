PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MATRIX = $(addprefix tests/,matrix families tuners gptq qft export trainers integration test_registry.py)

.PHONY: bench demo docs fuzz sanitize test test-conformance test-ecosystem test-matrix lint format clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo_assets.py
	rm -rf .cache/peqa_finetuning
	$(BIN)/python examples/peqa_finetuning/peqa_finetuning.py --model .cache/assets/smollm2-135m-instruct-gptq-4bit \
		--float-model .cache/assets/smollm2-135m-instruct --data .cache/assets/king-james \
		--eval-data .cache/assets/king-james .cache/assets/wikipedia

# needs a GPU; the peers that are installed are measured too
bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/bench.py

# warnings are errors; the pages are in build/site, and open from disk
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# the kernels under compute-sanitizer; needs a GPU
sanitize: $(VENV)/.ready
	$(BIN)/python tests/ops/sanitize.py

# every reader of other people's files, guided by coverage where there is a wheel of atheris
fuzz: $(VENV)/.ready .cache/pins.txt
	-$(BIN)/pip install -q -c .cache/pins.txt --only-binary atheris --no-build-isolation -e '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py --inputs 100000

# PEFT's own tests, from its source distribution, on our methods
test-conformance: .venv-conformance/.ready
	.venv-conformance/bin/python tests/conformance/run.py -n 2

# packages around PEFT that nothing else here needs
test-ecosystem: .venv-ecosystem/.ready
	HF_DATASETS_OFFLINE=1 .venv-ecosystem/bin/python -m pytest tests/ecosystem

# the oldest versions (constraints-oldest.txt), then the newest (constraints-newest.txt); prints what is supported
test-matrix: $(VENV)/.ready .venv-oldest/.ready .venv-newest/.ready
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(MATRIX) --support-table .cache/oldest.json
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal $(MATRIX) --support-table .cache/newest.json
	$(BIN)/python tests/matrix/support_table.py .cache/oldest.json .cache/newest.json

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# gptqmodel is built from source against the installed torch, hence torch first and no build isolation.
# auto-gptq cannot be imported under transformers 5, only its layers can: tests use them, without its dependencies.
$(VENV)/.ready: pyproject.toml constraints.txt constraints-extras.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints-extras.txt torch setuptools wheel
	$(BIN)/pip install -q --no-deps --no-build-isolation --force-reinstall --require-hashes -r constraints.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# pip wants hashes of everything if it is given any
.cache/pins.txt: constraints.txt constraints-extras.txt
	mkdir -p .cache
	sed -n 's/^\([[:alnum:]][^ ]*\).*/\1/p' $^ > $@

$(VENV)/.ready-bench: $(VENV)/.ready .cache/pins.txt
	$(BIN)/pip install -q -c .cache/pins.txt --no-build-isolation -e '.[bench]'
	touch $@

.venv-conformance/.ready .venv-ecosystem/.ready: .venv-%/.ready: pyproject.toml .cache/pins.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q -c .cache/pins.txt torch setuptools wheel
	.venv-$*/bin/pip install -q -c .cache/pins.txt --no-build-isolation -e '.[$*]'
	touch $@

.venv-oldest/.ready .venv-newest/.ready: .venv-%/.ready: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q -c constraints-$*.txt torch setuptools wheel
	.venv-$*/bin/pip install -q -c constraints-$*.txt --no-build-isolation -e '.[test]'
	.venv-$*/bin/pip install -q --no-deps --only-binary auto-gptq 'auto-gptq==0.7.1; python_version < "3.12"'
	touch $@

clean:
	rm -rf $(VENV) .venv-conformance .venv-ecosystem .venv-oldest .venv-newest .cache build dist
