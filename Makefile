# Every target sets up .venv by itself first; `make` alone prints what there is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv/bin
# Where torch is tried on two cores, more threads than processes only wait for each other.
export OMP_NUM_THREADS ?= 1
# Rooms whose types are checked strictly: everything that runs before, around and after a recipe.
STRICT := launcher checks env
SHELL_FILES := .ci/run tests/recipes/python_with_megatron_on_cpu $(wildcard jobs/*.sbatch)

.PHONY: help setup test lint demo bench soak lock clean

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 14

setup: ## make .venv and install everything into it (TORCH=cpu|cuda, PYTHON=/path/to/python)
	@$(PYTHON) env/make_venv.py

lint: setup ## ruff, mypy and shellcheck
	$(VENV)/ruff check .
	$(VENV)/mypy --strict $(STRICT)
	$(VENV)/shellcheck $(SHELL_FILES)

test: lint ## lint and every test; ARGS="-k box" selects
	$(VENV)/python -m pytest -n 2 $(ARGS)

demo: setup ## the whole thing in two minutes: a Slurm cluster on this machine and a recipe on it
	$(VENV)/python -m launcher demo

bench: setup ## measure what BENCHMARKS.md reports
	$(VENV)/python -m tests.bench

soak: setup ## one long run under 50 random faults; ARGS="faults=10 seed=1" for fewer, or the same again
	$(VENV)/python -m tests.soak $(ARGS)

lock: setup ## renew the locks in env/requirements and the files in env/containers (asks the package registry)
	$(VENV)/uv pip compile --quiet --upgrade --python-version 3.11 --python-platform linux --extra dev \
		--custom-compile-command "make lock" \
		--output-file env/requirements/dev.txt pyproject.toml env/requirements/torch.in
	$(VENV)/python env/lock_stacks.py

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
