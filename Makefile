# `make demo` and `make test` do everything: they set up what is missing, then run.

VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin

.PHONY: setup demo test lint clean

setup:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" ./scripts/setup.sh

demo: setup
	@$(RUN)/flashvla demo

test: setup
	@$(RUN)/python -m pytest

lint: setup
	@$(RUN)/ruff check .
	@$(RUN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info runs
