# These do everything on a fresh machine with Python 3.10 or newer:
#   make demo   installs fewbit and runs `fewbit demo`
#   make test   installs the test extras and runs the tests
#   make test-memory   runs the compiled kernels' tests under AddressSanitizer (needs gcc or clang)
#   make gpu    on a machine with a GPU: its tests, and the tables of docs/gpu.md
#   make docs   builds the documentation into site/
#   make dist   builds the source distribution and a wheel into dist/, and checks them
# Inside an active virtual environment they use it; otherwise they make .venv.

PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# A CPU build, so that nobody downloads gigabytes of CUDA for a demo. An installed torch is left alone.
TORCH := torch==2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-slow test-memory gpu lint docs dist clean torch

demo: torch
	$(PIP) install --quiet .
	$(BIN)/fewbit demo

test: torch
	$(PIP) install --quiet '.[test]'
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: torch
	$(PIP) install --quiet '.[test,lm-eval]' matplotlib
	$(BIN)/python -m pytest -m slow

# The module is built apart and found first on the path; leaks are Python's own.
SANITIZED := build/sanitized
test-memory: torch
	$(PIP) install --quiet '.[test]' cmake ninja 'nanobind>=2.4'
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFEWBIT_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build $(SANITIZED)
	rm -rf $(SANITIZED)/path && mkdir -p $(SANITIZED)/path && cp -r src/fewbit $(SANITIZED)/path/
	rm -f $(SANITIZED)/path/fewbit/_native*.so && cp $(SANITIZED)/_native*.so $(SANITIZED)/path/fewbit/
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(SANITIZED)/path \
	  $(BIN)/python -m pytest -p no:cacheprovider tests/kernels/test_packed.py tests/kernels/test_kernels.py tests/kernels/test_steps.py tests/gptq

# With the torch that is there: it must see the GPU. What was measured is written before a failed test ends this.
GPU := build/gpu
gpu: $(BIN)/python
	$(BIN)/python -c "import torch; raise SystemExit(None if torch.cuda.is_available() else 'this torch sees no GPU')"
	$(PIP) install --quiet '.[test]'
	mkdir -p $(GPU)
	$(BIN)/python -m pytest tests/kernels tests/gptq tests/pipeline tests/benchmarks \
	  tests/test_profiling.py tests/cli/test_bench_command.py > $(GPU)/tests.txt; echo $$? > $(GPU)/failed; tail -20 $(GPU)/tests.txt
	$(BIN)/python benchmarks/kernels_gpu.py --results $(GPU)/kernels.json
	$(BIN)/python benchmarks/kernels_gpu.py --results $(GPU)/kernels.json --into docs/gpu.md
	$(BIN)/python benchmarks/quantize_gpu.py --results $(GPU)/quantize.json --folder $(GPU)
	$(BIN)/python benchmarks/quantize_gpu.py --results $(GPU)/quantize.json --into docs/gpu.md
	exit $$(cat $(GPU)/failed)

lint:
	$(BIN)/ruff check src tests benchmarks examples scripts
	$(BIN)/ruff format --check src tests benchmarks examples scripts
	$(BIN)/mypy

docs: torch
	$(PIP) install --quiet '.[docs]'
	$(BIN)/python -m mkdocs build --strict

dist: $(BIN)/python
	$(PIP) install --quiet build twine
	rm -f dist/fewbit-*
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

torch: $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null \
	|| $(PIP) install --quiet --retries 1 --timeout 15 $(TORCH) --extra-index-url $(TORCH_INDEX) \
	|| $(PIP) install --quiet $(TORCH) \
	|| $(PIP) install --quiet torch

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
