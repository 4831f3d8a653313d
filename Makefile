# Every target sets itself up: it needs Python 3.10 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin

# One worker per core; a file stays with one worker, which shares what the file sets up, and the longest files come first.
PYTEST := $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast check bench quality clean

demo: .venv/ready-examples ## train AdamW and fused AdaLomo side by side on real text
	$(BIN)/python examples/demo.py

test: .venv/ready-test ## the whole test suite: about seventeen minutes on two cores
	$(PYTEST)

test-fast: .venv/ready-test ## a first answer in two to three minutes: what needs no other processes and nobody else's packages
	$(PYTEST) -m "not slow and not ranks and not peer"

check: .venv/ready-test ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready-bench ## speed and memory beside the peers, with goals
	$(BIN)/python benchmarks/step.py --json benchmarks/results/step.json
	$(BIN)/python benchmarks/composed.py --json benchmarks/results/composed.json
	$(BIN)/python benchmarks/host.py --json benchmarks/results/host.json
	$(BIN)/python benchmarks/low_bit.py --json benchmarks/results/low_bit.json
	$(BIN)/python benchmarks/checkpoint.py --json benchmarks/results/checkpoint.json
	$(BIN)/python benchmarks/memory.py --json benchmarks/results/memory.json
	$(BIN)/python benchmarks/scale.py --json benchmarks/results/scale.json
	$(BIN)/python benchmarks/counts.py --json benchmarks/results/counts.json

quality: .venv/ready-examples ## what compressed state costs in loss, on a small language model: about an hour
	$(BIN)/python benchmarks/quality.py --json benchmarks/results/quality.json

# torch first: a package that only asks for "torch" must find the pinned one in place.
.venv/ready-%: pyproject.toml constraints.txt $(wildcard optstate/kernels/native/*.c)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv runs
